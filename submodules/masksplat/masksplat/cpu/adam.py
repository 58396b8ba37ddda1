# SPDX-License-Identifier: Apache-2.0
"""Adam, dense as torch.optim.Adam: rows without a gradient decay and move, too (Kingma and Ba, 2015)."""

from __future__ import annotations

import math

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, broadcast, load, square_root, store


@device
def stepped(param, mean, square, gradient, factors):
    """A vector of a parameter and its moments after an update; `factors` as in `adam_span`."""
    one = factors.dtype.type(1)
    gradient = gradient * broadcast(factors[5])
    mean = broadcast(factors[0]) * mean + broadcast(one - factors[0]) * gradient
    square = broadcast(factors[1]) * square + broadcast(one - factors[1]) * gradient * gradient
    denominator = square_root(square) * broadcast(factors[3]) + broadcast(factors[4])
    return param - broadcast(factors[2]) * mean / denominator - broadcast(factors[6]), mean, square


@device
def store_state(param, exp_avg, exp_avg_sq, at, values):
    """Store what `stepped` returns."""
    store(param, at, values[0])
    store(exp_avg, at, values[1])
    store(exp_avg_sq, at, values[2])


@device
def adam_row(param, grad, exp_avg, exp_avg_sq, start, grad_start, width, factors):
    """`adam_span` for `width` numbers, 8 or more: the last vector overlaps the one before, and is stored last."""
    tail = width - LANES
    at = start + tail
    last = stepped(load(param, at), load(exp_avg, at), load(exp_avg_sq, at), load(grad, grad_start + tail), factors)
    for k in range(0, tail, LANES):
        at = start + k
        values = stepped(load(param, at), load(exp_avg, at), load(exp_avg_sq, at), load(grad, grad_start + k), factors)
        store_state(param, exp_avg, exp_avg_sq, at, values)
    store_state(param, exp_avg, exp_avg_sq, start + tail, last)


@device
def adam_span(param, grad, exp_avg, exp_avg_sq, start, grad_start, count, factors):
    """Update param[start : start + count] of flat arrays with grad[grad_start : grad_start + count].

    `factors` is (beta1, beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps, gradient scale, drift).
    Whole vectors first, then single elements by the same operations: a value does not depend on its place in the span.
    """
    beta1, beta2, rate, root, eps = factors[0], factors[1], factors[2], factors[3], factors[4]
    scale, drift = factors[5], factors[6]
    rest1, rest2 = param.dtype.type(1) - beta1, param.dtype.type(1) - beta2
    whole = count - count % LANES
    for k in range(0, whole, LANES):
        at = start + k
        values = stepped(load(param, at), load(exp_avg, at), load(exp_avg_sq, at), load(grad, grad_start + k), factors)
        store_state(param, exp_avg, exp_avg_sq, at, values)
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
