# SPDX-License-Identifier: Apache-2.0
"""exp and exp2 on 8-lane vectors: range reduction by powers of two and a polynomial (libm's are scalar calls)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import overload

from masksplat.cpu.simd import (
    VectorType,
    broadcast,
    fma,
    power_of_two,
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


# Minimax coefficients of 2^f on |f| <= 1/2, lowest power first, for the relative error (2.0e-9 before rounding) with
# 2^0 = 1. A degree less leaves 7.5e-8 of one sign near 0, and a transmittance is a product of many such errors.
_MINIMAX = (
    1.0, 0.6931472028555462, 0.24022647913573209, 0.055503324701565694, 0.009618437360867755, 0.0013398874785384885,
    0.00015353361866119085,
)  # fmt: skip
# Taylor coefficients of 2^f, lowest power first: the remainder is below 1e-17 on the reduced range.
_TAYLOR2 = tuple(float(_TAYLOR[13 - k]) * math.log(2.0) ** k for k in range(14))

_LOWEST_POWER = -120.0
"""exp2 clamps its arguments here: 2^-120 is a normal number, and far below the smallest alpha that counts."""


def exp2_constants(dtype: Any) -> tuple[float, ...]:
    """What `exp2` wants as vectors of `dtype`: lowest argument, rounding number, and the polynomial of |f| <= 1/2.

    Adding 1.5 * 2^mantissa_bits leaves no bits behind the binary point, and the rounded number in the lowest bits.
    """
    if dtype == np.float32:
        return _LOWEST_POWER, 1.5 * 2.0**23, *_MINIMAX
    return _LOWEST_POWER, 1.5 * 2.0**52, *_TAYLOR2


def exp2(x: Any, constants: Any) -> Any:
    """2 to the power of every lane, for x <= about 100; relative error 2e-7 in float32, 1e-15 in float64."""
    raise NotImplementedError("only callable from numba kernels")


@overload(exp2)
def _exp2_overload(x, constants):
    if not isinstance(x, VectorType):
        return None
    return _exp2_32 if x.dtype.bitwidth == 32 else _exp2_64


def _exp2_32(x, constants):
    lowest, rounding = constants[0], constants[1]
    c0, c1, c2, c3, c4, c5, c6 = constants[2:9]
    x = select_gt(x, lowest, x, lowest)
    shifted = x + rounding
    f = x - (shifted - rounding)
    # Pairs of terms side by side (Estrin): what a block waits for is this chain.
    square = f * f
    high = fma(fma(c6, square, fma(c5, f, c4)), square, fma(c3, f, c2))
    return scale_by_power(fma(high, square, fma(c1, f, c0)), shifted)


def _exp2_64(x, constants):
    lowest, rounding = constants[0], constants[1]
    x = select_gt(x, lowest, x, lowest)
    shifted = x + rounding
    f = x - (shifted - rounding)
    y = constants[15]
    for k in range(14, 1, -1):
        y = fma(y, f, constants[k])
    return scale_by_power(y, shifted)
