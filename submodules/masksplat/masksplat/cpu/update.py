# SPDX-License-Identifier: Apache-2.0
"""Projection backward, Adam and the densify statistics in one pass over the table: no gradient array is ever made."""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.adam import adam_span
from masksplat.cpu.kernel import allocating, device, kernel
from masksplat.cpu.project_backward import backward_scratch, chunk_backward
from masksplat.cpu.simd import LANES
from masksplat.types import SLOT_UNSEEN

ROWS_PER_CHUNK = 1024
"""Rows whose gradients are gathered before Adam runs over them.

They fit the L2 cache (242 kB in float32). Fewer rows are shorter stretches of each of the 18 arrays than memory is read
well in: with 64, a dense update takes 1.4 times as long.
"""

NUM_ATTRIBUTES = 6
"""means, quats, scales, opacities, sh0, shN: the order of every tuple here."""


@kernel
def update_rows(
    task, num_tasks, gaussian, flat, exp_avg, exp_avg_sq, factors, cameras, sizes, limits, flags, slots, d_rows,
    norm_sum, view_count, d_masks,
):  # fmt: skip
    """Update the rows of this task in place.

    `flat`, `exp_avg`, `exp_avg_sq` are the attributes and their moments as flat arrays, `factors` (6, 7) what
    `adam_span` needs for each; its gradient scale applies to d_masks, too, but not to the statistics.
    """
    means = gaussian[0]
    num_higher = 3 * gaussian[5].shape[1]
    scratch = backward_scratch(means)
    batches = (np.empty(ROWS_PER_CHUNK, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64))
    widths = np.array([3, 4, 3, 1, 3, num_higher, 1])
    gradients = chunk_gradients(means, num_higher)
    update_chunks(
        task, num_tasks, gaussian, flat, exp_avg, exp_avg_sq, factors, cameras, sizes, limits, flags, slots, d_rows,
        norm_sum, view_count, d_masks, scratch, batches, widths, gradients,
    )  # fmt: skip


@device
def update_chunks(
    task, num_tasks, gaussian, flat, exp_avg, exp_avg_sq, factors, cameras, sizes, limits, flags, slots, d_rows,
    norm_sum, view_count, d_masks, scratch, batches, widths, gradients,
):  # fmt: skip
    """`update_rows` with arrays to work in."""
    num_rows = gaussian[0].shape[0]
    stop = (task + 1) * num_rows // num_tasks
    for first in range(task * num_rows // num_tasks, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        chunk_backward(
            first, count, first, gaussian, flat[5], cameras, limits, flags, slots, d_rows, scratch, batches, gradients
        )
        for k in range(count):
            d_masks[first + k] = gradients[6][k] * factors[0, 5]
            add_statistics(first + k, slots, d_rows, sizes, norm_sum, view_count)
        for q in range(NUM_ATTRIBUTES):
            at, size = first * widths[q], count * widths[q]
            adam_span(flat[q], gradients[q], exp_avg[q], exp_avg_sq[q], at, 0, size, factors[q])
        clear_rows(first, count, slots, widths, gradients)


@allocating
def chunk_gradients(means, num_higher):
    """Zero gradients of a chunk: flat arrays of means, quats, scales, opacities, sh0, shN, masks."""
    return (
        np.zeros(ROWS_PER_CHUNK * 3, means.dtype),
        np.zeros(ROWS_PER_CHUNK * 4, means.dtype),
        np.zeros(ROWS_PER_CHUNK * 3, means.dtype),
        np.zeros(ROWS_PER_CHUNK, means.dtype),
        np.zeros(ROWS_PER_CHUNK * 3, means.dtype),
        np.zeros(ROWS_PER_CHUNK * num_higher, means.dtype),
        np.zeros(ROWS_PER_CHUNK, means.dtype),
    )


@device
def clear_rows(first, count, slots, widths, gradients):
    """Zero the rows that have a splat in some view; the others are zero already."""
    for k in range(count):
        is_used = False
        for view in range(slots.shape[0]):
            is_used = is_used or slots[view, first + k] >= 0
        if is_used:
            for q in range(NUM_ATTRIBUTES + 1):
                clear(gradients[q], k * widths[q], (k + 1) * widths[q])


@device
def clear(values, start, stop):
    """Zero a range of an array."""
    for c in range(start, stop):
        values[c] = 0


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
