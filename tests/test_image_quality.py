# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against formulas written a second time with NumPy and SciPy, and against values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from gaussian_renderer.image_quality import psnr, ssim, to_8bit


def _random_pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(generator.random((height, width, 3)), sigma=(3, 3, 0))
    first = (smooth - smooth.min()) / np.ptp(smooth) * 255
    second = first + generator.normal(0, 12, first.shape)
    return tuple(np.clip(np.round(values), 0, 255).astype(np.uint8) for values in (first, second))


def _ssim_by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM by a full two-dimensional convolution, channel by channel."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    maps = []
    for channel in range(3):
        x, y = first[..., channel] / 255, second[..., channel] / 255

        def blur(values: np.ndarray) -> np.ndarray:
            return signal.convolve2d(values, window, mode="same", boundary="fill", fillvalue=0)

        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        maps.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(maps))


@pytest.mark.parametrize("size", [(40, 61), (11, 11), (7, 90)])
def test_ssim_agrees_with_scipy(size: tuple[int, int]) -> None:
    first, second = _random_pair(*size)
    ours = ssim(torch.from_numpy(first), torch.from_numpy(second))
    assert ours == pytest.approx(_ssim_by_scipy(first, second), abs=1e-12)
    assert ours < 0.99


def test_ssim_pads_with_zeros_at_the_border() -> None:
    """For two constant images only the luminance term is left inside; zero padding shows in a band of 5 pixels."""
    first, second = torch.full((31, 31, 3), 0.5), torch.full((31, 31, 3), 0.25)
    inside = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    value = ssim(first, second)
    assert value != pytest.approx(inside, abs=1e-4)
    assert value == pytest.approx(_ssim_by_scipy(np.full((31, 31, 3), 127.5), np.full((31, 31, 3), 63.75)), abs=1e-12)


def test_psnr_agrees_with_numpy_over_all_channels() -> None:
    first, second = _random_pair(33, 47, seed=1)
    expected = 10 * np.log10(255.0**2 / np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    assert psnr(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(expected, abs=1e-12)


def test_psnr_is_not_the_mean_of_the_channels() -> None:
    image = torch.zeros(4, 4, 3)
    other = image.clone()
    other[..., 0], other[..., 1:] = 0.1, 0.01
    assert psnr(image, other) == pytest.approx(-10 * math.log10((0.01 + 2e-4) / 3), abs=1e-5)


def test_equal_images() -> None:
    image = torch.from_numpy(_random_pair(20, 20)[0])
    assert psnr(image, image) == math.inf
    assert ssim(image, image) == pytest.approx(1.0, abs=1e-12)


def test_8_bit_and_unit_range_mean_the_same() -> None:
    first, second = (torch.from_numpy(values) for values in _random_pair(24, 24, seed=2))
    assert psnr(first, second) == pytest.approx(psnr(first / 255.0, second / 255.0), abs=1e-4)
    assert ssim(first, second) == pytest.approx(ssim(first / 255.0, second / 255.0), abs=1e-6)


def test_to_8bit_rounds_and_clamps() -> None:
    values = torch.tensor([-0.2, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.0, 3.0])
    assert to_8bit(values).tolist() == [0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize("function", [psnr, ssim])
def test_unequal_shapes_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"one shape .*\(4, 5, 3\).*\(5, 4, 3\)"):
        function(torch.zeros(4, 5, 3), torch.zeros(5, 4, 3))
