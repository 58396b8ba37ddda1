# SPDX-License-Identifier: Apache-2.0
"""Lists of splats per tile, made on the GPU without waiting for it: memory and launches.

The kernels are source/binning.cu and source/radix_sort.cu. A torch op costs more host time than a launch, so a call
allocates three arenas (zeros, what a frame keeps, scratch); where their pieces lie is worked out once for each region
and capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from masksplat.cuda.arena import Layout, Piece, bytes_of, raw, rows_of
from masksplat.cuda.launcher import Launcher
from masksplat.types import TILE, Splats

THREADS = 256
ORDER_THREADS = 1024
BLOCK_SPLATS = 1024
"""Splats that a block of `prepare` or `emit` takes: four a thread. So do `order_ties` and `tile_ranges`, with keys."""

SPLAT_CHUNK, INSTANCE_CHUNK = 2048, 4096
"""Keys that a block of radix_sort.cu takes: of splats, of instances."""

PARTS_CHUNK = 2048
"""Instances for each block that deals with parts, eight of them full."""

DIGITS = 256
DIGIT_BITS = 8
DEPTH_PASSES = 4
SUBTILES = 8
CHECKPOINT_BYTES = 16 * TILE * TILE
TOTAL_WORDS = 5
LEAST_INSTANCES_PER_PART = 15
"""Splats of 17 instances and more make parts of 256 or what is left (source/totals.cuh): 1 / 17 + 1 / 256 < 1 / 15."""

MOST_PART_BLOCKS = 528
"""Blocks that deal with parts, one after the other: enough for any GPU to be full."""

MOST_TILES = 1 << 27

REMEMBERED = 256
"""Regions and layouts whose numbers are kept; capacities and the number of rows change with edits of the table."""


class Region:
    """Pixel rows [first, last) of a view of `width` pixels, in tiles from its first row on.

    columns, tile_rows, num_tiles: tiles in a row, rows of them, and all. arguments: what every kernel takes, first
    pixel row, one past the last, tile columns. tile_passes: how many passes sort by tile, and the bits of a digit.
    """

    def __init__(self, first: int, last: int, width: int) -> None:
        """See the class."""
        self.first, self.last, self.width = first, last, width
        self.columns = -(-width // TILE)
        self.tile_rows = -(-(last - first) // TILE)
        self.num_tiles = self.columns * self.tile_rows
        self.arguments = (first, last, self.columns)
        self.tile_passes = _tile_passes(self.num_tiles)


class ViewRows(NamedTuple):
    """The packed splats of one view: `most` rows, of which the first in_use[0] are there (all, when it is None).

    splats: whose pieces these are, and keeps alive; first: where they begin there.
    """

    rows: Piece
    boxes: Piece
    depths: Piece
    ids: Piece
    in_use: Piece | None
    most: int
    first: int
    splats: Splats


class Zeros(NamedTuple):
    """What the kernels count in, all zero at first; pieces of `memory`."""

    memory: Tensor
    ranges: Piece  # (tiles, 2) int32
    totals: Piece  # (TOTAL_WORDS,) int32, see source/totals.cuh
    bucket_counter: Piece  # int32
    depth_histograms: Piece
    tile_histograms: Piece
    depth_tickets: Piece
    tile_tickets: Piece
    prepare_words: Piece
    emit_words: Piece
    pairs: Piece  # (tile rows,) int64


class Kept(NamedTuple):
    """What a frame keeps for its backward, pieces of `memory`; see source/binning.cu and source/rasterize.cu."""

    memory: Tensor
    rows: Piece  # (instances,) int32 row of the view, by tile and depth
    instances: Piece  # (instances,) int32 number of the instance
    first_instances: Piece  # (most rows + 1,) int32
    parts: Piece  # (instances / LEAST_INSTANCES_PER_PART, 4) int32
    reached: Piece  # (instances,) uint8
    ends: Piece  # (tiles,) int32
    tile_order: Piece  # (tiles,) int32, longest lists first
    buckets: Piece  # (buckets, 2) int32
    alive: Piece  # (buckets, SUBTILES) uint32
    checkpoints: Piece  # (buckets, 256, 4) float32


class Scratch(NamedTuple):
    """Memory of one binning, pieces of `memory`: two of what is sorted back and forth."""

    memory: Tensor
    records: Piece  # (most rows, 4) uint32, see source/binning.cu
    keys: tuple[Piece, Piece]
    orders: tuple[Piece, Piece]
    tiles: tuple[Piece, Piece]
    rows: Piece
    instances: Piece
    depth_words: Piece  # the kernels clear as much as they need
    tile_words: Piece


@dataclass
class TileLists:
    """The lists of a region, the rows that they were made from, and room for what compositing leaves behind."""

    view: ViewRows
    region: Region
    zeros: Zeros
    kept: Kept
    num_instances: int  # capacity
    num_buckets: int  # capacity; 0: no backward

    def totals(self) -> list[int]:
        """Instances in use and splats of the view, read from the device."""
        return bytes_of(self.zeros.memory, self.zeros.totals).view(torch.int32)[:2].tolist()  # host sync: totals

    def buckets_in_use(self) -> int:
        """Buckets that the forward went through, read from the device."""
        counter = bytes_of(self.zeros.memory, self.zeros.bucket_counter)
        return int(counter.view(torch.int32)[0])  # host sync: buckets

    @property
    def pairs(self) -> Tensor:
        """(tile rows,) int64: `Frame.pairs_per_row`."""
        piece = self.zeros.pairs._replace(size=8 * self.region.tile_rows)
        return bytes_of(self.zeros.memory, piece).view(torch.int64)


def blocks_of(count: int, threads: int = THREADS) -> int:
    """Blocks of `threads` that cover `count`."""
    return -(-count // threads)


def part_blocks(num_instances: int) -> int:
    """Blocks of eight warps for the parts of as many instances; each warp takes one part after the other."""
    return min(MOST_PART_BLOCKS, blocks_of(num_instances, PARTS_CHUNK))


def _tile_passes(num_tiles: int) -> tuple[int, int]:
    bits = max(1, (num_tiles - 1).bit_length())
    passes = -(-bits // DIGIT_BITS)
    return passes, -(-bits // passes)


@lru_cache(REMEMBERED)
def region_of(first: int, last: int, width: int) -> Region:
    """The region with these numbers."""
    return Region(first, last, width)


@lru_cache(REMEMBERED)
def _zeros_layout(region: Region, most: int) -> Layout:
    passes, _ = region.tile_passes
    return Layout(
        (
            8 * region.num_tiles,
            4 * TOTAL_WORDS,
            4,
            4 * DIGITS * DEPTH_PASSES,
            4 * DIGITS * passes,
            4 * DEPTH_PASSES,
            4 * passes,
            8 * blocks_of(most, BLOCK_SPLATS),
            8 * blocks_of(most, BLOCK_SPLATS),
            8 * region.tile_rows,
        )
    )


@lru_cache(REMEMBERED)
def _kept_layout(region: Region, most: int, num_instances: int, num_buckets: int) -> Layout:
    return Layout(
        (
            4 * num_instances,
            4 * num_instances,
            4 * (most + 1),
            16 * blocks_of(num_instances, LEAST_INSTANCES_PER_PART),
            num_instances if num_buckets else 0,
            4 * region.num_tiles,
            4 * region.num_tiles,
            8 * num_buckets,
            4 * SUBTILES * num_buckets,
            CHECKPOINT_BYTES * num_buckets,
        )
    )


@lru_cache(REMEMBERED)
def _scratch_layout(region: Region, most: int, num_instances: int) -> Layout:
    passes, _ = region.tile_passes
    words = 4 * DIGITS
    return Layout(
        (
            16 * most,
            *[4 * most] * 4,
            *[4 * num_instances] * 4,
            words * DEPTH_PASSES * blocks_of(most, SPLAT_CHUNK),
            words * passes * blocks_of(num_instances, INSTANCE_CHUNK),
        )
    )


def _make_zeros(region: Region, most: int, device: torch.device) -> Zeros:
    layout = _zeros_layout(region, most)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    return Zeros(memory, *layout.cut(memory))


def _make_kept(region: Region, most: int, num_instances: int, num_buckets: int, device: torch.device) -> Kept:
    layout = _kept_layout(region, most, num_instances, num_buckets)
    memory = raw(layout, device)
    return Kept(memory, *layout.cut(memory))


def _make_scratch(region: Region, most: int, num_instances: int, device: torch.device) -> Scratch:
    layout = _scratch_layout(region, most, num_instances)
    memory = raw(layout, device)
    cut = layout.cut(memory)
    return Scratch(memory, cut[0], (cut[1], cut[2]), (cut[3], cut[4]), (cut[5], cut[6]), *cut[7:])


def make_tile_lists(
    launcher: Launcher, view: ViewRows, region: Region, *, num_instances: int, num_buckets: int, status: Tensor
) -> TileLists:
    """Queue the binning of a view's splats into the tiles of a region.

    Args:
        num_instances: (splat, tile) pairs that there is room for; with more, the lists are empty and status[0] is set.
        num_buckets: buckets that the forward may checkpoint; 0 when there will be no backward.

    Raises:
        ValueError: for a region of more than MOST_TILES tiles.
    """
    if region.num_tiles > MOST_TILES:
        raise ValueError(f"{region.num_tiles} tiles, and at most {MOST_TILES} fit: render in strips of rows")
    device = launcher.device
    zeros = _make_zeros(region, view.most, device)
    kept = _make_kept(region, view.most, num_instances, num_buckets, device)
    lists = TileLists(view, region, zeros, kept, num_instances, num_buckets)
    if view.most > 0 and region.num_tiles > 0:
        scratch = _make_scratch(region, view.most, num_instances, device)
        _prepare(launcher, view, lists, scratch, status)
        _sort_by_depth(launcher, view, lists, scratch)
        _sort_by_tile(launcher, view, lists, scratch)
    if region.num_tiles > 0:
        launcher("binning.order_tiles", 1, ORDER_THREADS, zeros.ranges, region.num_tiles, kept.tile_order)
    return lists


def _prepare(launcher: Launcher, view: ViewRows, lists: TileLists, scratch: Scratch, status: Tensor) -> None:
    zeros = lists.zeros
    launcher(
        "binning.prepare", blocks_of(view.most, BLOCK_SPLATS), THREADS, view.rows, view.boxes, view.depths,
        view.in_use, view.most, *lists.region.arguments, lists.num_instances, scratch.keys[0],
        lists.kept.first_instances, scratch.records, zeros.depth_histograms, scratch.depth_words,
        blocks_of(view.most, SPLAT_CHUNK), zeros.prepare_words, zeros.totals, status,
    )  # fmt: skip


def _sort_by_depth(launcher: Launcher, view: ViewRows, lists: TileLists, scratch: Scratch) -> None:
    """Leaves the rows in the order of depth and id in orders[0]: the number of passes is even."""
    zeros = lists.zeros
    for number in range(DEPTH_PASSES):
        here, there = number % 2, 1 - number % 2
        launcher(
            "radix_sort.sort_one", blocks_of(view.most, SPLAT_CHUNK), THREADS, scratch.keys[here], scratch.keys[there],
            scratch.orders[here] if number > 0 else None, scratch.orders[there], zeros.totals, zeros.depth_histograms,
            scratch.depth_words, zeros.depth_tickets, number, DIGIT_BITS,
        )  # fmt: skip
    launcher(
        "radix_sort.order_ties", blocks_of(view.most, BLOCK_SPLATS), THREADS, scratch.keys[0], scratch.orders[0],
        view.ids, zeros.totals,
    )  # fmt: skip


def _sort_by_tile(launcher: Launcher, view: ViewRows, lists: TileLists, scratch: Scratch) -> None:
    """Instances in depth order, then stably by tile; the last pass writes into the lists that are kept."""
    zeros, kept = lists.zeros, lists.kept
    passes, bits = lists.region.tile_passes
    rows, instances = (scratch.rows, kept.rows), (scratch.instances, kept.instances)
    if passes % 2 == 0:
        rows, instances = rows[::-1], instances[::-1]
    launcher(
        "binning.emit", blocks_of(view.most, BLOCK_SPLATS), THREADS, view.rows, view.boxes, scratch.orders[0],
        scratch.records, *lists.region.arguments, scratch.tiles[0], rows[0], instances[0], kept.parts,
        zeros.tile_histograms, passes, bits, scratch.tile_words, blocks_of(lists.num_instances, INSTANCE_CHUNK),
        zeros.emit_words, zeros.totals,
    )  # fmt: skip
    launcher(
        "binning.emit_parts", part_blocks(lists.num_instances), THREADS, view.rows, view.boxes, kept.first_instances,
        kept.parts, *lists.region.arguments, scratch.tiles[0], rows[0], instances[0], zeros.tile_histograms,
        passes, bits, zeros.totals,
    )  # fmt: skip
    for number in range(passes):
        here, there = number % 2, 1 - number % 2
        launcher(
            "radix_sort.sort_two", blocks_of(lists.num_instances, INSTANCE_CHUNK), THREADS, scratch.tiles[here],
            scratch.tiles[there], rows[here], rows[there], instances[here], instances[there], zeros.totals,
            zeros.tile_histograms, scratch.tile_words, zeros.tile_tickets, number, bits,
        )  # fmt: skip
    launcher(
        "binning.tile_ranges", blocks_of(lists.num_instances, BLOCK_SPLATS), THREADS, scratch.tiles[passes % 2],
        zeros.totals, zeros.ranges,
    )  # fmt: skip


def view_rows(splats: Splats, view: int, device: torch.device) -> ViewRows:
    """The rows of `view`; on the device, `counts` says how many are in use.

    Raises:
        ValueError: for rows that are not float32, or tensors that are not contiguous on `device`.
    """
    check_float32(rows=splats.rows, depths=splats.depths)
    first, last = splats.view_range(view)
    columns = (splats.rows, splats.boxes, splats.depths, splats.ids)
    rows, boxes, depths, ids = [rows_of(column, first, last, device) for column in columns]
    counts = splats.counts
    in_use = None if counts is None else rows_of(counts, view, view + 1, device)
    return ViewRows(rows, boxes, depths, ids, in_use, last - first, first, splats)


def check_float32(**tensors: Tensor | None) -> None:
    """Refuse other precisions.

    Raises:
        ValueError: naming the tensor.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; the cuda body takes float32: convert it, or use the cpu body")
