# SPDX-License-Identifier: Apache-2.0
"""Projection backward, Adam and the densify statistics in one pass over the table: no gradient array is ever made."""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.adam import adam_span
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.project_backward import MASK, MEAN, OPACITY, QUAT, SCALE, SH0, SHN, gaussian_backward
from masksplat.cpu.spherical_harmonics import PADDED, colour_scratch
from masksplat.types import SLOT_UNSEEN

ROWS_PER_CHUNK = 32
"""Rows whose gradients are gathered before Adam runs over them: long enough vectors, short enough for the L1 cache."""

NUM_ATTRIBUTES = 6
"""means, quats, scales, opacities, sh0, shN: the order of every tuple here."""


@kernel
def update_rows(
    task, num_tasks, gaussian, flat, exp_avg, exp_avg_sq, factors, cameras, sizes, limits, flags, slots, d_rows,
    gradient_scale, norm_sum, view_count, d_masks,
):  # fmt: skip  # type: ignore[no-untyped-def]
    """Update the rows of this task in place.

    `flat`, `exp_avg`, `exp_avg_sq` are the attributes and their moments as flat arrays, `factors` (6, 5) what
    `adam_span` needs for each. `gradient_scale` (1,) multiplies parameter gradients and d_masks, not the statistics.
    """
    means, shN = gaussian[0], gaussian[5]
    num_rows, width = means.shape[0], SHN + 3 * shN.shape[1]
    scratch = colour_scratch(means)
    out = np.empty(SHN + PADDED, means.dtype)
    buffer = np.empty(ROWS_PER_CHUNK * width, means.dtype)
    starts = np.array([MEAN, QUAT, SCALE, OPACITY, SH0, SHN])
    widths = np.array([3, 4, 3, 1, 3, 3 * shN.shape[1]])
    stop = (task + 1) * num_rows // num_tasks
    for first in range(task * num_rows // num_tasks, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        for k in range(count):
            gaussian_backward(first + k, gaussian, cameras, limits, flags, slots, d_rows, scratch, out)
            d_masks[first + k] = out[MASK] * gradient_scale[0]
            add_statistics(first + k, slots, d_rows, sizes, norm_sum, view_count)
            scatter_gradient(out, gradient_scale[0], starts, widths, k, buffer)
        for q in range(NUM_ATTRIBUTES):
            adam_span(
                flat[q], buffer, exp_avg[q], exp_avg_sq[q], first * widths[q], starts_in_buffer(widths, q),
                count * widths[q], factors[q],
            )  # fmt: skip


@device
def starts_in_buffer(widths, attribute):  # type: ignore[no-untyped-def]
    """Where an attribute's gradients of a chunk begin."""
    total = 0
    for q in range(attribute):
        total += widths[q]
    return total * ROWS_PER_CHUNK


@device
def scatter_gradient(out, scale, starts, widths, k, buffer):  # type: ignore[no-untyped-def]
    """Copy one row's gradient to its place in the attributes' parts of the buffer."""
    base = 0
    for q in range(NUM_ATTRIBUTES):
        for c in range(widths[q]):
            buffer[base * ROWS_PER_CHUNK + k * widths[q] + c] = out[starts[q] + c] * scale
        base += widths[q]


@device
def add_statistics(i, slots, d_rows, sizes, norm_sum, view_count):  # type: ignore[no-untyped-def]
    """3DGS's densify statistics: norm of the NDC-scaled gradient of the 2D mean, and the number of views."""
    half = norm_sum.dtype.type(0.5)
    for view in range(slots.shape[0]):
        slot = slots[view, i]
        if slot == SLOT_UNSEEN:
            continue
        view_count[i] += norm_sum.dtype.type(1)
        if slot >= 0:
            x = d_rows[slot, 0] * half * norm_sum.dtype.type(sizes[view, 0])
            y = d_rows[slot, 1] * half * norm_sum.dtype.type(sizes[view, 1])
            norm_sum[i] += math.sqrt(x * x + y * y)
