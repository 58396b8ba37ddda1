# SPDX-License-Identifier: Apache-2.0
"""Lists of splats per tile, in depth order with ties broken by id.

An instance is a (splat, tile) pair. Instances are numbered splat by splat (in depth order), so that the backward
writes each one's gradient to its own row and a splat's rows are contiguous: no atomics, one fixed order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from masksplat.cpu.footprint import NUM_FOOTPRINT, tiles_of_row, write_footprint
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.threads import ThreadTeam
from masksplat.types import TILE

Array = np.ndarray[Any, Any]

NUM_CHUNKS = 8
"""Depth ranges counted and emitted independently; more would cost memory (one histogram each) and gain nothing."""


@dataclass(frozen=True)
class TileLists:
    """Tiles of a region of one view and their splats. T tiles row by row, V splats of the view, I instances."""

    num_columns: int
    num_rows: int
    order: Array  # (V,) int32 splat of the view, front to back
    footprints: Array  # (V, 5) float64 by splat
    tile_offsets: Array  # (T + 1,) int64 into the two lists below
    splats: Array  # (I,) int32 splat of the view
    instances: Array  # (I,) int32 number of the instance
    instance_offsets: Array  # (V + 1,) int64 by depth rank: instances of order[k] are [k], ..., [k + 1] - 1

    @property
    def num_tiles(self) -> int:
        """Tiles of the region, T."""
        return self.num_columns * self.num_rows

    @property
    def num_instances(self) -> int:
        """(splat, tile) pairs, I."""
        return int(self.splats.size)


def depth_order(depths: Array, ids: Array) -> Array:
    """Splats front to back, (V,) int32; equal depths in the order of their ids."""
    order = np.argsort(depths)
    _order_ties_by_id(order, depths, ids)
    return order.astype(np.int32)


@kernel
def _order_ties_by_id(order, depths, ids):  # type: ignore[no-untyped-def]
    """Insertion sort by id inside each run of equal depths (runs are short: clones before their first update)."""
    for k in range(1, order.size):
        moved = order[k]
        j = k
        while j > 0 and depths[order[j - 1]] == depths[moved] and ids[order[j - 1]] > ids[moved]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = moved


def bin_splats(
    rows: Array, boxes: Array, depths: Array, ids: Array, *, width: int, pixel_rows: tuple[int, int], team: ThreadTeam
) -> TileLists:
    """Tile lists of the region of pixel rows `pixel_rows` for the V splats of one view."""
    num_columns = -(-width // TILE)
    num_rows = -(-(pixel_rows[1] - pixel_rows[0]) // TILE)
    num_splats = rows.shape[0]
    order = depth_order(depths, ids)
    footprints = np.empty((num_splats, NUM_FOOTPRINT), np.float64)
    counts = np.zeros((NUM_CHUNKS, max(1, num_columns * num_rows)), np.int64)
    per_splat = np.zeros(num_splats + 1, np.int64)
    region = np.array([pixel_rows[0], pixel_rows[1], num_columns], np.int64)
    team.run(_count, NUM_CHUNKS, rows, boxes, order, footprints, region, counts, per_splat)
    instance_offsets = np.cumsum(per_splat)
    per_tile = counts.sum(axis=0)
    tile_offsets = np.zeros(num_columns * num_rows + 1, np.int64)
    np.cumsum(per_tile[: num_columns * num_rows], out=tile_offsets[1:])
    cursors = np.cumsum(counts, axis=0) - counts + (np.cumsum(per_tile) - per_tile)
    total = int(tile_offsets[-1])
    splats, instances = np.empty(total, np.int32), np.empty(total, np.int32)
    team.run(_emit, NUM_CHUNKS, rows, boxes, order, footprints, region, cursors, instance_offsets, splats, instances)
    return TileLists(num_columns, num_rows, order, footprints, tile_offsets, splats, instances, instance_offsets)


@device
def _chunk(task, num_tasks, size):  # type: ignore[no-untyped-def]
    return task * size // num_tasks, (task + 1) * size // num_tasks


@device
def _tile_rows(boxes, s, region):  # type: ignore[no-untyped-def]
    """Half-open range of the region's tile rows that the pixel box touches."""
    top, bottom = max(boxes[s, 1], region[0]) - region[0], min(boxes[s, 3], region[1]) - region[0]
    if bottom <= top:
        return 0, 0
    return top // TILE, (bottom - 1) // TILE + 1


@kernel
def _count(task, num_tasks, rows, boxes, order, footprints, region, counts, per_splat):  # type: ignore[no-untyped-def]
    start, stop = _chunk(task, num_tasks, order.size)
    for k in range(start, stop):
        s = order[k]
        write_footprint(footprints, s, rows[s, 2], rows[s, 3], rows[s, 4], rows[s, 5])
        first_row, last_row = _tile_rows(boxes, s, region)
        total = 0
        for tile_row in range(first_row, last_row):
            first, last = tiles_of_row(footprints, rows, boxes, s, tile_row, region[0])
            for column in range(first, last):
                counts[task, tile_row * region[2] + column] += 1
            total += last - first
        per_splat[k + 1] = total


@kernel
def _emit(task, num_tasks, rows, boxes, order, footprints, region, cursors, offsets, splats, instances):  # type: ignore[no-untyped-def]
    start, stop = _chunk(task, num_tasks, order.size)
    for k in range(start, stop):
        s = order[k]
        instance = offsets[k]
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
