# SPDX-License-Identifier: Apache-2.0
"""The kernels of the exchange against its torch operations: the same splats, the same gradients to the bit.

Emulated ranks talk over gloo; with `-m gpu`, two to four GPUs over nccl.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distributed.exchange
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan
from distributed.kernel_passage import KernelPassage
from distributed.pixels import PixelPartition
from distributed.torch_passage import TorchPassage
from exchange_splats import SIDE, possible_gradient, random_partition, random_splats
from masksplat.cuda.launcher import Launcher
from masksplat.types import Splats
from rank_harness import run_ranks
from test_exchange import adjoint_cases, moved, waiting_forbidden
from test_exchange_traffic import Operations

SIZES = [1, 2, 3]
ROOM = 40


@contextmanager
def exchanged_by(launcher: Launcher | None) -> Iterator[None]:
    """A block in which every exchange of float32 goes through this launcher, or through torch operations."""
    before = distributed.exchange.kernels_for

    def chosen(splats: Splats) -> Launcher | None:
        return launcher if splats.rows.dtype == torch.float32 else None

    distributed.exchange.kernels_for = chosen
    try:
        yield
    finally:
        distributed.exchange.kernels_for = before


def kernels_of(world: Communicator) -> Launcher:
    """The emulator, or what drives this rank's GPU."""
    if world.device.type == "cpu":
        return make_launcher(EMULATED)
    from masksplat.cuda.devices import launcher_of

    return launcher_of(world.device)


def ready(size: int) -> int:
    """`size`, when there is an emulator; it is compiled before ranks need it."""
    make_launcher(EMULATED).kernels("exchange")
    return size


def ellipses(lengths: list[int], rank: int, seed: int) -> Splats:
    """Rows with proper conics, some of them behind `ROOM` for more whose contents are nonsense; ids are unique."""
    rng = np.random.default_rng([seed, rank])
    splats = random_splats([ROOM] * len(lengths), rng, torch.float32)
    rows = splats.rows
    rows[:, :2] = torch.from_numpy(rng.uniform(-5, SIDE + 5, (len(rows), 2)))
    half, turn = rng.uniform(0.05, 2, (len(rows), 2)), rng.uniform(-0.99, 0.99, len(rows))
    rows[:, 2], rows[:, 4] = torch.from_numpy(half[:, 0] ** 2), torch.from_numpy(half[:, 1] ** 2)
    rows[:, 3] = torch.from_numpy(half[:, 0] * half[:, 1] * turn)
    splats.ids = torch.from_numpy(rng.permutation(len(rows))) + 10_000 * rank
    splats.counts = torch.tensor(lengths, dtype=torch.int32)
    unused = ~in_use(splats)
    rows[unused], splats.depths[unused], splats.ids[unused] = torch.nan, torch.nan, -1
    return splats


def in_use(splats: Splats) -> Tensor:
    assert splats.counts is not None
    return (torch.arange(ROOM) < splats.counts.cpu()[:, None]).reshape(-1)


def order_of(received: Splats) -> Tensor:
    """The rows region after region, in each by id."""
    ranges = [received.view_range(region) for region in range(len(received.view_offsets) - 1)]
    ids = received.ids.cpu()
    return torch.cat(
        [torch.empty(0, dtype=torch.int64), *(first + ids[first:last].argsort() for first, last in ranges)]
    )


def compare(world: Communicator, num_seeds: int) -> int:
    """Both ways of the same splats; returns how many copies this rank got."""
    num_received = 0
    for seed in range(num_seeds):
        shared = np.random.default_rng(seed)
        partition = random_partition(int(shared.integers(1, 5)), world.size, shared)
        lengths = shared.choice([0, 1, 33, ROOM], (world.size, len(partition.heights)))[world.rank].tolist()
        splats = ellipses(lengths, world.rank, seed)
        options: dict[str, Any] = {"id_bound": [None, 1 << 20][seed // 2 % 2]}
        if seed % 2:
            options["sizes"] = [(SIDE - 9 * view, height) for view, height in enumerate(partition.heights)]
        if seed % 3 == 0 or world.size == 1:  # one rank that keeps all rows exchanges nothing
            options["keep"] = torch.from_numpy(np.random.default_rng(seed).random(len(splats)) < 0.7).to(world.device)
        num_received += compare_once(world, moved(splats, world.device), partition, options)
    return num_received


def compare_once(world: Communicator, splats: Splats, partition: PixelPartition, options: dict[str, Any]) -> int:
    with exchanged_by(None):
        torch_plan = ExchangePlan.for_partition(world, splats, partition, **options)
    expected = torch_plan.forward(splats)
    with exchanged_by(kernels_of(world)):
        plan = ExchangePlan.for_partition(world, splats, partition, **options)
    if plan.passage is None:
        return 0
    assert isinstance(plan.passage, KernelPassage) and isinstance(torch_plan.passage, TorchPassage)
    with waiting_forbidden(world.device):
        received = plan.forward(splats)
    assert torch.equal(received.view_offsets, expected.view_offsets)
    mine, theirs = order_of(received), order_of(expected)
    for name in ("rows", "depths", "ids", "gaussians"):
        found, wanted = getattr(received, name).cpu()[mine], getattr(expected, name).cpu()[theirs]
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    difference = (received.boxes.cpu()[mine] - expected.boxes.cpu()[theirs]).abs()
    assert difference.sum() <= (1 if "sizes" in options else 0)  # logarithms may differ in the last digit
    assert received.slots.shape == expected.slots.shape
    y = torch.empty(received.rows.shape)
    y[theirs] = possible_gradient(replace(expected, rows=expected.rows.cpu()[theirs]), np.random.default_rng(len(y)))
    y_mine = torch.empty_like(y).index_copy_(0, mine, y[theirs]).to(world.device)
    expected_rows = torch_plan.backward(y.to(world.device)).cpu()
    with waiting_forbidden(world.device):
        d_rows = plan.backward(y_mine)
    used = in_use(splats)
    assert d_rows.shape == expected_rows.shape and torch.equal(d_rows.cpu()[used], expected_rows[used])
    ours, wanted = plan.record.traffic(), torch_plan.record.traffic()
    assert (ours.copies, ours.own_copies, ours.backward_bytes) == (
        wanted.copies,
        wanted.own_copies,
        wanted.backward_bytes,
    )
    return len(received)


@pytest.mark.parametrize("size", SIZES)
def test_kernels_do_what_torch_operations_do(size: int) -> None:
    """Views in regions of any kind, ranks without regions, rows of none, one or several copies, room behind rows."""
    assert all(count > 50 for count in run_ranks(compare, ready(size), 12))


def emulated_adjoint_cases(world: Communicator, num_cases: int) -> list[tuple[float, float, float, float]]:
    with exchanged_by(kernels_of(world)):
        return adjoint_cases(world, num_cases)


@pytest.mark.parametrize("size", [2, 4])
def test_backward_is_the_adjoint_of_forward(size: int) -> None:
    """Law 4, with every row compared with a dense oracle."""
    for left, right, scale, tolerance in run_ranks(emulated_adjoint_cases, ready(size), 9)[0]:
        assert abs(left - right) <= tolerance * scale


class CountedLauncher:
    """Counts launches."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher, self.device, self.count = launcher, launcher.device, 0

    def __call__(self, kernel: str, *arguments: Any, **options: Any) -> None:
        self.count += 1
        self.launcher(kernel, *arguments, **options)


def count_calls(world: Communicator, num_views: int) -> tuple[int, int, list[str]]:
    """Launches, operations of torch that are no views, and waits, of a plan with its forward and backward."""
    partition = PixelPartition.of_cuts([SIDE] * num_views, [7 * num_views // 2], range(2))
    splats = ellipses([20] * num_views, world.rank, 0)
    launcher = CountedLauncher(kernels_of(world))
    with exchanged_by(launcher), Operations() as operations:
        plan = ExchangePlan.for_partition(world, splats, partition, sizes=[(SIDE, SIDE)] * num_views, id_bound=1 << 31)
        received = plan.forward(splats)
        plan.backward(torch.zeros_like(received.rows))
    return launcher.count, operations.count, operations.waits


@pytest.mark.parametrize("num_views", [1, 4])
def test_the_host_does_little(num_views: int) -> None:
    for launches, operations, waits in run_ranks(count_calls, ready(2), num_views):
        assert launches == 6 and operations <= 25 and not waits


def device_cases(world: Communicator) -> list[tuple[float, float, float, float]]:
    assert compare(world, 24) > 50
    return adjoint_cases(world, 16)


@pytest.mark.gpu
def test_the_kernels_between_gpus() -> None:
    """Without a wait in forward and backward."""
    size = min(torch.cuda.device_count(), 4)
    if size < 2:
        pytest.skip(f"needs two GPUs, found {size}")
    for left, right, scale, tolerance in run_ranks(device_cases, size, device_type="cuda", seconds=240.0)[0]:
        assert abs(left - right) <= tolerance * scale
