# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that every rank needs: one vector, summed over ranks once, read by the host once.

Each rank fills its own places and leaves zeros in the others', so that one sum brings everything together. All entries
but the two of the loss are whole numbers below 2^53, exact in float64.

Letters: B views of the batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition, Region, num_tile_rows
from distributed.transfer import sent_to
from masksplat.types import TILE


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
    """The summed vector, on the device until it is read. num_rows: this rank's Gaussians."""

    partition: PixelPartition
    values: Tensor  # see `share`
    num_rows: int

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
    ) -> StepTotals:
        """Sum over ranks. All ranks call it; no host sync.

        Args: loss: (2,) float64, L1 and SSIM summed over this rank's regions; pairs: `Frame.pairs_per_row` of each of
        them; num_splats: (B,) packed splats of this rank in each view, on the host or on the device; num_rows: its
        Gaussians.
        """
        num_ranks, rank = communicator.size, communicator.rank
        lengths = [[_frame_rows(region, partition) for region in mine] for mine in partition.regions]
        before = sum(map(sum, lengths[:rank]))
        after = sum(map(sum, lengths[rank + 1 :]))
        num_views, device = len(partition.heights), loss.device
        if num_ranks == 1:  # nothing of other ranks to leave room for, and few operations for a GPU's host
            return cls(partition, torch.cat([loss, num_splats.to(device), *pairs]), num_rows)
        rows = torch.zeros(num_ranks, dtype=torch.float64)
        rows[rank] = num_rows
        parts = [
            loss,
            sent_to(rows, device),
            loss.new_zeros(rank * num_views),
            sent_to(num_splats, device).to(loss.dtype) if num_splats.device != device else num_splats.to(loss.dtype),
            loss.new_zeros((num_ranks - 1 - rank) * num_views + before),
            *(part.to(loss.dtype) for part in pairs),
            loss.new_zeros(after),
        ]
        return cls(partition, communicator.sum(torch.cat(parts)), num_rows)  # all ranks

    def numbers(self, fetched: Tensor) -> StepNumbers:
        """The numbers in `fetched`, what `values` holds, on the host."""
        values = fetched.numpy()
        num_views, num_ranks = len(self.partition.heights), self.partition.num_ranks
        counts = values[2:].astype(np.int64)
        if num_ranks == 1:
            counts = np.concatenate([[self.num_rows], counts])
        rows, owned = counts[:num_ranks], counts[num_ranks : num_ranks * (num_views + 1)]
        drawn = counts[num_ranks * (num_views + 1) :]
        return StepNumbers(
            l1=float(values[0]) / num_views,
            ssim=float(values[1]) / num_views,
            num_pairs=int(drawn.sum()),
            owned=owned.reshape(num_ranks, num_views).T.copy(),
            rows=tuple(rows.tolist()),
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
