# SPDX-License-Identifier: Apache-2.0
"""The way of one step's splats in torch operations, for any device and dtype; `distributed.kernel_passage` is its twin.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them, S copies sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import PixelPartition
from distributed.routes import (
    MASK,
    OPACITY,
    GroupSpans,
    Routes,
    numbers_back,
    select_rows,
)
from distributed.transfer import sent_to
from distributed.wire import Wire
from masksplat.boxes import boxes_of_rows
from masksplat.types import NUM_ROW_COLUMNS, Splats


@dataclass(frozen=True, eq=False)
class TorchPassage:
    """The copies of one step on their way. See `distributed.exchange.Passage`.

    num_rows: M. send_rows: (S,) packed rows, by target. opacities: (M,) of the packed rows. sizes: (Q, 2) int32 width
    and height of the views of this rank's regions, or None when boxes travel. is_cut: a row may have copies on several
    ranks.
    """

    communicator: Communicator
    wire: Wire
    routes: Routes
    num_rows: int
    send_rows: Tensor
    opacities: Tensor
    sizes: np.ndarray | None
    is_cut: bool

    @classmethod
    def for_partition(
        cls,
        communicator: Communicator,
        splats: Splats,
        partition: PixelPartition,
        *,
        wire: Wire,
        sizes: Sequence[tuple[int, int]] | None,
        keep: Tensor | None,
    ) -> TorchPassage:
        """The way that `ExchangePlan.for_partition` describes. All ranks; host sync: the numbers of rows."""
        selection = select_rows(splats, partition, keep=keep)
        blocks = communicator.gather(selection.counts).cpu().numpy()  # all ranks; host sync: the only one
        routes = Routes(communicator.rank, blocks.astype(np.int64), tuple(map(len, partition.regions)))
        mine = partition.regions[communicator.rank]
        return cls(
            communicator=communicator,
            wire=wire,
            routes=routes,
            num_rows=len(splats),
            send_rows=selection.rows[: int(routes.sent.sum())],
            opacities=splats.rows[:, OPACITY],
            sizes=None if sizes is None else np.array([sizes[region.view] for region in mine], np.int32).reshape(-1, 2),
            is_cut=sum(map(len, partition.regions)) > len(partition.heights),
        )

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions. All ranks."""
        packed = self.wire.pack(splats, self.send_rows)
        arrived = self.communicator.all_to_all_rows(packed, self.send_counts, self.receive_counts)  # all ranks
        if self.places is not None:
            arrived = arrived.index_select(0, self.places)
        rows, depths, ids = self.wire.unpack(arrived, self.drawn)
        return Splats(
            rows=rows,
            depths=depths,
            ids=ids,
            gaussians=splats.gaussians.new_full((len(rows),), -1),
            boxes=self.wire.unpack_boxes(arrived) if self.limits is None else boxes_of_rows(rows, self.limits),
            view_offsets=self.region_offsets,
            slots=splats.slots.new_empty((len(self.region_offsets) - 1, 0)),
        )

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows. All ranks."""
        if self.places is not None:
            d_received = torch.empty_like(d_received).index_copy_(0, self.places, d_received)
        outgoing = _joined(d_received, GroupSpans.of(self.routes.received))
        back, sent = numbers_back(self.routes.received), numbers_back(self.routes.sent)
        returned = self.communicator.all_to_all_rows(outgoing, back, sent)  # all ranks
        return self._summed(returned)

    @property
    def windows(self) -> None:
        """There are none."""

    @property
    def region_offsets(self) -> Tensor:
        """(Q + 1,) int64, on the host."""
        return self.routes.region_offsets

    @property
    def send_counts(self) -> list[int]:
        """Rows for each rank."""
        return [int(count) for count in self.routes.sent.sum(axis=1)]

    @property
    def receive_counts(self) -> list[int]:
        """Rows from each rank."""
        return [int(count) for count in self.routes.received.sum(axis=1)]

    @cached_property
    def _runs(self) -> Tensor:
        """(R, 3) int32 of each received row: what `Routes.runs` says of its run."""
        runs = sent_to(torch.from_numpy(self.routes.runs), self.send_rows.device)
        run = torch.repeat_interleave(runs[:, 0], output_size=sum(self.receive_counts))
        return runs[:, 1:].index_select(0, run)

    @cached_property
    def places(self) -> Tensor | None:
        """(R,) int64: the place of each received row on its arrival; None when rows stay as they come."""
        if self.routes.num_regions[self.routes.rank] < 2:
            return None
        return self._runs[:, 0] + torch.arange(len(self._runs), device=self.send_rows.device)

    @property
    def drawn(self) -> Tensor:
        """(R,) 1 for rows with m = 1, else 0."""
        return self._runs[:, 1]

    @cached_property
    def limits(self) -> Tensor | None:
        """(R, 2) or (1, 2) int32: width and height of the view of each received row; None when boxes travel."""
        if self.sizes is None:
            return None
        sizes = sent_to(torch.from_numpy(self.sizes), self.send_rows.device)
        return sizes if len(sizes) == 1 else sizes.index_select(0, self._runs[:, 2])

    def _summed(self, returned: Tensor) -> Tensor:
        """(M, 10): what came back from all ranks (one line of numbers, as `_joined` makes it), added up by row."""
        spans, num_ranks = GroupSpans.of(self.routes.sent), len(self.routes.sent)
        lengths = [part for pair in zip(spans.drawn, spans.masked, strict=True) for part in pair]
        widths = [MASK * _length(part) if k % 2 == 0 else _length(part) for k, part in enumerate(lengths)]
        parts = returned.split(widths)
        d_rows = returned.new_zeros((self.num_rows, NUM_ROW_COLUMNS))
        turns = [slice(rank, rank + 1) for rank in range(num_ranks)] if self.is_cut else [slice(None)]
        for turn in turns:  # the fixed order of the sum; a rank has a row once
            _add_rows(d_rows[:, :MASK], self._rows_of(spans.drawn[turn]), torch.cat(parts[::2][turn]).view(-1, MASK))
            _add_rows(d_rows[:, MASK], self._rows_of(spans.masked[turn]), torch.cat(parts[1::2][turn]))
        shaded = self._rows_of(spans.shaded)
        d_opacity = d_rows[:, OPACITY].index_select(0, shaded)
        d_rows[:, MASK].index_copy_(0, shaded, d_opacity.mul_(self.opacities.index_select(0, shaded)))
        return d_rows

    def _rows_of(self, spans: Sequence[slice]) -> Tensor:
        return torch.cat([self.send_rows[span] for span in spans])


def _add_rows(total: Tensor, rows: Tensor, part: Tensor) -> None:
    """total[rows] += part in place, for distinct rows: index_add_ takes ten times as long on a CPU."""
    total.index_copy_(0, rows, total.index_select(0, rows).add_(part))


def _joined(gradients: Tensor, spans: GroupSpans) -> Tensor:
    """One line of numbers: for each rank nine of each drawn row, then the mask's of those where it travels."""
    nine, masks = gradients[:, :MASK].reshape(-1), gradients[:, MASK].contiguous()
    parts = []
    for drawn, masked in zip(spans.drawn, spans.masked, strict=True):
        parts += [nine[MASK * drawn.start : MASK * drawn.stop], masks[masked]]
    return torch.cat(parts)


def _length(span: slice) -> int:
    return int(span.stop - span.start)
