# SPDX-License-Identifier: Apache-2.0
"""Which rank draws which pixels of a batch: ranges of tile rows, and what each range needs around it.

A view is cut between rows of tiles only. A region is drawn with a halo of `HALO` pixel rows on either side, because the
loss of its own rows looks that far; losses are summed over own rows, gradients over everything drawn.

Letters: B views of the batch, W ranks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from masksplat.types import TILE

HALO = 5
"""Pixel rows that the 11 x 11 window of SSIM reaches beyond a region."""


@dataclass(frozen=True)
class Region:
    """Tile rows [tile_start, tile_stop) of the batch's view number `view` (a position in the batch)."""

    view: int
    tile_start: int
    tile_stop: int

    def own_rows(self, height: int) -> tuple[int, int]:
        """Pixel rows [start, stop) whose loss this region counts, of a view with `height` rows."""
        return TILE * self.tile_start, min(TILE * self.tile_stop, height)

    def drawn_rows(self, height: int, halo: int = HALO) -> tuple[int, int]:
        """Pixel rows [start, stop) that are drawn: the own rows and the halo, within the view."""
        start, stop = self.own_rows(height)
        return max(start - halo, 0), min(stop + halo, height)

    def frame_rows(self, height: int, halo: int = HALO) -> int:
        """Rows of tiles of what is drawn: a frame's begin at its first row of pixels."""
        first, last = self.drawn_rows(height, halo)
        return -(-(last - first) // TILE)

    def own_pairs(self, pairs_per_row: np.ndarray, height: int, halo: int = HALO) -> np.ndarray:
        """(tile rows of this region,) int64: what each of them cost, from what was counted in the drawn rows.

        Args: pairs_per_row: `Frame.pairs_per_row` of the drawn rows. A frame's rows of tiles begin at its first pixel
        row, the halo's; each is split between the region's rows of tiles by its share of pixel rows, the halo left out.
        """
        first, last = self.drawn_rows(height, halo)
        own_first, own_last = self.own_rows(height)
        if (first, last) == (own_first, own_last):
            return pairs_per_row.astype(np.int64)  # the frame's rows are the region's
        num_rows, lead = len(pairs_per_row), own_first - first  # of a frame's row, `lead` pixels are a tile's before
        before, within = pairs_per_row * lead // TILE, pairs_per_row * (TILE - lead) // TILE
        for row in range(max(num_rows - 2, 0), num_rows):  # may be cut, or reach beyond what is owned
            start, pairs = first + TILE * row, int(pairs_per_row[row])
            num_drawn, num_owned = min(TILE, last - start), max(min(TILE, own_last - start), 0)
            before[row] = pairs * min(lead, num_owned) // num_drawn
            within[row] = pairs * max(num_owned - lead, 0) // num_drawn
        found = np.zeros(self.tile_stop - self.tile_start, np.int64)
        found[:num_rows] = within[: len(found)]
        found[: num_rows - 1] += before[1 : len(found) + 1]
        return found


def num_tile_rows(height: int) -> int:
    """Rows of tiles of a view with `height` rows of pixels; the last may be cut."""
    return -(-height // TILE)


@dataclass(frozen=True)
class PixelPartition:
    """The regions of every rank, in the order of their views; at most one of each view. A rank may have none.

    heights: of the B views, in pixels. regions: W tuples.
    """

    heights: tuple[int, ...]
    regions: tuple[tuple[Region, ...], ...]

    def __post_init__(self) -> None:
        """Raises: ValueError when a tile row belongs to no rank or to two."""
        next_row = [0] * len(self.heights)
        for region in sorted((r for mine in self.regions for r in mine), key=lambda r: (r.view, r.tile_start)):
            if region.tile_start != next_row[region.view] or region.tile_stop <= region.tile_start:
                raise ValueError(f"{region} does not continue at tile row {next_row[region.view]} of its view")
            next_row[region.view] = region.tile_stop
        for view, height in enumerate(self.heights):
            if next_row[view] != num_tile_rows(height):
                raise ValueError(f"view {view} has {num_tile_rows(height)} tile rows, {next_row[view]} are given out")
        for rank, mine in enumerate(self.regions):
            views = [region.view for region in mine]
            if views != sorted(set(views)):
                raise ValueError(f"rank {rank} has regions of the views {views}; one of each, in order, is possible")

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.regions)

    @cached_property
    def frame_rows(self) -> tuple[int, ...]:
        """(W,) rows of tiles of all frames of each rank."""
        heights = self.heights
        return tuple(sum(region.frame_rows(heights[region.view]) for region in mine) for mine in self.regions)

    @cached_property
    def most_regions_of_a_view(self) -> int:
        """Regions of the view that is cut into most."""
        return max(Counter(region.view for mine in self.regions for region in mine).values(), default=0)

    @classmethod
    def of_whole_views(cls, heights: Sequence[int], rank_of_view: Sequence[int], num_ranks: int) -> PixelPartition:
        """View number b is drawn by rank rank_of_view[b]."""
        regions: list[list[Region]] = [[] for _ in range(num_ranks)]
        for view, (height, rank) in enumerate(zip(heights, rank_of_view, strict=True)):
            regions[rank].append(Region(view, 0, num_tile_rows(height)))
        return cls(tuple(heights), tuple(map(tuple, regions)))

    @classmethod
    def of_cuts(cls, heights: Sequence[int], cuts: Sequence[int], rank_of_part: Sequence[int]) -> PixelPartition:
        """Contiguous parts of all tile rows of the batch, view after view.

        Args: cuts: W - 1 ascending positions between 0 and the number of tile rows; rank_of_part: a permutation.
        """
        total = sum(map(num_tile_rows, heights))
        bounds = [0, *cuts, total]
        regions: list[tuple[Region, ...]] = [()] * len(rank_of_part)
        for part, rank in enumerate(rank_of_part):
            regions[rank] = _regions_between(heights, bounds[part], bounds[part + 1])
        return cls(tuple(heights), tuple(regions))

    def reordered(self, order: Sequence[int]) -> PixelPartition:
        """The same regions when the batch's view number k is the one that was number order[k]."""
        place = {view: k for k, view in enumerate(order)}
        regions = [
            tuple(sorted((replace(region, view=place[region.view]) for region in mine), key=lambda region: region.view))
            for mine in self.regions
        ]
        return PixelPartition(tuple(self.heights[view] for view in order), tuple(regions))

    def digest(self, step: int, views: Sequence[int]) -> int:
        """63 bits that tell this partition of the `views` of `step` from any other (`require_agreement`)."""
        numbers = [[(r.view, r.tile_start, r.tile_stop) for r in mine] for mine in self.regions]
        text = repr((step, tuple(views), self.heights, numbers))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def to_plain(self) -> list[list[list[int]]]:
        """[rank][region] -> [view, tile_start, tile_stop], for logs."""
        return [[[r.view, r.tile_start, r.tile_stop] for r in mine] for mine in self.regions]


@lru_cache(256)
def in_order_of_ranks(partition: PixelPartition) -> tuple[tuple[int, ...], PixelPartition]:
    """An order of the batch's views in which the first ranks draw the first views, and the regions in that order.

    Whole views of one size, of which each rank draws as many as ever, are then one and the same partition.
    """
    first_rank = {region.view: rank for rank, mine in reversed(list(enumerate(partition.regions))) for region in mine}
    order = tuple(sorted(range(len(partition.heights)), key=lambda view: first_rank[view]))
    return order, partition.reordered(order)


def _regions_between(heights: Sequence[int], start: int, stop: int) -> tuple[Region, ...]:
    """The regions that the rows [start, stop) of all tile rows are."""
    found, first = [], 0
    for view, height in enumerate(heights):
        last = first + num_tile_rows(height)
        if max(start, first) < min(stop, last):
            found.append(Region(view, max(start, first) - first, min(stop, last) - first))
        first = last
    return tuple(found)
