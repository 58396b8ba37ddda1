# SPDX-License-Identifier: Apache-2.0
"""Numba kernels of the probabilistic mask: sampling, and the straight-through update of its logits.

Both treat every row by itself, so the results do not depend on the order of the rows. They are serial: for 150 000 rows
they take a millisecond together. The contract of each is in `masksplat.masks`.

Letters: N Gaussians. Arrays are contiguous, (N,), float32 or float64 alike; scalars arrive in the arrays' dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from masksplat.cpu.exponential import exp
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, VectorType, broadcast, load, select_gt, store

_PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_DROPPED_BITS = 9  # 23 bits and a half are exact in float32


@intrinsic
def _uniform_integers(typingctx: Any, ids: Any, index: Any, counters: Any, like: Any) -> Any:
    """The upper 23 bits of Philox's first word for ids[index], ..., ids[index + 7], as a vector of the dtype of `like`.

    ids: uint64 array; counters: four uint64 (step, stream, key low, key high), each below 2^32. Bit-equal to
    `masksplat.random.philox_numba`, eight at a time: LLVM does not vectorise that one.
    """
    result = VectorType(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        wide = ir.VectorType(ir.IntType(64), LANES)
        first = builder.bitcast(builder.gep(array.data, [args[1]]), wide.as_pointer())
        identity = builder.load(first)
        identity.align = 8
        counters = [builder.extract_value(args[2], place) for place in range(4)]
        bits = builder.lshr(_philox_first_word(builder, identity, counters), _splat(builder, _DROPPED_BITS))
        narrow = builder.trunc(bits, ir.VectorType(ir.IntType(32), LANES))
        real = ir.FloatType() if signature.return_type.dtype.bitwidth == 32 else ir.DoubleType()
        return builder.sitofp(narrow, ir.VectorType(real, LANES))

    return result(ids, types.intp, counters, like), codegen


def _splat(builder: ir.IRBuilder, value: int | ir.Value) -> ir.Value:
    """Eight 64-bit lanes of one number."""
    wide = ir.VectorType(ir.IntType(64), LANES)
    if isinstance(value, int):
        return ir.Constant(wide, [value] * LANES)
    first = builder.insert_element(ir.Constant(wide, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(wide, ir.Undefined), lanes)


def _philox_first_word(builder: ir.IRBuilder, identity: ir.Value, counters: list[ir.Value]) -> ir.Value:
    """Philox4x32-10 of the counter (identity low, identity high, step, stream); see `masksplat.random`."""
    word, half = _splat(builder, _WORD), _splat(builder, 32)
    c0, c1 = builder.and_(identity, word), builder.lshr(identity, half)
    c2, c3, k0, k1 = (builder.and_(_splat(builder, counter), word) for counter in counters)
    for _ in range(_PHILOX_ROUNDS):
        product0 = builder.mul(_splat(builder, _MULTIPLIERS[0]), c0)
        product1 = builder.mul(_splat(builder, _MULTIPLIERS[1]), c2)
        c0 = builder.xor(builder.xor(builder.lshr(product1, half), c1), k0)
        c2 = builder.xor(builder.xor(builder.lshr(product0, half), c3), k1)
        c1, c3 = builder.and_(product1, word), builder.and_(product0, word)
        k0 = builder.and_(builder.add(k0, _splat(builder, _KEY_STEPS[0])), word)
        k1 = builder.and_(builder.add(k1, _splat(builder, _KEY_STEPS[1])), word)
    return c0


@device
def _sample_lanes(logits: Any, ids: Any, counters: Any, numbers: Any, mask: Any, keep_gradient: Any, row: Any) -> None:
    """Eight rows of `sample_kernel`."""
    one, lowest = broadcast(numbers[1]), broadcast(numbers[3])
    drawn = _uniform_integers(ids, row, counters, logits) + broadcast(numbers[0])  # u * 2^23, exact
    logit = load(logits, row)
    negated = broadcast(numbers[4]) - select_gt(logit, lowest, logit, lowest)
    against = exp(negated) * ((broadcast(numbers[2]) - drawn) / drawn)
    total = one + against
    store(mask, row, select_gt(one, against, one, broadcast(numbers[4])))
    store(keep_gradient, row, against / (total * total))


@kernel
def sample_kernel(logits: Any, ids: Any, counters: Any, numbers: Any, mask: Any, keep_gradient: Any) -> None:
    """Write the hard sample to `mask` and the derivative of the soft one by the logit to `keep_gradient`.

    ids: uint64; counters: uint64 (step, stream, key low, key high); numbers: 1/2, 1, 2^23, the lowest logit, 0 in the
    dtype of the logits.
    """
    num_rows = logits.shape[0]
    num_full = num_rows - num_rows % LANES
    for row in range(0, num_full, LANES):
        _sample_lanes(logits, ids, counters, numbers, mask, keep_gradient, row)
    if (
        num_full < num_rows
    ):  # the rest goes through the same instructions, so a row's result has nothing to do with its place
        last_ids, last = np.zeros(LANES, np.uint64), np.zeros((3, LANES), logits.dtype)
        last_ids[: num_rows - num_full] = ids[num_full:]
        last[0, : num_rows - num_full] = logits[num_full:]
        _sample_lanes(last[0], last_ids, counters, numbers, last[1], last[2], 0)
        mask[num_full:] = last[1, : num_rows - num_full]
        keep_gradient[num_full:] = last[2, : num_rows - num_full]


@kernel
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
