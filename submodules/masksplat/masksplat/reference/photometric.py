# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM of a region of an image, as 3DGS defines them, differentiable by autograd.

SSIM (Wang et al. 2004): an 11 x 11 Gaussian window of sigma 1.5 normalised to sum 1, images in [0, 1], zeros beyond
the true border of the image, C1 = 0.01^2, C2 = 0.03^2, biased variances. Five rows around a region decide its SSIM.

Legend: h, w pixels of the region, halo rows included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masksplat.types import PhotometricLoss

WINDOW = 11
HALO = WINDOW // 2
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2


def gaussian_window(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(11,) weights of the separable window, sum 1."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - HALO
    weights = torch.exp(-(offset**2) / (2 * SIGMA**2))
    return (weights / weights.sum()).to(dtype=dtype, device=device)


def _blur_along(images: Tensor, dim: int) -> Tensor:
    """Window average along one dimension, zeros outside: shifted sums, much faster than torch's conv2d on a CPU."""
    weights = gaussian_window(images.dtype, images.device).tolist()
    size = images.shape[dim]
    blurred = images * weights[HALO]
    for shift in range(1, min(HALO, size - 1) + 1):
        front, back = (0, size - shift), (shift, size - shift)
        blurred.narrow(dim, *front).add_(images.narrow(dim, *back), alpha=weights[HALO + shift])
        blurred.narrow(dim, *back).add_(images.narrow(dim, *front), alpha=weights[HALO - shift])
    return blurred


class _Blur(torch.autograd.Function):
    """Window average of images (n, h, w) with zeros outside; symmetric, so that it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return _blur_along(_blur_along(images, 2), 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_blurred: Tensor) -> Tensor:
        return _blur_along(_blur_along(d_blurred, 1), 2)


def ssim_map(first: Tensor, second: Tensor) -> Tensor:
    """(h, w, 3) structural similarity of two images (h, w, 3) in [0, 1]."""
    x, y = first.permute(2, 0, 1), second.permute(2, 0, 1)
    mean_x, mean_y, square_x, square_y, product = _Blur.apply(torch.cat((x, y, x * x, y * y, x * y))).chunk(5)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    denominator = (mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2)
    return (numerator / denominator).permute(1, 2, 0)


def photometric_terms(
    rgb: Tensor, target: Tensor, own_rows: tuple[int, int], image_height: int
) -> tuple[Tensor, Tensor]:
    """L1 and SSIM of rows `own_rows` of the region, summed and divided by 3 image_height w; differentiable.

    Args:
        rgb: (h, w, 3) in [0, 1].
        target: (h, w, 3) of the same dtype.
        own_rows: rows of the region [first, last) that count; the others are halo.
        image_height: rows of the whole image.
    """
    own = slice(*own_rows)
    values = 3 * image_height * rgb.shape[1]
    absolute = (rgb[own] - target[own]).abs().sum() / values
    return absolute, ssim_map(rgb, target)[own].sum() / values


def _check_region(height: int, own_rows: tuple[int, int], image_height: int, row_start: int) -> None:
    first, last = own_rows
    if not 0 <= first <= last <= height or row_start < 0 or row_start + height > image_height:
        raise ValueError(
            f"own rows {own_rows} of a region of {height} rows that starts at row {row_start} of an image of "
            f"{image_height} rows: they must lie in the region, and the region in the image."
        )
    halo_above, halo_below = min(HALO, row_start + first), min(HALO, image_height - row_start - last)
    if last > first and (first < halo_above or height - last < halo_below):
        raise ValueError(
            f"own rows {own_rows} of a region of {height} rows starting at row {row_start} of {image_height}: SSIM "
            f"needs {halo_above} rows above and {halo_below} below them."
        )


def photometric(
    rgb: Tensor,
    target: Tensor,
    lambda_dssim: float,
    *,
    own_rows: tuple[int, int] | None = None,
    image_height: int | None = None,
    row_start: int = 0,
) -> PhotometricLoss:
    """Loss terms and the gradient of (1 - lambda) L1 - lambda SSIM of a region; see `Body.photometric`.

    Args:
        rgb: (h, w, 3) float.
        target: (h, w, 3) uint8.
        lambda_dssim: weight in [0, 1].
        own_rows: rows of the region that count; default all of them.
        image_height: rows of the whole image; default the region's.
        row_start: row of the image at which the region begins.

    Raises:
        ValueError: shapes that differ, a target that is not uint8, or own rows without their halo of 5 rows.
    """
    if rgb.shape != target.shape or rgb.ndim != 3 or rgb.shape[-1] != 3 or target.dtype != torch.uint8:
        raise ValueError(
            f"rgb and target must both be (h, w, 3), target uint8; found {tuple(rgb.shape)} and "
            f"{tuple(target.shape)} {target.dtype}."
        )
    height = rgb.shape[0]
    own_rows = (0, height) if own_rows is None else own_rows
    image_height = height if image_height is None else image_height
    _check_region(height, own_rows, image_height, row_start)
    if own_rows[0] == own_rows[1]:
        nothing = torch.zeros(2, dtype=torch.float64, device=rgb.device)
        return PhotometricLoss(nothing, torch.zeros_like(rgb))
    leaf = rgb.detach().requires_grad_()
    with torch.enable_grad():
        wanted = target.to(rgb.dtype) / 255.0
        absolute, similarity = photometric_terms(leaf, wanted, own_rows, image_height)
        loss = (1.0 - lambda_dssim) * absolute - lambda_dssim * similarity
    (gradient,) = torch.autograd.grad(loss, leaf)
    return PhotometricLoss(torch.stack([absolute, similarity]).detach().double(), gradient)
