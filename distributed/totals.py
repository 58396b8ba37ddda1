# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that every rank needs: a vector of each rank, gathered once, read by the host once.

What the device needs of the others before it updates anything travels along: how many Gaussians were drawn, which the
masks learn from, and whether a buffer was too small, for then no rank updates.

Letters: B views of the batch, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition
from masksplat.cuda.devices import launcher_of
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.rank_numbers import combine_numbers, pack_numbers

NUM_LOSSES = 2
WORD, COUNT = 8, 4
"""Bytes of a float64 or int64, and of an int32."""

STATUS_WINDOWS = slice(3, 6)
"""The status words that say what was needed of windows (`masksplat.cuda.capacity`)."""


def kernels_for(values: Tensor) -> Launcher | None:
    """What launches the kernels that pack the numbers of a step; None where torch operations have to do."""
    return launcher_of(values.device) if values.device.type == "cuda" else None


class RankNumbers(NamedTuple):
    """What one rank brought.

    num_rows: its Gaussians; pairs: of each row of tiles of its frames, halos included; num_splats: (B,) of each view.
    """

    num_rows: int
    pairs: np.ndarray
    num_splats: np.ndarray


@dataclass(frozen=True, eq=False)
class StepNumbers:
    """What one step did, over all ranks.

    l1, ssim: means over the views. num_drawn: masks that were 1. has_overflow: whether a buffer of a body was too
    small, so that nothing was updated. needed: of the windows between ranks, so far, which all of them count alike;
    nothing where there are none. The rest is worked out when somebody asks, which in a world of one few do.
    """

    l1: float
    ssim: float
    num_drawn: int
    has_overflow: bool
    partition: PixelPartition
    of_ranks: tuple[RankNumbers, ...]
    needed: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """(W,) Gaussians of each rank while the step was drawn."""
        return tuple(each.num_rows for each in self.of_ranks)

    @property
    def num_pairs(self) -> int:
        """Pairs of pixel and splat that were evaluated, halos included."""
        return sum(int(each.pairs.sum()) for each in self.of_ranks)

    @cached_property
    def owned(self) -> np.ndarray:
        """(B, W) int64 splats that each rank has of each view."""
        return np.array([each.num_splats for each in self.of_ranks], np.int64).T

    @property
    def num_splats(self) -> int:
        """Packed splats of all views and ranks."""
        return int(self.owned.sum())

    @cached_property
    def pairs(self) -> tuple[np.ndarray, ...]:
        """For each view, (tile rows,) int64 pairs in its own rows."""
        heights = self.partition.heights
        found: list[list[np.ndarray]] = [[] for _ in heights]
        parts = []
        for mine, each in zip(self.partition.regions, self.of_ranks, strict=True):
            first = 0
            for region in mine:
                height = heights[region.view]
                last = first + region.frame_rows(height)
                parts.append((region.tile_start, region.view, region.own_pairs(each.pairs[first:last], height)))
                first = last
        for _, view, own in sorted(parts, key=itemgetter(0)):
            found[view].append(own)
        return tuple(of_view[0] if len(of_view) == 1 else np.concatenate(of_view) for of_view in found)

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
        status_bytes = status.numel() * COUNT if status is not None else 0
        found = cls(partition, num_splats, num_rows, num_drawn, status_bytes)
        launcher = kernels_for(num_splats)
        if communicator.size > 1 and launcher is not None:
            own = pack_numbers(
                launcher, found._num_words, num_rows=num_rows, num_drawn=num_drawn, status=status, losses=losses,
                pairs=pairs, num_splats=num_splats,
            )  # fmt: skip
            words = communicator.gather(own)  # all ranks
            num_drawn = combine_numbers(launcher, words, has_drawn=num_drawn is not None, status=status)
            return replace(found, values=words.view(torch.uint8), num_drawn=num_drawn)
        optional = [part for part in (num_drawn, status) if part is not None]
        parts = [_bytes(part) for part in (*optional, *losses, *pairs, num_splats)]
        if communicator.size == 1:  # few operations for a GPU's host, which knows how many rows there are
            return replace(found, values=torch.cat(parts)[None])
        parts.insert(0, _bytes(num_splats.new_full((1,), num_rows, dtype=torch.int64)))
        padded = parts[0].new_empty(WORD * found._num_words)
        torch.cat(parts, out=padded[: sum(found._sizes(communicator.rank))])
        values = communicator.gather(padded)  # all ranks
        behind_drawn = WORD if num_drawn is None else 2 * WORD
        if status is not None:
            stops = values[:, behind_drawn : behind_drawn + COUNT].view(torch.int32)
            status[:1].copy_(stops.amax())
        all_drawn = None if num_drawn is None else values[:, WORD:behind_drawn].view(torch.int64).sum()
        return replace(found, values=values, num_drawn=all_drawn)

    @property
    def _num_words(self) -> int:
        """Of the rank that brings most."""
        return -(-max(sum(self._sizes(rank)) for rank in range(self.partition.num_ranks)) // WORD)

    def _sizes(self, rank: int) -> tuple[int, ...]:
        """Bytes of what a rank brings, in this order: its Gaussians, its masks that are 1, its status words, the two
        losses of each region, the pairs of each row of tiles of each frame, the splats of each view."""
        partition = self.partition
        return (
            WORD if partition.num_ranks > 1 else 0,
            WORD if self.num_drawn is not None else 0,
            self.status_bytes,
            NUM_LOSSES * WORD * len(partition.regions[rank]),
            WORD * partition.frame_rows[rank],
            COUNT * len(partition.heights),
        )

    def numbers(self, fetched: Tensor) -> StepNumbers:
        """The numbers in `fetched`, what `values` holds, on the host."""
        l1 = ssim = 0.0
        num_drawn, has_overflow, of_ranks = 0, False, []
        for rank, row in enumerate(fetched.numpy().copy()):  # the memory is not ours to keep
            rows, drawn, status, losses, pairs, splats = _cut(row, self._sizes(rank))
            num_drawn += int(drawn.view(np.int64)[0]) if len(drawn) else 0
            has_overflow |= len(status) > 0 and bool(status.view(np.int32)[0])
            terms = losses.view(np.float64).tolist()
            l1, ssim = l1 + sum(terms[::NUM_LOSSES]), ssim + sum(terms[1::NUM_LOSSES])  # by ranks, regions
            num_rows = int(rows.view(np.int64)[0]) if len(rows) else self.num_rows
            of_ranks.append(RankNumbers(num_rows, pairs.view(np.int64), splats.view(np.int32)))
        num_views, needed = len(self.partition.heights), tuple(status.view(np.int32)[STATUS_WINDOWS].tolist())
        return StepNumbers(
            l1 / num_views, ssim / num_views, num_drawn, has_overflow, self.partition, tuple(of_ranks), needed
        )


def _cut(row: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    bounds = [0, *accumulate(sizes)]
    return [row[start:stop] for start, stop in pairwise(bounds)]


def _bytes(values: Tensor) -> Tensor:
    return values.view(-1).view(torch.uint8)
