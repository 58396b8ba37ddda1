# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM (11 x 11 Gaussian window, sigma 1.5, zero padding; Wang 2004) with their gradient, in three passes.

The window is separable, and an image row of w pixels is 3 w consecutive floats, so a horizontal tap is an offset of
three floats and every pass is a plain vector loop. With B the blur, mu = B x, and the SSIM map S(mu_x, B xx, B xy),
    dS/dx = B(dS/dmu_x) + 2 x B(dS/dBxx) + y B(dS/dBxy)        (B is its own adjoint under zero padding).
Passes: A) horizontal blur of x, y, xx, yy, xy; B) vertical blur, S and its derivatives, their horizontal blur;
C) vertical blur of those and the gradient. Rows outside the region count as zero, as at the border of the image; a
strip therefore carries 5 more rows on each side and takes the loss of its own rows only.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, broadcast, fma, load, store

RADIUS = 5
TAPS = 2 * RADIUS + 1
PAD = 3 * RADIUS
"""Floats of padding on each side of a row."""
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
BLURRED, DERIVATIVES = 5, 3


def window(dtype: type[np.floating]) -> np.ndarray:
    """The 11 taps, (11,), normalised to sum 1 in float64 first."""
    offsets = np.arange(TAPS) - RADIUS
    taps = np.exp(-(offsets**2) / (2.0 * SIGMA**2))
    return (taps / taps.sum()).astype(dtype)


def row_length(width: int) -> int:
    """Floats of a buffer row: 3 * width rounded up to whole vectors."""
    return -(-3 * width // LANES) * LANES


@device
def _blur_row(taps, padded, out):
    """Horizontal blur of a padded row (PAD zeros on each side) into out."""
    for j in range(0, out.size, LANES):
        total = broadcast(taps[0]) * load(padded, j)
        for k in range(1, TAPS):
            total = fma(broadcast(taps[k]), load(padded, j + 3 * k), total)
        store(out, j, total)


@device
def _blur_column(taps, rows, y, out):
    """Vertical blur at row y of rows (h, n) into out (n,)."""
    first, last = max(0, y - RADIUS), min(rows.shape[0], y + RADIUS + 1)
    for j in range(0, out.size, LANES):
        total = broadcast(taps[0] - taps[0])
        for source in range(first, last):
            total = fma(broadcast(taps[source - y + RADIUS]), load(rows[source], j), total)
        store(out, j, total)


@kernel
def blur_inputs(task, num_tasks, rgb, target, taps, blurred):
    """Pass A: blurred (5, h, n) = horizontal blur of x, y, xx, yy, xy."""
    size, scale = rgb.shape[1], rgb.dtype.type(1.0 / 255.0)
    padded = np.zeros((BLURRED, blurred.shape[2] + 2 * PAD), rgb.dtype)
    for row in range(task * rgb.shape[0] // num_tasks, (task + 1) * rgb.shape[0] // num_tasks):
        for j in range(size):
            x, y = rgb[row, j], rgb.dtype.type(target[row, j]) * scale
            padded[0, PAD + j], padded[1, PAD + j] = x, y
            padded[2, PAD + j], padded[3, PAD + j], padded[4, PAD + j] = x * x, y * y, x * y
        for q in range(BLURRED):
            _blur_row(taps, padded[q], blurred[q, row])


@device
def _ssim_row(column, size, weight, padded):
    """Sum of SSIM over a row, and weight * dS/d(mu_x, Bxx, Bxy) into padded (3, PAD + n + PAD)."""
    real = column.dtype.type
    c1, c2, two = real(C1), real(C2), real(2)
    total = 0.0
    for j in range(size):
        mx, my = column[0, j], column[1, j]
        xx, yy, xy = column[2, j] - mx * mx, column[3, j] - my * my, column[4, j] - mx * my
        a1, a2 = two * mx * my + c1, two * xy + c2
        b1, b2 = mx * mx + my * my + c1, xx + yy + c2
        inverse = real(1) / (b1 * b2)
        s = a1 * a2 * inverse
        d_xx, d_xy = -s / b2, two * a1 * inverse
        d_mx = two * my * a2 * inverse - two * mx * s / b1
        padded[0, PAD + j] = weight * (d_mx - two * mx * d_xx - my * d_xy)
        padded[1, PAD + j] = weight * d_xx
        padded[2, PAD + j] = weight * d_xy
        total += np.float64(s)
    return total


@kernel
def ssim_map(task, num_tasks, blurred, own_rows, size, weight, taps, derivatives, ssim_sums):
    """Pass B: per-row sums of SSIM over the own rows, and the horizontal blur of its weighted derivatives."""
    height, length = blurred.shape[1], blurred.shape[2]
    column = np.empty((BLURRED, length), blurred.dtype)
    padded = np.zeros((DERIVATIVES, length + 2 * PAD), blurred.dtype)
    for row in range(task * height // num_tasks, (task + 1) * height // num_tasks):
        if row < own_rows[0] or row >= own_rows[1]:
            derivatives[:, row] = 0
            continue
        for q in range(BLURRED):
            _blur_column(taps, blurred[q], row, column[q])
        ssim_sums[row] = _ssim_row(column, size, weight[0], padded)
        for q in range(DERIVATIVES):
            _blur_row(taps, padded[q], derivatives[q, row])


@kernel
def loss_gradient(task, num_tasks, rgb, target, derivatives, own_rows, l1_weight, taps, l1_sums, d_rgb):
    """Pass C: per-row sums of |x - y| over the own rows, and the gradient of the weighted loss."""
    size, scale, two = rgb.shape[1], rgb.dtype.type(1.0 / 255.0), rgb.dtype.type(2)
    column = np.empty((DERIVATIVES, derivatives.shape[2]), rgb.dtype)
    for row in range(task * rgb.shape[0] // num_tasks, (task + 1) * rgb.shape[0] // num_tasks):
        for q in range(DERIVATIVES):
            _blur_column(taps, derivatives[q], row, column[q])
        weight = l1_weight[0] if own_rows[0] <= row < own_rows[1] else rgb.dtype.type(0)
        total = 0.0
        for j in range(size):
            x, y = rgb[row, j], rgb.dtype.type(target[row, j]) * scale
            difference = x - y
            total += np.float64(abs(difference))
            sign = weight if difference > 0 else (-weight if difference < 0 else weight - weight)
            d_rgb[row, j] = sign + column[0, j] + two * x * column[1, j] + y * column[2, j]
        if own_rows[0] <= row < own_rows[1]:
            l1_sums[row] = total
