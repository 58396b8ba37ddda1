# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that every rank needs: a vector of each rank, gathered once, read by the host once.

What the device needs of the others before it updates anything travels along: how many Gaussians were drawn, which the
masks learn from, and whether a buffer was too small, for then no rank updates.

Letters: B views of the batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, Region, num_tile_rows
from distributed.transfer import sent_to
from masksplat.types import TILE

NUM_LOSSES = 2
ROWS, DRAWN, STOP = range(3)
NUM_COUNTS = 3
"""Whole numbers of a rank behind its losses: Gaussians, those whose mask is 1, 1 when a buffer was too small."""


@dataclass(frozen=True, eq=False)
class StepNumbers:
    """What one step did, over all ranks.

    l1, ssim: means over the views. num_pairs: pairs of pixel and splat that were evaluated, halos included.
    pairs: for each view, (tile rows,) int64 pairs in its own rows. owned: (B, W) int64 splats that each rank has of
    each view. rows: (W,) Gaussians of each rank while the step was drawn.
    """

    l1: float
    ssim: float
    num_pairs: int
    owned: np.ndarray
    rows: tuple[int, ...]
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

    num_rows: this rank's Gaussians. num_drawn: () int64, masks of all ranks that are 1; None without masks.
    values: of several ranks (W, n) int64, a row each: the bits of the two losses, then ROWS, DRAWN, STOP, the splats of
    each view, the pairs of each row of tiles of each frame, and room up to the longest rank. Of one rank (n,) float64:
    losses, splats, pairs.
    """

    partition: PixelPartition
    values: Tensor
    num_rows: int
    num_drawn: Tensor | None = None

    @classmethod
    def share(
        cls,
        communicator: Communicator,
        partition: PixelPartition,
        *,
        loss: Tensor,
        pairs: Sequence[Tensor],
        num_splats: Tensor,
        num_rows: int,
        num_drawn: Tensor | None = None,
        status: Tensor | None = None,
    ) -> StepTotals:
        """Gather them from all ranks, before anything is updated. All ranks call it; no host sync.

        Args: loss: (2,) float64, L1 and SSIM summed over this rank's regions; pairs: `Frame.pairs_per_row` of each of
        them; num_splats: (B,) packed splats of this rank in each view, on the host or on the device; num_rows: its
        Gaussians; num_drawn: () int64, those whose mask is 1; status: the body's status words, of which the first gets
        the largest of all ranks.
        """
        if communicator.size == 1:  # few operations for a GPU's host
            return cls(partition, torch.cat([loss, num_splats.to(loss.device), *pairs]), num_rows, num_drawn)
        lengths = [sum(_frame_rows(region, partition) for region in mine) for mine in partition.regions]
        counts = num_splats if num_splats.device == loss.device else sent_to(num_splats, loss.device)
        nothing = counts.new_zeros(1, dtype=torch.int64)
        parts = [
            loss.view(torch.int64),
            counts.new_full((1,), num_rows, dtype=torch.int64),
            num_drawn.view(1) if num_drawn is not None else nothing,
            status[:1].to(torch.int64) if status is not None else nothing,
            counts.to(torch.int64),
            *pairs,
        ]
        num_header = NUM_LOSSES + NUM_COUNTS + len(partition.heights)
        own = nothing.new_empty(num_header + max(lengths))
        torch.cat(parts, out=own[: num_header + lengths[communicator.rank]])
        values = communicator.gather(own)  # all ranks
        if status is not None:
            status[:1].copy_(values[:, NUM_LOSSES + STOP].amax())
        all_drawn = values[:, NUM_LOSSES + DRAWN].sum() if num_drawn is not None else None
        return cls(partition, values, num_rows, all_drawn)

    def numbers(self, fetched: Tensor) -> StepNumbers:
        """The numbers in `fetched`, what `values` holds, on the host."""
        values, num_views, num_ranks = fetched.numpy(), len(self.partition.heights), self.partition.num_ranks
        if num_ranks == 1:
            losses, counts = values[:NUM_LOSSES], values[NUM_LOSSES:].astype(np.int64)
            rows, owned, drawn = (self.num_rows,), counts[None, :num_views], counts[num_views:]
        else:
            losses = reduce(np.add, values[:, :NUM_LOSSES].copy().view(np.float64))  # in the order of the ranks
            counts = values[:, NUM_LOSSES + NUM_COUNTS :]
            rows, owned = tuple(values[:, NUM_LOSSES + ROWS].tolist()), counts[:, :num_views]
            lengths = [sum(_frame_rows(region, self.partition) for region in mine) for mine in self.partition.regions]
            found = [counts[rank, num_views : num_views + length] for rank, length in enumerate(lengths)]
            drawn = np.concatenate(found)
        return StepNumbers(
            l1=float(losses[0]) / num_views,
            ssim=float(losses[1]) / num_views,
            num_pairs=int(drawn.sum()),
            owned=owned.T.copy(),
            rows=rows,
            pairs_of_views=partial(self._pairs_of_views, drawn),
        )

    def _pairs_of_views(self, drawn: np.ndarray) -> tuple[np.ndarray, ...]:
        """(tile rows,) of each view, from the rows of tiles of all frames, halos included."""
        heights = self.partition.heights
        found = tuple(np.zeros(num_tile_rows(height), np.int64) for height in heights)
        regions = [region for mine in self.partition.regions for region in mine]
        ends = list(accumulate(_frame_rows(region, self.partition) for region in regions))
        for region, start, stop in zip(regions, [0, *ends], ends, strict=False):
            own = region.own_pairs(drawn[start:stop], heights[region.view])
            found[region.view][region.tile_start : region.tile_stop] = own
        return found


def _frame_rows(region: Region, partition: PixelPartition) -> int:
    """Rows of tiles of the region's frame: they begin at its first drawn row of pixels."""
    first, last = region.drawn_rows(partition.heights[region.view])
    return -(-(last - first) // TILE)
