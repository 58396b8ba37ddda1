# SPDX-License-Identifier: Apache-2.0
"""Updates that rows of shN missed while no view drew them, made up for in closed form, several at a time.

Without a gradient, update s leaves m_s = b1 m_(s-1) and v_s = b2 v_(s-1), and takes c_s m_s / (sqrt(v_s) + e_s) off
the parameter, where c_s = lr_s sqrt(1 - b2^s) / (1 - b1^s), e_s = eps sqrt(1 - b2^s). A leg is updates u + 1, ..., t:

    p_t = p_u - sum over s of  w_s m_u / (sqrt(v_u) + e_s b2^(-(s-u)/2)),   w_s = c_s (b1 / sqrt(b2))^(s-u)
        ~ p_u - S m_u / (sqrt(v_u) + E),   S = sum of w_s,   E = mean of e_s b2^(-(s-u)/2), weighted by w_s

so a leg takes one root and one quotient a value, whatever its length. The mean E makes it exact to the first order in
the terms with eps; what is left is, of the move, at most var(E) / (sqrt(v_u) + E)^2. These terms differ by a
hundredth within a leg, so this is below a ten-thousandth even where the gradient was of the order of eps, and below
the rounding of float32 where sqrt(v) is 1e-13 and more.

A leg ends at every multiple of LEG, however long a row waits: whoever looks at a table there, which settles it, leaves
no trace in later bits.

Rows are behind in blocks. Where the table is in Morton order, the rows that a view draws fill some of them.

Letters: F updates that can be made up for, N rows.
"""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, broadcast, load, square_root, store

BLOCK = 128
"""Rows that are behind together. Fewer would be updated where more are drawn; more are read from memory in one go."""

LEG = 10
"""Updates of a leg at most. 1 would be the dense update, 100 would be hardly faster: most blocks wait for less."""

BETA1, BETA2, RATE, ROOT, EPS, DRIFT = 0, 1, 2, 3, 4, 6
"""Columns of the ring, as `adam_span` takes them: RATE lr / (1 - beta1^s), ROOT 1 / sqrt(1 - beta2^s)."""

DECAY1, DECAY2, MOVE, OFFSET, FALL, NUM_LEG_COLUMNS = 0, 1, 2, 3, 4, 5
"""Columns of the legs: what m and v are multiplied with, S, E, and the drifts' sum."""


@kernel
def write_legs(ring, latest, legs):
    """Set row u % F of `legs` to the leg from update u to the next multiple of LEG, or to `latest`, whichever is first.

    ring: (F, FACTORS), update s in row s % F; legs: (F, NUM_LEG_COLUMNS). From the last one backwards, in float64.
    """
    capacity = ring.shape[0]
    decay1, decay2, move, offsets, fall = 1.0, 1.0, 0.0, 0.0, 0.0
    for s in range(latest, latest - capacity, -1):
        if s % LEG == 0:
            decay1, decay2, move, offsets, fall = 1.0, 1.0, 0.0, 0.0, 0.0
        k = s % capacity
        beta1, beta2, root = np.float64(ring[k, BETA1]), np.float64(ring[k, BETA2]), np.float64(ring[k, ROOT])
        rate, eps = np.float64(ring[k, RATE]) / root, np.float64(ring[k, EPS]) / root
        shrinks = math.sqrt(beta2)
        decay1, decay2, fall = decay1 * beta1, decay2 * beta2, fall + np.float64(ring[k, DRIFT])
        offsets = (rate * eps + offsets) * (beta1 / beta2)
        move = (rate + move) * (beta1 / shrinks)
        u = (s - 1) % capacity
        legs[u, DECAY1], legs[u, DECAY2], legs[u, MOVE], legs[u, FALL] = decay1, decay2, move, fall
        legs[u, OFFSET] = offsets / move if move > 0.0 else eps


@device
def task_rows(task, num_tasks, num_rows):
    """(start, stop), the rows of a task: whole blocks."""
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    return task * num_blocks // num_tasks * BLOCK, min((task + 1) * num_blocks // num_tasks * BLOCK, num_rows)


@device
def catch_up_block(block, num_rows, width, param, late):
    """Bring the rows of a block, `width` numbers each, up to the last update.

    `late` is (updates, legs, exp_avg, exp_avg_sq, latest): `LazyRows.updates`, legs from `write_legs`, flat moments,
    and the last update.
    """
    updates, legs, exp_avg, exp_avg_sq, latest = late
    start, stop = block * BLOCK * width, min((block + 1) * BLOCK, num_rows) * width
    u = np.int64(updates[block])
    while u < latest:
        travel(param, exp_avg, exp_avg_sq, start, stop, legs, u % legs.shape[0])
        u = min((u // LEG + 1) * LEG, latest)
    updates[block] = latest


@device
def travel(param, exp_avg, exp_avg_sq, start, stop, legs, leg):
    """One leg, whole vectors first, then single numbers by the same operations."""
    decay1, decay2, move, offset, fall = legs[leg, 0], legs[leg, 1], legs[leg, 2], legs[leg, 3], legs[leg, 4]
    v_decay1, v_decay2, v_move = broadcast(decay1), broadcast(decay2), broadcast(move)
    v_offset, v_fall = broadcast(offset), broadcast(fall)
    whole = stop - (stop - start) % LANES
    for k in range(start, whole, LANES):
        mean, square = load(exp_avg, k), load(exp_avg_sq, k)
        store(param, k, load(param, k) - v_move * mean / (square_root(square) + v_offset) - v_fall)
        store(exp_avg, k, v_decay1 * mean)
        store(exp_avg_sq, k, v_decay2 * square)
    for k in range(whole, stop):
        m, v = exp_avg[k], exp_avg_sq[k]
        param[k] = param[k] - move * m / (math.sqrt(v) + offset) - fall
        exp_avg[k] = decay1 * m
        exp_avg_sq[k] = decay2 * v


@device
def catch_up_drawn(drawn, num_drawn, num_rows, width, param, late):
    """Bring the blocks of the rows drawn[:num_drawn] up to the last update; nothing where `late` has no blocks."""
    if late[0].size == 0:
        return
    for k in range(num_drawn):
        catch_up_block(drawn[k] // BLOCK, num_rows, width, param, late)


@kernel
def catch_up_rows(task, num_tasks, num_rows, width, param, late):
    """Bring this task's share of all blocks up to the last update."""
    num_blocks = late[0].size
    for block in range(task * num_blocks // num_tasks, (task + 1) * num_blocks // num_tasks):
        catch_up_block(block, num_rows, width, param, late)
