# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from rank_threads import run_on_threads
from strategies.base import OneRank, RankReducer
from strategies.selection import smallest

CASES = [
    torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 1.0]),
    torch.tensor([5.0, 5.0, 5.0, 5.0]),
    torch.tensor([0.0, -0.0, torch.inf, 1e-300, 2e-300, torch.inf], dtype=torch.float64),
    torch.empty(0),
    torch.rand(999, generator=torch.Generator().manual_seed(1)).mul(40).floor(),
]


def oracle(values: torch.Tensor, ids: torch.Tensor, count: int) -> set[int]:
    order = sorted(zip(values.tolist(), ids.tolist(), strict=True), key=lambda pair: (pair[0] + 0.0, pair[1]))
    return {number for _, number in order[:count]}


@pytest.mark.parametrize("values", CASES, ids=lambda values: f"{len(values)}")
def test_the_smallest_are_chosen_and_ties_go_by_id(values: torch.Tensor) -> None:
    ids = torch.from_numpy(np.random.default_rng(2).permutation(len(values))) * (1 << 50)
    for count in {0, 1, 2, 3, len(values) // 2, len(values) - 1, len(values), len(values) + 5}:
        chosen = smallest(values, ids, count, OneRank())
        assert set(ids[chosen].tolist()) == oracle(values, ids, max(count, 0))


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_choose_what_one_would(num_ranks: int) -> None:
    values, ids = CASES[-1], torch.arange(999) * 7 + (1 << 61)
    owner = torch.arange(999) % (num_ranks + 2)  # the last two shares belong to nobody's rank: rank 0 owns them, too
    owner[owner >= num_ranks] = 0
    if num_ranks > 2:
        owner[owner == 1] = 2  # one rank owns nothing

    def work(rank: int, ranks: RankReducer) -> set[int]:
        mine = owner == rank
        return set(ids[mine][smallest(values[mine], ids[mine], 431, ranks)].tolist())

    chosen = set().union(*run_on_threads(range(num_ranks), work))
    assert chosen == oracle(values, ids, 431)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_other_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        smallest(torch.tensor([value, 1.0]), torch.arange(2), 1, OneRank())
