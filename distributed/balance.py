# SPDX-License-Identifier: Apache-2.0
"""Which rank draws what: work is shared out by what each tile row of each view cost when it was last drawn.

Costs are whole numbers (pairs of pixel and splat that were evaluated), never times, so that every rank computes the
same partition. Costs seen at step t count from step t + k on for a fixed k, which leaves time to share them.

Letters: B views of the batch, W ranks, n tile rows of the batch, view after view.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise, permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, num_tile_rows
from masksplat.types import TILE

RULES = ("balanced", "equal_rows", "grendel")

WHOLE_VIEW_TOLERANCE = 1.05
"""Views stay whole while the largest load is at most this times the mean."""

SNAP_TOLERANCE = 1.01
"""A cut moves to the border of a view when the largest load grows by no more than this."""

GRENDEL_BORDER = 1
"""Tile rows around a border within which Grendel's cuts move to it (its border_divpos_coeff)."""

COST_DELAY = 2
"""Steps between counting a cost and using it."""

PIXEL_COST = 1
"""Cost of a pixel without any splat (background and loss), in pairs."""

MOST_RANKS_TO_TRY = 3
"""Parts are given to up to as many ranks by trying all orders."""

REMEMBERED = 256
"""Partitions into whole views that are kept."""


def assign_whole_views(costs: Sequence[int], num_ranks: int) -> list[int]:
    """(B,) part of each view, so that the largest sum of costs is small: longest first, then moves and swaps.

    Longest-processing-time-first is within 4/3 of the optimum (Graham, 1969).
    """
    parts = [0] * len(costs)
    loads = [(0, part) for part in range(num_ranks)]
    for view in sorted(range(len(costs)), key=lambda view: (-costs[view], view)):
        load, part = heapq.heappop(loads)
        parts[view] = part
        heapq.heappush(loads, (load + costs[view], part))
    totals = [load for load, _ in sorted(loads, key=lambda entry: entry[1])]
    while _improve_heaviest(parts, totals, costs):
        pass
    return parts


def _improve_heaviest(parts: list[int], totals: list[int], costs: Sequence[int]) -> bool:
    """One move or swap that lowers the larger of the two loads it touches, from the heaviest part; False at the end."""
    heavy = max(range(len(totals)), key=lambda part: (totals[part], -part))
    best: tuple[int, int, int, int] | None = None
    for mine in (view for view, part in enumerate(parts) if part == heavy):
        for other in range(-len(totals), len(parts)):  # negative: an empty place of part -other - 1
            part = parts[other] if other >= 0 else -other - 1
            moved = costs[mine] - (costs[other] if other >= 0 else 0)
            larger = max(totals[heavy] - moved, totals[part] + moved)
            if part != heavy and larger < totals[heavy] and (best is None or larger < best[0]):
                best = (larger, mine, other, part)
    if best is None:
        return False
    _, mine, other, part = best
    moved = costs[mine] - (costs[other] if other >= 0 else 0)
    parts[mine] = part
    if other >= 0:
        parts[other] = heavy
    totals[heavy] -= moved
    totals[part] += moved
    return True


def smallest_largest_load(costs: Sequence[int], num_parts: int) -> int:
    """The largest load of the best cut of n rows into contiguous parts: exact, by bisection over whole numbers."""
    prefix = [0, *accumulate(costs)]
    low, high = max([*costs, -(-prefix[-1] // num_parts)]), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        if _num_parts_needed(prefix, 0, middle, num_parts) <= num_parts:
            high = middle
        else:
            low = middle + 1
    return low


def _num_parts_needed(prefix: Sequence[int], start: int, limit: int, enough: int) -> int:
    """Parts of at most `limit` that cover the rows from `start` on; stops counting above `enough`."""
    count, num_rows = 0, len(prefix) - 1
    while start < num_rows and count <= enough:
        start = max(bisect_right(prefix, prefix[start] + limit) - 1, start)
        count += 1
    return count


def balanced_cuts(costs: Sequence[int], num_parts: int, borders: Sequence[int]) -> list[int]:
    """W - 1 ascending cuts whose largest load is within 1 % of the best, at the borders of views where that allows it.

    Args: costs: (n,) of all rows, >= 0; borders: ascending positions where a cut costs no halo and no second copies.
    """
    prefix = [0, *accumulate(costs)]
    num_rows = len(costs)
    best = smallest_largest_load(costs, num_parts)
    limit = max(best, int(best * SNAP_TOLERANCE))
    cuts, start = [], 0
    for parts_left in range(num_parts - 1, 0, -1):
        furthest = min(bisect_right(prefix, prefix[start] + limit) - 1, num_rows)
        fair = bisect_right(prefix, prefix[start] + (prefix[-1] - prefix[start]) // (parts_left + 1)) - 1
        start = _chosen_cut(prefix, start, (fair, furthest), limit, parts_left, borders)
        cuts.append(start)
    return cuts


def _chosen_cut(
    prefix: Sequence[int], start: int, span: tuple[int, int], limit: int, parts_left: int, borders: Sequence[int]
) -> int:
    """The border nearest to the fair cut from which the other parts can do the rest, else the nearest row that can."""
    fair, furthest = span
    near = [border for border in borders if start < border <= furthest]
    for border in sorted(near, key=lambda border: abs(prefix[border] - prefix[min(fair, furthest)]))[:2]:
        if _num_parts_needed(prefix, border, limit, parts_left) <= parts_left:
            return border
    for row in (min(fair, furthest), min(fair + 1, furthest)):
        if row >= start and _num_parts_needed(prefix, row, limit, parts_left) <= parts_left:
            return row
    return furthest


def equal_row_cuts(num_rows: int, num_parts: int) -> list[int]:
    """Cuts into equally many rows, whatever they cost."""
    return [num_rows * part // num_parts for part in range(1, num_parts)]


def grendel_cuts(costs: Sequence[int], num_parts: int, borders: Sequence[int]) -> list[int]:
    """Grendel-GS's "final" rule: cuts at equal shares of the prefix sum, moved to a border of a view within one row."""
    prefix = list(accumulate(costs))
    ends = [0, *borders]
    cuts = []
    for part in range(1, num_parts):
        cut = bisect_right(prefix, prefix[-1] * part // num_parts)
        view = bisect_right(ends, cut) - 1
        if view + 1 < len(ends) and cut + GRENDEL_BORDER >= ends[view + 1]:
            cut = ends[view + 1]
        elif cut - GRENDEL_BORDER <= ends[view]:
            cut = ends[view]
        cuts.append(cut)
    return cuts


def match_parts_to_ranks(affinity: Sequence[Sequence[int]] | np.ndarray) -> list[int]:
    """Rank of each part, so that the sum of affinity (W parts, W ranks) is largest; whole numbers, ties by order."""
    if len(affinity) <= MOST_RANKS_TO_TRY:  # one best order is what the search finds, too; it takes ten times as long
        orders = list(permutations(range(len(affinity))))
        sums = [sum(affinity[part][rank] for part, rank in enumerate(order)) for order in orders]
        largest = max(sums)
        if sums.count(largest) == 1:
            return list(orders[sums.index(largest)])
    _, ranks = linear_sum_assignment(-np.asarray(affinity))
    return [int(rank) for rank in ranks]


def loads_of(partition: PixelPartition, costs: Sequence[np.ndarray]) -> list[int]:
    """(W,) the cost of each rank's regions; costs: for each view of the batch, (tile rows,)."""
    return [sum(int(costs[r.view][r.tile_start : r.tile_stop].sum()) for r in mine) for mine in partition.regions]


class RowCosts:
    """What the rows of tiles of a view cost. rows: (tile rows,) int64, which nobody changes; total: their sum."""

    def __init__(self, rows: np.ndarray) -> None:
        """See the class."""
        self.rows = rows
        self.total = int(rows.sum())

    @cached_property
    def prefix(self) -> list[int]:
        """(tile rows + 1,) the cost of the rows before each."""
        return [0, *accumulate(self.rows.tolist())]

    def between(self, start: int, stop: int) -> int:
        """The cost of the rows [start, stop)."""
        return self.total if stop - start == len(self.rows) else self.prefix[stop] - self.prefix[start]


class _Piece(NamedTuple):
    """Rows of tiles [start, stop) of a view of the batch."""

    view: int
    start: int
    stop: int


def partition_batch(
    heights: Sequence[int],
    costs: Sequence[np.ndarray | RowCosts],
    num_ranks: int,
    *,
    rule: str = "balanced",
    affinity: Sequence[Sequence[int]] | np.ndarray | None = None,
    hidden_load: int = 0,
) -> PixelPartition:
    """The regions of every rank for one batch: a pure function.

    Args: heights: (B,) pixels; costs: for each view, (tile rows,) int64 >= 0; affinity: (B, W) int64, how many of the
    splats that view b shows rank r owns (loads come first, this breaks the symmetry of ranks); rule: one of RULES;
    hidden_load: loads up to this take no time, because something else takes longer. Views then stay whole, or are cut
    into equal rows, whatever they cost: batches are shared out in few ways, each of which comes again and again.
    """
    views = [view if isinstance(view, RowCosts) else RowCosts(view) for view in costs]
    borders = list(accumulate(len(view.rows) for view in views))
    if rule == "equal_rows":
        return PixelPartition.of_cuts(heights, equal_row_cuts(borders[-1], num_ranks), range(num_ranks))
    if rule == "grendel":
        return PixelPartition.of_cuts(heights, grendel_cuts(_all_rows(views), num_ranks, borders), range(num_ranks))
    if rule != "balanced":
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    totals = [view.total for view in views]
    parts, largest = _whole_parts(totals, num_ranks)
    if largest > max(hidden_load, WHOLE_VIEW_TOLERANCE * sum(totals) / num_ranks):  # strips take longer to find
        if hidden_load:
            equal = PixelPartition.of_cuts(heights, equal_row_cuts(borders[-1], num_ranks), range(num_ranks))
            if max(loads_of(equal, [view.rows for view in views])) <= hidden_load:
                return equal
        cuts = balanced_cuts(_all_rows(views), num_ranks, borders)
        pieces = _pieces(borders, cuts)
        if largest > max(sum(views[view].between(start, stop) for view, start, stop in part) for part in pieces):
            return PixelPartition.of_cuts(heights, cuts, _ranks_of(pieces, views, affinity))
    pieces = [[] for _ in range(num_ranks)]
    for view, part in enumerate(parts):
        pieces[part].append(_Piece(view, 0, len(views[view].rows)))
    ranks = _ranks_of(pieces, views, affinity)
    return _whole_views(tuple(heights), tuple([ranks[part] for part in parts]), num_ranks)


def _whole_parts(totals: Sequence[int], num_ranks: int) -> tuple[list[int], float]:
    """The part of each view and the largest load; infinite, all in one part, when there are fewer views than ranks."""
    if len(totals) < num_ranks:
        return [0] * len(totals), math.inf
    parts, loads = assign_whole_views(totals, num_ranks), [0] * num_ranks
    for total, part in zip(totals, parts, strict=True):
        loads[part] += total
    return parts, max(loads)


def _all_rows(views: Sequence[RowCosts]) -> list[int]:
    return [cost for view in views for cost in view.rows.tolist()]


@lru_cache(REMEMBERED)
def _whole_views(heights: tuple[int, ...], rank_of_view: tuple[int, ...], num_ranks: int) -> PixelPartition:
    return PixelPartition.of_whole_views(heights, rank_of_view, num_ranks)


def _pieces(borders: Sequence[int], cuts: Sequence[int]) -> list[list[_Piece]]:
    """What the parts between cuts are made of; borders: where views end among all rows."""
    bounds, pieces = [0, *cuts, borders[-1]], []
    for first, last in pairwise(bounds):
        part, start = [], 0
        for view, stop in enumerate(borders):
            if max(first, start) < min(last, stop):
                part.append(_Piece(view, max(first, start) - start, min(last, stop) - start))
            start = stop
        pieces.append(part)
    return pieces


def _ranks_of(
    parts: Sequence[Sequence[_Piece]], views: Sequence[RowCosts], affinity: Sequence[Sequence[int]] | np.ndarray | None
) -> list[int]:
    """Rank of each part: the one that owns most of what the part shows."""
    num_ranks = len(parts)
    if affinity is None:
        return list(range(num_ranks))
    owned = affinity.tolist() if isinstance(affinity, np.ndarray) else affinity
    gains = []
    for part in parts:
        gain = [0] * num_ranks
        for view, start, stop in part:
            share, total = views[view].between(start, stop), max(views[view].total, 1)
            for rank, count in enumerate(owned[view]):
                gain[rank] += count * share // total
        gains.append(gain)
    return match_parts_to_ranks(gains)


class LoadBalancer:
    """Remembers what each tile row of each view cost, and shares out batches by it. Every rank holds the same one.

    Args: sizes: (width, height) of every view of the scene; num_ranks: W; rule: one of RULES; delay: k, at least 1;
    hidden_load: see `partition_batch`.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        num_ranks: int,
        *,
        rule: str = "balanced",
        delay: int = COST_DELAY,
        hidden_load: int = 0,
    ) -> None:
        if delay < 1 or rule not in RULES:
            raise ValueError(f"the delay is {delay} (at least 1) and the rule {rule!r} (one of {', '.join(RULES)})")
        self.heights = tuple(height for _, height in sizes)
        self.num_ranks, self.rule, self.delay, self.hidden_load = num_ranks, rule, delay, hidden_load
        self._widths = tuple(width for width, _ in sizes)
        self._pairs: dict[int, np.ndarray] = {}
        self._owned: dict[int, list[int]] = {}
        self._pixels: dict[tuple[int, int], RowCosts] = {}  # of a size of views
        self._costs: dict[int, RowCosts] = {}  # of views whose pairs are known
        self._all_pairs = self._all_pixels = 0  # of these views
        self._waiting: list[_Observation] = []
        self._newest = -1  # the last step that was shared out

    def assign(self, step: int, views: Sequence[int]) -> PixelPartition:
        """The partition of the batch of `step`; equal on all ranks that observed the same."""
        self._newest = max(self._newest, step)
        while self._waiting and self._waiting[0].step + self.delay <= step:
            self._learn(self._waiting.pop(0))
        heights = [self.heights[view] for view in views]
        nobody = [0] * self.num_ranks
        affinity = [self._owned.get(view, nobody) for view in views]
        return partition_batch(
            heights, self.row_costs(views), self.num_ranks,
            rule=self.rule, affinity=affinity, hidden_load=self.hidden_load,
        )  # fmt: skip

    def costs(self, view: int) -> np.ndarray:
        """(tile rows,) int64 >= 1: pairs when last counted, or the mean density of known views, and the pixels."""
        return self._cost_of(view).rows

    def row_costs(self, views: Sequence[int]) -> list[RowCosts]:
        """`costs` of some views."""
        return [self._cost_of(view) for view in views]

    def _cost_of(self, view: int) -> RowCosts:
        known = self._costs.get(view)
        if known is None:
            pixels, pairs = self._pixels_of(view).rows, self._pairs.get(view)
            if pairs is None:
                return RowCosts(pixels * self._all_pairs // max(self._all_pixels, 1) + PIXEL_COST * pixels)
            known = self._costs[view] = RowCosts(pairs + PIXEL_COST * pixels)
        return known

    def _learn(self, due: _Observation) -> None:
        """Costs of a step count from now on."""
        for view, pairs in due.pairs.items():
            before = self._pairs.get(view)
            if before is None:
                self._all_pixels += self._pixels_of(view).total
            self._all_pairs += int(pairs.sum()) - (0 if before is None else int(before.sum()))
            self._pairs[view] = pairs
            self._costs.pop(view, None)
        for view, owned in due.owned.items():
            self._owned[view] = owned.tolist()

    def observe(
        self, step: int, pairs: Mapping[int, np.ndarray], owned: Mapping[int, np.ndarray] | None = None
    ) -> None:
        """Remember what `step` counted, equal on all ranks: view of the scene -> whole numbers.

        Args: pairs: (tile rows,) of each view (`share_costs`); owned: (W,) how many of its splats each rank owns
        (`share_owned`), by which a part goes to the rank that has most of it already.
        Raises: ValueError for steps out of order, costs that come when they should have been used, or a vector of
        another length.
        """
        if step + self.delay <= self._newest:
            raise ValueError(f"costs of step {step} count from step {step + self.delay} on, and come after that")
        if self._waiting and self._waiting[-1].step >= step:
            raise ValueError(f"costs of step {step} come after those of step {self._waiting[-1].step}")
        for view, values in pairs.items():
            if values.shape != (num_tile_rows(self.heights[view]),):
                raise ValueError(f"view {view} has {num_tile_rows(self.heights[view])} tile rows, not {values.shape}")
        for view, values in (owned or {}).items():
            if values.shape != (self.num_ranks,):
                raise ValueError(f"view {view} has splats of {self.num_ranks} ranks, not {values.shape}")
        self._waiting.append(_Observation(step, _whole(pairs), _whole(owned or {})))

    def to_plain(self) -> dict[str, Any]:
        """Everything that later partitions depend on, as JSON can hold it (`restore`)."""
        return {
            "num_ranks": self.num_ranks,
            "known": [_plain(self._pairs), [[view, list(owned)] for view, owned in self._owned.items()]],
            "waiting": [[seen.step, _plain(seen.pairs), _plain(seen.owned)] for seen in self._waiting],
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Become the balancer that `to_plain` described; with another number of ranks, forget who owned what.

        Raises: as `observe`.
        """
        same_ranks = plain["num_ranks"] == self.num_ranks
        self._waiting = []
        for step, pairs, owned in [[-1, *plain["known"]], *plain["waiting"]]:
            self.observe(int(step), _unplain(pairs), _unplain(owned if same_ranks else []))
        self._pairs, self._owned, self._costs = {}, {}, {}
        self._all_pairs = self._all_pixels = 0
        self._learn(self._waiting.pop(0))

    def _pixels_of(self, view: int) -> RowCosts:
        """The pixels in each row of tiles."""
        height, width = size = self.heights[view], self._widths[view]
        if size not in self._pixels:
            starts = TILE * np.arange(num_tile_rows(height), dtype=np.int64)
            self._pixels[size] = RowCosts(np.minimum(height - starts, TILE) * width)
        return self._pixels[size]


@dataclass(frozen=True, eq=False)
class _Observation:
    """What one step counted: view of the scene -> pairs of its tile rows, splats that each rank owns."""

    step: int
    pairs: dict[int, np.ndarray]
    owned: dict[int, np.ndarray]


def _whole(counts: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {view: np.asarray(values, np.int64) for view, values in counts.items()}


def _plain(counts: Mapping[int, np.ndarray]) -> list[list[object]]:
    return [[view, values.tolist()] for view, values in counts.items()]


def _unplain(plain: Sequence[Sequence[Any]]) -> dict[int, np.ndarray]:
    return {int(view): np.array(values, np.int64) for view, values in plain}


def share_costs(
    communicator: Communicator, partition: PixelPartition, views: Sequence[int], mine: Sequence[np.ndarray]
) -> dict[int, np.ndarray]:
    """The pairs of every tile row of the batch, for `LoadBalancer.observe`. All ranks.

    Args: views: of the scene, as drawn; mine: for each region of this rank, its own tile rows' pairs.
    """
    offsets = [0, *accumulate(map(num_tile_rows, partition.heights))]
    flat = torch.zeros(offsets[-1], dtype=torch.int64)
    for region, pairs in zip(partition.regions[communicator.rank], mine, strict=True):
        first = offsets[region.view]
        flat[first + region.tile_start : first + region.tile_stop] = torch.from_numpy(pairs)
    total = communicator.sum(flat).numpy()  # all ranks
    return {view: total[offsets[k] : offsets[k + 1]] for k, view in enumerate(views)}


def share_owned(communicator: Communicator, views: Sequence[int], num_splats: Sequence[int]) -> dict[int, np.ndarray]:
    """(W,) of each view of the batch: how many of its splats each rank owns, for `LoadBalancer.observe`. All ranks.

    Args: views: of the scene, as drawn; num_splats: packed splats of this rank in each of them.
    """
    owned = np.array(communicator.gather_counts(num_splats), np.int64)  # all ranks
    return {view: owned[:, k] for k, view in enumerate(views)}
