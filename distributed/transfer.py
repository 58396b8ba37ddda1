# SPDX-License-Identifier: Apache-2.0
"""Values on their way to a device or back, without waiting for the work that is queued there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """`values`, a host tensor, on a device.

    For a GPU they go through pinned memory, which torch keeps until the copy is over: a copy from ordinary memory would
    wait until the GPU has done all else.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True, eq=False)
class Fetched:
    """Device tensors on their way to the host; what they held when `start` was called.

    `start` returns at once; `wait` blocks until the device has come that far, and no further.
    """

    copies: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None

    @classmethod
    def start(cls, values: Sequence[Tensor], *, over: Fetched | None = None) -> Fetched:
        """Begin to copy `values`, all of one device, to the host.

        Args: over: one that has arrived and that nobody looks at any more; its memory is used again where it fits.
        """
        if not values or values[0].device.type != "cuda":
            return cls(tuple(value.detach().clone() for value in values), None)
        free = over.copies if over is not None else ()
        if [_kind(value) for value in values] != [_kind(copy) for copy in free]:
            free = tuple(torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for value in values)
        for copy, value in zip(free, values, strict=True):
            copy.copy_(value, non_blocking=True)
        arrived = over.arrived if over is not None and over.arrived is not None else torch.cuda.Event()
        arrived.record()
        return cls(free, arrived)

    def wait(self) -> tuple[Tensor, ...]:
        """The values, on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copies


def _kind(values: Tensor) -> tuple[torch.Size, torch.dtype]:
    return values.shape, values.dtype
