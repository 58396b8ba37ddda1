# SPDX-License-Identifier: Apache-2.0
"""Lists of splats per tile, in depth order with ties broken by id.

An instance is a (splat, tile) pair. Instances are numbered splat by splat, so that the backward writes each one's
gradient to its own row and a splat's rows are contiguous: no atomics, one fixed order of sums. Splats are counted and
emitted in the order they are stored in, which keeps memory access sequential; each tile sorts its own short list.

Most splats touch one to four tiles, which is too few for loops: what costs time is guessing how often they turn.
So a splat is counted by the four corners of its rectangle of tiles, and emitted by one loop over the whole rectangle.
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

NUM_CHUNKS = 16
"""Ranges of splats counted and emitted independently; more would cost memory (one histogram each) and gain nothing."""

DIGIT_BITS = 8
NUM_DIGITS = 1 << DIGIT_BITS
"""Buckets of one radix pass: keys are sorted a byte at a time."""

MAX_PASSES = 3
"""Radix passes look at the highest 24 bits in which keys of a tile differ; what is equal there, insertion sorts."""

SHORT = 24
"""Lists of at most so many entries are sorted by insertion alone."""

KEY_SHIFT = np.uint64(32)
"""An entry of a list being sorted is its key, shifted by this, and the number of the instance."""


@dataclass(frozen=True)
class TileLists:
    """Tiles of a region of one view and their splats. T tiles row by row, V splats of the view, I instances."""

    num_columns: int
    num_rows: int
    footprints: Array  # (V, 5) float64, undefined for splats that are not large
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
    footprints = np.empty((rows.shape[0], NUM_FOOTPRINT), np.float64)
    corners = np.zeros((NUM_CHUNKS, num_rows + 1, num_columns + 1), np.int64)
    region = np.array([pixel_rows[0], pixel_rows[1], num_columns], np.int64)
    team.run(_count, NUM_CHUNKS, rows, boxes, footprints, region, corners)
    counts = corners.cumsum(axis=1).cumsum(axis=2)[:, :-1, :-1].reshape(NUM_CHUNKS, num_rows * num_columns)
    per_tile, per_chunk = counts.sum(axis=0), counts.sum(axis=1)
    tile_offsets = np.concatenate(([0], np.cumsum(per_tile)))
    cursors = np.cumsum(counts, axis=0) - counts + tile_offsets[:-1]
    num_instances = int(tile_offsets[-1])
    entries, splat_of = np.empty(num_instances, np.uint64), np.empty(num_instances, np.uint32)
    instance_offsets = np.empty(rows.shape[0] + 1, np.int64)
    instance_offsets[-1] = num_instances
    first = np.cumsum(per_chunk) - per_chunk
    team.run(
        _emit, NUM_CHUNKS, rows, boxes, footprints, region, sort_keys(depths), first, cursors, instance_offsets,
        entries, splat_of,
    )  # fmt: skip
    splats, instances = np.empty(num_instances, np.uint32), np.empty(num_instances, np.uint32)
    longest = int(per_tile.max(initial=0))
    team.run(_sort_tiles, NUM_CHUNKS, tile_offsets, longest, depths, ids, splat_of, entries, splats, instances)
    return TileLists(num_columns, num_rows, footprints, tile_offsets, splats, instances, instance_offsets)


def sort_keys(depths: Array) -> Array:
    """Unsigned integers (V,) uint32 in the order of the depths, which are positive: their bits, rounded to float32."""
    return depths.astype(np.float32, copy=False).view(np.uint32)


@device
def _rectangle(boxes, s, region):
    """Half-open ranges of the region's tiles that the pixel box of splat s touches: first row, last, column, last."""
    top, bottom = max(boxes[s, 1], region[0]) - region[0], min(boxes[s, 3], region[1]) - region[0]
    if bottom <= top:
        return 0, 0, 0, 0
    return top // TILE, (bottom + TILE - 1) // TILE, boxes[s, 0] // TILE, (boxes[s, 2] + TILE - 1) // TILE


@device
def _add(corners, task, first_row, last_row, first, last):
    """Count one more in every tile of a rectangle, to be seen when both axes of `corners` have been summed up."""
    corners[task, first_row, first] += 1
    corners[task, first_row, last] -= 1
    corners[task, last_row, first] -= 1
    corners[task, last_row, last] += 1


@kernel
def _count(task, num_tasks, rows, boxes, footprints, region, corners):
    """Footprints, and instances per tile (of this task) as sums of corners."""
    for s in range(task * boxes.shape[0] // num_tasks, (task + 1) * boxes.shape[0] // num_tasks):
        first_row, last_row, first, last = _rectangle(boxes, s, region)
        if is_large(boxes, s):
            write_footprint(footprints, rows, boxes, s)
            for tile_row in range(first_row, last_row):
                first, last = tiles_of_row(footprints, rows, boxes, s, tile_row, region[0])
                _add(corners, task, tile_row, tile_row + 1, first, last)
        else:
            _add(corners, task, first_row, last_row, first, last)


@kernel
def _emit(
    task, num_tasks, rows, boxes, footprints, region, keys, chunk_offsets, cursors, offsets, entries, splat_of
):  # fmt: skip
    """Put every instance of this task into its tile's list."""
    instance = chunk_offsets[task]
    for s in range(task * boxes.shape[0] // num_tasks, (task + 1) * boxes.shape[0] // num_tasks):
        offsets[s] = instance
        key = np.uint64(keys[s]) << KEY_SHIFT
        first_row, last_row, first, last = _rectangle(boxes, s, region)
        if is_large(boxes, s):
            for tile_row in range(first_row, last_row):
                first, last = tiles_of_row(footprints, rows, boxes, s, tile_row, region[0])
                for column in range(first, last):
                    _emit_one(task, tile_row * region[2] + column, key, s, instance, cursors, entries, splat_of)
                    instance += 1
        else:
            tile = first_row * region[2] + first
            end_of_row, to_next_row = tile + last - first, region[2] - (last - first)
            for _ in range((last_row - first_row) * (last - first)):
                _emit_one(task, tile, key, s, instance, cursors, entries, splat_of)
                instance += 1
                tile += 1
                is_end = tile == end_of_row
                tile += to_next_row if is_end else 0
                end_of_row += region[2] if is_end else 0


@device
def _emit_one(task, tile, key, s, instance, cursors, entries, splat_of):
    """Append one instance to a tile's list."""
    at = cursors[task, tile]
    cursors[task, tile] = at + 1
    entries[at] = key | np.uint64(instance)
    splat_of[instance] = s


@kernel
def _sort_tiles(task, num_tasks, tile_offsets, longest, depths, ids, splat_of, entries, splats, instances):
    """Sort the lists of tiles task, task + num_tasks, ... front to back; equal depths in the order of their ids."""
    spare, ends = np.empty(longest, np.uint64), np.empty((MAX_PASSES, NUM_DIGITS), np.int64)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        start, stop = tile_offsets[tile], tile_offsets[tile + 1]
        if stop - start > SHORT:
            _radix_sort(entries, start, stop, spare, ends)
        _insertion_sort(entries, start, stop, depths, ids, splat_of)
        for k in range(start, stop):
            instance = np.uint32(entries[k])
            instances[k] = instance
            splats[k] = splat_of[instance]


@device
def _radix_sort(entries, start, stop, spare, ends):
    """Sort entries[start:stop] by the highest MAX_PASSES digits in which their keys differ; stable."""
    lowest = highest = entries[start]
    for k in range(start + 1, stop):
        lowest, highest = min(lowest, entries[k]), max(highest, entries[k])
    base = lowest >> KEY_SHIFT << KEY_SHIFT
    bits, spread = 0, (highest - base) >> KEY_SHIFT
    while spread != 0:
        spread >>= np.uint64(1)
        bits += 1
    num_passes = min(MAX_PASSES, (bits + DIGIT_BITS - 1) // DIGIT_BITS)
    shift = KEY_SHIFT + np.uint64(max(0, bits - MAX_PASSES * DIGIT_BITS))
    _count_digits(entries, start, stop, base, shift, num_passes, ends)
    for digit in range(num_passes):
        place = shift + np.uint64(digit * DIGIT_BITS)
        if digit % 2 == 0:
            _move(entries, start, spare, 0, stop - start, base, place, ends, digit)
        else:
            _move(spare, 0, entries, start, stop - start, base, place, ends, digit)
    if num_passes % 2 == 1:
        for k in range(stop - start):
            entries[start + k] = spare[k]


@device
def _digit(entry, base, place):
    """The digit of an entry that begins at bit `place`."""
    return np.uint8((entry - base) >> place)


@device
def _count_digits(entries, start, stop, base, shift, num_passes, ends):
    """Set `ends` to where each value of each digit begins in the list sorted by it."""
    ends[:] = 0
    for k in range(start, stop):
        for digit in range(MAX_PASSES):
            ends[digit, _digit(entries[k], base, shift + np.uint64(digit * DIGIT_BITS))] += 1
    for digit in range(num_passes):
        total = 0
        for bucket in range(NUM_DIGITS):
            total, ends[digit, bucket] = total + ends[digit, bucket], total


@device
def _move(source, start, target, to_start, count, base, place, ends, digit):
    """One stable radix pass from one list into another, after `_count_digits`."""
    for k in range(start, start + count):
        entry = source[k]
        bucket = _digit(entry, base, place)
        at = ends[digit, bucket]
        ends[digit, bucket] = at + 1
        target[to_start + at] = entry


@device
def _insertion_sort(entries, start, stop, depths, ids, splat_of):
    """Sort entries by depth and id; quick where they are in order already, but for a few that are close or tie."""
    for at in range(start + 1, stop):
        entry, k = entries[at], at
        if entries[at - 1] >> KEY_SHIFT < entry >> KEY_SHIFT:
            continue  # storing it where it is would make the next turn wait
        while k > start and _is_behind(entries[k - 1], entry, depths, ids, splat_of):
            entries[k] = entries[k - 1]
            k -= 1
        entries[k] = entry


@device
def _is_behind(one, other, depths, ids, splat_of):
    """Whether entry `one` comes after `other`."""
    if one >> KEY_SHIFT != other >> KEY_SHIFT:
        return one > other
    first, second = splat_of[np.uint32(one)], splat_of[np.uint32(other)]
    return depths[first] > depths[second] or (depths[first] == depths[second] and ids[first] > ids[second])
