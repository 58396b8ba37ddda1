# SPDX-License-Identifier: Apache-2.0
"""exp on 8-lane vectors: range reduction by powers of two and a polynomial (libm's exp is a scalar call)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from masksplat.cpu.simd import VectorType, broadcast, fma, power_of_two, round_to_integer, select_gt

_LOG2E = 1.4426950408889634
_LN2_HIGH_32, _LN2_LOW_32 = 0.693359375, -2.12194440e-4
_LN2_HIGH_64, _LN2_LOW_64 = 0.6931471803691238, 1.9082149292705877e-10
_LOWEST = -80.0
"""Arguments below are clamped: exp(-80) is far below the smallest alpha that counts."""

# Minimax coefficients of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, highest power first (Cephes, public domain).
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)
# Taylor coefficients 1/13! ... 1/0!: the remainder is below 5e-18 on the reduced range.
_TAYLOR = tuple(np.float64(1.0) / np.float64(np.prod(np.arange(1, k + 1, dtype=np.float64))) for k in range(13, -1, -1))


def exp(x: Any) -> Any:
    """The exponential of every lane, for x <= about 1; relative error 2 ulp in float32, 4 ulp in float64."""
    raise NotImplementedError("only callable from numba kernels")


@overload(exp)
def _exp_overload(x):
    if not isinstance(x, VectorType):
        return None
    return _exp32 if x.dtype.bitwidth == 32 else _exp64


def _exp32(x):
    lowest = broadcast(np.float32(_LOWEST))
    x = select_gt(x, lowest, x, lowest)
    n = round_to_integer(x * broadcast(np.float32(_LOG2E)))
    r = fma(n, broadcast(np.float32(-_LN2_HIGH_32)), x)
    r = fma(n, broadcast(np.float32(-_LN2_LOW_32)), r)
    y = fma(broadcast(_P0), r, broadcast(_P1))
    y = fma(y, r, broadcast(_P2))
    y = fma(y, r, broadcast(_P3))
    y = fma(y, r, broadcast(_P4))
    y = fma(y, r, broadcast(_P5))
    y = fma(y, r * r, r + broadcast(np.float32(1.0)))
    return y * power_of_two(n)


def _exp64(x):
    lowest = broadcast(np.float64(_LOWEST))
    x = select_gt(x, lowest, x, lowest)
    n = round_to_integer(x * broadcast(np.float64(_LOG2E)))
    r = fma(n, broadcast(np.float64(-_LN2_HIGH_64)), x)
    r = fma(n, broadcast(np.float64(-_LN2_LOW_64)), r)
    y = broadcast(_TAYLOR[0])
    for k in range(1, 14):
        y = fma(y, r, broadcast(_TAYLOR[k]))
    return y * power_of_two(n)
