# SPDX-License-Identifier: Apache-2.0
"""Eight Gaussians at a time: reading rows of a table into lanes, and numbers that lanes need.

A batch is `index` (8,) int64, the rows in its lanes; a batch of fewer rows repeats the last one, and whoever writes
results back writes the first `count` lanes only.
"""

from __future__ import annotations

from masksplat.cpu.kernel import device
from masksplat.cpu.simd import LANES, load, load_halves, pack, select_gt, store, transpose, transpose_halves

COEFFICIENTS = 48
"""Vectors of scratch for a row of shN, 3 (K - 1) <= 45."""


@device
def row_starts(index, width):
    """Where the batch's rows of `width` numbers begin in a flat array.

    Worked out once for all reads: LLVM would read `index` again after every store.
    """
    return (
        index[0] * width, index[1] * width, index[2] * width, index[3] * width,
        index[4] * width, index[5] * width, index[6] * width, index[7] * width,
    )  # fmt: skip


@device
def three_columns(flat, index):
    """The three columns of the batch's rows in a flat array of rows of three."""
    at = row_starts(index, 3)
    return single_column(flat, at, 0), single_column(flat, at, 1), single_column(flat, at, 2)


@device
def single_column(flat, at, c):
    """Column c of the rows that begin at `at`."""
    return pack(
        flat[at[0] + c], flat[at[1] + c], flat[at[2] + c], flat[at[3] + c],
        flat[at[4] + c], flat[at[5] + c], flat[at[6] + c], flat[at[7] + c],
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
def four_columns(flat, at, start):
    """Columns start, ..., start + 3 of the rows that begin at `at`: four vectors."""
    return transpose_halves(
        load_halves(flat, at[0] + start, at[4] + start),
        load_halves(flat, at[1] + start, at[5] + start),
        load_halves(flat, at[2] + start, at[6] + start),
        load_halves(flat, at[3] + start, at[7] + start),
    )


@device
def read_rows(flat, width, index, num_columns, out):
    """out[8 j :] = column j of rows of `width` numbers in a flat array, for j < num_columns (0, or 4 and more)."""
    at = row_starts(index, width)
    for group in range((num_columns + 3) // 4):
        start = min(4 * group, width - 4)  # the last group of a row overlaps the one before
        vectors = four_columns(flat, at, start)
        place = start * LANES
        store(out, place, vectors[0])
        store(out, place + LANES, vectors[1])
        store(out, place + 2 * LANES, vectors[2])
        store(out, place + 3 * LANES, vectors[3])


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
