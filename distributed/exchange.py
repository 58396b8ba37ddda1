# SPDX-License-Identifier: Apache-2.0
"""Splats travel from the owners of Gaussians to the owners of pixels, and gradients travel back.

The forward E copies each packed splat to every region it touches; the backward is its adjoint: the copies' gradients
are summed at the owner, in the order of ranks. One collective carries the numbers of rows, one the splats, one the
gradients. The numbers of rows are all that the host ever reads, and it reads none where copies travel in windows of a
fixed size (`distributed.kernel_passage`). A rank's copies for itself stay inside its own memory.

What a row's receiver can work out does not travel: the mask follows from the block that the row is in
(`distributed.routes`), the box of pixels from the row. Of the gradient, neither the zeros of rows that were not drawn
nor the mask's of rows that no pixel caps.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them, S copies sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.kernel_passage import KernelPassage, RoomForRows, kernels_for
from distributed.pixels import PixelPartition
from distributed.routes import LateRoutes, Routes, numbers_back
from distributed.torch_passage import TorchPassage
from distributed.wire import Wire
from masksplat.cuda.capacity import Windows
from masksplat.cuda.exchange import RegionTables
from masksplat.types import Splats

COUNT_BYTES = 4

GRENDEL_FORWARD_BYTES = 48
GRENDEL_BACKWARD_BYTES = 40
"""What mask-Grendel-GS sends for a copy of a splat: ten float32 and radius and depth; ten float32 back."""


@dataclass(frozen=True)
class Traffic:
    """What the splats of one rank cost in one step; sum over ranks for all.

    copies: splats delivered, those to this rank itself (`own_copies`) included. forward_bytes, backward_bytes: sent by
    this rank to others, and returned to it. count_bytes: the numbers of rows that this rank sends. unused_bytes: what
    of the windows both ways is not filled and travels, too.
    """

    copies: int
    own_copies: int
    forward_bytes: int
    backward_bytes: int
    count_bytes: int
    unused_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """What has to travel between ranks for this one's splats."""
        return self.forward_bytes + self.backward_bytes + self.count_bytes

    @property
    def num_bytes(self) -> int:
        """All that travels between ranks for this one's splats."""
        return self.needed_bytes + self.unused_bytes

    @property
    def grendel_bytes(self) -> int:
        """What mask-Grendel-GS puts into its all-to-alls for as many copies; it sends itself its own, too."""
        return self.copies * (GRENDEL_FORWARD_BYTES + GRENDEL_BACKWARD_BYTES)


@dataclass(frozen=True, eq=False)
class ExchangeRecord:
    """The numbers of an exchange; it keeps no splats alive. wire, routes: None when nothing was sent.

    num_received: rows that there was room for. windows: what travelled whether it was filled or not.
    """

    rank: int
    num_received: int
    wire: Wire | None = None
    routes: Routes | LateRoutes | None = None
    windows: Windows | None = None

    def traffic(self, dtype: torch.dtype = torch.float32) -> Traffic:
        """What forward and backward move for this rank's splats, with floats of `dtype`.

        Host sync: the numbers of rows, where nobody has read them.
        """
        rank = self.rank
        if self.routes is None or self.wire is None:
            return Traffic(self.num_received, self.num_received, 0, 0, 0)
        routes = self.routes.read()
        own, all_copies = int(routes.sent[rank].sum()), int(routes.sent.sum())
        back = sum(count for to, count in enumerate(numbers_back(routes.sent)) if to != rank)
        row_bytes, num_others = replace(self.wire, dtype=dtype).row_bytes, len(routes.num_regions) - 1
        forward_bytes, backward_bytes = (all_copies - own) * row_bytes, back * dtype.itemsize
        count_bytes, unused_bytes = COUNT_BYTES * routes.blocks.shape[1] * num_others, 0
        if self.windows is not None:
            window_bytes = self.windows.rows * row_bytes + self.windows.numbers * dtype.itemsize
            unused_bytes = num_others * window_bytes - forward_bytes - backward_bytes
        return Traffic(all_copies, own, forward_bytes, backward_bytes, count_bytes, unused_bytes)


class Passage(Protocol):
    """The way of one step's copies between ranks: torch operations, or kernels of masksplat."""

    @property
    def wire(self) -> Wire:
        """How a row travels."""

    @property
    def routes(self) -> Routes | LateRoutes:
        """How many rows travel between whom."""

    @property
    def windows(self) -> Windows | None:
        """What travels whether it is filled or not; None: just what is needed."""

    @property
    def region_offsets(self) -> Tensor:
        """(Q + 1,) int64, on the host."""

    def forward(self, splats: Splats) -> Splats:
        """See `ExchangePlan.forward`."""

    def backward(self, d_received: Tensor) -> Tensor:
        """See `ExchangePlan.backward`."""


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Who sends which packed rows to whom in one step; made by all ranks together.

    num_rows: M. region_offsets: (Q + 1,) int64, on the host: region q has the rows from [q] to [q + 1] of what is
    received, or as many of them as `Splats.counts` says.
    passage: None in a world of one that draws everything; forward and backward then return what they are given.
    """

    communicator: Communicator
    num_rows: int
    region_offsets: Tensor
    passage: Passage | None = None

    @classmethod
    def for_partition(
        cls,
        communicator: Communicator,
        splats: Splats,
        partition: PixelPartition,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        keep: Tensor | None = None,
        id_bound: int | None = None,
        room: RoomForRows | None = None,
        tables: RegionTables | None = None,
    ) -> ExchangePlan:
        """The plan that brings every region of `partition` the splats it can show. All ranks call it.

        Host sync: the numbers of rows, the only one of an exchange; with `room` none, where kernels exchange.

        Args: sizes: (width, height) of each view of the batch: receivers work out the boxes of rows, which suits the
        bodies whose boxes hold alpha >= 1/255; without it boxes travel. keep: see `select_rows`. id_bound: all ids are
        below it (`distributed.numbering` makes small ones), so they travel in fewer bytes. room: of windows, for ranks
        of one machine; regions may then have rows that are not in use, and when something has no room, its status says
        so on all ranks, and what is received is empty. tables: what kernels read of all this, if it is on the device
        already (`distributed.kernel_passage.host_tables`), with zeros where copies are counted.
        """
        if communicator.size == 1 and keep is None:
            return cls(communicator, len(splats), splats.view_offsets)
        launcher = kernels_for(splats)
        in_words = launcher is not None or splats.rows.device.type == "cuda"
        wire = Wire.of(splats, id_bound, sends_boxes=sizes is None, in_words=in_words)
        passage: Passage
        if launcher is None:
            passage = TorchPassage.for_partition(communicator, splats, partition, wire=wire, sizes=sizes, keep=keep)
        else:
            windows = status = None
            if room is not None and id_bound is not None:
                num_regions = sum(map(len, partition.regions))
                windows, status = room.windows_for(id_bound, num_regions, communicator.size), room.status
            passage = KernelPassage.for_partition(
                communicator, splats, partition, wire=wire, sizes=sizes, keep=keep, launcher=launcher, windows=windows,
                status=status, tables=tables,
            )  # fmt: skip
        return cls(communicator, len(splats), passage.region_offsets, passage)

    @property
    def num_received(self) -> int:
        """R."""
        return int(self.region_offsets[-1])

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions: "view" q of the result is region q. All ranks.

        Masks must be 0 or 1. `gaussians` of the result are -1 (their owners know them), `slots` are empty.
        """
        return splats if self.passage is None else self.passage.forward(splats)

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows, from (R, 10) gradients by what it received. All ranks.

        As `rasterize_backward` makes them: rows that were not drawn have zeros in all columns but the mask's, and the
        mask's gradient of the others is opacity * dL/d(opacity) where no pixel capped alpha.
        """
        return d_received if self.passage is None else self.passage.backward(d_received)

    @property
    def record(self) -> ExchangeRecord:
        """What remains to be said of the plan when its splats are gone."""
        way, rank = self.passage, self.communicator.rank
        if way is None:
            return ExchangeRecord(rank, self.num_received)
        return ExchangeRecord(rank, self.num_received, way.wire, way.routes, way.windows)
