# SPDX-License-Identifier: Apache-2.0
"""exp and exp2 on 8-lane vectors: range reduction by powers of two and a polynomial (libm's are scalar calls)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from masksplat.cpu.simd import (
    VectorType,
    broadcast,
    fma,
    power_of_two,
    round_to_binary_point,
    round_to_integer,
    scale_by_power,
    select_gt,
)

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


LOWEST_POWER = -120
"""exp2 clamps its arguments here: 2^-120 is a normal number, and far below the smallest alpha that counts."""

# Minimax coefficients of 2^f on |f| <= 1/2, lowest power first, for the relative error (7.5e-8 before rounding).
_MINIMAX = tuple(
    np.float32(c)
    for c in (1.0000000716552198, 0.6931469670632628, 0.24022119721166055, 0.055507132746511346, 0.009675541479875469,
              0.0013276472028367512)
)  # fmt: skip
# Taylor coefficients of 2^f: the remainder is below 1e-17 on the reduced range.
_TAYLOR2 = tuple(_TAYLOR[13 - k] * np.float64(np.log(2.0)) ** k for k in range(14))


def exp2(x: Any) -> Any:
    """2 to the power of every lane, for x <= about 100; relative error 2.2e-7 in float32, 4 ulp in float64."""
    raise NotImplementedError("only callable from numba kernels")


@overload(exp2)
def _exp2_overload(x):
    if not isinstance(x, VectorType):
        return None
    return _exp2_32 if x.dtype.bitwidth == 32 else _exp2_64


def _exp2_32(x):
    lowest = broadcast(np.float32(LOWEST_POWER))
    x = select_gt(x, lowest, x, lowest)
    n, shifted = round_to_binary_point(x)
    f = x - n
    y = fma(broadcast(_MINIMAX[5]), f, broadcast(_MINIMAX[4]))
    y = fma(y, f, broadcast(_MINIMAX[3]))
    y = fma(y, f, broadcast(_MINIMAX[2]))
    y = fma(y, f, broadcast(_MINIMAX[1]))
    y = fma(y, f, broadcast(_MINIMAX[0]))
    return scale_by_power(y, shifted)


def _exp2_64(x):
    lowest = broadcast(np.float64(LOWEST_POWER))
    x = select_gt(x, lowest, x, lowest)
    n, shifted = round_to_binary_point(x)
    f = x - n
    y = broadcast(_TAYLOR2[13])
    for k in range(12, -1, -1):
        y = fma(y, f, broadcast(_TAYLOR2[k]))
    return scale_by_power(y, shifted)
