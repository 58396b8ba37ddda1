# SPDX-License-Identifier: Apache-2.0
"""Law 4 (adjoint) for any counts, and one whole forward and backward of the step on 1 to 4 ranks (law 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan, Traffic
from distributed.kernel_passage import RoomForRows
from distributed.numbering import order_numbers
from distributed.pixels import PixelPartition, Region, num_tile_rows
from distributed.routes import select_rows
from exchange_splats import possible_gradient, random_partition, random_splats
from kernel_scenes import parameters_of, random_scene
from masksplat.ops import Body, get_body
from masksplat.types import Gaussians, ProjectionSettings, Splats, Views
from rank_harness import run_ranks

SIZES = [1, 2, 3, 4]


def rows_of_region(splats: Splats, region: Region, partition: PixelPartition, keep: torch.Tensor) -> list[int]:
    """What the region needs, one row after the other."""
    start, stop = region.drawn_rows(partition.heights[region.view])
    first, last = splats.view_range(region.view)
    boxes = splats.boxes.tolist()
    return [row for row in range(first, last) if keep[row] and boxes[row][1] < stop and boxes[row][3] > start]


def moved(splats: Splats, device: torch.device | str) -> Splats:
    """On a device; the offsets of views stay on the host."""
    tensors = {
        name: value.to(device)
        for name, value in vars(splats).items()
        if isinstance(value, torch.Tensor) and name != "view_offsets"
    }
    return replace(splats, **tensors)


def there_and_back(
    world: Communicator,
    splats: Splats,
    partition: PixelPartition,
    keep: torch.Tensor | None,
    rng: np.random.Generator,
) -> tuple[Splats, torch.Tensor, torch.Tensor]:
    """What is received, a gradient of it, and what that becomes at the owners; on the host.

    On a GPU forward and backward must not wait for it.
    """
    here = moved(splats, world.device)
    plan = ExchangePlan.for_partition(world, here, partition, keep=None if keep is None else keep.to(world.device))
    with waiting_forbidden(world.device):
        received = plan.forward(here)
    on_host = moved(received, "cpu")
    y = possible_gradient(on_host, rng)
    y_here = y.to(world.device)
    with waiting_forbidden(world.device):
        d_rows = plan.backward(y_here)
    return on_host, y, d_rows.cpu()


@contextmanager
def waiting_forbidden(device: torch.device) -> Iterator[None]:
    """torch raises when the host would wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def adjoint_case(world: Communicator, seed: int) -> tuple[float, float, float, float]:
    """<E x, y>, <x, E^T y>, their scale and tolerance, after checking what arrived and what returned row by row."""
    shared = np.random.default_rng(seed)
    dtype = torch.float64 if seed % 3 else torch.float32
    partition = random_partition(int(shared.integers(1, 4)), world.size, shared)
    lengths = shared.choice([0, 1, 7, 30], (world.size, len(partition.heights)))[world.rank].tolist()
    rng = np.random.default_rng([seed, world.rank])
    splats = random_splats(lengths, rng, dtype)
    keep = None if seed % 4 else torch.from_numpy(rng.random(len(splats)) < 0.7)
    received, y, d_rows = there_and_back(world, splats, partition, keep, rng)
    assert len(received.view_offsets) == len(partition.regions[world.rank]) + 1
    assert d_rows.shape == splats.rows.shape
    chosen = [
        [
            rows_of_region(splats, region, partition, torch.ones(len(splats)) if keep is None else keep)
            for region in mine
        ]
        for mine in partition.regions
    ]
    everything = check_against_everybody(world, splats, chosen, received, y, d_rows)
    return (*everything, 1e-14 if dtype == torch.float64 else 1e-6)


def everybody(world: Communicator, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, of different lengths, by a way of their own (no plan)."""
    lengths = [row[0] for row in world.gather_counts([len(tensor)])]
    padded = torch.cat([tensor, tensor.new_zeros((max(lengths) - len(tensor), *tensor.shape[1:]))])
    return [part[:length] for part, length in zip(world.gather(padded), lengths, strict=True)]


def check_against_everybody(
    world: Communicator,
    splats: Splats,
    chosen: list[list[list[int]]],
    received: Splats,
    y: torch.Tensor,
    d_rows: torch.Tensor,
) -> tuple[float, float, float]:
    """Compare with a dense oracle: every row is named by its id."""
    ids, rows = torch.cat(everybody(world, splats.ids)), torch.cat(everybody(world, splats.rows))
    depths, boxes = torch.cat(everybody(world, splats.depths)), torch.cat(everybody(world, splats.boxes))
    place = {number: row for row, number in enumerate(ids.tolist())}
    found = [place[number] for number in received.ids.tolist()]
    assert torch.equal(received.rows, rows[found]) and torch.equal(received.depths, depths[found])
    if world.size > 1 or len(received) < len(splats):
        assert torch.equal(received.boxes, boxes[found])
        check_selection(world, splats, chosen, received)
    returned, owner_ids = torch.cat(everybody(world, y)), torch.cat(everybody(world, received.ids))
    expected = torch.zeros_like(rows).index_add_(
        0, torch.tensor([place[n] for n in owner_ids.tolist()]).long(), returned
    )
    mine = torch.tensor([place[number] for number in splats.ids.tolist()]).long()
    torch.testing.assert_close(d_rows, expected[mine], rtol=1e-5, atol=1e-5)
    left = world.sum((received.rows.double() * y.double()).sum())
    right = world.sum((splats.rows.double() * d_rows.double()).sum())
    scale = world.sum((received.rows.double() * y.double()).abs().sum())
    return float(left), float(right), float(scale)


def check_selection(world: Communicator, splats: Splats, chosen: list[list[list[int]]], received: Splats) -> None:
    """Each region got exactly the rows that it needs."""
    for rank, regions in enumerate(chosen):
        for region, rows in enumerate(regions):
            wanted = torch.cat(everybody(world, splats.ids[rows])).sort().values
            if rank == world.rank:
                first, last = received.view_range(region)
                assert torch.equal(received.ids[first:last].sort().values, wanted)


def adjoint_cases(world: Communicator, num_cases: int) -> list[tuple[float, float, float, float]]:
    return [adjoint_case(world, seed) for seed in range(num_cases)]


@pytest.mark.parametrize("size", SIZES)
def test_backward_is_the_adjoint_of_forward(size: int) -> None:
    """Law 4."""
    num_something = 0
    for left, right, scale, tolerance in run_ranks(adjoint_cases, size, 16)[0]:
        assert abs(left - right) <= tolerance * scale
        num_something += scale > 0
    assert num_something > 5


@pytest.mark.gpu
def test_the_exchange_between_gpus() -> None:
    """Law 4 over nccl, without a wait in forward and backward."""
    size = min(torch.cuda.device_count(), 4)
    if size < 2:
        pytest.skip(f"needs two GPUs, found {size}")
    for left, right, scale, tolerance in run_ranks(adjoint_cases, size, 16, device_type="cuda", seconds=120.0)[0]:
        assert abs(left - right) <= tolerance * scale


def test_one_rank_gets_the_very_tensors_back() -> None:
    splats = random_splats([4], np.random.default_rng(0), torch.float32)
    partition = PixelPartition.of_whole_views([40], [0], 1)
    plan = ExchangePlan.for_partition(Communicator(), splats, partition, sizes=[(40, 40)])
    assert plan.forward(splats) is splats
    gradient = torch.ones(4, 10)
    assert plan.backward(gradient) is gradient
    assert plan.record.traffic() == Traffic(4, 4, 0, 0, 0)


def test_evaluation_leaves_out_what_is_not_drawn() -> None:
    splats = random_splats([6], np.random.default_rng(0), torch.float32)
    splats.boxes[:] = torch.tensor([0, 0, 9, 9], dtype=torch.int32)
    splats.rows[:, 5] = 0.5
    splats.rows[:, 9] = torch.tensor([1.0, 0, 1, 0, 1, 1])
    partition = PixelPartition.of_whole_views([40], [0], 1)
    keep = splats.rows[:, 9] != 0
    plan = ExchangePlan.for_partition(Communicator(), splats, partition, keep=keep)
    assert torch.equal(plan.forward(splats).rows, splats.rows[keep])
    assert torch.equal(plan.backward(torch.ones(4, 10))[:, 0], keep.float())


def test_rows_go_where_their_boxes_reach_the_halo() -> None:
    splats = random_splats([4], np.random.default_rng(0), torch.float32)
    splats.boxes = torch.tensor([[0, 0, 9, 27], [0, 27, 9, 28], [0, 37, 9, 38], [0, 36, 9, 37]], dtype=torch.int32)
    splats.rows[:, 5], splats.rows[:, 9] = 0.5, 1
    partition = PixelPartition((48,), ((Region(0, 0, 2),), (Region(0, 2, 3),)))  # drawn rows: 0..37 and 27..48
    chosen = select_rows(splats, partition)
    assert chosen.counts.tolist() == [3, 0, 0, 3, 0, 0]
    assert chosen.rows[:6].tolist() == [0, 1, 3, 1, 2, 3]


def test_rows_beyond_what_a_view_fills_stay() -> None:
    """A body may leave room behind the rows of each view; what is there means nothing."""
    splats = random_splats([4, 4], np.random.default_rng(0), torch.float32)
    splats.boxes[:] = torch.tensor([0, 0, 9, 9], dtype=torch.int32)
    splats.rows[:, 5], splats.rows[:, 9] = 0.5, 1
    splats.counts = torch.tensor([3, 1], dtype=torch.int32)
    chosen = select_rows(splats, PixelPartition.of_whole_views([40, 40], [1, 0], 2))
    assert chosen.counts.tolist() == [1, 0, 0, 3, 0, 0]
    assert chosen.rows[:4].tolist() == [4, 0, 1, 2]


# One whole step: project, exchange, rasterize, loss, and back.


def scene_of(num_views: int, dtype: torch.dtype) -> tuple[Gaussians, Views, torch.Tensor, list[torch.Tensor]]:
    """Views of two sizes, masks 0 or 1, photos. Some Gaussians are capped, some tie in depth across ranks."""
    gaussians, views, masks = random_scene(30, (40, 52), num_views=num_views, dtype=dtype, sh_degree=1)
    gaussians.opacities[:8] = 6.0
    gaussians.means[1::4] = gaussians.means[::4][: len(gaussians.means[1::4])]
    sizes = tuple((40, 52) if view % 2 == 0 else (33, 41) for view in range(num_views))
    rng = np.random.default_rng(5)
    photos = [torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return gaussians, Views(views.viewmats, views.intrinsics, sizes), (masks > 0.5).to(dtype), photos


def gradients_of(
    world: Communicator, partition: PixelPartition, dtype: torch.dtype, body: Body, room: RoomForRows | None = None
) -> tuple[Any, ...]:
    """(ids of my Gaussians, gradients by their parameters, loss of my regions) of one step."""
    gaussians, views, masks, photos = scene_of(len(partition.heights), dtype)
    ids = torch.arange(len(gaussians))
    mine = (
        (ids * 7 % world.size == world.rank) & (ids % 5 > 0) if world.size > 3 else ids * 7 % world.size == world.rank
    )
    if world.size > 3 and world.rank == 0:
        mine |= ids % 5 == 0  # shards of very different sizes
    shard = Gaussians(*(values[mine] for values in parameters_of(gaussians)))
    settings = ProjectionSettings(sh_degree=1)
    order = order_numbers(1000 * ids[mine] ** 5, world)
    splats = body.project(shard, views, settings, masks=masks[mine], ids=order.numbers)
    plan = ExchangePlan.for_partition(world, splats, partition, sizes=views.sizes, id_bound=order.bound, room=room)
    received = plan.forward(splats)
    d_received, loss = torch.zeros_like(received.rows), torch.zeros((), dtype=torch.float64)
    for number, region in enumerate(partition.regions[world.rank]):
        width, height = views.sizes[region.view]
        (own_start, own_stop), drawn = region.own_rows(height), region.drawn_rows(height)
        frame = body.rasterize(received, number, (width, height), torch.full((3,), 0.3, dtype=dtype), rows=drawn)
        own = (own_start - drawn[0], own_stop - drawn[0])
        photo = photos[region.view][drawn[0] : drawn[1]]
        part = body.photometric(frame.rgb, photo, 0.2, own_rows=own, image_height=height, row_start=drawn[0])
        body.rasterize_backward(received, frame, part.d_rgb, d_received)
        loss += 0.8 * part.l1 - 0.2 * part.ssim
    gradients = body.project_backward(shard, views, settings, splats, plan.backward(d_received))
    total = world.sum(loss)
    flat = torch.cat([values.reshape(len(shard), -1) for values in gradients], dim=1)
    return ids[mine].numpy(), flat.detach().numpy(), float(total)


def steps(world: Communicator, partitions: list[PixelPartition], dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [gradients_of(world, partition, dtype, get_body("reference")) for partition in partitions]


def partitions_for(size: int) -> list[PixelPartition]:
    """Whole views; strips of one view (with more ranks than rows, too); strips across two views of different sizes."""
    heights = [52, 41]
    total = sum(map(num_tile_rows, heights))
    reversed_ranks = list(range(size))[::-1]
    cuts = [total * part // size for part in range(1, size)]
    return [
        PixelPartition.of_whole_views(heights[:1], [size - 1], size),
        PixelPartition.of_cuts(heights[:1], [min(part, 4) for part in range(1, size)], reversed_ranks),
        PixelPartition.of_cuts(heights, cuts, reversed_ranks),
        PixelPartition.of_whole_views(heights, [0, size - 1], size),
    ]


def assembled(answers: list[list[tuple[Any, ...]]], case: int) -> tuple[np.ndarray, float]:
    """The gradients of all ranks in the order of ids, and the loss."""
    ids = np.concatenate([answer[case][0] for answer in answers])
    assert sorted(ids) == list(range(30))
    return np.concatenate([answer[case][1] for answer in answers])[np.argsort(ids)], answers[0][case][2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_do_not_depend_on_the_number_of_ranks(dtype: torch.dtype, tolerance: float) -> None:
    """Law 2 for one step: loss and gradients of parameters and masks."""
    alone = [steps(Communicator(), [*partitions_for(1)], dtype)]
    for size in SIZES if dtype == torch.float64 else [3]:
        answers = run_ranks(steps, size, partitions_for(size), dtype)
        for case in range(4):
            expected, expected_loss = assembled(alone, case)
            found, loss = assembled(answers, case)
            assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
            assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
        if size == 1:
            assert np.array_equal(assembled(answers, 2)[0], assembled(alone, 2)[0])  # law 3, to the bit


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (((Region(0, 0, 2),), (Region(0, 1, 4),)), "does not continue at tile row 2"),
        (((Region(0, 0, 2),), ()), "view 0 has 4 tile rows, 2 are given out"),
        (((Region(0, 0, 2), Region(0, 2, 4)), ()), "rank 0 has regions of the views"),
    ],
)
def test_a_partition_gives_every_row_to_one_rank(regions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelPartition((52,), regions)


def test_pairs_of_a_shifted_frame_come_back_to_their_tiles() -> None:
    whole = Region(0, 0, 3)
    assert whole.own_pairs(np.array([5, 7, 9]), 41).tolist() == [5, 7, 9]  # no halo: the frame's rows are the view's
    middle = Region(0, 1, 2)  # draws 11..37 of 64: rows of tiles 11..27 and 27..37; owns 16..32
    assert middle.drawn_rows(64) == (11, 37)
    assert middle.own_pairs(np.array([1600, 1000]), 64).tolist() == [1100 + 500]
    last = Region(0, 2, 3)  # draws 27..41 of 41, owns 32..41
    assert last.own_pairs(np.array([1400]), 41).tolist() == [900]
    strip = Region(0, 1, 4)  # draws 11..69 of 100 as 11, 27, 43, 59: own rows 16, 32, 48 .. 64
    assert strip.own_pairs(np.array([160, 160, 160, 100]), 100).tolist() == [110 + 50, 110 + 50, 110 + 50]


def test_digests_tell_partitions_apart() -> None:
    partition = PixelPartition.of_cuts([52, 41], [3], [0, 1])
    other = PixelPartition.of_cuts([52, 41], [4], [0, 1])
    digests = {partition.digest(3, [5, 6]), partition.digest(4, [5, 6]), partition.digest(3, [6, 5])}
    assert len(digests | {other.digest(3, [5, 6])}) == 4
    assert all(0 <= digest < 1 << 63 for digest in digests)
    assert partition.digest(3, [5, 6]) == PixelPartition.of_cuts([52, 41], [3], [0, 1]).digest(3, (5, 6))
