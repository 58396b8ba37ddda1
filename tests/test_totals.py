# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that all ranks get with one sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, num_tile_rows
from distributed.totals import StepNumbers, StepTotals
from rank_harness import run_ranks

HEIGHTS = (52, 41, 100)


def partition_for(size: int) -> PixelPartition:
    total = sum(map(num_tile_rows, HEIGHTS))
    cuts = [total * part // size for part in range(1, size)]
    return PixelPartition.of_cuts(HEIGHTS, cuts, list(range(size))[::-1])


def share(world: Communicator) -> StepNumbers:
    """Each rank has other numbers; a row of tiles of a frame costs 100 pairs for each of its pixel rows."""
    partition = partition_for(world.size)
    pairs = []
    for region in partition.regions[world.rank]:
        first, last = region.drawn_rows(HEIGHTS[region.view])
        pairs.append(torch.tensor([100 * (min(start + 16, last) - start) for start in range(first, last, 16)]))
    totals = StepTotals.share(
        world,
        partition,
        loss=torch.tensor([0.3 * (world.rank + 1), -0.6], dtype=torch.float64),
        pairs=pairs,
        num_splats=torch.tensor([world.rank, 10, 100 * world.rank]),
        num_rows=7 + world.rank,
    )
    return totals.numbers(totals.values)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_everything(size: int) -> None:
    for numbers in run_ranks(share, size):
        assert numbers.l1 == pytest.approx(0.3 * sum(range(1, size + 1)) / 3, rel=1e-15)
        assert numbers.ssim == pytest.approx(-0.6 * size / 3, rel=1e-15)
        assert numbers.image_loss(0.2) == pytest.approx(0.8 * numbers.l1 + 0.2 * (1 - numbers.ssim), rel=1e-15)
        assert numbers.rows == tuple(range(7, 7 + size))
        assert numbers.owned.tolist() == [list(range(size)), [10] * size, [100 * rank for rank in range(size)]]
        assert numbers.num_splats == sum(map(sum, numbers.owned.tolist()))
        for height, found in zip(HEIGHTS, numbers.pairs, strict=True):
            expected = [100 * (min(16 * row + 16, height) - 16 * row) for row in range(num_tile_rows(height))]
            assert np.array_equal(found, expected)
        halos = numbers.num_pairs - 100 * sum(HEIGHTS)
        # Of the cuts for 4, one is 4 rows before the end of view 0, one between views, one inside view 2.
        assert halos == {1: 0, 2: 0, 4: 100 * (5 + 4 + 5 + 5)}[size]
