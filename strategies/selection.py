# SPDX-License-Identifier: Apache-2.0
"""The k smallest of numbers that are spread over ranks, found without bringing the numbers together.

Bits are fixed from the highest down, eight at a time: each round counts, over all ranks, how many candidates have each
value of the next byte. Keys of 63 bits take eight rounds of 256 counts, whatever the number of rows.

Letters: N rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import RankReducer

BITS = 8
KEY_BITS = 64


def smallest(values: Tensor, ids: Tensor, count: int, ranks: RankReducer) -> Tensor:
    """(N,) bool, True for the `count` rows of all ranks with the smallest values; of equal values, the lowest ids.

    Args: values: (N,) float >= 0 (inf allowed); ids: (N,) int64 >= 0, unique over all ranks; count: 0 or more.
    Raises: ValueError for values that are negative or NaN.
    """
    keys = _ordered_keys(values)
    threshold, num_below = _kth_smallest(keys, torch.ones_like(keys, dtype=torch.bool), count, ranks)
    below, equal = keys < threshold, keys == threshold
    id_threshold, id_below = _kth_smallest(ids, equal, count - num_below, ranks)
    last = (ids == id_threshold) if count - num_below - id_below > 0 else torch.zeros_like(equal)
    return below | (equal & ((ids < id_threshold) | last))


def _ordered_keys(values: Tensor) -> Tensor:
    """(N,) int64 >= 0 in the order of non-negative floats: their bits."""
    if bool((~(values >= 0)).any()):  # host sync
        raise ValueError("only numbers of at least 0 can be ordered here")
    return (values.double() + 0.0).contiguous().view(torch.int64)  # + 0.0 turns -0.0 into 0.0


def _kth_smallest(keys: Tensor, is_candidate: Tensor, count: int, ranks: RankReducer) -> tuple[int, int]:
    """The key t of the count-th smallest candidate of all ranks, and how many candidates are smaller than t.

    With `count` 0 or less: (0, 0); with more than there are candidates: (largest int64, all of them).
    """
    if count <= 0:
        return 0, 0
    prefix = num_below = 0
    candidates = keys[is_candidate]
    for shift in range(KEY_BITS - BITS, -1, -BITS):
        digits = (candidates >> shift) & ((1 << BITS) - 1)
        totals = ranks.sum(torch.bincount(digits, minlength=1 << BITS))  # all ranks
        cumulative = totals.cumsum(0)
        digit = int(torch.searchsorted(cumulative, count - num_below))  # host sync
        if digit == 1 << BITS:
            return torch.iinfo(torch.int64).max, num_below + int(cumulative[-1])
        num_below += int(cumulative[digit - 1]) if digit else 0
        prefix |= digit << shift
        candidates = candidates[digits == digit]
    return prefix, num_below
