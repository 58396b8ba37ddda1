# SPDX-License-Identifier: Apache-2.0
"""Projection backward, Adam and the densify statistics in one pass over the table: no gradient array is ever made."""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.adam import adam_span
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.project_backward import (
    MASK,
    MEAN,
    OPACITY,
    QUAT,
    SCALE,
    SH0,
    SHN,
    backward_scratch,
    chunk_backward,
)
from masksplat.cpu.simd import LANES
from masksplat.types import SLOT_UNSEEN

ROWS_PER_CHUNK = 64
"""Rows whose gradients are gathered before Adam runs over them: long enough vectors, short enough for the L1 cache."""

NUM_ATTRIBUTES = 6
"""means, quats, scales, opacities, sh0, shN: the order of every tuple here."""


@kernel
def update_rows(
    task, num_tasks, gaussian, flat, exp_avg, exp_avg_sq, factors, cameras, sizes, limits, flags, slots, d_rows,
    gradient_scale, norm_sum, view_count, d_masks,
):  # fmt: skip
    """Update the rows of this task in place.

    `flat`, `exp_avg`, `exp_avg_sq` are the attributes and their moments as flat arrays, `factors` (6, 5) what
    `adam_span` needs for each. `gradient_scale` (1,) multiplies parameter gradients and d_masks, not the statistics.
    """
    means, num_higher = gaussian[0], 3 * gaussian[5].shape[1]
    num_rows, width = means.shape[0], SHN + num_higher
    scratch = backward_scratch(means)
    rows, columns = np.empty(ROWS_PER_CHUNK * width, means.dtype), np.empty(ROWS_PER_CHUNK * width, means.dtype)
    batches = (np.empty(ROWS_PER_CHUNK, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64))
    starts = np.array([MEAN, QUAT, SCALE, OPACITY, SH0, SHN])
    widths = np.array([3, 4, 3, 1, 3, num_higher])
    stop = (task + 1) * num_rows // num_tasks
    for first in range(task * num_rows // num_tasks, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        chunk_backward(
            first, count, gaussian, flat[5], cameras, limits, flags, slots, d_rows, scratch, batches, width, rows
        )
        for k in range(count):
            d_masks[first + k] = rows[k * width + MASK] * gradient_scale[0]
            add_statistics(first + k, slots, d_rows, sizes, norm_sum, view_count)
        for q in range(NUM_ATTRIBUTES):
            for k in range(count):
                for c in range(widths[q]):
                    columns[k * widths[q] + c] = rows[k * width + starts[q] + c] * gradient_scale[0]
            at, size = first * widths[q], count * widths[q]
            adam_span(flat[q], columns, exp_avg[q], exp_avg_sq[q], at, 0, size, factors[q])


@device
def add_statistics(i, slots, d_rows, sizes, norm_sum, view_count):
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
