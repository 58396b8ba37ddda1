# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that every rank needs: a vector of each rank, gathered once, read by the host once.

What the device needs of the others before it updates anything travels along: how many Gaussians were drawn, which the
masks learn from, and whether a buffer was too small, for then no rank updates.

Letters: B views of the batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, Region, num_tile_rows
from masksplat.types import TILE

NUM_LOSSES = 2
WORD, COUNT = 8, 4
"""Bytes of a float64 or int64, and of an int32."""


@dataclass(frozen=True, eq=False)
class StepNumbers:
    """What one step did, over all ranks.

    l1, ssim: means over the views. num_pairs: pairs of pixel and splat that were evaluated, halos included.
    pairs: for each view, (tile rows,) int64 pairs in its own rows. owned: (B, W) int64 splats that each rank has of
    each view. rows: (W,) Gaussians of each rank while the step was drawn. num_drawn: masks of all ranks that were 1.
    has_overflow: whether a buffer of a body was too small, so that nothing was updated.
    """

    l1: float
    ssim: float
    num_pairs: int
    owned: np.ndarray
    rows: tuple[int, ...]
    num_drawn: int
    has_overflow: bool
    pairs_of_views: Callable[[], tuple[np.ndarray, ...]]

    @cached_property
    def pairs(self) -> tuple[np.ndarray, ...]:
        """Worked out when somebody asks, which in a world of one nobody does."""
        return self.pairs_of_views()

    @property
    def num_splats(self) -> int:
        """Packed splats of all views and ranks."""
        return int(self.owned.sum())

    def image_loss(self, lambda_dssim: float) -> float:
        """(1 - lambda) L1 + lambda (1 - SSIM)."""
        return (1.0 - lambda_dssim) * self.l1 + lambda_dssim * (1.0 - self.ssim)


@dataclass(frozen=True, eq=False)
class StepTotals:
    """What all ranks brought, on the device until it is read.

    values: (W, n) uint8, of each rank the bytes of what `_sizes` lists, and room up to the longest. num_rows: this
    rank's Gaussians. num_drawn: () int64, masks of all ranks that are 1; None without masks. status_bytes: of the
    body's status words; 0 without any.
    """

    partition: PixelPartition
    values: Tensor
    num_rows: int
    num_drawn: Tensor | None = None
    status_bytes: int = 0

    @classmethod
    def share(
        cls,
        communicator: Communicator,
        partition: PixelPartition,
        *,
        losses: Sequence[Tensor],
        pairs: Sequence[Tensor],
        num_splats: Tensor,
        num_rows: int,
        num_drawn: Tensor | None = None,
        status: Tensor | None = None,
    ) -> StepTotals:
        """Gather them from all ranks, before anything is updated. All ranks call it; no host sync.

        Args: all on one device. losses: (2,) float64 for each of this rank's regions, L1 and SSIM; pairs:
        `Frame.pairs_per_row` of each; num_splats: (B,) int32 packed splats of this rank in each view; num_rows: its
        Gaussians; num_drawn: () int64, those whose mask is 1; status: (8,) int32, the body's status words, of which the
        first gets the largest of all ranks.
        """
        found = cls(partition, num_splats, num_rows, num_drawn, status.numel() * COUNT if status is not None else 0)
        optional = [part for part in (num_drawn, status) if part is not None]
        parts = [_bytes(part) for part in (*optional, *losses, *pairs, num_splats)]
        if communicator.size == 1:  # few operations for a GPU's host, which knows how many rows there are
            return replace(found, values=torch.cat(parts)[None])
        parts.insert(0, _bytes(num_splats.new_full((1,), num_rows, dtype=torch.int64)))
        lengths = [sum(found._sizes(rank)) for rank in range(communicator.size)]
        own = parts[0].new_empty(-(-max(lengths) // WORD) * WORD)
        torch.cat(parts, out=own[: lengths[communicator.rank]])
        values = communicator.gather(own)  # all ranks
        behind_drawn = WORD if num_drawn is None else 2 * WORD
        if status is not None:
            stops = values[:, behind_drawn : behind_drawn + COUNT].view(torch.int32)
            status[:1].copy_(stops.amax())
        all_drawn = None if num_drawn is None else values[:, WORD:behind_drawn].view(torch.int64).sum()
        return replace(found, values=values, num_drawn=all_drawn)

    def _sizes(self, rank: int) -> tuple[int, ...]:
        """Bytes of what a rank brings, in this order: its Gaussians, its masks that are 1, its status words, the two
        losses of each region, the pairs of each row of tiles of each frame, the splats of each view."""
        mine, heights = self.partition.regions[rank], self.partition.heights
        return (
            WORD if self.partition.num_ranks > 1 else 0,
            WORD if self.num_drawn is not None else 0,
            self.status_bytes,
            NUM_LOSSES * WORD * len(mine),
            WORD * sum(_frame_rows(region, heights[region.view]) for region in mine),
            COUNT * len(heights),
        )

    def numbers(self, fetched: Tensor) -> StepNumbers:
        """The numbers in `fetched`, what `values` holds, on the host."""
        num_views, nothing = len(self.partition.heights), np.zeros(NUM_LOSSES)
        rows, drawn, stops, losses, pairs, owned = [], [], [], [], [], []
        for rank, row in enumerate(fetched.numpy()):
            bounds = [0, *accumulate(self._sizes(rank))]
            cut = [row[start:stop] for start, stop in pairwise(bounds)]
            rows.append(int(cut[0].view(np.int64)[0]) if len(cut[0]) else self.num_rows)
            drawn.append(int(cut[1].view(np.int64)[0]) if len(cut[1]) else 0)
            stops.append(bool(cut[2].view(np.int32)[:1].any()))
            losses.append(reduce(np.add, cut[3].view(np.float64).reshape(-1, NUM_LOSSES), nothing))
            pairs.append(cut[4].view(np.int64))
            owned.append(cut[5].view(np.int32))
        l1, ssim = reduce(np.add, losses).tolist()  # in the order of regions and ranks
        return StepNumbers(
            l1=l1 / num_views,
            ssim=ssim / num_views,
            num_pairs=sum(int(each.sum()) for each in pairs),
            owned=np.stack(owned, axis=1).astype(np.int64),
            rows=tuple(rows),
            num_drawn=sum(drawn),
            has_overflow=any(stops),
            pairs_of_views=partial(self._pairs_of_views, pairs),
        )

    def _pairs_of_views(self, pairs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """(tile rows,) of each view, from the rows of tiles of the frames of each rank, halos included."""
        heights = self.partition.heights
        found = tuple(np.zeros(num_tile_rows(height), np.int64) for height in heights)
        for mine, drawn in zip(self.partition.regions, pairs, strict=True):
            first = 0
            for region in mine:
                height = heights[region.view]
                last = first + _frame_rows(region, height)
                found[region.view][region.tile_start : region.tile_stop] = region.own_pairs(drawn[first:last], height)
                first = last
        return found


def _bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _frame_rows(region: Region, height: int) -> int:
    """Rows of tiles of the region's frame in a view of that height: they begin at its first drawn row of pixels."""
    first, last = region.drawn_rows(height)
    return -(-(last - first) // TILE)
