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

from masksplat.cuda.launcher import Argument, Launcher
from masksplat.cuda.projection import upload
from masksplat.types import NUM_ROW_COLUMNS, Splats

THREADS = 256
ROUTE_THREADS = 1024
NUM_GROUPS = 3
BOX_WORDS = 4
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


@dataclass(frozen=True)
class RegionTables:
    """Who draws what, as the kernels read it; int32 on the device.

    regions: (B, L, 4) drawn rows [start, stop), first block, blocks to the next group. views: (B, 2) first packed row,
    rows there is room for. sizes: (Q, 2) width and height. first_regions: (W + 1,) number of each rank's first region.
    blocks: (K,) zeros. The numbers are on the host: L, the rows of the longest view, W, Q.
    """

    regions: Tensor
    views: Tensor
    sizes: Tensor
    first_regions: Tensor
    blocks: Tensor
    most_regions: int
    most_rows: int
    num_ranks: int
    num_regions: int

    @classmethod
    def upload(
        cls,
        launcher: Launcher,
        *,
        regions: np.ndarray,
        view_offsets: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        num_regions: Sequence[int],
        rank: int,
    ) -> RegionTables:
        """One copy from the host. Args: view_offsets: B + 1; num_regions: regions of each rank."""
        views = [number for start, stop in pairwise(view_offsets) for number in (start, stop - start)]
        first_regions = [0, *accumulate(num_regions)]
        flat = [number for size in sizes for number in size]
        lengths = [regions.size, len(views), len(flat), len(first_regions), NUM_GROUPS * first_regions[-1]]
        packed = np.zeros(sum(lengths), np.int32)
        packed[: regions.size] = regions.reshape(-1)
        packed[regions.size : -lengths[-1]] = views + flat + first_regions
        regions_, views_, sizes_, first_regions_, blocks = upload(launcher, packed).split(lengths)
        return cls(
            regions_, views_, sizes_, first_regions_, blocks, most_regions=regions.shape[1],
            most_rows=max(views[1::2], default=0), num_ranks=len(num_regions), num_regions=num_regions[rank],
        )  # fmt: skip

    @property
    def num_views(self) -> int:
        """B."""
        return len(self.views) // 2


@dataclass(frozen=True)
class Layout:
    """Where copies lie when they are sent and when they arrive; see `arrange` in exchange.cu.

    for_host: (4 W + Q + 1 + W K,) int32: rows sent to each rank, received from it, numbers that come back from it, that
    go back to it; first row of each region and their end; the copies in each block of each rank.
    """

    starts: Tensor
    runs: Tensor
    for_host: Tensor


def arrange(launcher: Launcher, tables: RegionTables, rank: int, blocks: Tensor) -> Layout:
    """The layout of a step, from `blocks` (W, K) int32, the counts that `SentCopies.route` made on every rank."""
    num_ranks, num_blocks = blocks.shape
    sizes = [
        RUN_WORDS * (NUM_GROUPS * tables.num_regions * num_ranks + 1),
        START_WORDS * (num_blocks + 1),
        4 * num_ranks + tables.num_regions + 1 + num_ranks * num_blocks,
    ]
    runs, starts, for_host = torch.empty(sum(sizes), dtype=torch.int32, device=launcher.device).split(sizes)
    launcher(
        "exchange.arrange", 1, THREADS, blocks, tables.first_regions, np.int32(num_ranks), np.int32(rank),
        starts, runs, for_host,
    )  # fmt: skip
    return Layout(starts, runs, for_host)


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
        shape = (tables.most_regions, len(splats))
        ordinals = torch.empty(shape, dtype=torch.int32, device=launcher.device)
        copies = cls(launcher, tables, splats, keep, never_capped, ordinals)
        launcher("exchange.route_rows", copies._grid(ROUTE_THREADS), ROUTE_THREADS, *copies._rows(), tables.blocks)
        return copies

    def pack(self, layout: Layout, wire: WireWords, num_copies: int) -> Tensor:
        """(S, words) int32: the copies, block after block."""
        packed = torch.empty((num_copies, wire.per_row), dtype=torch.int32, device=self.launcher.device)
        self.launcher(
            "exchange.pack_rows", self._grid(THREADS), THREADS, *self._rows(), layout.starts,
            self.splats.depths.view(torch.int32), self.splats.ids, np.int32(wire.ids), np.int32(wire.sends_boxes),
            packed,
        )  # fmt: skip
        return packed

    def sum_gradients(self, layout: Layout, numbers: Tensor) -> Tensor:
        """(M, 10): the gradients by the packed rows in use, from the `numbers` that `pack_gradients` made elsewhere."""
        d_rows = torch.empty_like(self.splats.rows)
        self.launcher(
            "exchange.sum_copies", self._grid(THREADS), THREADS, *self._rows(), layout.starts, numbers, d_rows
        )
        return d_rows

    def _grid(self, threads: int) -> tuple[int, int]:
        return -(-self.tables.most_rows // threads), self.tables.num_views

    def _rows(self) -> tuple[Argument, ...]:
        """What the kernels of packed rows share."""
        splats, tables = self.splats, self.tables
        return (
            splats.rows, splats.boxes, self.keep, splats.counts, tables.views, tables.regions,
            np.int32(tables.most_regions), np.float32(self.never_capped), np.int32(len(splats)), self.ordinals,
        )  # fmt: skip


def unpack_rows(
    launcher: Launcher, tables: RegionTables, layout: Layout, wire: WireWords, arrived: Tensor, region_offsets: Tensor
) -> Splats:
    """The splats in `arrived` (R, words); "view" q of the result is region q, `region_offsets` are its view_offsets."""
    num_received, device = len(arrived), launcher.device
    received = Splats(
        rows=torch.empty((num_received, NUM_ROW_COLUMNS), dtype=torch.float32, device=device),
        depths=torch.empty(num_received, dtype=torch.float32, device=device),
        ids=torch.empty(num_received, dtype=torch.int64, device=device),
        gaussians=torch.empty(num_received, dtype=torch.int32, device=device),
        boxes=torch.empty((num_received, BOX_WORDS), dtype=torch.int32, device=device),
        view_offsets=region_offsets,
        slots=torch.empty((tables.num_regions, 0), dtype=torch.int32, device=device),
    )
    launcher(
        "exchange.unpack_rows", -(-num_received // THREADS), THREADS, arrived, *_runs(tables, layout, num_received),
        None if wire.sends_boxes else tables.sizes, np.int32(wire.ids),
        received.rows, received.depths, received.ids, received.gaussians, received.boxes,
    )  # fmt: skip
    return received


def pack_gradients(
    launcher: Launcher, tables: RegionTables, layout: Layout, d_received: Tensor, num_numbers: int
) -> Tensor:
    """(num_numbers,): what goes back of the gradients (R, 10), in the order in which the rows arrived."""
    numbers = torch.empty(num_numbers, dtype=torch.float32, device=launcher.device)
    num_received = len(d_received)
    launcher(
        "exchange.pack_gradients", -(-num_received // THREADS), THREADS, d_received,
        *_runs(tables, layout, num_received), numbers,
    )  # fmt: skip
    return numbers


def _runs(tables: RegionTables, layout: Layout, num_received: int) -> tuple[Argument, ...]:
    num_runs = NUM_GROUPS * tables.num_regions * tables.num_ranks
    return np.int32(num_received), layout.runs, np.int32(num_runs), np.int32(tables.num_regions)
