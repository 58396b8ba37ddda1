# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that all ranks get with one sum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, num_tile_rows
from distributed.totals import StepNumbers, StepTotals
from rank_harness import run_ranks
from test_cuda_exchange import exchanged_by, kernels_of

HEIGHTS = (52, 41, 100)


def partition_for(size: int) -> PixelPartition:
    total = sum(map(num_tile_rows, HEIGHTS))
    cuts = [total * part // size for part in range(1, size)]
    return PixelPartition.of_cuts(HEIGHTS, cuts, list(range(size))[::-1])


def share(world: Communicator) -> StepNumbers:
    totals = totals_of(world)
    return totals.numbers(totals.values)


def totals_of(world: Communicator, **on_device: torch.Tensor) -> StepTotals:
    """Each rank has other numbers; a row of tiles of a frame costs 100 pairs for each of its pixel rows."""
    partition = partition_for(world.size)
    pairs = []
    for region in partition.regions[world.rank]:
        first, last = region.drawn_rows(HEIGHTS[region.view])
        pairs.append(torch.tensor([100 * (min(start + 16, last) - start) for start in range(first, last, 16)]))
    others = len(pairs) - 1
    losses = [[0.3 * (world.rank + 1), -0.6 - 0.1 * others], *[[0.0, 0.1]] * others]
    return StepTotals.share(
        world,
        partition,
        losses=[torch.tensor(each, dtype=torch.float64) for each in losses],
        pairs=pairs,
        num_splats=torch.tensor([world.rank, 10, 100 * world.rank], dtype=torch.int32),
        num_rows=7 + world.rank,
        **on_device,
    )


def share_by_kernels(world: Communicator) -> StepNumbers:
    with exchanged_by(kernels_of(world)):
        return share(world)


@pytest.mark.parametrize(("size", "way"), [(1, share), (2, share), (4, share), (2, share_by_kernels)])
def test_every_rank_gets_everything(size: int, way: Callable[[Communicator], StepNumbers]) -> None:
    make_launcher(EMULATED).kernels("rank_numbers")
    for numbers in run_ranks(way, size):
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


def both_ways(world: Communicator, num_regions: int, has_drawn: bool, has_status: bool) -> None:
    """Kernels bring the same bytes as torch operations; ranks with none and with many regions."""
    partition = PixelPartition.of_whole_views([33] * num_regions, [1] * num_regions, world.size)
    mine = len(partition.regions[world.rank])
    rng, found = np.random.default_rng(world.rank), []
    losses = [torch.from_numpy(rng.random(2)) for _ in range(mine)]
    pairs = [torch.from_numpy(rng.integers(0, 1 << 40, 3)) for _ in range(mine)]
    splats = torch.from_numpy(rng.integers(0, 1 << 20, num_regions).astype(np.int32))
    for launcher in (None, kernels_of(world)):
        status = torch.tensor([world.rank, *range(7)], dtype=torch.int32) if has_status else None
        drawn = torch.tensor(5 << 33 + world.rank) if has_drawn else None
        with exchanged_by(launcher):
            totals = StepTotals.share(
                world, partition, losses=losses, pairs=pairs, num_splats=splats, num_rows=(1 << 33) + world.rank,
                num_drawn=drawn, status=status,
            )  # fmt: skip
        numbers = totals.numbers(totals.values)
        all_drawn = None if totals.num_drawn is None else int(totals.num_drawn)
        state = None if status is None else status.tolist()
        ranks = [(each.num_rows, each.pairs.tolist(), each.num_splats.tolist()) for each in numbers.of_ranks]
        found.append((numbers.l1, numbers.ssim, numbers.num_drawn, numbers.has_overflow, ranks, all_drawn, state))
    assert found[0] == found[1]
    assert not has_status or found[0][-1] == [world.size - 1, *range(7)]


@pytest.mark.parametrize(
    ("num_regions", "has_drawn", "has_status"), [(1, True, True), (9, True, True), (5, False, True), (4, True, False)]
)
def test_kernels_bring_what_torch_operations_bring(num_regions: int, has_drawn: bool, has_status: bool) -> None:
    make_launcher(EMULATED).kernels("rank_numbers")
    run_ranks(both_ways, 2, num_regions, has_drawn, has_status)


def drawn_and_stopped(world: Communicator, overflowed: int) -> tuple[int, list[int]]:
    """All masks that were drawn; the status words of this rank, of which one rank's tell of an overflow."""
    status = torch.tensor([int(world.rank == overflowed), 10 + world.rank, 0, 0], dtype=torch.int32)
    totals = totals_of(world, num_drawn=torch.tensor(5 + world.rank), status=status)
    assert totals.num_drawn is not None and totals.num_drawn.dtype == torch.int64
    return int(totals.num_drawn), status.tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_stop_together(size: int) -> None:
    """What each of them needs is its own affair; num_drawn is that of all."""
    for overflowed in (0, size - 1, -1):
        for rank, (num_drawn, status) in enumerate(run_ranks(drawn_and_stopped, size, overflowed)):
            assert num_drawn == sum(range(5, 5 + size))
            assert status == [int(overflowed >= 0), 10 + rank, 0, 0]
