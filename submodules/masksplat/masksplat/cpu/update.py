# SPDX-License-Identifier: Apache-2.0
"""Projection backward, Adam and the densify statistics in one pass over the table: no gradient array is ever made."""

from __future__ import annotations

import numpy as np

from masksplat.cpu.adam import adam_span
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.lazy_adam import BLOCK, catch_up_block, task_rows
from masksplat.cpu.project_backward import (
    MASKS,
    NORMS,
    ROWS_PER_CHUNK,
    SHN,
    backward_scratch,
    chunk_backward,
    chunk_space,
    clear_gradients,
)
from masksplat.types import SLOT_UNSEEN


@kernel
def update_rows(
    task, num_tasks, gaussian, exp_avg, exp_avg_sq, late, is_due, factors, cameras, limits, flags, slots, rows, d_rows,
    norm_sum, view_count, d_masks,
):  # fmt: skip
    """Update the rows of this task in place; of shN those of the blocks in `is_due` (all where it is empty).

    `gaussian`, `exp_avg`, `exp_avg_sq` are the attributes and their moments as flat arrays, `factors` (6, 7) what
    `adam_span` needs for each; its gradient scale applies to d_masks, too, but not to the statistics. `late` is as for
    `catch_up_block`, before this update. The rest is as for `chunk_backward`.
    """
    real, num_rows = gaussian[0].dtype, d_masks.size
    scratch, space = backward_scratch(real), chunk_space(real, flags[3])
    widths = np.array([3, 4, 3, 1, 3, flags[3]])
    start, stop = task_rows(task, num_tasks, num_rows)
    update_span(
        start, stop, gaussian, exp_avg, exp_avg_sq, late, is_due, factors, cameras, limits, flags, slots, rows, d_rows,
        norm_sum, view_count, d_masks, scratch, space, widths,
    )  # fmt: skip


@device
def update_span(
    start, stop, gaussian, exp_avg, exp_avg_sq, late, is_due, factors, cameras, limits, flags, slots, rows, d_rows,
    norm_sum, view_count, d_masks, scratch, space, widths,
):  # fmt: skip
    """`update_rows` for the rows from `start` to `stop`, with arrays to work in."""
    is_clear = False
    for first in range(start, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        if any_drawn(slots, first, count):
            chunk_backward(first, count, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space)
            add_norms(first, count, space[0][NORMS], norm_sum)
            is_clear = False
        elif not is_clear:
            clear_gradients(space[0])
            is_clear = True
        for k in range(count):
            d_masks[first + k] = space[0][MASKS][k] * factors[0, 5]
        count_views(first, count, slots, view_count)
        for q in range(SHN):
            at, size = first * widths[q], count * widths[q]
            adam_span(gaussian[q], space[0][q], exp_avg[q], exp_avg_sq[q], at, 0, size, factors[q])
        shN = gaussian[SHN], space[0][SHN], exp_avg[SHN], exp_avg_sq[SHN]
        update_harmonics(first, count, widths[SHN], shN, late, is_due, factors[SHN])


@device
def any_drawn(slots, first, count):
    """Whether a view draws one of the rows first, ..., first + count - 1."""
    num_drawn = 0
    for view in range(slots.shape[0]):
        for i in range(first, first + count):
            num_drawn += slots[view, i] >= 0
    return num_drawn > 0


@device
def update_harmonics(first, count, width, shN, late, is_due, factors):
    """Adam for the chunk's blocks of shN that are due, which are up to date afterwards; the others stay behind.

    `shN` is parameter, the chunk's gradient, and moments.
    """
    param, gradient, exp_avg, exp_avg_sq = shN
    if is_due.size == 0:
        adam_span(param, gradient, exp_avg, exp_avg_sq, first * width, 0, count * width, factors)
        return
    for at in range(first, first + count, BLOCK):
        block, size = at // BLOCK, min(BLOCK, first + count - at)
        if is_due[block]:
            catch_up_block(block, param.size // width, width, param, late)
            adam_span(param, gradient, exp_avg, exp_avg_sq, at * width, (at - first) * width, size * width, factors)
            late[0][block] = late[4] + 1


@device
def add_norms(first, count, norms, norm_sum):
    """3DGS's densify statistics, first part: the norm of the NDC-scaled gradient of the 2D mean."""
    for k in range(count):
        norm_sum[first + k] += norms[k]


@device
def count_views(first, count, slots, view_count):
    """3DGS's densify statistics, second part: the number of views that see a row."""
    one, zero = view_count.dtype.type(1), view_count.dtype.type(0)
    for view in range(slots.shape[0]):
        for i in range(first, first + count):
            view_count[i] += zero if slots[view, i] == SLOT_UNSEEN else one
