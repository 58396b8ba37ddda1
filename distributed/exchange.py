# SPDX-License-Identifier: Apache-2.0
"""Splats travel from the owners of Gaussians to the owners of pixels, and gradients travel back.

The forward E copies each packed splat to every region it touches; the backward is its adjoint: the copies' gradients
are summed at the owner, in the order of ranks. One collective carries the numbers of rows, one the splats, one the
gradients. Copies for this rank itself never enter a collective. The mask travels as the group a row is sent in (drawn,
m = 1, or not drawn, m = 0); a row that was not drawn has a gradient by its mask only and returns that one number.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import HALO, PixelPartition
from masksplat.types import NUM_ROW_COLUMNS, Splats

MASK_COLUMN = NUM_ROW_COLUMNS - 1
LARGEST_NARROW_SIDE = 32767
"""Boxes of views up to this size travel as four 16-bit numbers."""

GRENDEL_FORWARD_BYTES = 48
GRENDEL_BACKWARD_BYTES = 40
"""What mask-Grendel-GS sends for a copy of a splat: ten float32 and radius and depth; ten float32 back."""


@dataclass(frozen=True)
class Traffic:
    """What the splats of one rank cost in one step; sum over ranks for all.

    copies: splats delivered, those to this rank itself (`own_copies`) included. forward_bytes, backward_bytes: sent by
    this rank, and returned to it. count_bytes: the numbers of rows that this rank sends.
    """

    copies: int
    own_copies: int
    forward_bytes: int
    backward_bytes: int
    count_bytes: int

    @property
    def grendel_bytes(self) -> int:
        """What mask-Grendel-GS puts into its all-to-alls for as many copies; it sends itself its own, too."""
        return self.copies * (GRENDEL_FORWARD_BYTES + GRENDEL_BACKWARD_BYTES)


def select_rows(
    splats: Splats, partition: PixelPartition, *, keep: Tensor | None = None, halo: int = HALO
) -> list[list[Tensor]]:
    """[rank][region] -> (n,) int64: the packed rows whose box of pixels meets what the region draws.

    Args: keep: (M,) bool, rows that are sent at all (evaluation leaves out those with m = 0).
    """
    return [
        [_rows_of_region(splats, region.view, region.drawn_rows(partition.heights[region.view], halo), keep)
         for region in regions]
        for regions in partition.regions
    ]  # fmt: skip


def _rows_of_region(splats: Splats, view: int, drawn: tuple[int, int], keep: Tensor | None) -> Tensor:
    """(n,) int64, ascending."""
    first, last = splats.view_range(view)
    boxes = splats.boxes[first:last]
    meets = (boxes[:, 1] < drawn[1]) & (boxes[:, 3] > drawn[0])
    if keep is not None:
        meets &= keep[first:last]
    return torch.nonzero(meets)[:, 0] + first  # host sync on a GPU: its length


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Who sends which packed rows to whom in one step; made by all ranks together.

    num_rows: M. region_offsets: (Q + 1,) int64, on the host: rows [q, q + 1) of what is received are region q's.
    send_rows: for each rank, the packed rows that it gets, in the order of its regions, within a region drawn rows
    first. is_identity: a world of one that sends everything; forward and backward return what they are given.
    """

    communicator: Communicator
    num_rows: int
    region_offsets: Tensor
    send_rows: tuple[Tensor, ...]
    send_drawn: Tensor  # (rows sent to others,) bool
    receive_counts: tuple[int, ...]  # rows from each rank, 0 from this one
    receive_drawn: Tensor  # (rows from others,) bool, in order of arrival
    receive_places: Tensor  # (rows from others,) int64: where they go among the R
    own_places: Tensor  # (own copies,) int64
    has_wide_boxes: bool
    is_identity: bool = False

    @classmethod
    def for_partition(
        cls,
        communicator: Communicator,
        splats: Splats,
        partition: PixelPartition,
        *,
        largest_side: int,
        keep: Tensor | None = None,
    ) -> ExchangePlan:
        """The plan that brings every region of `partition` the splats it can show. All ranks call it.

        Args: largest_side: widest or highest view of the batch, in pixels; keep: see `select_rows`.
        """
        if communicator.size == 1 and keep is None:
            return cls._identity(communicator, splats)
        selections = select_rows(splats, partition, keep=keep)
        return cls.for_selections(communicator, selections, splats.rows[:, MASK_COLUMN] != 0, largest_side=largest_side)

    @classmethod
    def _identity(cls, communicator: Communicator, splats: Splats) -> ExchangePlan:
        """One rank draws all views whole: nothing moves."""
        nothing = torch.empty(0, dtype=torch.int64)
        empty = torch.empty(0, dtype=torch.bool)
        unused = ((nothing,), empty, (0,), empty, nothing, nothing, False)
        return cls(communicator, len(splats), splats.view_offsets, *unused, is_identity=True)

    @classmethod
    def for_selections(
        cls, communicator: Communicator, selections: Sequence[Sequence[Tensor]], is_drawn: Tensor, *, largest_side: int
    ) -> ExchangePlan:
        """The plan for chosen rows. All ranks call it, and know how many regions each rank has.

        Args: selections: [rank][region] -> (n,) int64 packed rows; the regions of one rank have no row in common.
        is_drawn: (M,) bool, m = 1.
        """
        rank, device = communicator.rank, is_drawn.device
        blocks = [[_drawn_first(rows, is_drawn) for rows in regions] for regions in selections]
        counts = torch.tensor([block[1] for regions in blocks for block in regions], dtype=torch.int64).reshape(-1, 2)
        num_regions = len(selections[rank])
        received = communicator.all_to_all_rows(
            counts, [len(regions) for regions in selections], [num_regions] * communicator.size
        )
        arrivals = _Arrivals.of(received.reshape(communicator.size, num_regions, 2).numpy(), rank)
        none = [torch.empty(0, dtype=torch.int64, device=device)]
        send_rows = tuple(torch.cat(none + [block[0] for block in regions]) for regions in blocks)
        others = torch.cat(none + [rows for to, rows in enumerate(send_rows) if to != rank])
        return cls(
            communicator,
            len(is_drawn),
            torch.from_numpy(arrivals.region_offsets),
            send_rows,
            is_drawn[others],
            tuple(arrivals.counts),
            torch.from_numpy(arrivals.drawn).to(device),
            torch.from_numpy(arrivals.places).to(device),
            torch.from_numpy(arrivals.own_places).to(device),
            largest_side > LARGEST_NARROW_SIDE,
        )

    @property
    def num_received(self) -> int:
        """R."""
        return int(self.region_offsets[-1])

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions: "view" q of the result is region q.

        Masks must be 0 or 1. `gaussians` of the result are -1 (their owners know them), `slots` are empty. All ranks.
        """
        if self.is_identity:
            return splats
        own = self._own_rows
        others = self._other_rows
        wire = torch.cat([_float_words(splats, others), _whole_words(splats, others, self.has_wide_boxes)], dim=1)
        arrived = self.communicator.all_to_all_rows(wire, self._send_counts, self.receive_counts)
        floats, ids, boxes = _unpacked(arrived, splats.rows.dtype, self.has_wide_boxes)
        drawn = self.receive_drawn.to(splats.rows.dtype)[:, None]
        place = self._placed
        return Splats(
            rows=place(splats.rows[own], torch.cat([floats[:, :MASK_COLUMN], drawn], dim=1)),
            depths=place(splats.depths[own], floats[:, MASK_COLUMN]),
            ids=place(splats.ids[own], ids),
            gaussians=splats.gaussians.new_full((self.num_received,), -1),
            boxes=place(splats.boxes[own], boxes),
            view_offsets=self.region_offsets,
            slots=splats.slots.new_empty((len(self.region_offsets) - 1, 0)),
        )

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows, from (R, 10) gradients by what it received. All ranks.

        Rows that were not drawn must have zeros in all columns but the mask's.
        """
        if self.is_identity:
            return d_received
        widths_out, widths_in = _widths(self.receive_drawn), _widths(self.send_drawn)
        outgoing = _joined(d_received[self.receive_places], self.receive_drawn, widths_out)
        send_counts, receive_counts = self._send_counts, self.receive_counts
        flat = self.communicator.all_to_all_rows(
            outgoing, _sums(widths_out, receive_counts), _sums(widths_in, send_counts)
        )
        returned = _separated(flat, self.send_drawn, widths_in).split(send_counts)
        d_rows = d_received.new_zeros((self.num_rows, d_received.shape[1]))
        for rank, rows in enumerate(self.send_rows):  # the fixed order of the sum
            part = d_received[self.own_places] if rank == self.communicator.rank else returned[rank]
            d_rows.index_add_(0, rows, part)
        return d_rows

    def traffic(self, dtype: torch.dtype = torch.float32) -> Traffic:
        """What forward and backward move for this rank's splats, with floats of `dtype`."""
        if self.is_identity:
            return Traffic(self.num_received, self.num_received, 0, 0, 0)
        drawn, sent = int(self.send_drawn.sum()), len(self.send_drawn)
        num_bytes = dtype.itemsize
        per_copy = NUM_ROW_COLUMNS * num_bytes + 8 + (16 if self.has_wide_boxes else 8)
        back = (drawn * NUM_ROW_COLUMNS + sent - drawn) * num_bytes
        counts = 16 * (len(self.region_offsets) - 1) * (self.communicator.size - 1)
        return Traffic(sent + len(self._own_rows), len(self._own_rows), sent * per_copy, back, counts)

    @property
    def _own_rows(self) -> Tensor:
        return self.send_rows[self.communicator.rank]

    @property
    def _other_rows(self) -> Tensor:
        parts = [rows for rank, rows in enumerate(self.send_rows) if rank != self.communicator.rank]
        return torch.cat([self._own_rows[:0], *parts])

    @property
    def _send_counts(self) -> list[int]:
        """Rows for each rank that enter the collective."""
        return [0 if rank == self.communicator.rank else len(rows) for rank, rows in enumerate(self.send_rows)]

    def _placed(self, own: Tensor, arrived: Tensor) -> Tensor:
        """Own copies and arrived rows, each in its place."""
        result = own.new_empty((self.num_received, *own.shape[1:]))
        result[self.own_places] = own
        result[self.receive_places] = arrived
        return result


@dataclass(frozen=True, eq=False)
class _Arrivals:
    """Rows arrive by source, region, group; they are kept by region, source, group."""

    region_offsets: np.ndarray
    counts: list[int]
    drawn: np.ndarray
    places: np.ndarray
    own_places: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray, rank: int) -> _Arrivals:
        """From the (W, Q, 2) numbers of rows: drawn, not drawn."""
        lengths = counts.reshape(-1)
        starts_of_arrival = np.cumsum(lengths) - lengths
        by_region = counts.transpose(1, 0, 2)
        kept = by_region.reshape(-1)
        starts_kept = (np.cumsum(kept) - kept).reshape(by_region.shape).transpose(1, 0, 2).reshape(-1)
        places = np.repeat(starts_kept - starts_of_arrival, lengths) + np.arange(lengths.sum())
        source, _, group = np.indices(counts.shape).reshape(3, -1)
        is_own = np.repeat(source == rank, lengths)
        from_rank = counts.sum(axis=(1, 2))
        from_rank[rank] = 0
        offsets = np.concatenate([[0], np.cumsum(by_region.sum(axis=(1, 2)))]).astype(np.int64)
        drawn = np.repeat(group == 0, lengths)[~is_own]
        return cls(offsets, from_rank.tolist(), drawn, places[~is_own], places[is_own])


def _drawn_first(rows: Tensor, is_drawn: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The rows with those drawn in front, and the two numbers of rows."""
    drawn = is_drawn[rows]
    front, back = rows[drawn], rows[~drawn]  # host sync on a GPU: their lengths
    return torch.cat([front, back]), (len(front), len(back))


def _float_words(splats: Splats, rows: Tensor) -> Tensor:
    """(n, 10 or 20) int32: nine columns of the rows and the depth, bit for bit."""
    floats = torch.cat([splats.rows[rows, :MASK_COLUMN], splats.depths[rows, None]], dim=1)
    return floats.contiguous().view(torch.int32)


def _whole_words(splats: Splats, rows: Tensor, wide: bool) -> Tensor:
    """(n, 4 or 6) int32: id and box."""
    ids = splats.ids[rows, None].view(torch.int32)
    boxes = splats.boxes[rows]
    return torch.cat([ids, boxes if wide else boxes.to(torch.int16).view(torch.int32)], dim=1)


def _unpacked(words: Tensor, dtype: torch.dtype, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Floats (n, 10), ids (n,) and boxes (n, 4) of the words that `_float_words` and `_whole_words` made."""
    split = NUM_ROW_COLUMNS * dtype.itemsize // 4
    floats = words[:, :split].contiguous().view(dtype)
    ids = words[:, split : split + 2].contiguous().view(torch.int64)[:, 0]
    boxes = words[:, split + 2 :].contiguous()
    return floats, ids, boxes if wide else boxes.view(torch.int16).to(torch.int32)


def _widths(drawn: Tensor) -> Tensor:
    """(n,) int64: how many numbers of each row's gradient travel."""
    return torch.where(drawn, NUM_ROW_COLUMNS, 1)


def _sums(widths: Tensor, counts: Sequence[int]) -> list[int]:
    """The sum of the widths of each run of `counts` rows."""
    ends = torch.cat([widths.new_zeros(1), widths.cumsum(0)])[np.cumsum([0, *counts])]
    return ends.diff().tolist()  # host sync on a GPU


def _joined(gradients: Tensor, drawn: Tensor, widths: Tensor) -> Tensor:
    """One line of numbers: ten of each drawn row, the mask's of the others, in the order of the (n, 10) rows."""
    flat = gradients.new_empty(int(widths.sum()))
    starts = widths.cumsum(0) - widths
    columns = torch.arange(NUM_ROW_COLUMNS, device=widths.device)
    flat[starts[drawn][:, None] + columns] = gradients[drawn]
    flat[starts[~drawn]] = gradients[~drawn, MASK_COLUMN]
    return flat


def _separated(flat: Tensor, drawn: Tensor, widths: Tensor) -> Tensor:
    """The inverse of `_joined`: (n, 10) rows, zero where nothing travelled."""
    gradients = flat.new_zeros((len(drawn), NUM_ROW_COLUMNS))
    starts = widths.cumsum(0) - widths
    columns = torch.arange(NUM_ROW_COLUMNS, device=widths.device)
    gradients[drawn] = flat[starts[drawn][:, None] + columns]
    gradients[~drawn, MASK_COLUMN] = flat[starts[~drawn]]
    return gradients
