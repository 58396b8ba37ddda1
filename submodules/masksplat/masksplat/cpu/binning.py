# SPDX-License-Identifier: Apache-2.0
"""Lists of splats per tile, in depth order with ties broken by id.

An instance is a (splat, tile) pair. Instances are numbered splat by splat, so that the backward writes each one's
gradient to its own row and a splat's rows are contiguous: no atomics, one fixed order of sums. Splats are counted and
emitted in the order they are stored in, which keeps memory access sequential; each tile sorts its own short list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from masksplat.cpu.footprint import NUM_FOOTPRINT, is_large, tiles_of_row, write_footprint
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.threads import ThreadTeam
from masksplat.types import TILE

Array = np.ndarray[Any, Any]

NUM_CHUNKS = 8
"""Ranges of splats counted and emitted independently; more would cost memory (one histogram each) and gain nothing."""

NUM_DIGITS = 256
"""Buckets of one radix pass: keys are sorted a byte at a time."""


@dataclass(frozen=True)
class TileLists:
    """Tiles of a region of one view and their splats. T tiles row by row, V splats of the view, I instances."""

    num_columns: int
    num_rows: int
    footprints: Array  # (V, 5) float64
    tile_offsets: Array  # (T + 1,) int64 into the two lists below
    splats: Array  # (I,) uint32 splat of the view, front to back within a tile
    instances: Array  # (I,) uint32 number of the instance
    instance_offsets: Array  # (V + 1,) int64: instances of splat s are [s], ..., [s + 1] - 1

    @property
    def num_tiles(self) -> int:
        """Tiles of the region, T."""
        return self.num_columns * self.num_rows

    @property
    def num_instances(self) -> int:
        """(splat, tile) pairs, I."""
        return int(self.splats.size)


def bin_splats(
    rows: Array, boxes: Array, depths: Array, ids: Array, *, width: int, pixel_rows: tuple[int, int], team: ThreadTeam
) -> TileLists:
    """Tile lists of the region of pixel rows `pixel_rows` for the V splats of one view."""
    num_columns = -(-width // TILE)
    num_rows = -(-(pixel_rows[1] - pixel_rows[0]) // TILE)
    num_tiles, num_splats = num_columns * num_rows, rows.shape[0]
    footprints = np.empty((num_splats, NUM_FOOTPRINT), np.float64)
    counts = np.zeros((NUM_CHUNKS, num_tiles), np.int64)
    instance_offsets = np.zeros(num_splats + 1, np.int64)
    region = np.array([pixel_rows[0], pixel_rows[1], num_columns], np.int64)
    team.run(_count, NUM_CHUNKS, rows, boxes, footprints, region, counts, instance_offsets)
    np.cumsum(instance_offsets, out=instance_offsets)
    per_tile = counts.sum(axis=0)
    tile_offsets = np.zeros(num_tiles + 1, np.int64)
    np.cumsum(per_tile, out=tile_offsets[1:])
    cursors = np.cumsum(counts, axis=0) - counts + tile_offsets[:-1]
    splats, instances = np.empty(int(tile_offsets[-1]), np.uint32), np.empty(int(tile_offsets[-1]), np.uint32)
    team.run(_emit, NUM_CHUNKS, rows, boxes, footprints, region, cursors, instance_offsets, splats, instances)
    longest = int(per_tile.max(initial=0))
    team.run(_sort_tiles, NUM_CHUNKS, tile_offsets, longest, sort_keys(depths), ids, splats, instances)
    return TileLists(num_columns, num_rows, footprints, tile_offsets, splats, instances, instance_offsets)


def sort_keys(depths: Array) -> Array:
    """Unsigned integers in the order of the depths, which are positive: their bits, (V,) uint32 or uint64."""
    return depths.view(np.uint32 if depths.dtype == np.float32 else np.uint64)


@device
def _tile_rows(boxes, s, region):
    """Half-open range of the region's tile rows that the pixel box touches."""
    top, bottom = max(boxes[s, 1], region[0]) - region[0], min(boxes[s, 3], region[1]) - region[0]
    if bottom <= top:
        return 0, 0
    return top // TILE, (bottom - 1) // TILE + 1


@kernel
def _count(task, num_tasks, rows, boxes, footprints, region, counts, offsets):
    """Footprints, instances per tile (of this task) and, at offsets[s + 1], instances of splat s."""
    for s in range(task * boxes.shape[0] // num_tasks, (task + 1) * boxes.shape[0] // num_tasks):
        if is_large(boxes, s):
            write_footprint(footprints, rows, boxes, s)
        first_row, last_row = _tile_rows(boxes, s, region)
        total = 0
        for tile_row in range(first_row, last_row):
            first, last = tiles_of_row(footprints, rows, boxes, s, tile_row, region[0])
            for column in range(first, last):
                counts[task, tile_row * region[2] + column] += 1
            total += max(0, last - first)
        offsets[s + 1] = total


@kernel
def _emit(task, num_tasks, rows, boxes, footprints, region, cursors, offsets, splats, instances):
    """Put every instance of this task into its tile's list."""
    for s in range(task * boxes.shape[0] // num_tasks, (task + 1) * boxes.shape[0] // num_tasks):
        instance = offsets[s]
        first_row, last_row = _tile_rows(boxes, s, region)
        for tile_row in range(first_row, last_row):
            first, last = tiles_of_row(footprints, rows, boxes, s, tile_row, region[0])
            for column in range(first, last):
                tile = tile_row * region[2] + column
                at = cursors[task, tile]
                splats[at] = s
                instances[at] = instance
                cursors[task, tile] = at + 1
                instance += 1


@kernel
def _sort_tiles(task, num_tasks, tile_offsets, longest, keys, ids, splats, instances):
    """Sort the lists of tiles task, task + num_tasks, ... front to back; equal depths in the order of their ids."""
    spare_splats, spare_instances = np.empty(longest, np.uint32), np.empty(longest, np.uint32)
    ends = np.empty(NUM_DIGITS, np.int64)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        start, count = tile_offsets[tile], tile_offsets[tile + 1] - tile_offsets[tile]
        is_in_place = True
        for digit in range(keys.itemsize):
            # The digits of a list are counted in any order, so always where the list was.
            if not _count_digits(splats, start, count, digit, keys, ends):
                continue
            if is_in_place:
                _move(splats, instances, start, spare_splats, spare_instances, 0, count, digit, keys, ends)
            else:
                _move(spare_splats, spare_instances, 0, splats, instances, start, count, digit, keys, ends)
            is_in_place = not is_in_place
        if not is_in_place:
            for k in range(count):
                splats[start + k], instances[start + k] = spare_splats[k], spare_instances[k]
        _order_ties_by_id(start, start + count, keys, ids, splats, instances)


@device
def _digit(keys, splat, digit):
    """One byte of a splat's key."""
    return (keys[splat] >> keys.dtype.type(8 * digit)) & keys.dtype.type(NUM_DIGITS - 1)


@device
def _count_digits(splats, base, count, digit, keys, ends):
    """Set `ends` to where each value of the digit begins in the sorted list; False when all share one value."""
    ends[:] = 0
    for k in range(base, base + count):
        ends[_digit(keys, splats[k], digit)] += 1
    total = 0
    for bucket in range(NUM_DIGITS):
        if ends[bucket] == count:
            return False
        total, ends[bucket] = total + ends[bucket], total
    return True


@device
def _move(splats, instances, base, to_splats, to_instances, to_base, count, digit, keys, ends):
    """One stable radix pass from one list into another, after `_count_digits`."""
    for k in range(base, base + count):
        bucket = _digit(keys, splats[k], digit)
        to_splats[to_base + ends[bucket]] = splats[k]
        to_instances[to_base + ends[bucket]] = instances[k]
        ends[bucket] += 1


@device
def _order_ties_by_id(start, stop, keys, ids, splats, instances):
    """Insertion sort by id inside each run of equal depths (runs are short: clones before their first update)."""
    for at in range(start + 1, stop):
        splat, instance, k = splats[at], instances[at], at
        while k > start and keys[splats[k - 1]] == keys[splat] and ids[splats[k - 1]] > ids[splat]:
            splats[k], instances[k] = splats[k - 1], instances[k - 1]
            k -= 1
        splats[k], instances[k] = splat, instance
