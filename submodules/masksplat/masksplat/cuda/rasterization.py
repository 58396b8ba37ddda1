# SPDX-License-Identifier: Apache-2.0
"""Tile lists, compositing, its backward and blend scores on the GPU: the host side of the kernels.

Nothing here waits for the device, except `Capacity.recover` in the immediate mode. The kernels are described in
source/binning.cu, radix_sort.cu, rasterize.cu, rasterize_backward.cu and scores.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.capacity import Capacity
from masksplat.cuda.launcher import Launcher
from masksplat.types import NUM_ROW_COLUMNS, TILE, Frame, Splats

THREADS = 256
SORT_CHUNK = 2048
"""Keys that a block of radix_sort.cu takes."""

DIGITS = 256
DIGIT_BITS = 8
DEPTH_PASSES = 4
BACKWARD_WARPS = 4
FINISH_THREADS = 128
SUBTILES = 8
CHECKPOINT_BYTES = 16 * TILE * TILE
NUM_TOTALS = 4
"""int32 words: instances in use, splats of the view, two tickets."""

ALIGNMENT = 256
MOST_TILES = 1 << 27


@dataclass(frozen=True)
class Region:
    """Pixel rows [first, last) of a view of `width` pixels, in tiles from its first row on."""

    first: int
    last: int
    width: int

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.width // TILE)

    @property
    def tile_rows(self) -> int:
        """Rows of tiles."""
        return -(-(self.last - self.first) // TILE)

    @property
    def num_tiles(self) -> int:
        """All tiles."""
        return self.columns * self.tile_rows

    def arguments(self) -> tuple[np.int32, np.int32, np.int32]:
        """What every kernel takes: first pixel row, one past the last, tile columns."""
        return np.int32(self.first), np.int32(self.last), np.int32(self.columns)


@dataclass(frozen=True)
class ViewRows:
    """The packed splats of one view: `most` rows, of which the first count[0] are in use (all, when count is None)."""

    rows: Tensor
    boxes: Tensor
    depths: Tensor
    ids: Tensor
    count: Tensor | None
    most: int


@dataclass(frozen=True)
class TileLists:
    """Tile lists of a region; see source/binning.cu. All on the device."""

    region: Region
    totals: Tensor  # (NUM_TOTALS,) int32, see source/totals.cuh
    ranges: Tensor  # (2 tiles,) int32
    rows: Tensor  # (capacity,) int32 row of the view, by tile and depth
    instances: Tensor  # (capacity,) int32 number of the instance
    first_instances: Tensor  # (most rows + 1,) int32
    capacity: int  # instances


@dataclass(frozen=True)
class Checkpoints:
    """What the forward leaves to the backward; see source/rasterize.cu."""

    reached: Tensor
    ends: Tensor
    buckets: Tensor
    alive: Tensor
    values: Tensor
    counter: Tensor
    capacity: int


@dataclass(frozen=True)
class _FrameState:
    lists: TileLists
    checkpoints: Checkpoints | None


def cut(arena: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Pieces of at least `sizes` bytes of an arena of `arena_bytes(sizes)` bytes."""
    return arena.split([_aligned(size) for size in sizes])


def arena_bytes(sizes: list[int]) -> int:
    """Bytes that pieces of `sizes` take together."""
    return sum(map(_aligned, sizes))


def _aligned(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def _blocks(count: int, threads: int = THREADS) -> int:
    return -(-count // threads)


class Rasterizer:
    """rasterize, rasterize_backward and blend_scores of `masksplat.ops.Body` for float32 tensors of one device."""

    def __init__(self, launcher: Launcher, capacity: Capacity | None = None) -> None:
        """Work through `launcher`, with the buffer sizes and the status of `capacity`."""
        self.launcher = launcher
        self.capacity = Capacity(launcher.device) if capacity is None else capacity
        self.backward_kernel = "rasterize_backward.backward_pixels"

    def rasterize(
        self,
        splats: Splats,
        view: int,
        size: tuple[int, int],
        background: Tensor,
        *,
        rows: tuple[int, int] | None = None,
        has_backward: bool = True,
    ) -> Frame:
        """See `Body.rasterize`. Without `has_backward` nothing is kept for `rasterize_backward`.

        Raises:
            ValueError: for tensors that are not float32.
        """
        region = _region(size, rows)
        its_rows = view_rows(splats, view)
        self.capacity.expect(its_rows.most)
        while True:
            frame = self._composite(its_rows, region, background, has_backward)
            if self.capacity.defers or not self.capacity.recover():
                frame.view = view
                return frame

    def rasterize_backward(
        self,
        splats: Splats,
        frame: Frame,
        d_rgb: Tensor,
        d_rows: Tensor,
        *,
        d_transmittance: Tensor | None = None,
    ) -> None:
        """See `Body.rasterize_backward`.

        Raises:
            ValueError: for a frame that was made without a backward, or tensors that are not float32.
        """
        state: _FrameState = frame.state
        lists, kept = state.lists, state.checkpoints
        if kept is None:
            raise ValueError("this frame was made with has_backward=False; rasterize it with the default")
        its_rows = view_rows(splats, frame.view)
        first, _ = splats.view_range(frame.view)
        if lists.region.num_tiles == 0 or its_rows.most == 0:
            return
        _check_float32(d_rgb=d_rgb, d_rows=d_rows, d_transmittance=d_transmittance)
        sums = torch.empty((lists.capacity, NUM_ROW_COLUMNS), dtype=torch.float32, device=self.launcher.device)
        self.launcher(
            self.backward_kernel, _blocks(kept.capacity, BACKWARD_WARPS), BACKWARD_WARPS * 32,
            its_rows.rows, lists.ranges, lists.rows, lists.instances, kept.reached, kept.ends, kept.buckets,
            kept.alive, kept.values, kept.counter, np.int32(kept.capacity),
            *lists.region.arguments(), np.int32(lists.region.width), frame.rgb, frame.transmittance,
            d_rgb.contiguous(), None if d_transmittance is None else d_transmittance.contiguous(), sums,
        )  # fmt: skip
        self.launcher(
            "rasterize_backward.finish_rows", _blocks(its_rows.most, FINISH_THREADS), FINISH_THREADS,
            its_rows.rows, lists.first_instances, lists.totals, sums, d_rows[first : first + its_rows.most],
        )  # fmt: skip

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Body.blend_scores`; rows that are not in use score 0."""
        region = _region(size, rows)
        its_rows = view_rows(splats, view)
        self.capacity.expect(its_rows.most)
        while True:
            scores = self._score(its_rows, region)
            if self.capacity.defers or not self.capacity.recover():
                return scores

    def _score(self, its_rows: ViewRows, region: Region) -> tuple[Tensor, Tensor]:
        header = self._header(region)
        lists = self._bin(its_rows, region, header)
        device = self.launcher.device
        scores = torch.empty((lists.capacity, 2), dtype=torch.float32, device=device)
        maximum, total = torch.empty((2, its_rows.most), dtype=torch.float32, device=device).unbind()
        self.launcher(
            "scores.score_tiles", region.num_tiles, THREADS, its_rows.rows, lists.ranges, lists.rows, lists.instances,
            *region.arguments(), np.int32(region.width), scores,
        )  # fmt: skip
        self.launcher(
            "scores.sum_scores", _blocks(its_rows.most), THREADS, lists.first_instances, lists.totals,
            np.int32(its_rows.most), scores, maximum, total,
        )  # fmt: skip
        return maximum, total

    def _composite(self, its_rows: ViewRows, region: Region, background: Tensor, has_backward: bool) -> Frame:
        header = self._header(region)
        lists = self._bin(its_rows, region, header)
        kept = self._checkpoints(lists, header) if has_backward else None
        height, width = region.last - region.first, region.width
        pixels = torch.empty((4 * height * width,), dtype=torch.float32, device=self.launcher.device)
        rgb, transmittance = pixels.split([3 * height * width, height * width])
        pairs = header.pairs
        outputs = (None,) * 6 if kept is None else (
            kept.reached, kept.ends, kept.buckets, kept.alive, kept.values, kept.counter
        )  # fmt: skip
        self.launcher(
            "rasterize.forward_tiles", region.num_tiles, THREADS, its_rows.rows, lists.ranges, lists.rows,
            *region.arguments(), np.int32(width), background, rgb, transmittance, pairs,
            *outputs, np.int32(0 if kept is None else kept.capacity), self.capacity.status,
        )  # fmt: skip
        return Frame(
            rgb.view(height, width, 3),
            transmittance.view(height, width),
            pairs,
            rows=(region.first, region.last),
            state=_FrameState(lists, kept),
        )

    def _header(self, region: Region) -> _Header:
        """Zeros that the kernels count in."""
        tiles = region.num_tiles
        words = torch.zeros(region.tile_rows + tiles + NUM_TOTALS, dtype=torch.int64, device=self.launcher.device)
        pairs, ranges, rest = words.split([region.tile_rows, tiles, NUM_TOTALS])
        return _Header(pairs, ranges.view(torch.int32), *rest.view(torch.int32).split([NUM_TOTALS, NUM_TOTALS]))

    def _checkpoints(self, lists: TileLists, header: _Header) -> Checkpoints:
        capacity = self.capacity.buckets
        sizes = [
            lists.capacity,
            4 * lists.region.num_tiles,
            8 * capacity,
            4 * SUBTILES * capacity,
            CHECKPOINT_BYTES * capacity,
        ]
        arena = torch.empty(arena_bytes(sizes), dtype=torch.uint8, device=self.launcher.device)
        reached, ends, buckets, alive, values = cut(arena, sizes)
        return Checkpoints(reached, ends, buckets, alive, values, header.counter, capacity)

    def _bin(self, its_rows: ViewRows, region: Region, header: _Header) -> TileLists:
        """Tile lists of the region for the rows of a view."""
        if region.num_tiles > MOST_TILES:
            raise ValueError(f"{region.num_tiles} tiles, and at most {MOST_TILES} fit: render in strips of rows")
        capacity, device = self.capacity.instances, self.launcher.device
        sizes = [4 * capacity, 4 * capacity, 4 * (its_rows.most + 1)]
        arena = torch.empty(arena_bytes(sizes), dtype=torch.uint8, device=device)
        list_rows, list_instances, first_instances = cut(arena, sizes)
        lists = TileLists(region, header.totals, header.ranges, list_rows, list_instances, first_instances, capacity)
        if its_rows.most > 0 and region.num_tiles > 0:
            _Binning(self.launcher, its_rows, lists, self.capacity.status).run()
        return lists


@dataclass(frozen=True)
class _Header:
    pairs: Tensor  # (tile rows,) int64
    ranges: Tensor  # (2 tiles,) int32
    totals: Tensor  # (NUM_TOTALS,) int32
    counter: Tensor  # int32: buckets


class _Binning:
    """Scratch memory and launches of one binning."""

    def __init__(self, launcher: Launcher, its_rows: ViewRows, lists: TileLists, status: Tensor) -> None:
        self.launcher, self.its_rows, self.lists, self.status = launcher, its_rows, lists, status
        tile_bits = max(1, (lists.region.num_tiles - 1).bit_length())
        self.tile_passes = -(-tile_bits // DIGIT_BITS)
        self.tile_bits = -(-tile_bits // self.tile_passes)
        most, capacity = its_rows.most, lists.capacity
        self.row_blocks, self.list_blocks = _blocks(most, SORT_CHUNK), _blocks(capacity, SORT_CHUNK)
        zeros = [
            4 * DIGITS * DEPTH_PASSES,
            4 * DIGITS * self.tile_passes,
            4 * DEPTH_PASSES,
            4 * self.tile_passes,
            8 * _blocks(most),
            8 * _blocks(most),
            4 * DIGITS * self.row_blocks * DEPTH_PASSES,
            4 * DIGITS * self.list_blocks * self.tile_passes,
        ]
        words = torch.zeros(arena_bytes(zeros), dtype=torch.uint8, device=launcher.device)
        (
            self.depth_histograms, self.tile_histograms, self.depth_tickets, self.tile_tickets, self.prepare_words,
            self.emit_words, self.depth_words, self.tile_words,
        ) = cut(words, zeros)  # fmt: skip
        scratch = [4 * most] * 4 + [4 * capacity] * 4
        pieces = cut(torch.empty(arena_bytes(scratch), dtype=torch.uint8, device=launcher.device), scratch)
        self.keys, self.orders, self.tiles = pieces[:2], pieces[2:4], pieces[4:6]
        # The last pass by tile writes into the lists; before it, lists and scratch take turns.
        self.list_rows, self.list_instances = (pieces[6], lists.rows), (pieces[7], lists.instances)
        if self.tile_passes % 2 == 0:
            self.list_rows, self.list_instances = self.list_rows[::-1], self.list_instances[::-1]

    def run(self) -> None:
        """Queue everything."""
        its_rows, lists, region = self.its_rows, self.lists, self.lists.region.arguments()
        self.launcher(
            "binning.prepare", _blocks(its_rows.most), THREADS, its_rows.rows, its_rows.boxes, its_rows.depths,
            its_rows.count, np.int32(its_rows.most), *region, np.int32(lists.capacity), self.keys[0],
            lists.first_instances, self.depth_histograms, self.prepare_words, lists.totals, self.status,
        )  # fmt: skip
        self._sort_by_depth()
        self.launcher(
            "binning.emit", _blocks(its_rows.most), THREADS, its_rows.rows, its_rows.boxes, self.orders[0],
            lists.first_instances, *region, self.tiles[0], self.list_rows[0], self.list_instances[0],
            self.tile_histograms, np.int32(self.tile_passes), np.int32(self.tile_bits), self.emit_words, lists.totals,
        )  # fmt: skip
        self._sort_by_tile()
        self.launcher(
            "binning.tile_ranges", _blocks(lists.capacity), THREADS, self.tiles[self.tile_passes % 2], lists.totals,
            lists.ranges,
        )  # fmt: skip

    def _sort_by_depth(self) -> None:
        """Leaves the rows in the order of depth and id in orders[0]: the number of passes is even."""
        for number in range(DEPTH_PASSES):
            here, there = number % 2, 1 - number % 2
            self.launcher(
                "radix_sort.sort_one", self.row_blocks, THREADS, self.keys[here], self.keys[there],
                self.orders[here] if number > 0 else None, self.orders[there], self.lists.totals,
                self.depth_histograms, self.depth_words, self.depth_tickets, np.int32(number), np.int32(DIGIT_BITS),
            )  # fmt: skip
        self.launcher(
            "radix_sort.order_ties", _blocks(self.its_rows.most), THREADS, self.keys[0], self.orders[0],
            self.its_rows.ids, self.lists.totals,
        )  # fmt: skip

    def _sort_by_tile(self) -> None:
        for number in range(self.tile_passes):
            here, there = number % 2, 1 - number % 2
            self.launcher(
                "radix_sort.sort_two", self.list_blocks, THREADS, self.tiles[here], self.tiles[there],
                self.list_rows[here], self.list_rows[there], self.list_instances[here], self.list_instances[there],
                self.lists.totals, self.tile_histograms, self.tile_words, self.tile_tickets, np.int32(number),
                np.int32(self.tile_bits),
            )  # fmt: skip


def view_rows(splats: Splats, view: int) -> ViewRows:
    """The rows of `view`; on the device, `counts` says how many are in use.

    Raises:
        ValueError: for rows that are not float32.
    """
    _check_float32(rows=splats.rows, depths=splats.depths)
    first, last = splats.view_range(view)
    tensors = [splats.rows, splats.boxes, splats.depths, splats.ids]
    if (first, last) != (0, len(splats)):
        tensors = [tensor[first:last] for tensor in tensors]
    rows, boxes, depths, ids = (tensor.contiguous() for tensor in tensors)
    counts = splats.counts
    return ViewRows(rows, boxes, depths, ids, None if counts is None else counts[view:], last - first)


def _region(size: tuple[int, int], rows: tuple[int, int] | None) -> Region:
    width, height = size
    first, last = rows if rows is not None else (0, height)
    return Region(first, last, width)


def _check_float32(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; the cuda body takes float32: convert it, or use the cpu body")
