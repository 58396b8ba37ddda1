# SPDX-License-Identifier: Apache-2.0
"""Projection backward, Adam and the densify statistics in one pass over the table: no gradient array is ever made."""

from __future__ import annotations

import numpy as np

from masksplat.cpu.adam import adam_span
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.project_backward import (
    MASKS,
    NORMS,
    NUM_ATTRIBUTES,
    ROWS_PER_CHUNK,
    backward_scratch,
    chunk_backward,
    chunk_space,
)
from masksplat.types import SLOT_UNSEEN


@kernel
def update_rows(
    task, num_tasks, gaussian, exp_avg, exp_avg_sq, factors, cameras, limits, flags, slots, rows, d_rows,
    norm_sum, view_count, d_masks,
):  # fmt: skip
    """Update the rows of this task in place.

    `gaussian`, `exp_avg`, `exp_avg_sq` are the attributes and their moments as flat arrays, `factors` (6, 7) what
    `adam_span` needs for each; its gradient scale applies to d_masks, too, but not to the statistics. The rest is as
    for `chunk_backward`.
    """
    real, num_rows = gaussian[0].dtype, d_masks.size
    scratch, space = backward_scratch(real), chunk_space(real, flags[3])
    widths = np.array([3, 4, 3, 1, 3, flags[3]])
    start, stop = task * num_rows // num_tasks, (task + 1) * num_rows // num_tasks
    update_span(
        start, stop, gaussian, exp_avg, exp_avg_sq, factors, cameras, limits, flags, slots, rows, d_rows,
        norm_sum, view_count, d_masks, scratch, space, widths,
    )  # fmt: skip


@device
def update_span(
    start, stop, gaussian, exp_avg, exp_avg_sq, factors, cameras, limits, flags, slots, rows, d_rows,
    norm_sum, view_count, d_masks, scratch, space, widths,
):  # fmt: skip
    """`update_rows` for the rows from `start` to `stop`, with arrays to work in."""
    for first in range(start, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        chunk_backward(first, count, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space)
        for k in range(count):
            d_masks[first + k] = space[0][MASKS][k] * factors[0, 5]
        add_statistics(first, count, slots, space[0][NORMS], norm_sum, view_count)
        for q in range(NUM_ATTRIBUTES):
            at, size = first * widths[q], count * widths[q]
            adam_span(gaussian[q], space[0][q], exp_avg[q], exp_avg_sq[q], at, 0, size, factors[q])


@device
def add_statistics(first, count, slots, norms, norm_sum, view_count):
    """3DGS's densify statistics: norm of the NDC-scaled gradient of the 2D mean, and the number of views."""
    one, zero = norm_sum.dtype.type(1), norm_sum.dtype.type(0)
    for k in range(count):
        norm_sum[first + k] += norms[k]
    for view in range(slots.shape[0]):
        for i in range(first, first + count):
            view_count[i] += zero if slots[view, i] == SLOT_UNSEEN else one
