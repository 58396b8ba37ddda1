# SPDX-License-Identifier: Apache-2.0
"""The kernels of the exchange against its torch operations: the same splats, the same gradients to the bit.

Emulated ranks talk over gloo; with `-m gpu`, two to four GPUs over nccl.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distributed.exchange
import distributed.totals
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan
from distributed.kernel_passage import KernelPassage
from distributed.pixels import PixelPartition
from distributed.routes import numbers_back
from distributed.torch_passage import TorchPassage
from exchange_splats import SIDE, possible_gradient, random_partition, random_splats
from masksplat.cuda.body import CudaBody
from masksplat.cuda.capacity import Capacity, Windows
from masksplat.cuda.launcher import Launcher
from masksplat.types import Splats
from rank_harness import run_ranks
from test_exchange import adjoint_cases, assembled, gradients_of, moved, partitions_for, waiting_forbidden
from test_exchange_traffic import Operations

SIZES = [1, 2, 3]
ROOM = 40


@contextmanager
def exchanged_by(launcher: Launcher | None) -> Iterator[None]:
    """A block in which every exchange of float32, and the numbers of a step, go through this launcher, or torch."""
    before, before_totals = distributed.exchange.kernels_for, distributed.totals.kernels_for

    def chosen(splats: Splats) -> Launcher | None:
        return launcher if splats.rows.dtype == torch.float32 else None

    distributed.exchange.kernels_for, distributed.totals.kernels_for = chosen, lambda _: launcher
    try:
        yield
    finally:
        distributed.exchange.kernels_for, distributed.totals.kernels_for = before, before_totals


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


def ellipses(lengths: list[int], rank: int, seed: int, room: int = ROOM) -> Splats:
    """Rows with proper conics, behind them `room` for more whose contents are nonsense; ids are unique."""
    rng = np.random.default_rng([seed, rank])
    splats = random_splats([room] * len(lengths), rng, torch.float32)
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
    room = len(splats) // len(splats.counts)
    return (torch.arange(room) < splats.counts.cpu()[:, None]).reshape(-1)


def order_of(received: Splats) -> Tensor:
    """The rows region after region, in each by id."""
    ranges = [received.view_range(region) for region in range(len(received.view_offsets) - 1)]
    if received.counts is not None:
        ranges = [(first, first + count) for (first, _), count in zip(ranges, received.counts.tolist(), strict=True)]
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


@dataclass(frozen=True)
class FixedRoom:
    """Windows of a size that nobody grows."""

    windows: Windows
    status: Tensor

    def windows_for(self, *_: int) -> Windows:
        return self.windows

    def provide(self, _: object) -> bool:
        return False


def needs(plan: ExchangePlan) -> Windows:
    """By the numbers of rows that the host has read."""
    assert isinstance(plan.passage, KernelPassage)
    routes = plan.passage.routes.read()
    ranks = range(len(routes.num_regions))
    pairs = [routes.between(source, target).sum(axis=1) for source in ranks for target in ranks if source != target]
    regions = [
        np.sum([routes.between(source, target).sum(axis=0) for source in ranks], axis=0).max(initial=0)
        for target in ranks
    ]
    rows = max((int(pair.sum()) for pair in pairs), default=0)
    return Windows(rows, max(numbers_back(np.array(pairs).reshape(-1, 3)), default=0), int(max(regions)))


def window_case(world: Communicator, seed: int) -> tuple[Splats, PixelPartition, dict[str, Any]]:
    """Up to 2 400 rows, which a window needs several blocks of threads for."""
    shared = np.random.default_rng(seed)
    partition = random_partition(int(shared.integers(1, 5)), world.size, shared)
    room = int(shared.choice([40, 600]))
    lengths = shared.choice([0, 1, room // 2, room], (world.size, len(partition.heights)))[world.rank].tolist()
    splats = moved(ellipses(lengths, world.rank, seed, room), world.device)
    options: dict[str, Any] = {"id_bound": [1 << 20, 1 << 40][seed // 2 % 2]}
    if seed % 2:
        options["sizes"] = [(SIDE - 9 * view, height) for view, height in enumerate(partition.heights)]
    return splats, partition, options


@contextmanager
def unwritten_memory_shows() -> Iterator[None]:
    """A block in which memory that nobody has written holds NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare_windows(world: Communicator, num_seeds: int) -> list[tuple[int, int]]:
    """Windows against the exchange whose rows the host counts; copies that this rank got, blocks of the windows."""
    with unwritten_memory_shows():
        return [compare_windows_once(world, *window_case(world, seed)) for seed in range(num_seeds)]


def compare_windows_once(
    world: Communicator, splats: Splats, partition: PixelPartition, options: dict[str, Any]
) -> tuple[int, int]:
    with exchanged_by(kernels_of(world)):
        tight = ExchangePlan.for_partition(world, splats, partition, **options)
        expected, needed = tight.forward(splats), needs(tight)
        windows = Windows(*(-(-max(need, 1) // 256) * 256 for need in needed[:2]), needed.region_rows)
        room = FixedRoom(windows, torch.zeros(8, dtype=torch.int32, device=world.device))
        with waiting_forbidden(world.device):
            plan = ExchangePlan.for_partition(world, splats, partition, **options, room=room)
            received = plan.forward(splats)
    assert received.view_offsets.tolist() == [
        windows.region_rows * region for region in range(len(partition.regions[world.rank]) + 1)
    ]
    assert received.counts is not None and received.counts.tolist() == expected.view_offsets.diff().tolist()
    mine, theirs = order_of(received), order_of(expected)
    for name in ("rows", "depths", "ids", "gaussians", "boxes"):
        assert torch.equal(getattr(received, name).cpu()[mine], getattr(expected, name).cpu()[theirs]), name
    y = possible_gradient(moved(expected, "cpu"), np.random.default_rng(world.rank))
    y_mine = torch.full((len(received), 10), torch.nan).index_copy_(0, mine, y[theirs]).to(world.device)
    expected_rows = tight.backward(y.to(world.device)).cpu()
    with waiting_forbidden(world.device):
        d_rows = plan.backward(y_mine)
    used = in_use(splats)
    assert torch.equal(d_rows.cpu()[used], expected_rows[used])
    assert room.status.tolist() == [0, 0, 0, *needed, 0, 0]
    ours, wanted = plan.record.traffic(), tight.record.traffic()
    window_bytes = windows.rows * plan.record.wire.row_bytes + 4 * windows.numbers if plan.record.wire else 0
    assert replace(ours, unused_bytes=0) == wanted and wanted.unused_bytes == 0
    assert ours.num_bytes == (world.size - 1) * window_bytes + ours.count_bytes
    return int(received.counts.sum()), windows.rows // 256


@pytest.mark.parametrize("size", [2, 3])
def test_windows_bring_what_counted_rows_bring(size: int) -> None:
    """And the same gradients to the bit: nothing of what lies in a window behind its rows is taken for a row."""
    for found in run_ranks(compare_windows, ready(size), 12):
        assert sum(count for count, _ in found) > 1000
        assert {1, 2} <= {blocks for _, blocks in found}


def overflow_windows(world: Communicator, seed: int) -> list[list[int]]:
    """The status with ample room, then with one row, number or place too few; nothing is written then."""
    splats, partition, options = window_case(world, seed)
    found = []
    with exchanged_by(kernels_of(world)), unwritten_memory_shows():
        needed = needs(ExchangePlan.for_partition(world, splats, partition, **options))
        for lacking in range(3):
            sizes = [1 << 12, 1 << 14, 1 << 12]
            sizes[lacking] = needed[lacking] - 1
            room = FixedRoom(Windows(*sizes), torch.zeros(8, dtype=torch.int32, device=world.device))
            plan = ExchangePlan.for_partition(world, splats, partition, **options, room=room)
            assert isinstance(plan.passage, KernelPassage)
            packed = plan.passage.copies.pack(plan.passage.layout, plan.passage._words, plan.passage.numbers.rows.total)
            assert bool((packed == torch.iinfo(torch.int32).max).all())
            received = plan.forward(splats)
            assert received.counts is not None and not received.counts.any()
            assert bool(received.rows.isnan().all())
            assert bool(plan.backward(torch.zeros_like(received.rows)).isnan().all())
            found.append(room.status.tolist())
        assert found == [[1, 0, 0, *needed, 0, 0]] * 3
    return found


def test_what_has_no_room_is_found_by_all_ranks_and_written_by_none() -> None:
    for seed in (3, 5):
        first, *others = run_ranks(overflow_windows, ready(3), seed)
        assert all(other == first for other in others)


def emulated_steps(world: Communicator, partitions: list[PixelPartition]) -> list[tuple[Any, ...]]:
    """Whole steps of the cuda body; several ranks exchange in windows."""
    body = CudaBody(launcher=make_launcher(EMULATED))
    room = body.capacity if world.size > 1 else None
    with exchanged_by(body.launcher):
        found = [gradients_of(world, partition, torch.float32, body, room) for partition in partitions]
    assert (body.capacity.windows is not None) == (world.size > 1) and not body.status[0]
    return found


def test_gradients_of_windows_do_not_depend_on_the_number_of_ranks() -> None:
    """Law 2 for one step: loss and gradients of parameters and masks."""
    for source in ("project", "project_backward", "photometric", "binning", "radix_sort", "rasterize"):
        make_launcher(EMULATED).kernels(source)
    alone = [emulated_steps(Communicator(), partitions_for(1))]
    for size in (2, 3):
        answers = run_ranks(emulated_steps, ready(size), partitions_for(size))
        for case in range(4):
            expected, expected_loss = assembled(alone, case)
            found, loss = assembled(answers, case)
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
            assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)


def test_windows_grow_where_more_was_needed() -> None:
    """By half of the need and in whole blocks of threads; at first a region shows one in 16 of all Gaussians."""
    capacity = Capacity(torch.device("cpu"))
    assert capacity.windows_for(100_000, 4, 2) == capacity.windows == Windows(6_400, 64_000, 6_400)
    assert capacity.windows_for(7, 4, 2) == Windows(6_400, 64_000, 6_400)
    capacity.status[0], capacity.status[3:6] = 1, torch.tensor([30_000, 64_000, 25_089], dtype=torch.int32)
    assert capacity.recover() and not capacity.recover()
    assert capacity.windows == Windows(45_056, 96_000, 37_888)
    assert capacity.provide((36_044, 1, 30_311)) and not capacity.provide((36_044, 1, 30_311))
    assert capacity.windows == Windows(45_056, 96_000, 45_568)  # 0.8 of the last one was 30 310
    assert Capacity(torch.device("cpu")).windows_for(10, 4, 2) == Windows(1024, 10_240, 1024)


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
    assert sum(count for count, _ in compare_windows(world, 24)) > 1000
    for seed in (3, 5):
        overflow_windows(world, seed)
    return adjoint_cases(world, 16)


@pytest.mark.gpu
def test_the_kernels_between_gpus() -> None:
    """Without a wait in forward and backward, and with windows none in making the plan either."""
    size = min(torch.cuda.device_count(), 4)
    if size < 2:
        pytest.skip(f"needs two GPUs, found {size}")
    for left, right, scale, tolerance in run_ranks(device_cases, size, device_type="cuda", seconds=240.0)[0]:
        assert abs(left - right) <= tolerance * scale
