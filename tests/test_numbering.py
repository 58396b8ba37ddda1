# SPDX-License-Identifier: Apache-2.0
"""Numbers in the order of the ids, over any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed.communicator import Communicator
from distributed.numbering import order_numbers
from rank_harness import run_ranks


def ids_of(rank: int, num_rows: int, seed: int) -> torch.Tensor:
    """Unique over ranks, in no order: small ones as of the first cloud and hashes as of children."""
    rng = np.random.default_rng([seed, rank])
    small = rank + 4 * rng.permutation(num_rows)[: num_rows // 2]
    large = rank + 4 * rng.integers(1 << 20, 1 << 61, num_rows - num_rows // 2)
    return torch.from_numpy(rng.permutation(np.concatenate([small, large])))


def numbered(world: Communicator, lengths: list[int], seed: int) -> tuple[list[int], list[int], int]:
    ids = ids_of(world.rank, lengths[world.rank], seed)
    numbers, bound = order_numbers(ids, world)
    return ids.tolist(), numbers.tolist(), bound


@pytest.mark.parametrize("lengths", [[500], [300, 0], [0, 1, 2], [200, 1000, 3, 0]])
def test_numbers_count_the_smaller_ids(lengths: list[int]) -> None:
    answers = run_ranks(numbered, len(lengths), lengths, 7)
    ids = [number for answer in answers for number in answer[0]]
    numbers = [number for answer in answers for number in answer[1]]
    assert np.array_equal(np.argsort(np.argsort(ids)), numbers)
    assert {answer[2] for answer in answers} == {len(ids)}


def test_one_process_without_a_group() -> None:
    ids, numbers, bound = numbered(Communicator(), [200], 3)
    assert np.array_equal(np.argsort(np.argsort(ids)), numbers) and bound == 200
    assert order_numbers(torch.empty(0, dtype=torch.int64), Communicator()).bound == 0
