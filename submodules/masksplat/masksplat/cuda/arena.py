# SPDX-License-Identifier: Apache-2.0
"""Memory of one call, allocated at once and cut into pieces for kernels.

An allocation costs the host some microseconds and a tensor that shows a part of another one a microsecond; a piece is
two numbers, and where the pieces of an arena begin is worked out once for each set of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256


class Piece(NamedTuple):
    """Raw memory that a kernel gets: where it begins, and bytes. Whoever cuts it keeps the arena alive."""

    address: int
    size: int


class Layout:
    """Where pieces lie in an arena: each at a multiple of ALIGNMENT, none of them empty."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` in bytes."""
        self._spans: list[tuple[int, int]] = []
        self.num_bytes = 0
        for size in sizes:
            aligned = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
            self._spans.append((self.num_bytes, aligned))
            self.num_bytes += aligned

    def cut(self, memory: Tensor) -> list[Piece]:
        """The pieces of `memory`, uint8, of at least `num_bytes`."""
        base = memory.data_ptr()
        return [Piece(base + first, size) for first, size in self._spans]


def rows_of(values: Tensor, first: int, last: int, device: torch.device) -> Piece:
    """Rows [first, last) of a tensor as a piece; the tensor must live as long.

    Raises:
        ValueError: for a tensor that is not contiguous or on another device.
    """
    if not values.is_contiguous() or values.device != device:
        raise ValueError(
            f"a tensor of shape {tuple(values.shape)} on {values.device} with strides {values.stride()}; kernels take "
            f"contiguous tensors on {device}"
        )
    row = values.stride(0) * values.element_size()
    return Piece(values.data_ptr() + first * row, (last - first) * row)


def bytes_of(memory: Tensor, piece: Piece) -> Tensor:
    """A piece of `memory` as a tensor of uint8."""
    first = piece.address - memory.data_ptr()
    return memory[first : first + piece.size]


def raw(layout: Layout, device: torch.device) -> Tensor:
    """Memory for a layout; what it holds is undefined."""
    return torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
