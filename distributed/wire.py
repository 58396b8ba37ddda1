# SPDX-License-Identifier: Apache-2.0
"""How a splat is written while it travels between ranks.

Letters: S copies sent, R splats received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed.routes import MASK
from masksplat.types import NUM_ROW_COLUMNS, Splats

NUM_FLOATS = NUM_ROW_COLUMNS
"""Floats of a row on its way: all columns but the mask, and the depth."""

WORD = 4
ID_BYTES = 8
BOX_BYTES = 16


@dataclass(frozen=True)
class Wire:
    """How a row travels: its floats bit for bit, the low bytes of its id, its box if the receiver cannot work it out.

    dtype: of the floats. id_bytes: 1 to 8. sends_boxes: see `ExchangePlan.for_partition`.
    """

    dtype: torch.dtype
    id_bytes: int = ID_BYTES
    sends_boxes: bool = False

    @classmethod
    def of(cls, splats: Splats, id_bound: int | None, *, sends_boxes: bool, in_words: bool) -> Wire:
        """The narrowest one for ids below `id_bound`; in_words: a GPU moves whole words, and odd bytes one by one."""
        needed = ID_BYTES if id_bound is None else max(1, -(-(id_bound - 1).bit_length() // 8))
        if in_words:
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
