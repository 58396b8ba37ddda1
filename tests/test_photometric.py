# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM of both bodies: a direct formula, finite differences, strips with their halo against the whole image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masksplat.ops import get_body
from masksplat.reference.photometric import gaussian_window, photometric_terms, ssim_map

BODIES = pytest.mark.parametrize("body", [get_body("reference"), get_body("cpu")], ids=["reference", "cpu"])
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def pair(height, width, *, seed=0, dtype=torch.float64):
    """A rendered image and a target that resembles it; no value within 1e-5 of the target's, where L1 has a corner."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    shift = rng.choice([-1, 1], target.shape) * rng.uniform(0.001, 0.3, target.shape)
    return torch.tensor(target / 255 + shift, dtype=dtype), torch.tensor(target)


def ssim_by_definition(x, y):
    """Wang et al. 2004, eq. 13, one window at a time with a two-dimensional kernel and zeros outside the image."""
    height, width = x.shape
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    padded_x, padded_y = np.pad(x, 5), np.pad(y, 5)
    result = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            a = padded_x[row : row + 11, column : column + 11]
            b = padded_y[row : row + 11, column : column + 11]
            mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
            var_a, var_b = (kernel * (a - mean_a) ** 2).sum(), (kernel * (b - mean_b) ** 2).sum()
            cov = (kernel * (a - mean_a) * (b - mean_b)).sum()
            first = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            result[row, column] = first * (2 * cov + 9e-4) / (var_a + var_b + 9e-4)
    return result


@pytest.mark.parametrize("size", [(1, 1), (7, 23), (16, 16)])
def test_ssim_map_equals_the_definition(size):
    rgb, target = pair(*size)
    found = ssim_map(rgb, target / 255.0)
    for channel in range(3):
        expected = ssim_by_definition(rgb[..., channel].numpy(), target[..., channel].numpy() / 255)
        np.testing.assert_allclose(found[..., channel].numpy(), expected, atol=1e-12)


def test_window_is_normalised_with_sigma_one_and_a_half():
    window = gaussian_window(torch.float64, torch.device("cpu"))
    assert len(window) == 11 and window.sum().item() == pytest.approx(1, abs=1e-15)
    assert (window[6] / window[5]).item() == pytest.approx(math.exp(-1 / 4.5), rel=1e-12)


@BODIES
@BOTH
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (21, 17)])
def test_terms_equal_the_formulas(body, dtype, size):
    rgb, target = pair(*size, dtype=dtype)
    loss = body.photometric(rgb, target, 0.2)
    x, y = rgb.double().numpy(), target.double().numpy() / 255
    similarity = np.mean([ssim_by_definition(x[..., c], y[..., c]) for c in range(3)])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert loss.l1 == pytest.approx(np.abs(x - y).mean(), rel=tolerance)
    assert loss.ssim == pytest.approx(similarity, rel=tolerance, abs=tolerance)
    assert loss.d_rgb.dtype == dtype and loss.d_rgb.shape == rgb.shape


@BODIES
def test_equal_images_have_no_loss(body):
    _, target = pair(20, 15)
    loss = body.photometric(target / 255.0, target, 0.2)
    assert loss.l1 < 1e-7 and loss.ssim == pytest.approx(1, abs=1e-6)
    black = body.photometric(torch.zeros(20, 15, 3), torch.zeros(20, 15, 3, dtype=torch.uint8), 0.2)
    assert (float(black.l1), float(black.ssim)) == (0.0, pytest.approx(1, abs=1e-6)) and bool((black.d_rgb == 0).all())


@BODIES
@pytest.mark.parametrize("lambda_dssim", [0.0, 0.2, 1.0])
def test_gradient_equals_finite_differences(body, lambda_dssim):
    rgb, target = pair(9, 13)

    def loss(image):
        terms = body.photometric(image, target, lambda_dssim)
        return (1 - lambda_dssim) * terms.l1 + lambda_dssim * (1 - terms.ssim)

    gradient = body.photometric(rgb, target, lambda_dssim).d_rgb
    expected = torch.zeros_like(rgb)
    for place in np.ndindex(*rgb.shape):
        moved = [rgb.clone(), rgb.clone()]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        expected[place] = (loss(moved[0]) - loss(moved[1])) / 2e-5
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-6)


def test_gradcheck_of_the_terms():
    rgb, target = pair(6, 8)

    def terms(image):
        return photometric_terms(image, target / 255.0, (1, 6), 20)

    assert torch.autograd.gradcheck(terms, (rgb.requires_grad_(),), eps=1e-5)


@BODIES
@BOTH
@pytest.mark.parametrize("cuts", [(0, 16, 32, 45), (0, 1, 3, 45), (0, 6, 6, 45), (0, 45)])
def test_strips_with_halo_equal_the_whole_image(body, dtype, cuts):
    """Sums over strips of terms and of gradients, halo rows included: the law behind world-size invariance."""
    height = cuts[-1]
    rgb, target = pair(height, 19, dtype=dtype)
    whole = body.photometric(rgb, target, 0.2)
    absolute, similarity, gradient = 0.0, 0.0, torch.zeros_like(rgb)
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        start, stop = max(0, first - 5), min(height, last + 5)
        strip = body.photometric(
            rgb[start:stop],
            target[start:stop],
            0.2,
            own_rows=(first - start, last - start),
            image_height=height,
            row_start=start,
        )
        absolute, similarity = absolute + strip.l1, similarity + strip.ssim
        gradient[start:stop] += strip.d_rgb
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert absolute == pytest.approx(float(whole.l1), rel=tolerance)
    assert similarity == pytest.approx(float(whole.ssim), rel=tolerance)
    error = torch.linalg.vector_norm(gradient - whole.d_rgb) / torch.linalg.vector_norm(whole.d_rgb)
    assert error < tolerance


@BODIES
def test_halo_rows_get_the_gradient_of_own_rows_only(body):
    """Without its halo a strip's gradient would miss what its rows do to SSIM beyond them."""
    rgb, target = pair(30, 11)
    strip = body.photometric(rgb[5:25], target[5:25], 0.2, own_rows=(5, 15), image_height=30, row_start=5)
    assert bool((strip.d_rgb[:5] != 0).any()) and bool((strip.d_rgb[15:] != 0).any())
    only_l1 = body.photometric(rgb[5:25], target[5:25], 0.0, own_rows=(5, 15), image_height=30, row_start=5)
    assert bool((only_l1.d_rgb[:5] == 0).all()) and bool((only_l1.d_rgb[15:] == 0).all())


def test_reference_refuses_what_it_cannot_take():
    reference = get_body("reference")
    rgb, target = pair(12, 4)
    with pytest.raises(ValueError, match="target uint8"):
        reference.photometric(rgb, target.double(), 0.2)
    with pytest.raises(ValueError, match=r"found \(12, 4, 3\) and \(11, 4, 3\)"):
        reference.photometric(rgb, target[1:], 0.2)
    with pytest.raises(ValueError, match="must lie in the region"):
        reference.photometric(rgb, target, 0.2, own_rows=(3, 13))
    with pytest.raises(ValueError, match="SSIM needs 5 rows above and 5 below"):
        reference.photometric(rgb, target, 0.2, own_rows=(0, 7), image_height=40, row_start=10)
