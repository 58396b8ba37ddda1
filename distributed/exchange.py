# SPDX-License-Identifier: Apache-2.0
"""Splats travel from the owners of Gaussians to the owners of pixels, and gradients travel back.

The forward E copies each packed splat to every region it touches; the backward is its adjoint: the copies' gradients
are summed at the owner, in the order of ranks. One collective carries the numbers of rows, one the splats, one the
gradients; the numbers of rows are all that the host ever reads. A rank's copies for itself take the same way, inside
its own memory.

What a row's receiver can work out does not travel: the mask follows from the block that the row is in
(`distributed.routes`), the box of pixels from the row. Of the gradient, neither the zeros of rows that were not drawn
nor the mask's of rows that no pixel caps.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them, S copies sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from masksplat.boxes import boxes_of_rows
from masksplat.types import NUM_ROW_COLUMNS, Splats

NUM_FLOATS = NUM_ROW_COLUMNS
"""Floats of a row on its way: all columns but the mask, and the depth."""

WORD = 4
ID_BYTES = 8
BOX_BYTES = 16
COUNT_BYTES = 4

GRENDEL_FORWARD_BYTES = 48
GRENDEL_BACKWARD_BYTES = 40
"""What mask-Grendel-GS sends for a copy of a splat: ten float32 and radius and depth; ten float32 back."""


@dataclass(frozen=True)
class Traffic:
    """What the splats of one rank cost in one step; sum over ranks for all.

    copies: splats delivered, those to this rank itself (`own_copies`) included. forward_bytes, backward_bytes: sent by
    this rank to others, and returned to it. count_bytes: the numbers of rows that this rank sends.
    """

    copies: int
    own_copies: int
    forward_bytes: int
    backward_bytes: int
    count_bytes: int

    @property
    def num_bytes(self) -> int:
        """All that travels between ranks for this one's splats."""
        return self.forward_bytes + self.backward_bytes + self.count_bytes

    @property
    def grendel_bytes(self) -> int:
        """What mask-Grendel-GS puts into its all-to-alls for as many copies; it sends itself its own, too."""
        return self.copies * (GRENDEL_FORWARD_BYTES + GRENDEL_BACKWARD_BYTES)


@dataclass(frozen=True)
class Wire:
    """How a row travels: its floats bit for bit, the low bytes of its id, its box if the receiver cannot work it out.

    dtype: of the floats. id_bytes: 1 to 8. sends_boxes: see `ExchangePlan.for_partition`.
    """

    dtype: torch.dtype
    id_bytes: int = ID_BYTES
    sends_boxes: bool = False

    @classmethod
    def of(cls, splats: Splats, id_bound: int | None, *, sends_boxes: bool) -> Wire:
        """The narrowest one for ids below `id_bound`. On a GPU in whole words: it moves odd bytes one at a time."""
        needed = ID_BYTES if id_bound is None else max(1, -(-(id_bound - 1).bit_length() // 8))
        if splats.rows.device.type == "cuda":
            needed = -(-needed // WORD) * WORD
        return cls(splats.rows.dtype, needed, sends_boxes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one copy."""
        return NUM_FLOATS * self.dtype.itemsize + self.id_bytes + (BOX_BYTES if self.sends_boxes else 0)

    @property
    def unit(self) -> torch.dtype:
        """Integers that rows are cut into."""
        return torch.uint8 if self.id_bytes % WORD else torch.int32

    def _units(self, num_bytes: int) -> int:
        return num_bytes // self.unit.itemsize

    def pack(self, splats: Splats, rows: Tensor) -> Tensor:
        """(S, units): the chosen packed rows."""
        unit, ids = self.unit, splats.ids.index_select(0, rows)
        parts = [
            splats.rows.index_select(0, rows).view(unit)[:, : self._units(MASK * self.dtype.itemsize)],
            splats.depths.index_select(0, rows)[:, None].view(unit),
            ids[:, None].view(unit)[:, : self._units(self.id_bytes)],
        ]
        if self.sends_boxes:
            parts.append(splats.boxes.index_select(0, rows).view(unit))
        return torch.cat(parts, dim=1)

    def unpack(self, wire: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (R, 10), depths (R,) and ids (R,) of what `pack` made; drawn: (R,), the masks."""
        columns, floats = self._units(MASK * self.dtype.itemsize), self._units(NUM_FLOATS * self.dtype.itemsize)
        rows = torch.empty((len(wire), NUM_ROW_COLUMNS), dtype=self.dtype, device=wire.device)
        rows.view(self.unit)[:, :columns] = wire[:, :columns]
        rows[:, MASK] = drawn
        depths = torch.empty((len(wire), 1), dtype=self.dtype, device=wire.device)
        depths.view(self.unit)[:] = wire[:, columns:floats]
        ids = torch.zeros((len(wire), 1), dtype=torch.int64, device=wire.device)
        last = floats + self._units(self.id_bytes)
        ids.view(self.unit)[:, : last - floats] = wire[:, floats:last]
        return rows, depths[:, 0], ids[:, 0]

    def unpack_boxes(self, wire: Tensor) -> Tensor:
        """(R, 4) int32 boxes that were sent."""
        boxes = torch.empty((len(wire), 4), dtype=torch.int32, device=wire.device)
        boxes.view(self.unit)[:] = wire[:, -self._units(BOX_BYTES) :]
        return boxes


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Who sends which packed rows to whom in one step; made by all ranks together.

    num_rows: M. region_offsets: (Q + 1,) int64, on the host: rows [q, q + 1) of what is received are region q's.
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
    ) -> ExchangePlan:
        """The plan that brings every region of `partition` the splats it can show. All ranks call it.

        Host sync: the numbers of rows, the only one of an exchange.

        Args: sizes: (width, height) of each view of the batch: receivers work out the boxes of rows, which suits the
        bodies whose boxes hold alpha >= 1/255; without it boxes travel. keep: see `select_rows`. id_bound: all ids are
        below it (`distributed.numbering` makes small ones), so they travel in fewer bytes.
        """
        if communicator.size == 1 and keep is None:
            return cls(communicator, len(splats), splats.view_offsets)
        selection = select_rows(splats, partition, keep=keep)
        blocks = communicator.gather(selection.counts).cpu().numpy()  # all ranks; host sync: the only one
        routes = Routes(communicator.rank, blocks.astype(np.int64), tuple(map(len, partition.regions)))
        mine = partition.regions[communicator.rank]
        passage = Passage(
            wire=Wire.of(splats, id_bound, sends_boxes=sizes is None),
            routes=routes,
            send_rows=selection.rows[: int(routes.sent.sum())],
            opacities=splats.rows[:, OPACITY],
            sizes=None if sizes is None else np.array([sizes[region.view] for region in mine], np.int32).reshape(-1, 2),
            is_cut=sum(map(len, partition.regions)) > len(partition.heights),
        )
        return cls(communicator, len(splats), routes.region_offsets, passage)

    @property
    def num_received(self) -> int:
        """R."""
        return int(self.region_offsets[-1])

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions: "view" q of the result is region q. All ranks.

        Masks must be 0 or 1. `gaussians` of the result are -1 (their owners know them), `slots` are empty.
        """
        way = self.passage
        if way is None:
            return splats
        packed = way.wire.pack(splats, way.send_rows)
        arrived = self.communicator.all_to_all_rows(packed, way.send_counts, way.receive_counts)  # all ranks
        if way.places is not None:
            arrived = arrived.index_select(0, way.places)
        rows, depths, ids = way.wire.unpack(arrived, way.drawn)
        return Splats(
            rows=rows,
            depths=depths,
            ids=ids,
            gaussians=splats.gaussians.new_full((len(rows),), -1),
            boxes=way.wire.unpack_boxes(arrived) if way.limits is None else boxes_of_rows(rows, way.limits),
            view_offsets=self.region_offsets,
            slots=splats.slots.new_empty((len(self.region_offsets) - 1, 0)),
        )

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows, from (R, 10) gradients by what it received. All ranks.

        As `rasterize_backward` makes them: rows that were not drawn have zeros in all columns but the mask's, and the
        mask's gradient of the others is opacity * dL/d(opacity) where no pixel capped alpha.
        """
        way = self.passage
        if way is None:
            return d_received
        if way.places is not None:
            d_received = torch.empty_like(d_received).index_copy_(0, way.places, d_received)
        outgoing = _joined(d_received, GroupSpans.of(way.routes.received))
        back, sent = numbers_back(way.routes.received), numbers_back(way.routes.sent)
        returned = self.communicator.all_to_all_rows(outgoing, back, sent)  # all ranks
        return way.summed(returned, self.num_rows)

    def traffic(self, dtype: torch.dtype = torch.float32) -> Traffic:
        """What forward and backward move for this rank's splats, with floats of `dtype`."""
        way = self.passage
        if way is None:
            return Traffic(self.num_received, self.num_received, 0, 0, 0)
        rank, routes = self.communicator.rank, way.routes
        own, all_copies = int(routes.sent[rank].sum()), int(routes.sent.sum())
        back = sum(count for to, count in enumerate(numbers_back(routes.sent)) if to != rank)
        forward_bytes = (all_copies - own) * replace(way.wire, dtype=dtype).row_bytes
        count_bytes = COUNT_BYTES * routes.blocks.shape[1] * (self.communicator.size - 1)
        return Traffic(all_copies, own, forward_bytes, back * dtype.itemsize, count_bytes)


@dataclass(frozen=True, eq=False)
class Passage:
    """The copies of one step on their way.

    send_rows: (S,) packed rows, by target. opacities: (M,) of the packed rows. sizes: (Q, 2) int32 width and height of
    the views of this rank's regions, or None when boxes travel. is_cut: a row may have copies on several ranks.
    """

    wire: Wire
    routes: Routes
    send_rows: Tensor
    opacities: Tensor
    sizes: np.ndarray | None
    is_cut: bool

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

    def summed(self, returned: Tensor, num_rows: int) -> Tensor:
        """(M, 10): what came back from all ranks (one line of numbers, as `_joined` makes it), added up by row."""
        spans, num_ranks = GroupSpans.of(self.routes.sent), len(self.routes.sent)
        lengths = [part for pair in zip(spans.drawn, spans.masked, strict=True) for part in pair]
        widths = [MASK * _length(part) if k % 2 == 0 else _length(part) for k, part in enumerate(lengths)]
        parts = returned.split(widths)
        d_rows = returned.new_zeros((num_rows, NUM_ROW_COLUMNS))
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
