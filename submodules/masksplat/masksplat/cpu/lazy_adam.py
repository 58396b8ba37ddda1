# SPDX-License-Identifier: Apache-2.0
"""The updates that a row missed while it had no gradient, replayed as `adam_span` would have made them: the same bits.

A row of `width` numbers (0, or 8 and more) is taken in vectors of eight; the last one overlaps the one before, so it is
worked out first and stored last.
"""

from __future__ import annotations

from masksplat.cpu.adam import store_state
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, any_positive, broadcast, load, prefetch, square_root

CACHE_LINE = 64

AHEAD = 6
"""Rows that are asked for before their turn."""


@device
def replayed(param, mean, square, first, last, ring):
    """A vector of a parameter and its moments after the updates first, ..., last with gradient 0.

    `ring` (F, 6) has the factors of update u in row u % F, as `adam_span` takes them.
    """
    zero = broadcast(ring.dtype.type(0))
    if not (any_positive(square) or any_positive(mean) or any_positive(zero - mean)):
        return param, mean + zero, square  # never had a gradient, and shN has no drift; -0 becomes +0
    for update in range(first, last + 1):
        k = update % ring.shape[0]
        # Adding 0 is what the sum with a gradient of 0 does: it makes -0 of an underflow +0.
        mean = broadcast(ring[k, 0]) * mean + zero
        square = broadcast(ring[k, 1]) * square
        root, eps = broadcast(ring[k, 3]), broadcast(ring[k, 4])
        param = param - broadcast(ring[k, 2]) * mean / (square_root(square) * root + eps) - broadcast(ring[k, 6])
    return param, mean, square


@device
def catch_up_row(row, last, width, param, late):
    """Bring a row up to update `last`. `late` is (updates, exp_avg, exp_avg_sq, ring), flat but for the ring."""
    updates, exp_avg, exp_avg_sq, ring = late
    first, start = updates[row] + 1, row * width
    if first > last:
        return
    tail = start + width - LANES
    ends = replayed(load(param, tail), load(exp_avg, tail), load(exp_avg_sq, tail), first, last, ring)
    for at in range(start, tail, LANES):
        values = replayed(load(param, at), load(exp_avg, at), load(exp_avg_sq, at), first, last, ring)
        store_state(param, exp_avg, exp_avg_sq, at, values)
    store_state(param, exp_avg, exp_avg_sq, tail, ends)
    updates[row] = last


@device
def ask_for_row(row, width, param, late):
    """Ask for a row that is about to be caught up or updated: drawn rows lie scattered, and memory is far."""
    step = CACHE_LINE // param.itemsize
    for at in range(row * width, (row + 1) * width + step - 1, step):
        prefetch(param, at)
        prefetch(late[1], at)
        prefetch(late[2], at)


@device
def catch_up_all(rows, count, last, width, param, late):
    """Bring rows[:count] up to update `last`."""
    for k in range(count):
        if k + AHEAD < count:
            ask_for_row(rows[k + AHEAD], width, param, late)
        catch_up_row(rows[k], last, width, param, late)


@kernel
def catch_up_rows(task, num_tasks, width, last, param, late):
    """Bring this task's share of all rows up to update `last`."""
    num_rows = late[0].size
    for row in range(task * num_rows // num_tasks, (task + 1) * num_rows // num_tasks):
        catch_up_row(row, last, width, param, late)
