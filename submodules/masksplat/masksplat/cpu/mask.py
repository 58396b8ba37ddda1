# SPDX-License-Identifier: Apache-2.0
"""Numba kernels of the probabilistic mask: sampling, and the straight-through update of its logits.

Both treat every row by itself, so the results do not depend on the order of the rows. They are serial: a sample of
150 000 rows is a fraction of a percent of a training step.
The contract of each is in `masksplat.masks`.

Letters: N Gaussians. Arrays are contiguous, (N,), float32 or float64 alike; scalars arrive in the arrays' dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from masksplat.random import philox_numba

_WORD = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)
_DROPPED_BITS = np.uint64(9)


@numba.njit(cache=True, nogil=True)
def sample_kernel(
    logits: Any, ids: Any, step: Any, stream: Any, key: Any, numbers: Any, mask: Any, keep_gradient: Any
) -> None:
    """Write the hard sample to `mask` and the derivative of the soft one by the logit to `keep_gradient`.

    ids: uint64; step, stream: uint64; key: two uint64. numbers: [1/2, 1, 2^23, lowest logit] in the logits' dtype.
    """
    half, one, span, lowest = numbers[0], numbers[1], numbers[2], numbers[3]
    for row in range(logits.shape[0]):
        identity = ids[row]
        word = philox_numba(identity & _WORD, identity >> _HALF_WORD, step, stream, key[0], key[1])[0]
        keep_gradient[row] = word >> _DROPPED_BITS
    for row in range(logits.shape[0]):
        drawn = keep_gradient[row] + half  # u * 2^23, exact
        against = math.exp(-max(logits[row], lowest)) * ((span - drawn) / drawn)
        total = one + against
        mask[row] = one if against < one else one - one
        keep_gradient[row] = against / (total * total)


@numba.njit(cache=True, nogil=True)
def update_kernel(
    logits: Any, d_mask: Any, keep_gradient: Any, exp_avg: Any, exp_avg_sq: Any, d_all: Any, adam: Any
) -> None:
    """One Adam update of the logits with the gradient (d_mask + d_all) * keep_gradient, in place.

    adam: [beta1, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(bias correction 2), eps] in the logits' dtype.
    """
    beta1, rest1, beta2, rest2 = adam[0], adam[1], adam[2], adam[3]
    step_size, correction, eps = adam[4], adam[5], adam[6]
    for row in range(logits.shape[0]):
        gradient = (d_mask[row] + d_all) * keep_gradient[row]
        first = beta1 * exp_avg[row] + rest1 * gradient
        second = beta2 * exp_avg_sq[row] + rest2 * gradient * gradient
        exp_avg[row] = first
        exp_avg_sq[row] = second
        logits[row] -= step_size * first / (math.sqrt(second) * correction + eps)
