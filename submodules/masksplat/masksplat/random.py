# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: a pure function of (seed, step, id, stream), equal on every rank and device.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
The counter is (id low, id high, step, stream), the key (seed low, seed high). There is no state: what a Gaussian
draws depends on its id alone, never on its row, its rank or on how many Gaussians there are.

Three bodies that agree bit for bit: ``philox`` (torch int64, any device), ``philox_numba`` (scalar, callable in numba
kernels) and the one of the CUDA kernels. This module knows nothing of masks or Gaussians beyond the names of the
streams.

Legend: ``N`` ids.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numba
import numpy as np
import torch
from torch import Tensor

# Streams: one per purpose, so that two uses at the same step and id are independent.
MASK_SAMPLE: Final = 0
MASK_PRUNE: Final = 1
SPLIT: Final = 2
CHILD_ID: Final = 3
VIEW_ORDER: Final = 4
BACKGROUND: Final = 5

_WORD: Final = 0xFFFFFFFF
_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_ROUNDS: Final = 10
_CHILD_BIT: Final = 1 << 62

# Typed twins of the constants: a uint64 times a Python int would be promoted to float64 by numba.
_U32: Final = np.uint64(32)
_UWORD: Final = np.uint64(_WORD)
_UMULTIPLIER_0: Final = np.uint64(_MULTIPLIER_0)
_UMULTIPLIER_1: Final = np.uint64(_MULTIPLIER_1)
_UWEYL_0: Final = np.uint64(_WEYL_0)
_UWEYL_1: Final = np.uint64(_WEYL_1)


@numba.njit(cache=True, nogil=True)
def philox_numba(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """The four output words of Philox4x32-10, for use inside numba kernels.

    Args:
        c0, c1, c2, c3: uint64 holding the 32-bit counter words.
        k0, k1: uint64 holding the 32-bit key words.

    Returns:
        Four uint64 holding 32-bit words, bit-equal to ``philox``.
    """
    for _ in range(_ROUNDS):
        product_0 = _UMULTIPLIER_0 * c0
        product_1 = _UMULTIPLIER_1 * c2
        c0 = (product_1 >> _U32) ^ c1 ^ k0
        c2 = (product_0 >> _U32) ^ c3 ^ k1
        c1 = product_1 & _UWORD
        c3 = product_0 & _UWORD
        k0 = (k0 + _UWEYL_0) & _UWORD
        k1 = (k1 + _UWEYL_1) & _UWORD
    return c0, c1, c2, c3


@numba.njit(cache=True, nogil=True)
def _fill_words(ids: Any, step: Any, stream: Any, k0: Any, k1: Any, out: Any) -> None:
    for row in range(ids.shape[0]):
        low, high = ids[row] & _UWORD, ids[row] >> _U32
        w0, w1, w2, w3 = philox_numba(low, high, step, stream, k0, k1)
        out[row, 0], out[row, 1], out[row, 2], out[row, 3] = w0, w1, w2, w3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * word`` by 16-bit halves, so that no int64 ever overflows."""
    lower = (word & 0xFFFF) * multiplier
    upper = (word >> 16) * multiplier + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four output words of Philox4x32-10 for every counter.

    Args:
        counter: four int64 tensors that broadcast, each holding 32-bit words (0 <= word < 2**32).
        key: two Python integers below 2**32.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def _require_range(name: str, value: int, bits: int) -> int:
    if not 0 <= int(value) < 1 << bits:
        raise ValueError(f"{name} is {value}; it must lie in [0, 2**{bits}).")
    return int(value)


def require_key(seed: int, step: int) -> None:
    """Raises: ValueError for a seed outside 64 bits or a step outside 32."""
    _require_range("seed", seed, 64)
    _require_range("step", step, 32)


def words(seed: int, step: int, ids: Tensor, stream: int) -> Tensor:
    """Four random 32-bit words per id.

    Args:
        seed: 64-bit unsigned key.
        step: 32-bit unsigned counter word.
        ids: (N,) int64, any device.
        stream: 32-bit unsigned counter word that tells purposes apart.

    Returns:
        (N, 4) int64 on the device of ``ids``; CPU tensors go through the numba twin, CUDA ones
        through a kernel: torch takes hundreds of operations.

    Raises:
        ValueError: ids that are not (N,) int64, or a number out of its range.
    """
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids must be (N,) int64, found {tuple(ids.shape)} {ids.dtype}.")
    seed = _require_range("seed", seed, 64)
    step = _require_range("step", step, 32)
    stream = _require_range("stream", stream, 32)
    k0, k1 = seed & _WORD, seed >> 32
    if ids.device.type == "cpu":
        out = np.empty((ids.shape[0], 4), dtype=np.int64)
        unsigned = ids.detach().contiguous().numpy().view(np.uint64)
        _fill_words(unsigned, np.uint64(step), np.uint64(stream), np.uint64(k0), np.uint64(k1), out)
        return torch.from_numpy(out)
    if ids.device.type == "cuda":
        from masksplat.cuda import devices
        from masksplat.cuda import random as kernels

        return kernels.words(devices.launcher_of(ids.device), seed, step, ids.contiguous(), stream)
    counter = (ids & _WORD, (ids >> 32) & _WORD, torch.full_like(ids, step), torch.full_like(ids, stream))
    return torch.stack(philox(counter, (k0, k1)), dim=1)


def to_unit_interval(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers strictly inside (0, 1) from 32-bit words: ((word >> 9) + 1/2) * 2**-23.

    23 bits and a half are exact in float32: with 24 the largest word would round to 1, and the value would
    depend on the dtype.
    """
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def uniform(seed: int, step: int, ids: Tensor, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N,) uniform numbers strictly inside (0, 1), the same in float32 and float64. Raises as ``words``."""
    return to_unit_interval(words(seed, step, ids, stream)[:, 0], dtype)


def normal(seed: int, step: int, ids: Tensor, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, 3) standard normal numbers by Box and Muller, computed in float64. Raises as ``words``."""
    drawn = to_unit_interval(words(seed, step, ids, stream), torch.float64)
    radius = torch.sqrt(-2.0 * torch.log(drawn[:, 0::2]))
    angle = 2.0 * math.pi * drawn[:, 1::2]
    columns = (radius[:, 0] * torch.cos(angle[:, 0]), radius[:, 0] * torch.sin(angle[:, 0]))
    return torch.stack((*columns, radius[:, 1] * torch.cos(angle[:, 1])), dim=1).to(dtype)


def child_ids(parent_ids: Tensor, event: int, child: int) -> Tensor:
    """(N,) int64 ids of the children that an event makes of Gaussians.

    A pure function of (parent id, event, child number). Bit 62 is always set, so a child's id is non-negative
    and never that of an initial Gaussian (0 .. P-1); two children collide with probability 2**-62 a pair.
    Raises as ``words``.
    """
    drawn = words(_require_range("child", child, 32), event, parent_ids, CHILD_ID)
    return ((drawn[:, 0] & 0x3FFFFFFF) << 32) | drawn[:, 1] | _CHILD_BIT


def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """A random order of 0 .. n-1 that depends on (seed, epoch, n) alone. Raises as ``words``.

    By ``words`` in plain numpy: numba takes a third of a second to load its first kernel, and on a GPU needs no other.
    """
    require_key(seed, epoch)
    counter = np.arange(n, dtype=np.uint64), np.uint64(0), np.uint64(epoch), np.uint64(VIEW_ORDER)
    word_0, word_1, *_ = philox_numba.py_func(*counter, np.uint64(seed & _WORD), np.uint64(seed >> 32))
    return np.argsort((word_0 << np.uint64(31)) | (word_1 >> np.uint64(1)), kind="stable").tolist()
