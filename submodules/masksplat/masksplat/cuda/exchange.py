# SPDX-License-Identifier: Apache-2.0
"""Copies of packed splats for other ranks and their gradients on the GPU: launches of `exchange.cu`, where it is told
what blocks, groups, ordinals and runs are. How the copies travel is for whoever calls.

Letters: B views, L most regions of one view, W ranks, Q regions of this rank, K blocks (3 times all regions), M packed
rows, S copies sent, R received. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.capacity import Windows
from masksplat.cuda.launcher import Argument, Launcher
from masksplat.cuda.projection import upload
from masksplat.types import NUM_ROW_COLUMNS, Splats

THREADS = 256
ROUTE_THREADS = 1024
NUM_GROUPS = 3
BOX_WORDS = 4
REGION_WORDS = 4
RUN_WORDS = 4
START_WORDS = 2


class WireWords(NamedTuple):
    """How a copy travels: words of its id (1 or 2), and whether its box does."""

    ids: int
    sends_boxes: bool

    @property
    def per_row(self) -> int:
        """Words of 4 bytes of one copy."""
        return NUM_ROW_COLUMNS + self.ids + (BOX_WORDS if self.sends_boxes else 0)


class TableShape(NamedTuple):
    """What the host knows of `RegionTables`: B, L, the rows of the longest view, regions of each rank, this rank.

    has_sizes: False when boxes travel.
    """

    num_views: int
    most_regions: int
    most_rows: int
    num_regions: tuple[int, ...]
    rank: int
    has_sizes: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """int32 numbers of regions, views, sizes, first_regions and blocks."""
        own = self.num_regions[self.rank] if self.has_sizes else 0
        num_blocks = NUM_GROUPS * sum(self.num_regions)
        regions = REGION_WORDS * self.num_views * self.most_regions
        return regions, 2 * self.num_views, 2 * own, len(self.num_regions) + 1, num_blocks

    @property
    def num_words(self) -> int:
        """All of them."""
        return sum(self.lengths)


@dataclass(frozen=True)
class HostTables:
    """`RegionTables` on the host, in one line, for one copy: to new memory, or over that of a step that is repeated."""

    shape: TableShape
    packed: np.ndarray

    @classmethod
    def pack(
        cls,
        *,
        regions: np.ndarray,
        view_offsets: Sequence[int],
        sizes: Sequence[tuple[int, int]] | None,
        num_regions: Sequence[int],
        rank: int,
    ) -> HostTables:
        """Args: view_offsets: B + 1; sizes: (Q,) of this rank's regions; num_regions: of each rank."""
        views = [number for start, stop in pairwise(view_offsets) for number in (start, stop - start)]
        flat = [number for size in sizes or () for number in size]
        most_rows = max(views[1::2], default=0)
        shape = TableShape(len(regions), regions.shape[1], most_rows, tuple(num_regions), rank, sizes is not None)
        packed = np.zeros(sum(shape.lengths), np.int32)
        packed[: regions.size] = regions.reshape(-1)
        packed[regions.size : len(packed) - shape.lengths[-1]] = views + flat + [0, *accumulate(num_regions)]
        return cls(shape, packed)


def most_table_words(num_views: int, num_ranks: int) -> int:
    """The most that `HostTables.packed` holds for B views and W > 1 ranks: W - 1 cuts make as many more regions."""
    if num_ranks == 1:
        return 0
    most_regions = num_views + num_ranks
    return TableShape(num_views, num_ranks, 0, (most_regions,) + (0,) * (num_ranks - 1), 0, True).num_words


@dataclass(frozen=True)
class RegionTables:
    """Who draws what, as the kernels read it; int32 on the device.

    regions: (B, L, 4) drawn rows [start, stop), first block, blocks to the next group. views: (B, 2) first packed row,
    rows there is room for. sizes: (Q, 2) width and height, or None. first_regions: (W + 1,) number of each rank's first
    region. blocks: (K,) zeros.
    """

    shape: TableShape
    regions: Tensor
    views: Tensor
    sizes: Tensor | None
    first_regions: Tensor
    blocks: Tensor

    @classmethod
    def upload(cls, launcher: Launcher, tables: HostTables) -> RegionTables:
        """One copy from the host."""
        return cls.cut(upload(launcher, tables.packed.copy()), tables.shape)

    @classmethod
    def cut(cls, memory: Tensor, shape: TableShape) -> RegionTables:
        """The tables in `memory`, a copy of `HostTables.packed` on the device."""
        regions, views, sizes, first_regions, blocks = memory.split_with_sizes(shape.lengths)
        return cls(shape, regions, views, sizes if shape.has_sizes else None, first_regions, blocks)

    @property
    def num_ranks(self) -> int:
        """W."""
        return len(self.shape.num_regions)

    @property
    def num_regions(self) -> int:
        """Q."""
        return self.shape.num_regions[self.shape.rank]


@dataclass(frozen=True)
class Layout:
    """Where copies lie when they are sent and when they arrive; see `arrange` in exchange.cu.

    in_use: (Q,) int32 rows of each region. status: words that say whether all has room; None: there is as much room as
    is needed. for_host: (4 W + Q + 1 + W K,) int32: rows sent to each rank, received from it, numbers that come back
    from it, that go back to it; first row of each region and their end; the copies in each block of each rank.
    """

    starts: Tensor
    runs: Tensor
    in_use: Tensor
    for_host: Tensor
    status: Tensor | None


def arrange(
    launcher: Launcher,
    tables: RegionTables,
    blocks: Tensor,
    *,
    windows: Windows | None = None,
    status: Tensor | None = None,
) -> Layout:
    """The layout of a step, from `blocks` (W, K) int32, the counts that `SentCopies.route` made on every rank.

    Args: windows, status: room, and the words that say when it did not suffice; None: what the host reads decides.
    """
    num_ranks, num_blocks = blocks.shape
    num_regions = tables.num_regions
    sizes = [
        RUN_WORDS * (NUM_GROUPS * num_regions * num_ranks + 1),
        START_WORDS * num_blocks,
        num_regions,
        4 * num_ranks + num_regions + 1 + num_ranks * num_blocks,
    ]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=launcher.device)
    runs, starts, in_use, for_host = memory.split_with_sizes(sizes)
    launcher(
        "exchange.arrange", 1, THREADS, blocks, tables.first_regions, num_ranks, tables.shape.rank,
        *(windows or (0, 0, 0)), starts, runs, in_use, for_host, status,
    )  # fmt: skip
    return Layout(starts, runs, in_use, for_host, status)


class Extents(NamedTuple):
    """Sizes of the buffer of one way, in rows or numbers; see exchange.cu.

    sent, received: (W,) to and from each rank, 0 for this one. num_sent, num_received: their sums. first_received:
    where what arrives begins. num_arriving: what arrives and this rank's own. total: all.
    """

    sent: list[int]
    received: list[int]
    num_sent: int
    num_received: int
    first_received: int
    num_arriving: int
    total: int

    @classmethod
    def of(cls, sent: list[int], received: list[int], own: int) -> Extents:
        """From what travels and what there is room for of this rank's own."""
        num_sent, num_received = sum(sent), sum(received)
        first, arriving = _whole_blocks(num_sent), _whole_blocks(num_received) + own
        return cls(sent, received, num_sent, num_received, first, arriving, first + arriving)


def _whole_blocks(count: int) -> int:
    return -(-count // THREADS) * THREADS


@dataclass(frozen=True, eq=False)
class SentCopies:
    """The copies of this rank's packed rows. ordinals: (L, M) int32; what belongs to no copy is unspecified.

    keep: (M,) bool, rows that have copies at all, or None for all. never_capped: the largest opacity of group SHADED.
    """

    launcher: Launcher
    tables: RegionTables
    splats: Splats
    keep: Tensor | None
    never_capped: float
    ordinals: Tensor

    @classmethod
    def route(
        cls, launcher: Launcher, tables: RegionTables, splats: Splats, *, keep: Tensor | None, never_capped: float
    ) -> SentCopies:
        """Find the copies of all rows, and count those of each block into `tables.blocks`."""
        shape = (tables.shape.most_regions, len(splats))
        ordinals = torch.empty(shape, dtype=torch.int32, device=launcher.device)
        copies = cls(launcher, tables, splats, keep, never_capped, ordinals)
        launcher("exchange.route_rows", copies._grid(ROUTE_THREADS), ROUTE_THREADS, *copies._rows(), tables.blocks)
        return copies

    def pack(self, layout: Layout, wire: WireWords, num_rows: int) -> Tensor:
        """(num_rows, words) int32, of which the windows to others and the own one are filled."""
        packed = torch.empty((num_rows, wire.per_row), dtype=torch.int32, device=self.launcher.device)
        self.launcher(
            "exchange.pack_rows", self._grid(THREADS), THREADS, *self._rows(), layout.starts, layout.status,
            self.splats.depths.view(torch.int32), self.splats.ids, wire.ids, int(wire.sends_boxes), packed,
        )  # fmt: skip
        return packed

    def sum_gradients(self, layout: Layout, numbers: Tensor) -> Tensor:
        """(M, 10): the gradients by the packed rows in use, from the `numbers` that came back."""
        d_rows = torch.empty_like(self.splats.rows)
        self.launcher(
            "exchange.sum_copies", self._grid(THREADS), THREADS, *self._rows(), layout.starts, layout.status, numbers,
            d_rows,
        )  # fmt: skip
        return d_rows

    def _grid(self, threads: int) -> tuple[int, int]:
        return -(-self.tables.shape.most_rows // threads), self.tables.shape.num_views

    def _rows(self) -> tuple[Argument, ...]:
        """What the kernels of packed rows share."""
        splats, tables = self.splats, self.tables
        return (
            splats.rows, splats.boxes, self.keep, splats.counts, tables.views, tables.regions,
            tables.shape.most_regions, self.never_capped, len(splats), self.ordinals,
        )  # fmt: skip


def unpack_rows(
    launcher: Launcher,
    tables: RegionTables,
    layout: Layout,
    wire: WireWords,
    arrived: Tensor,
    *,
    region_offsets: Tensor,
    num_received: int,
    counts: Tensor | None = None,
) -> Splats:
    """The splats in the windows of `arrived` (rows, words); "view" q of the result is region q.

    Args: region_offsets, num_received, counts: view_offsets, length and counts of the result.
    """
    device = launcher.device
    received = Splats(
        rows=torch.empty((num_received, NUM_ROW_COLUMNS), dtype=torch.float32, device=device),
        depths=torch.empty(num_received, dtype=torch.float32, device=device),
        ids=torch.empty(num_received, dtype=torch.int64, device=device),
        gaussians=torch.empty(num_received, dtype=torch.int32, device=device),
        boxes=torch.empty((num_received, BOX_WORDS), dtype=torch.int32, device=device),
        view_offsets=region_offsets,
        slots=torch.empty((tables.num_regions, 0), dtype=torch.int32, device=device),
        counts=counts,
    )
    launcher(
        "exchange.unpack_rows", -(-len(arrived) // THREADS), THREADS, arrived, *_runs(tables, layout, len(arrived)),
        tables.sizes, wire.ids, received.rows, received.depths, received.ids, received.gaussians, received.boxes,
    )  # fmt: skip
    return received


def pack_gradients(
    launcher: Launcher, tables: RegionTables, layout: Layout, d_received: Tensor, *, num_arrived: int, num_numbers: int
) -> Tensor:
    """(num_numbers,): of the gradients (R, 10), what goes back to others and this rank's own, in the rows' windows.

    Args: num_arrived: rows of the windows that arrived.
    """
    numbers = torch.empty(num_numbers, dtype=torch.float32, device=launcher.device)
    launcher(
        "exchange.pack_gradients", -(-num_arrived // THREADS), THREADS, d_received,
        *_runs(tables, layout, num_arrived), numbers,
    )  # fmt: skip
    return numbers


def _runs(tables: RegionTables, layout: Layout, num_arrived: int) -> tuple[Argument, ...]:
    num_runs = NUM_GROUPS * tables.num_regions * tables.num_ranks
    return num_arrived, layout.runs, num_runs, tables.num_regions
