# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM between two images by the protocol of 3D Gaussian Splatting.

The protocol (`docs/parity.md`): both images are 8-bit and divided by 255; PSNR is taken per image from the mean squared
error over all pixels and channels, and averaged over images afterwards; SSIM has an 11x11 Gaussian window with a
standard deviation of 1.5 pixels, zeros beyond the border, and is the mean over the whole map. Other protocols give
other numbers for the same pair. This module knows tensors only: no files, no cameras.

Legend: H, w height and width in pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional

WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5  # pixels
LUMINANCE_CONSTANT = 0.01**2
CONTRAST_CONSTANT = 0.03**2


def to_8bit(rgb: torch.Tensor) -> torch.Tensor:
    """Return colours in [0, 1] as uint8, rounded to the nearest of 256 levels (values outside are clamped).

    Rounding matters: truncation costs about 0.05 dB of PSNR at 31 dB.
    """
    return (rgb * 255.0).round().clamp(0, 255).to(torch.uint8)


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels: ``-10 log10(mean((image - reference)^2))``.

    Args:
        image: (H, w, C), uint8 in 0..255 or float in [0, 1].
        reference: same shape, uint8 or float.

    Returns:
        The ratio over all pixels and channels together; ``inf`` for equal images.

    Raises:
        ValueError: the shapes differ.
    """
    first, second = _as_unit_range(image, reference)
    mean_squared_error = float((first - second).square().mean())
    return math.inf if mean_squared_error == 0.0 else -10.0 * math.log10(mean_squared_error)


def ssim(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the structural similarity, at most 1 (equal images), as 3DGS measures it.

    Args:
        image: (H, w, C), uint8 in 0..255 or float in [0, 1].
        reference: same shape, uint8 or float.

    Raises:
        ValueError: the shapes differ.
    """
    first, second = (values.permute(2, 0, 1) for values in _as_unit_range(image, reference))
    mean_first, mean_second = _blur(first), _blur(second)
    variance_first = _blur(first * first) - mean_first * mean_first
    variance_second = _blur(second * second) - mean_second * mean_second
    covariance = _blur(first * second) - mean_first * mean_second
    luminance = (2 * mean_first * mean_second + LUMINANCE_CONSTANT) / (
        mean_first.square() + mean_second.square() + LUMINANCE_CONSTANT
    )
    contrast = (2 * covariance + CONTRAST_CONSTANT) / (variance_first + variance_second + CONTRAST_CONSTANT)
    return float((luminance * contrast).mean())


def _as_unit_range(image: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both images as float64 in [0, 1] (float64, so that E[x^2] - E[x]^2 does not cancel in flat areas)."""
    if image.shape != reference.shape or image.dim() != 3:
        raise ValueError(
            f"two images of one shape (H, w, C) are needed to compare them, not {tuple(image.shape)} and "
            f"{tuple(reference.shape)}"
        )
    first, second = (
        values.double() / 255.0 if values.dtype == torch.uint8 else values.double() for values in (image, reference)
    )
    return first, second


def _window_weights() -> list[float]:
    """Return the 11 weights of the separable Gaussian window, with sum 1."""
    offsets = range(-(WINDOW_SIZE // 2), WINDOW_SIZE // 2 + 1)
    weights = [math.exp(-(offset**2) / (2 * WINDOW_SIGMA**2)) for offset in offsets]
    return [weight / sum(weights) for weight in weights]


def _blur(planes: torch.Tensor) -> torch.Tensor:
    """Return (C, H, w) planes convolved with the window along both axes, zeros beyond the border.

    Sums of shifted slices: six times faster than conv2d with one channel on a CPU.
    """
    weights = _window_weights()
    for axis in (1, 2):
        half, length = WINDOW_SIZE // 2, planes.shape[axis]
        padded = functional.pad(planes, (0, 0, half, half) if axis == 1 else (half, half))
        planes = padded.narrow(axis, 0, length) * weights[0]
        for offset in range(1, WINDOW_SIZE):
            planes.add_(padded.narrow(axis, offset, length), alpha=weights[offset])
    return planes
