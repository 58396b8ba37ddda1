# SPDX-License-Identifier: Apache-2.0
"""Photos on the device that compares them: uploaded once, kept there within a byte budget, and read without waiting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distributed.transfer import sent_to


class PixelSource(Protocol):
    """Where photos come from, `scene.images.ImageStore` for example."""

    def fetch(self, index: int, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows of a photo, (rows, width, 3) uint8, on the CPU."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to decode photos that will be fetched."""

    def close(self) -> None:
        """Stop the background work."""


class DeviceImages:
    """The photos of a `PixelSource`, as tensors of a device; the same bytes, whatever the budget.

    Photos are kept in device memory up to `byte_budget` bytes, those used longest ago go first. For a strip of a photo
    that is not there, all of it is uploaded while there is room, the strip alone when others would have to go.
    Uploads go through pinned memory and never block the host.
    """

    def __init__(self, source: PixelSource, device: torch.device, *, byte_budget: int) -> None:
        self._source = source
        self._device = device
        self._byte_budget = byte_budget
        self._kept: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._kept_bytes = 0

    def fetch(self, index: int, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop) of a photo: (rows, width, 3) uint8, contiguous, on the device. Read it only.

        Raises: as the source's `fetch`.
        """
        kept = self._kept.get(index)
        if kept is not None:
            self._kept.move_to_end(index)
            return _rows(kept, row_start, row_stop)
        pixels = self._source.fetch(index)
        is_whole = row_start == 0 and row_stop is None
        if not is_whole and self._kept_bytes + pixels.numel() > self._byte_budget:
            return sent_to(_rows(pixels, row_start, row_stop), self._device)
        uploaded = sent_to(pixels, self._device)
        self._keep(index, uploaded)
        return _rows(uploaded, row_start, row_stop)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to decode the photos that are not on the device, and return at once."""
        missing = [index for index in indices if index not in self._kept]
        if missing:
            self._source.prefetch(missing)

    def close(self) -> None:
        """Forget the device's photos and stop the source's background work."""
        self._kept.clear()
        self._kept_bytes = 0
        self._source.close()

    def _keep(self, index: int, pixels: Tensor) -> None:
        """Keep a photo and drop those used longest ago until the budget holds."""
        self._kept[index] = pixels
        self._kept_bytes += pixels.numel()
        while self._kept_bytes > self._byte_budget:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.numel()


def _rows(pixels: Tensor, start: int, stop: int | None) -> Tensor:
    return pixels if start == 0 and stop is None else pixels[start:stop]
