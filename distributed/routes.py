# SPDX-License-Identifier: Apache-2.0
"""Which packed splats each rank needs, and how many rows every rank sends to every other: the numbers of an exchange.

Rows travel in blocks: by the rank that gets them, by what comes back for them, by the region of that rank. What comes
back is the group of a row:

    SHADED  drawn (m = 1): nine numbers; its mask's gradient is opacity * dL/d(opacity), the owner works it out
    CAPPED  drawn, and so opaque that a pixel may cap its alpha, which breaks that equation: ten numbers
    ABSENT  not drawn (m = 0): the mask's gradient alone

Letters: B views, W ranks, M packed splats of this rank, L most regions of one view, Q regions of one rank, K = 3 times
the number of all regions: the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distributed.pixels import HALO, PixelPartition
from distributed.transfer import sent_to
from masksplat.types import ROW_COLUMNS, Splats

SHADED, CAPPED, ABSENT = range(3)
NUM_GROUPS = 3

MASK, OPACITY = ROW_COLUMNS.index("mask"), ROW_COLUMNS.index("opacity")

OPACITY_NEVER_CAPPED = 0.98
"""No pixel caps a splat up to this opacity: alpha is opacity * exp(power), capped at 0.99, and power <= 0 but for
rounding, which the hundredth is for."""

NUMBERS_BACK = (len(ROW_COLUMNS) - 1, len(ROW_COLUMNS), 1)
"""How many numbers of the gradient of a row travel, by its group."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The copies of this rank's rows, block after block.

    rows: packed rows, ascending within a block; what follows the selected ones is unspecified.
    counts: (K,) int32 rows of each block, on the device.
    """

    rows: Tensor
    counts: Tensor


def select_rows(
    splats: Splats, partition: PixelPartition, *, keep: Tensor | None = None, halo: int = HALO
) -> Selection:
    """The rows whose box of pixels meets what a region draws, for every region of every rank. No host sync.

    Args: keep: (M,) bool, rows that are sent at all (evaluation leaves out those with m = 0).
    """
    device, num_rows = splats.rows.device, len(splats)
    table = sent_to(torch.from_numpy(region_table(partition, halo)), device)
    lengths = sent_to(splats.view_offsets.diff(), device)
    view = torch.repeat_interleave(lengths, output_size=num_rows)
    regions = table.index_select(0, view)  # (M, L, 4)
    meets = (splats.boxes[:, 1, None] < regions[..., 1]) & (splats.boxes[:, 3, None] > regions[..., 0])
    for allowed in (keep, _rows_in_use(splats)):
        if allowed is not None:
            meets &= allowed[:, None]
    group = torch.where(splats.rows[:, MASK] != 0, splats.rows[:, OPACITY] > OPACITY_NEVER_CAPPED, ABSENT)
    num_blocks = NUM_GROUPS * sum(map(len, partition.regions))
    block = torch.where(meets, regions[..., 2] + regions[..., 3] * group[:, None], num_blocks)
    keys = block.reshape(-1).to(torch.int16 if num_blocks < 1 << 15 else torch.int32)  # short keys sort in fewer passes
    keys, order = torch.sort(keys, stable=True)
    blocks = torch.arange(num_blocks + 1, dtype=keys.dtype, device=device)
    counts = torch.searchsorted(keys, blocks, out_int32=True).diff()
    copies_per_row = regions.shape[1]
    return Selection(order if copies_per_row == 1 else order // copies_per_row, counts)


def _rows_in_use(splats: Splats) -> Tensor | None:
    """(M,) bool where views have room for more rows than they fill; otherwise nothing."""
    counts = splats.counts
    if counts is None:
        return None
    room = torch.arange(len(splats) // len(counts), dtype=counts.dtype, device=counts.device)
    return (room < counts[:, None]).reshape(-1)


def region_table(partition: PixelPartition, halo: int) -> np.ndarray:
    """(B, L, 4) int32 for each region of a view: drawn pixel rows [start, stop), block of group 0, blocks to group 1.

    Views with fewer regions have some that draw nothing.
    """
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in partition.heights]
    first_block = 0
    for regions in partition.regions:
        for number, region in enumerate(regions):
            drawn = region.drawn_rows(partition.heights[region.view], halo)
            found[region.view].append((*drawn, first_block + number, len(regions)))
        first_block += NUM_GROUPS * len(regions)
    longest = max(map(len, found), default=1)
    padded = [regions + [(0, 0, 0, 0)] * (longest - len(regions)) for regions in found]
    return np.array(padded, np.int32).reshape(len(found), longest, 4)


@dataclass(frozen=True, eq=False)
class Routes:
    """How many rows travel between whom, on the host.

    rank: this one. blocks: (W, K) int64 rows of each block that each rank sends. num_regions: (W,) of each rank.
    """

    rank: int
    blocks: np.ndarray
    num_regions: tuple[int, ...]

    def read(self) -> Routes:
        """These very numbers."""
        return self

    def between(self, source: int, target: int) -> np.ndarray:
        """(3, Q) rows from one rank to another, by group and region of the target."""
        first = NUM_GROUPS * sum(self.num_regions[:target])
        count = self.num_regions[target]
        return self.blocks[source, first : first + NUM_GROUPS * count].reshape(NUM_GROUPS, count)

    @cached_property
    def sent(self) -> np.ndarray:
        """(W, 3) rows that this rank sends to each rank (itself included), by group."""
        return np.stack([self.between(self.rank, rank).sum(axis=1) for rank in range(len(self.num_regions))])

    @cached_property
    def arriving(self) -> np.ndarray:
        """(W, 3, Q) rows that each rank (this one included) sends to this one, by group and region."""
        return np.stack([self.between(rank, self.rank) for rank in range(len(self.num_regions))])

    @cached_property
    def received(self) -> np.ndarray:
        """(W, 3): `arriving` summed over regions."""
        return self.arriving.sum(axis=2)

    @cached_property
    def region_offsets(self) -> Tensor:
        """(Q + 1,) int64, on the host: rows [q], ..., [q + 1] - 1 of what is received are region q's."""
        return torch.from_numpy(np.concatenate([[0], np.cumsum(self.arriving.sum(axis=(0, 1)))]).astype(np.int64))

    @cached_property
    def runs(self) -> np.ndarray:
        """(runs, 4) int32 of what is received, by region, source, group: rows, how far each row's place is behind or
        before its place on arrival (by source, group, region), 1 when drawn, region."""
        lengths = self.arriving.reshape(-1)
        on_arrival = (np.cumsum(lengths) - lengths).reshape(self.arriving.shape).transpose(2, 0, 1)
        kept = self.arriving.transpose(2, 0, 1)
        starts = (np.cumsum(kept.reshape(-1)) - kept.reshape(-1)).reshape(kept.shape)
        region, _, group = np.indices(kept.shape)
        columns = (kept, on_arrival - starts, group != ABSENT, region)
        return np.stack([column.reshape(-1) for column in columns], axis=1).astype(np.int32)


@dataclass(frozen=True, eq=False)
class LateRoutes:
    """Routes that are still on the device; see `masksplat.cuda.exchange.Layout` for what is in `for_host`."""

    rank: int
    for_host: Tensor
    num_regions: tuple[int, ...]

    def read(self) -> Routes:
        """The numbers; waits for the device."""
        num_ranks = len(self.num_regions)
        num_counts = NUM_GROUPS * sum(self.num_regions) * num_ranks
        counts = self.for_host[len(self.for_host) - num_counts :].cpu()  # host sync: the numbers of rows
        return Routes(self.rank, counts.view(num_ranks, -1).numpy().astype(np.int64), self.num_regions)


def numbers_back(rows: np.ndarray) -> list[int]:
    """Numbers of gradients that travel back for (n, 3) rows by group."""
    return [int(count) for count in rows @ np.array(NUMBERS_BACK)]


@dataclass(frozen=True)
class GroupSpans:
    """Where the rows of (W, 3) counts lie, rank after rank, the groups of each in their order: slices for each rank.

    shaded: group SHADED; drawn: SHADED and CAPPED; masked: CAPPED and ABSENT, whose mask's gradient travels.
    """

    shaded: tuple[slice, ...]
    drawn: tuple[slice, ...]
    masked: tuple[slice, ...]

    @classmethod
    def of(cls, rows: np.ndarray) -> GroupSpans:
        """From the (W, 3) numbers of rows."""
        shaded, drawn, masked, start = [], [], [], 0
        for counts in rows.tolist():
            middle, last = start + counts[SHADED], start + sum(counts)
            shaded.append(slice(start, middle))
            drawn.append(slice(start, middle + counts[CAPPED]))
            masked.append(slice(middle, last))
            start = last
        return cls(tuple(shaded), tuple(drawn), tuple(masked))
