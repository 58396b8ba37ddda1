# SPDX-License-Identifier: Apache-2.0
"""Adam, dense as torch.optim.Adam: rows without a gradient decay and move, too (Kingma and Ba, 2015)."""

from __future__ import annotations

import math

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, broadcast, load, prefetch_to_write, square_root, store

AHEAD = 256
"""Numbers that are asked for in advance: the processor by itself goes to the end of a page of memory only."""


@device
def adam_span(param, grad, exp_avg, exp_avg_sq, start, grad_start, count, factors):
    """Update param[start : start + count] of flat arrays with grad[grad_start : grad_start + count].

    `factors` is (beta1, beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, gradient scale, drift).
    Whole vectors first, then single elements by the same operations: a value does not depend on its place in the span.
    """
    beta1, beta2, rate, root, eps = factors[0], factors[1], factors[2], factors[3], factors[4]
    scale, drift = factors[5], factors[6]
    rest1, rest2 = param.dtype.type(1) - beta1, param.dtype.type(1) - beta2
    v_beta1, v_beta2, v_rest1, v_rest2 = broadcast(beta1), broadcast(beta2), broadcast(rest1), broadcast(rest2)
    v_rate, v_root, v_eps, v_scale = broadcast(rate), broadcast(root), broadcast(eps), broadcast(scale)
    v_drift = broadcast(drift)
    whole = count - count % LANES
    for k in range(0, whole, LANES):
        prefetch_to_write(exp_avg, start + k + AHEAD)
        prefetch_to_write(exp_avg_sq, start + k + AHEAD)
        prefetch_to_write(param, start + k + AHEAD)
        gradient = load(grad, grad_start + k) * v_scale
        mean = v_beta1 * load(exp_avg, start + k) + v_rest1 * gradient
        square = v_beta2 * load(exp_avg_sq, start + k) + v_rest2 * gradient * gradient
        store(exp_avg, start + k, mean)
        store(exp_avg_sq, start + k, square)
        moved = load(param, start + k) - v_rate * mean / (square_root(square) * v_root + v_eps)
        store(param, start + k, moved - v_drift)
    for k in range(whole, count):
        g = grad[grad_start + k] * scale
        m = beta1 * exp_avg[start + k] + rest1 * g
        v = beta2 * exp_avg_sq[start + k] + rest2 * g * g
        exp_avg[start + k] = m
        exp_avg_sq[start + k] = v
        moved = param[start + k] - rate * m / (math.sqrt(v) * root + eps)
        param[start + k] = moved - drift


@kernel
def adam_rows(task, num_tasks, param, grad, exp_avg, exp_avg_sq, factors):
    """One task's share of a dense update of flat arrays."""
    start, stop = task * param.size // num_tasks, (task + 1) * param.size // num_tasks
    adam_span(param, grad, exp_avg, exp_avg_sq, start, start, stop - start, factors)
