# SPDX-License-Identifier: Apache-2.0
"""Adam, dense as torch.optim.Adam: rows without a gradient decay and move, too (Kingma and Ba, 2015)."""

from __future__ import annotations

import math

from masksplat.cpu.kernel import kernel


@kernel
def adam_span(param, grad, exp_avg, exp_avg_sq, start, grad_start, count, factors):  # type: ignore[no-untyped-def]
    """Update param[start : start + count] of flat arrays with grad[grad_start : grad_start + count].

    `factors` is (beta1, beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps).
    """
    beta1, beta2, rate, root, eps = factors[0], factors[1], factors[2], factors[3], factors[4]
    rest1, rest2 = param.dtype.type(1) - beta1, param.dtype.type(1) - beta2
    for k in range(count):
        g = grad[grad_start + k]
        m = beta1 * exp_avg[start + k] + rest1 * g
        v = beta2 * exp_avg_sq[start + k] + rest2 * g * g
        exp_avg[start + k] = m
        exp_avg_sq[start + k] = v
        param[start + k] -= rate * m / (math.sqrt(v) * root + eps)


@kernel
def adam_rows(task, num_tasks, param, grad, exp_avg, exp_avg_sq, factors):  # type: ignore[no-untyped-def]
    """One task's share of a dense update of flat arrays."""
    start, stop = task * param.size // num_tasks, (task + 1) * param.size // num_tasks
    adam_span(param, grad, exp_avg, exp_avg_sq, start, start, stop - start, factors)
