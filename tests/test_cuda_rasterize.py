# SPDX-License-Identifier: Apache-2.0
"""Tile lists, compositing, backward and scores of the cuda body, emulated and on the device.

The yardstick is the reference in float64 on the same packed rows: the cuda body may be off by at most twice as much as
the float32 cpu body, or by a few float32 roundings where that one is luckier.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_launchers import launchers, make_launcher
from kernel_scenes import random_scene, settings_for
from masksplat.cuda.arena import Piece, bytes_of
from masksplat.cuda.capacity import Capacity
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.rasterization import Rasterizer
from masksplat.cuda.tile_lists import Kept, Zeros, view_rows
from masksplat.ops import get_body
from masksplat.types import ROW_COLUMNS, TILE, Frame, Splats

CPU, REFERENCE = get_body("cpu"), get_body("reference")
BACKGROUND = torch.tensor([0.2, 0.5, 0.9])
FLOOR, GRADIENT_FLOOR = 3e-7, 2e-6


@pytest.fixture(params=launchers())
def launcher(request) -> Launcher:
    return make_launcher(request.param)


@dataclasses.dataclass
class Outcome:
    """Everything a body computes from packed splats, on the CPU in float64."""

    rgb: Tensor
    transmittance: Tensor
    gradients: Tensor
    maximum: Tensor
    total: Tensor


def moved(splats: Splats, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splats:
    """The splats elsewhere, or in another precision."""
    return dataclasses.replace(
        splats,
        rows=splats.rows.to(device, dtype),
        depths=splats.depths.to(device, dtype),
        ids=splats.ids.to(device),
        boxes=splats.boxes.to(device),
    )


def words(cut: Kept | Zeros, piece: Piece) -> Tensor:
    """A piece of what a frame holds as int32 on the CPU."""
    return bytes_of(cut.memory, piece).cpu().view(torch.int32)


def loss_gradients(size, rows) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    height = rows[1] - rows[0]
    return torch.randn(height, size[0], 3, generator=generator), torch.randn(height, size[0], generator=generator)


def outcome(body, splats: Splats, size, *, rows=None, view=0) -> Outcome:
    rows = (0, size[1]) if rows is None else rows
    dtype, device = splats.rows.dtype, splats.rows.device
    d_rgb, d_light = (tensor.to(device, dtype) for tensor in loss_gradients(size, rows))
    frame = body.rasterize(splats, view, size, BACKGROUND.to(device, dtype), rows=rows)
    d_rows = torch.ones_like(splats.rows)  # backward adds
    body.rasterize_backward(splats, frame, d_rgb, d_rows, d_transmittance=d_light)
    first, last = splats.view_range(view)
    scores = body.blend_scores(splats, view, size, rows=rows)
    tensors = (frame.rgb, frame.transmittance, d_rows[first:last] - 1, *scores)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    return Outcome(*(tensor.cpu().double() for tensor in tensors))


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference, norm = (torch.linalg.vector_norm(tensor).item() for tensor in (found - expected, expected))
    return difference / norm if norm > 0 else difference


def assert_as_good(found: Outcome, other: Outcome, exact: Outcome):
    """`found` is at most twice as far from `exact` as `other`, value by value and column by column."""
    parts = [(getattr(found, name), getattr(other, name), getattr(exact, name), FLOOR, name)
             for name in ("rgb", "transmittance", "maximum", "total")]  # fmt: skip
    for k, name in enumerate(ROW_COLUMNS):
        columns = (each.gradients[:, k] for each in (found, other, exact))
        parts.append((*columns, GRADIENT_FLOOR, f"gradient of {name}"))
    for one, two, three, floor, name in parts:
        assert one.shape == three.shape, name
        error, allowed = relative_error(one, three), 2 * max(relative_error(two, three), floor)
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def compare(launcher: Launcher, splats: Splats, size, *, rows=None, view=0):
    """All ops on the float32 `splats` against the reference."""
    exact = outcome(REFERENCE, moved(splats, dtype=torch.float64), size, rows=rows, view=view)
    other = outcome(CPU, splats, size, rows=rows, view=view)
    found = outcome(Rasterizer(launcher), moved(splats, device=launcher.device), size, rows=rows, view=view)
    assert_as_good(found, other, exact)


def projected(count, size, *, seed, opaque=False, num_views=1, **changes) -> Splats:
    gaussians, views, masks = random_scene(count, size, seed=seed, dtype=torch.float32, num_views=num_views)
    if opaque:
        changes = {"opacities": gaussians.opacities + 2, "scales": gaussians.scales + 0.5}
    gaussians = dataclasses.replace(gaussians, **changes)
    return CPU.project(gaussians, views, settings_for(), masks=masks)


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (64, 48), (3, 70)])
@pytest.mark.parametrize("opaque", [False, True])
def test_random_scenes(launcher, size, opaque):
    compare(launcher, projected(150, size, seed=33, opaque=opaque, num_views=2), size, view=int(opaque))


@pytest.mark.parametrize("rows", [(0, 16), (16, 40), (11, 29), (39, 40), (5, 5)])
def test_strips(launcher, rows):
    compare(launcher, projected(100, (35, 40), seed=34), (35, 40), rows=rows)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.4])
def test_equal_masks(launcher, value):
    splats = projected(100, (35, 40), seed=35)
    splats.rows[:, 9] = value
    compare(launcher, splats, (35, 40))
    if value == 0.0:
        found = outcome(Rasterizer(launcher), moved(splats, device=launcher.device), (35, 40))
        assert bool((found.rgb.float() == BACKGROUND).all()) and bool((found.transmittance == 1).all())
        assert bool((found.gradients[:, :9] == 0).all()) and bool((found.gradients[:, 9] != 0).any())


def test_no_splat(launcher):
    splats = projected(20, (20, 20), seed=36, opacities=torch.full((20,), -7.0))
    assert len(splats) == 0
    compare(launcher, splats, (20, 20))


def test_thin_and_huge_splats(launcher):
    """Needles, discs, and splats far larger than the image: the bounds must hold in float32."""
    scales = torch.tensor(np.random.default_rng(39).uniform(-6.0, 0.5, (200, 3)), dtype=torch.float32)
    compare(launcher, projected(200, (80, 60), seed=39, scales=scales), (80, 60))


def test_needles_over_many_rows_of_tiles(launcher):
    """Up to 14 rows of few tiles: their spans fill one word of a record, two, or do not fit (source/binning.cu)."""
    rng, size = np.random.default_rng(42), (90, 14 * TILE - 5)
    scales = torch.tensor(np.stack([rng.uniform(-6, -4, 60), rng.uniform(-2, 1, 60), rng.uniform(-6, -4, 60)], axis=1))
    compare(launcher, projected(60, size, seed=42, scales=scales.float()), size)


def test_lists_of_boxes_of_every_shape(launcher):
    """One splat for each number of columns and rows of tiles up to 17: its list is the box."""
    edge = 18 * TILE
    shapes = [(x, y) for y in range(1, 18) for x in range(1, 18)]
    splats = projected(500, (edge, edge), seed=43)
    firsts = np.random.default_rng(43).integers(0, 18 - np.array(shapes), endpoint=True)
    splats = dataclasses.replace(
        splats, **{name: getattr(splats, name)[: len(shapes)] for name in ("rows", "boxes", "depths", "ids")},
        view_offsets=torch.tensor([0, len(shapes)]),
    )  # fmt: skip
    splats.rows[:, 2:6] = torch.tensor([1e-6, 1e-7, 1e-6, 0.01])  # reaches everything in its box
    splats.boxes[:] = torch.from_numpy(np.concatenate([firsts * TILE + 3, (firsts + shapes) * TILE - 2], axis=1)).int()
    there = moved(splats, device=launcher.device)
    lists = Rasterizer(launcher).rasterize(there, 0, (edge, edge), BACKGROUND.to(launcher.device)).state
    made, _ = lists.totals()
    ranges = words(lists.zeros, lists.zeros.ranges)[: 2 * 18 * 18].view(-1, 2)
    tiles = torch.repeat_interleave(torch.arange(18 * 18), ranges.diff()[:, 0])
    found = sorted(zip(words(lists.kept, lists.kept.rows)[:made].tolist(), tiles.tolist(), strict=True))
    assert found == sorted(
        (row, 18 * (top + y) + left + x)
        for row, ((left, top), (width, height)) in enumerate(zip(firsts.tolist(), shapes, strict=True))
        for y in range(height)
        for x in range(width)
    )


@pytest.mark.parametrize("size", [(33 * TILE + 3, 8 * TILE), (TILE + 2, 34 * TILE + 5)])
def test_one_splat_over_all_tiles(launcher, size):
    """More than 32 columns, or rows, of tiles; in the first case more than 256 tiles, which take two passes."""
    splats = projected(40, size, seed=40)
    splats.rows[0, 2:6] = torch.tensor([1e-6, 1e-7, 1e-6, 0.8])
    splats.boxes[0] = torch.tensor([0, 0, *size])
    compare(launcher, splats, size)


def brute_force_instances(splats: Splats, size) -> int:
    """(splat, tile) pairs with a pixel of alpha >= 1/255."""
    width, height = size
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    tiles = (ys // TILE * 1000 + xs // TILE).long()
    x, y, a, b, c, opacity = (value[:, None, None] for value in splats.rows[:, :6].double().unbind(1))
    dx, dy = xs - x, ys - y
    is_seen = opacity * torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy) >= 1 / 255
    return sum(len(torch.unique(tiles[seen])) for seen in is_seen)


@pytest.mark.parametrize("log_scale", [-3.0, -1.5])
def test_lists_hold_hardly_more_than_the_tiles_that_a_splat_reaches(launcher, log_scale):
    size = (150, 130)
    scales = torch.tensor(np.random.default_rng(41).normal(log_scale, 0.8, (300, 3)), dtype=torch.float32)
    splats = projected(300, size, seed=41, scales=scales)
    needed = brute_force_instances(splats, size)
    frame = Rasterizer(launcher).rasterize(
        moved(splats, device=launcher.device), 0, size, BACKGROUND.to(launcher.device)
    )
    made, _ = frame.state.totals()
    assert needed <= made <= 1.03 * needed + 5


@pytest.mark.parametrize("size", [(70 * TILE, 20 * TILE), (9 * TILE + 5, 100 * TILE + 3)])
def test_lists_with_splats_of_many_parts(launcher, size):
    """Giants among small splats: instances are numbered splat by splat and lie by tile, depth and id."""
    splats = projected(600, size, seed=50)
    rng, number, (width, height) = np.random.default_rng(50), len(splats), size
    for row in rng.choice(number, 40, replace=False):
        splats.rows[row, 2:6] = torch.tensor([1e-6, 1e-7, 1e-6, 0.8])  # reaches everything in its box
        first = rng.integers(0, [width // 2, height // 2])
        splats.boxes[row] = torch.tensor([*first, *rng.integers(first + 1, size, endpoint=True)])
        if rng.random() < 0.5:
            splats.boxes[row] = torch.tensor([0, 0, *size])
    splats.depths[:] = torch.from_numpy(rng.choice([1.0, 2.0, 3.0], number)).float()
    expected = [
        (y * -(-width // TILE) + x, splats.depths[row].item(), splats.ids[row].item())
        for row, (x0, y0, x1, y1) in enumerate(splats.boxes.tolist())
        for y in range(y0 // TILE, -(-y1 // TILE))
        for x in range(x0 // TILE, -(-x1 // TILE))
        if splats.rows[row, 2] == 1e-6
    ]
    there = moved(splats, device=launcher.device)
    frame = Rasterizer(launcher).rasterize(there, 0, size, BACKGROUND.to(launcher.device))
    kept, (made, in_use), tiles = frame.state.kept, frame.state.totals(), frame.state.region.num_tiles
    rows, instances = (words(kept, piece)[:made].long() for piece in (kept.rows, kept.instances))
    ranges = words(frame.state.zeros, frame.state.zeros.ranges)[: 2 * tiles].view(-1, 2)
    tile_of = torch.repeat_interleave(torch.arange(tiles), ranges.diff()[:, 0])
    assert in_use == number and len(tile_of) == made and torch.equal(instances.sort().values, torch.arange(made))
    found = list(zip(tile_of.tolist(), splats.depths[rows].tolist(), splats.ids[rows].tolist(), strict=True))
    assert found == sorted(found)
    firsts = words(kept, kept.first_instances)[: number + 1].long()
    assert torch.equal(torch.searchsorted(firsts, instances, right=True) - 1, rows)
    by_number = instances.argsort()
    neighbours = rows[by_number].diff() == 0
    assert bool((tile_of[by_number].diff()[neighbours] > 0).all())
    giants = {splats.ids[row].item() for row in range(number) if splats.rows[row, 2] == 1e-6}
    assert len(giants) == 40 and [each for each in found if each[2] in giants] == sorted(expected)


def test_order_of_the_rows_changes_nothing_and_ids_break_ties(launcher):
    """Runs of equal depth, one longer than a thread, a warp and a block sort: images depend on the ids alone."""
    size, count = (40, 24), 900
    splats = projected(count, size, seed=42, opaque=True)
    number = len(splats)
    rng = np.random.default_rng(42)
    splats.depths[:] = torch.from_numpy(rng.choice([1.0, 2.0, 2.5, 3.0], number, p=[0.02, 0.03, 0.8, 0.15])).float()
    splats.depths[-20:] += torch.arange(20) // 2  # pairs
    splats.ids[:] = torch.from_numpy(rng.permutation(number)) + 2**40
    frames = []
    for seed in range(2):
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
        turned = Splats(*(tensor[order] for tensor in (splats.rows, splats.depths, splats.ids, splats.gaussians,
                                                       splats.boxes)), splats.view_offsets, splats.slots)  # fmt: skip
        compare(launcher, turned, size)
        there = moved(turned, device=launcher.device)
        frames.append(Rasterizer(launcher).rasterize(there, 0, size, BACKGROUND.to(launcher.device)))
    assert torch.equal(frames[0].rgb, frames[1].rgb)


@pytest.mark.parametrize("rows", [(0, 40), (16, 25), (5, 5)])
@pytest.mark.parametrize("name", ["cpu", "reference", "cuda"])
def test_gradients_that_overwrite_are_those_that_are_added_to_zeros(launcher, name, rows):
    """The rows of the other view stay as they are, and so do rows that are not in use."""
    size = (35, 40)
    splats = projected(60, size, seed=51, num_views=2)
    body = {"cpu": CPU, "reference": REFERENCE}.get(name) or Rasterizer(launcher)
    if name == "cuda":
        splats = moved(splats, device=launcher.device)
    d_rgb, d_light = (tensor.to(splats.rows.device) for tensor in loss_gradients(size, rows))
    frame = body.rasterize(splats, 1, size, BACKGROUND.to(splats.rows.device), rows=rows)
    added, written = torch.zeros_like(splats.rows), torch.full_like(splats.rows, torch.nan)
    body.rasterize_backward(splats, frame, d_rgb, added, d_transmittance=d_light)
    body.rasterize_backward(splats, frame, d_rgb, written, d_transmittance=d_light, overwrite=True)
    first, last = splats.view_range(1)
    assert torch.equal(written[first:last], added[first:last]) and bool(written[:first].isnan().all())
    if name == "cuda":
        in_use = (last - first) // 2
        splats.counts = torch.tensor([first, in_use], dtype=torch.int32, device=launcher.device)
        frame = body.rasterize(splats, 1, size, BACKGROUND.to(splats.rows.device), rows=rows)
        written = torch.full_like(splats.rows, torch.nan)
        body.rasterize_backward(splats, frame, d_rgb, written, overwrite=True)
        is_written = ~written[first:last].isnan().any(dim=1)
        assert rows[0] == rows[1] or (bool(is_written[:in_use].all()) and not bool(is_written[in_use:].any()))


def rasterized(rasterizer: Rasterizer, splats: Splats, size) -> tuple[Frame, Tensor]:
    device = rasterizer.launcher.device
    frame = rasterizer.rasterize(splats, 0, size, BACKGROUND.to(device))
    d_rows = torch.zeros_like(splats.rows)
    rasterizer.rasterize_backward(splats, frame, loss_gradients(size, (0, size[1]))[0].to(device), d_rows)
    return frame, d_rows


@pytest.mark.parametrize(("instances", "buckets"), [(32, 1 << 10), (1 << 12, 1), (1 << 12, 3)])
def test_overflow_changes_nothing(launcher, instances, buckets):
    size = (50, 40)
    splats = moved(projected(120, size, seed=43), device=launcher.device)
    plain = rasterized(Rasterizer(launcher), splats, size)
    small = Capacity(launcher.device)
    small.expect(0)
    small.instances, small.buckets = instances, buckets
    forced = rasterized(Rasterizer(launcher, small), splats, size)
    for one, two in zip((plain[0].rgb, plain[1]), (forced[0].rgb, forced[1]), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(plain[0].pairs_per_row, forced[0].pairs_per_row)
    assert small.instances > instances or small.buckets > buckets
    assert small.status.tolist() == [0] * 8


def test_deferred_overflow_is_told_once_and_the_repeated_step_is_right(launcher):
    size = (50, 40)
    splats = moved(projected(120, size, seed=43), device=launcher.device)
    plain, _ = rasterized(Rasterizer(launcher), splats, size)
    capacity = Capacity(launcher.device, instances=64)
    capacity.expect(0)
    capacity.defers = True
    rasterizer = Rasterizer(launcher, capacity)
    frame, d_rows = rasterized(rasterizer, splats, size)
    assert int(capacity.status[0]) == 1 and int(capacity.status[1]) == plain.state.totals()[0]
    assert bool((frame.transmittance == 1).all()) and bool((d_rows == 0).all())
    assert capacity.recover() and not capacity.recover()
    frame, _ = rasterized(rasterizer, splats, size)
    assert int(capacity.status[0]) == 0 and torch.equal(frame.rgb, plain.rgb)


def test_an_overflow_of_buckets_leads_the_backward_nowhere(launcher, monkeypatch):
    """Memory is never clean in a training: places that were reserved, but not there, must not be read."""
    make, size = torch.empty, (50, 40)

    def littered(*shape, **options):
        tensor = make(*shape, **options)
        return tensor.fill_(0x31) if tensor.dtype == torch.uint8 else tensor

    splats = moved(projected(400, size, seed=43), device=launcher.device)
    needed = rasterized(Rasterizer(launcher), splats, size)[0].state.buckets_in_use()
    monkeypatch.setattr(torch, "empty", littered)
    for buckets in range(1, needed, 3):
        capacity = Capacity(launcher.device)
        capacity.expect(0)
        capacity.buckets, capacity.defers = buckets, True
        frame, _ = rasterized(Rasterizer(launcher, capacity), splats, size)
        assert int(capacity.status[0]) == 1 and bool(torch.isfinite(frame.rgb).all())


def test_counts_on_the_device(launcher):
    """A view's range may be larger than what is in use: what lies behind is not looked at."""
    size = (40, 30)
    splats = moved(projected(100, size, seed=44, num_views=2), device=launcher.device)
    offsets = splats.view_offsets.tolist()
    counts = [offsets[1] - offsets[0], offsets[2] - offsets[1]]
    room = 130
    padded = {}
    for name in ("rows", "depths", "ids", "gaussians", "boxes"):
        tensor = getattr(splats, name)
        wide = torch.full((2 * room, *tensor.shape[1:]), 7, dtype=tensor.dtype, device=tensor.device)
        wide[: counts[0]], wide[room : room + counts[1]] = tensor[: counts[0]], tensor[counts[0] :]
        padded[name] = wide
    wide_splats = dataclasses.replace(splats, **padded, view_offsets=torch.tensor([0, room, 2 * room]))
    wide_splats.counts = torch.tensor(counts, dtype=torch.int32, device=launcher.device)
    for view in range(2):
        one = outcome(Rasterizer(launcher), splats, size, view=view)
        two = outcome(Rasterizer(launcher), wide_splats, size, view=view)
        assert torch.equal(one.rgb, two.rgb)
        assert torch.equal(one.gradients, two.gradients[: counts[view]])
        assert torch.equal(one.total, two.total[: counts[view]])
        assert bool((two.gradients[counts[view] :] == 0).all()) and bool((two.total[counts[view] :] == 0).all())


@pytest.mark.parametrize("name", launchers(is_reversed=True))
def test_two_runs_are_bit_equal(name):
    """Also with the emulator's threads in another order than the first run's."""
    other, size = make_launcher(name), (50, 40)
    splats = projected(200, size, seed=45, opaque=True)
    splats.depths[:50] = 3.0
    runs = [outcome(Rasterizer(each), moved(splats, device=other.device), size)
            for each in (other, make_launcher("emulated") if other.device.type == "cpu" else other)]  # fmt: skip
    for field in dataclasses.fields(Outcome):
        assert torch.equal(getattr(runs[0], field.name), getattr(runs[1], field.name)), field.name


@pytest.mark.parametrize("count", [1, 255, 2048, 6000])
@pytest.mark.parametrize("bits", [5, 8])
def test_radix_sort(launcher, count, bits):
    """Two passes, stable, with one value and with two, and fewer keys than there is room for."""
    rng = np.random.default_rng(46)
    keys = rng.integers(0, 1 << (2 * bits), 6000).astype(np.int32)
    keys[rng.random(6000) < 0.3] = 3  # runs across blocks
    device, passes, blocks = launcher.device, 2, 3

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    for kernel, which in (("sort_one", 1), ("sort_two", 0)):
        totals, histograms = zeros(4), zeros(passes, 256)
        totals[which] = count
        for number in range(passes):
            digits = keys[:count] >> (bits * number) & ((1 << bits) - 1)
            histograms[number] = torch.from_numpy(np.bincount(digits, minlength=256)).int().to(device)
        words, tickets = zeros(passes, blocks, 256), zeros(passes)
        columns = [torch.from_numpy(keys).to(device), torch.arange(6000, dtype=torch.int32, device=device)]
        columns += [columns[1] * 7] if which == 0 else []
        for number in range(passes):
            outputs = [torch.full_like(column, -1) for column in columns]
            pairs = [tensor for both in zip(columns, outputs, strict=True) for tensor in both]
            launcher(f"radix_sort.{kernel}", blocks, 256, *pairs, totals, histograms, words, tickets,
                     np.int32(number), np.int32(bits))  # fmt: skip
            columns = outputs
        order = np.argsort(keys[:count], kind="stable")
        assert np.array_equal(columns[0][:count].cpu().numpy(), keys[:count][order])
        assert np.array_equal(columns[1][:count].cpu().numpy(), order)
        assert which == 1 or np.array_equal(columns[2][:count].cpu().numpy(), 7 * order)
        assert bool((columns[0][count:] == -1).all())


def test_runs_of_equal_keys_of_any_length_are_sorted_by_id(launcher):
    rng = np.random.default_rng(47)
    lengths = [1, 2, 31, 32, 33, 1, 64, 257, 1, 700, 300, 2]
    keys = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    ids = rng.permutation(len(keys)) - 500
    order = torch.from_numpy(rng.permutation(len(keys)).astype(np.int32)).to(launcher.device)
    before = order.cpu().numpy().copy()
    totals = torch.tensor([0, len(keys), 0, 0], dtype=torch.int32, device=launcher.device)
    launcher("radix_sort.order_ties", -(-len(keys) // 256), 256, torch.from_numpy(keys).to(launcher.device), order,
             torch.from_numpy(ids).to(launcher.device), totals)  # fmt: skip
    start = 0
    for length in lengths:
        run = before[start : start + length]
        assert np.array_equal(order.cpu().numpy()[start : start + length], run[np.argsort(ids[run])])
        start += length


def test_other_precisions_and_frames_without_a_backward_are_refused(launcher):
    splats = projected(10, (16, 16), seed=48)
    with pytest.raises(ValueError, match="float32"):
        view_rows(moved(splats, dtype=torch.float64), 0, torch.device("cpu"))
    there = moved(splats, device=launcher.device)
    rasterizer = Rasterizer(launcher)
    frame = rasterizer.rasterize(there, 0, (16, 16), BACKGROUND.to(launcher.device), has_backward=False)
    assert torch.equal(frame.rgb, rasterizer.rasterize(there, 0, (16, 16), BACKGROUND.to(launcher.device)).rgb)
    with pytest.raises(ValueError, match="has_backward"):
        rasterizer.rasterize_backward(there, frame, torch.zeros_like(frame.rgb), torch.zeros_like(there.rows))


def trimmed_error(found: Tensor, expected: Tensor) -> float:
    """`relative_error` without the worst 1e-5 of the elements: pairs on different sides of a threshold."""
    found, expected = found.flatten(), expected.flatten()
    kept = len(found) - int(1e-5 * len(found))
    order = torch.argsort((found - expected).abs())[:kept]
    return relative_error(found[order], expected[order])


@pytest.mark.gpu
@pytest.mark.parametrize("log_scale", [-6.5, -5.0])
def test_many_splats_on_the_device(log_scale):
    """Thousands of blocks at once, which the emulator runs in turn: against the cpu body, and three times the same."""
    device_launcher, size = make_launcher("device"), (1600, 1064)
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(1_000_000, 3, generator=generator) * 0.5 + log_scale
    splats = projected(1_000_000, size, seed=49, scales=scales)
    other = outcome(CPU, splats, size)
    runs = [outcome(Rasterizer(device_launcher), moved(splats, device=device_launcher.device), size) for _ in range(3)]
    for run in runs[1:]:
        for part in dataclasses.fields(Outcome):
            assert torch.equal(getattr(runs[0], part.name), getattr(run, part.name)), part.name
    for name in ("rgb", "transmittance", "maximum", "total"):
        assert trimmed_error(getattr(runs[0], name), getattr(other, name)) < 2e-6, name
    for k, name in enumerate(ROW_COLUMNS):
        assert trimmed_error(runs[0].gradients[:, k], other.gradients[:, k]) < 3e-5, name


@pytest.mark.gpu
def test_twenty_million_instances_on_the_device():
    """More (splat, tile) pairs than any usual scene has, from capacities that are too small at first."""
    device_launcher, size = make_launcher("device"), (1600, 1064)
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(1_000_000, 3, generator=generator) * 0.5 - 3.5
    splats = projected(1_000_000, size, seed=50, scales=scales)
    there = moved(splats, device=device_launcher.device)
    frame = Rasterizer(device_launcher).rasterize(there, 0, size, BACKGROUND.to(device_launcher.device))
    assert frame.state.totals()[0] >= 20_000_000
    other = CPU.rasterize(splats, 0, size, BACKGROUND)
    assert trimmed_error(frame.rgb.cpu(), other.rgb) < 2e-6
    assert trimmed_error(frame.transmittance.cpu(), other.transmittance) < 2e-6
