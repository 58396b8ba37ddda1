# SPDX-License-Identifier: Apache-2.0
"""What an exchange costs: bytes between ranks, operations and waits of the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan, Traffic
from distributed.pixels import PixelPartition
from distributed.simulation import simulate_exchange
from exchange_splats import SIDE, possible_gradient, random_partition, random_splats
from masksplat.types import Splats
from rank_harness import run_ranks


def two_views(num_rows: int, dtype: torch.dtype = torch.float32) -> Splats:
    """Rows of rank 0 for view 0, all with boxes in the upper half: 2 shaded, 1 capped, 2 not drawn, and so on."""
    splats = random_splats([num_rows, 0], np.random.default_rng(0), dtype)
    splats.boxes[:] = torch.tensor([0, 0, 9, 9], dtype=torch.int32)
    splats.rows[:, 9] = torch.tensor([1.0, 0, 1, 0, 1])[:num_rows]
    splats.rows[:, 5] = torch.tensor([0.5, 1.0, 0.5, 0.5, 1.0])[:num_rows]
    splats.ids = torch.arange(num_rows) * 50
    return splats


def count_traffic(world: Communicator, boxes_travel: bool, id_bound: int | None) -> Traffic:
    """Rank 0 has 5 rows; rank 1 draws them and owns nothing."""
    splats = two_views(5 if world.rank == 0 else 0)
    partition = PixelPartition.of_whole_views([40, 40], [1, 0], 2)
    sizes = None if boxes_travel else [(50, 40), (50, 40)]
    plan = ExchangePlan.for_partition(world, splats, partition, sizes=sizes, id_bound=id_bound)
    received = plan.forward(splats)
    assert received.ids.tolist() == ([0, 100, 200, 50, 150] if world.rank == 1 else [])
    plan.backward(torch.zeros(len(received), 10))
    return plan.record.traffic()


@pytest.mark.parametrize(
    ("boxes_travel", "id_bound", "row_bytes"),
    [
        (True, None, 64),
        (False, None, 48),
        (False, (1 << 29) + 1, 44),
        (False, 1 << 29, 43),
        (False, 1 << 13, 41),
        (False, (1 << 13) + 1, 42),
    ],
)
def test_bytes_are_counted(boxes_travel: bool, id_bound: int | None, row_bytes: int) -> None:
    owner, other = run_ranks(count_traffic, 2, boxes_travel, id_bound)
    back = 2 * 36 + 40 + 2 * 4
    assert owner == Traffic(copies=5, own_copies=0, forward_bytes=5 * row_bytes, backward_bytes=back, count_bytes=24)
    assert owner.grendel_bytes == 5 * 88
    assert owner.num_bytes == 5 * row_bytes + back + 24
    assert (other.copies, other.forward_bytes, other.backward_bytes) == (0, 0, 0)


def own_copies_only(world: Communicator) -> Traffic:
    """Every rank draws the view that only it has splats of."""
    splats = random_splats(
        [3 if view == world.rank else 0 for view in range(2)], np.random.default_rng(0), torch.float32
    )
    splats.boxes[:] = torch.tensor([0, 0, 9, 9], dtype=torch.int32)
    plan = ExchangePlan.for_partition(world, splats, PixelPartition.of_whole_views([40, 40], [0, 1], 2))
    assert plan.num_received == 3
    return plan.record.traffic()


def test_copies_for_oneself_cost_nothing() -> None:
    for traffic in run_ranks(own_copies_only, 2):
        assert (traffic.copies, traffic.own_copies, traffic.forward_bytes, traffic.backward_bytes) == (3, 3, 0, 0)


def joined(parts: list[Splats]) -> Splats:
    """The splats of all ranks as one table's: view after view, within a view rank after rank."""
    num_views = len(parts[0].view_offsets) - 1
    ranges = [(part, slice(*part.view_range(view))) for view in range(num_views) for part in parts]
    lengths = sum(part.view_offsets.diff() for part in parts)
    columns = {
        name: torch.cat([getattr(part, name)[rows] for part, rows in ranges])
        for name in ("rows", "depths", "ids", "gaussians", "boxes")
    }
    return replace(parts[0], **columns, view_offsets=torch.tensor([0, *lengths.cumsum(0).tolist()]))


def traffic_of(world: Communicator, shards: list[Splats], partition: PixelPartition) -> Traffic:
    plan = ExchangePlan.for_partition(
        world, shards[world.rank], partition, sizes=[(SIDE, SIDE)] * len(partition.heights), id_bound=1 << 20
    )
    return plan.record.traffic()


def test_the_simulation_counts_what_ranks_send() -> None:
    rng = np.random.default_rng(3)
    shards = [random_splats([20, 0, 9], rng, torch.float32), random_splats([5, 30, 0], rng, torch.float32)]
    for rank, shard in enumerate(shards):
        shard.gaussians[:] = rank
    partition = random_partition(3, 2, rng)
    answers = run_ranks(traffic_of, 2, shards, partition)
    everything = joined(shards)
    found = simulate_exchange(everything, everything.gaussians.long(), partition, id_bound=1 << 20)
    assert vars(found) == {name: sum(getattr(answer, name) for answer in answers) for name in vars(found)}
    assert 0 < found.own_copies < found.copies


class Operations(TorchDispatchMode):
    """Counts the operations of torch and lists those for which a GPU would have to wait."""

    WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not is_view
        self.waits += [name] * name.startswith(self.WAITS)
        return func(*args, **(kwargs or {}))


def count_operations(world: Communicator, num_views: int) -> tuple[list[int], list[str]]:
    """Operations that are no views in the plan, its forward and its backward; boxes are one call."""
    rng = np.random.default_rng(world.rank)
    partition = PixelPartition.of_cuts([SIDE] * num_views, [7 * num_views // 2], range(2))
    splats = random_splats([20] * num_views, rng, torch.float32)
    splats.rows[:, [2, 4]] = splats.rows[:, [2, 4]].abs() + 5  # ellipses
    with Operations() as plan_operations:
        plan = ExchangePlan.for_partition(world, splats, partition, sizes=[(SIDE, SIDE)] * num_views, id_bound=1 << 31)
    with Operations() as forward_operations:
        received = plan.forward(splats)
    y = possible_gradient(received, rng)
    with Operations() as backward_operations:
        plan.backward(y)
    counted = [plan_operations, forward_operations, backward_operations]
    return [part.count for part in counted], [name for part in counted for name in part.waits]


@pytest.mark.parametrize("num_views", [1, 2, 4])
def test_the_host_waits_for_nothing_but_the_counts(num_views: int) -> None:
    """And asks for few operations: on a GPU each costs it as much as a small kernel."""
    for counts, waits in run_ranks(count_operations, 2, num_views):
        assert not waits
        assert counts[0] <= 26 and counts[1] <= 22 and counts[2] <= 33
