# SPDX-License-Identifier: Apache-2.0
"""How a splat is written while it travels between ranks.

Letters: S copies sent, R splats received.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed.routes import MASK
from masksplat.types import NUM_ROW_COLUMNS, ROW_COLUMNS, Splats

NUM_FLOATS = NUM_ROW_COLUMNS
"""Floats of a row on its way: all columns but the mask, and the depth."""

OPACITY = ROW_COLUMNS.index("opacity")

WORD = 4
ID_BYTES = 8
BOX_BYTES = 16

SPARE_BITS = 5
OPACITY_TOP = 0b00111 << 3
"""The opacity of a packed splat lies in [1/255, 1], so that its sign and the first four bits of its exponent are always
these, in float32 and in float64: five bits of its highest byte that say nothing."""


@dataclass(frozen=True)
class Wire:
    """How a row travels: its floats bit for bit, the low bytes of its id, its box if the receiver cannot work it out.

    dtype: of the floats. id_bytes: 0 to 8. sends_boxes: see `ExchangePlan.for_partition`. uses_spare_bits: the lowest
    bits of the id travel in those of the opacity that say nothing.
    """

    dtype: torch.dtype
    id_bytes: int = ID_BYTES
    sends_boxes: bool = False
    uses_spare_bits: bool = False

    @classmethod
    def of(cls, splats: Splats, id_bound: int | None, *, sends_boxes: bool, in_words: bool) -> Wire:
        """The narrowest one for ids below `id_bound`; in_words: a GPU moves whole words, and odd bytes one by one."""
        bits = 8 * ID_BYTES if id_bound is None else (id_bound - 1).bit_length()
        if in_words:
            return cls(splats.rows.dtype, max(1, -(-bits // (8 * WORD))) * WORD, sends_boxes)
        uses_spare_bits = id_bound is not None and splats.rows.device.type == "cpu"
        id_bytes = -(-max(0, bits - SPARE_BITS) // 8) if uses_spare_bits else ID_BYTES
        return cls(splats.rows.dtype, id_bytes, sends_boxes, uses_spare_bits)

    @property
    def row_bytes(self) -> int:
        """Bytes of one copy."""
        return NUM_FLOATS * self.dtype.itemsize + self.id_bytes + (BOX_BYTES if self.sends_boxes else 0)

    @property
    def unit(self) -> torch.dtype:
        """Integers that rows are cut into."""
        return torch.uint8 if self.uses_spare_bits or self.id_bytes % WORD else torch.int32

    def _units(self, num_bytes: int) -> int:
        return num_bytes // self.unit.itemsize

    def pack(self, splats: Splats, rows: Tensor) -> Tensor:
        """(S, units): the chosen packed rows."""
        unit, ids = self.unit, splats.ids.index_select(0, rows)
        chosen = splats.rows.index_select(0, rows)
        if self.uses_spare_bits:
            top = self._tops_of_opacities(chosen)
            top[:] = top & 0b111 | (ids.numpy() << 3).astype(np.uint8)  # the cast keeps the lowest eight bits
            ids = ids >> SPARE_BITS
        parts = [
            chosen.view(unit)[:, : self._units(MASK * self.dtype.itemsize)],
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
        if self.uses_spare_bits:
            top, numbers = self._tops_of_opacities(rows), ids.numpy()[:, 0]
            numbers[:] = numbers << SPARE_BITS | top >> 3
            top[:] = top & 0b111 | OPACITY_TOP
        return rows, depths[:, 0], ids[:, 0]

    def _tops_of_opacities(self, rows: Tensor) -> np.ndarray:
        """(n,) uint8, the highest byte of each opacity, in place; numpy's operations cost less than torch's here."""
        return rows.numpy().view(np.uint8)[:, (OPACITY + 1) * self.dtype.itemsize - 1]

    def unpack_boxes(self, wire: Tensor) -> Tensor:
        """(R, 4) int32 boxes that were sent."""
        boxes = torch.empty((len(wire), 4), dtype=torch.int32, device=wire.device)
        boxes.view(self.unit)[:] = wire[:, -self._units(BOX_BYTES) :]
        return boxes
