# SPDX-License-Identifier: Apache-2.0
"""Eight Gaussians at a time: reading rows of a table into lanes, and numbers that lanes need.

A batch is `index` (8,) int64, the rows in its lanes; a batch of fewer rows repeats the last one, and whoever writes
results back writes the first `count` lanes only.
"""

from __future__ import annotations

from masksplat.cpu.kernel import device
from masksplat.cpu.simd import LANES, load, pack, select_gt, store, transpose

COEFFICIENTS = 48
"""Vectors of scratch for a row of shN, 3 (K - 1) <= 45."""


@device
def column(array, index, c):
    """Column c of a 2-D array at the batch's rows."""
    return pack(
        array[index[0], c], array[index[1], c], array[index[2], c], array[index[3], c],
        array[index[4], c], array[index[5], c], array[index[6], c], array[index[7], c],
    )  # fmt: skip


@device
def entry(array, index):
    """A 1-D array at the batch's rows."""
    return pack(
        array[index[0]], array[index[1]], array[index[2]], array[index[3]],
        array[index[4]], array[index[5]], array[index[6]], array[index[7]],
    )  # fmt: skip


@device
def fill_batch(index, rows, first, count):
    """Set index to rows[first : first + count], repeating the last one."""
    for lane in range(LANES):
        index[lane] = rows[first + min(lane, count - 1)]


@device
def maximum(a, b):
    """The larger of two lanes; a where a is no number, so that it is not hidden."""
    return select_gt(b, a, b, a)


@device
def minimum(a, b):
    """The smaller of two lanes."""
    return select_gt(a, b, b, a)


@device
def group_start(group, width):
    """First column of a group of eight; the last group of a row of `width` >= 8 columns overlaps the one before."""
    return min(group * LANES, width - LANES)


@device
def read_rows(flat, width, index, num_columns, out):
    """out[8 j :] = column j of rows of `width` numbers in a flat array, for j < num_columns (0, or 8 and more)."""
    for group in range((num_columns + LANES - 1) // LANES):
        start = group_start(group, width)
        vectors = transpose(
            load(flat, index[0] * width + start), load(flat, index[1] * width + start),
            load(flat, index[2] * width + start), load(flat, index[3] * width + start),
            load(flat, index[4] * width + start), load(flat, index[5] * width + start),
            load(flat, index[6] * width + start), load(flat, index[7] * width + start),
        )  # fmt: skip
        store_eight(out, start * LANES, vectors)


@device
def store_eight(out, at, vectors):
    """Eight vectors one after the other."""
    store(out, at, vectors[0])
    store(out, at + 8, vectors[1])
    store(out, at + 16, vectors[2])
    store(out, at + 24, vectors[3])
    store(out, at + 32, vectors[4])
    store(out, at + 40, vectors[5])
    store(out, at + 48, vectors[6])
    store(out, at + 56, vectors[7])


@device
def load_transposed(values, at):
    """The eight vectors from values[at] on, transposed: one vector per lane."""
    return transpose(
        load(values, at), load(values, at + 8), load(values, at + 16), load(values, at + 24),
        load(values, at + 32), load(values, at + 40), load(values, at + 48), load(values, at + 56),
    )  # fmt: skip
