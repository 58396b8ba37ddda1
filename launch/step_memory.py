# SPDX-License-Identifier: Apache-2.0
"""What changes from step to step, in one piece of device memory that recorded launches read.

Everything goes there by one copy that nobody waits for: cameras, what Adam and the masks need to know, the number that
the noise is keyed with.

Letters: B views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from gaussian_renderer.views import CAMERA_NUMBERS, KERNEL_ATTRIBUTES
from masksplat.cuda.exchange import HostTables, RegionTables
from masksplat.cuda.projection import ADAM_FACTORS, adam_table
from masksplat.types import AdamStep, Views
from strategies.base import MASK_NUMBERS, MaskMemory

ALIGNMENT = 4
"""Floats that a part of the memory begins at a multiple of."""

VIEWMAT = 16
"""Of the numbers of a camera, those of its 4 x 4 matrix; the others are its intrinsics."""


@dataclass(frozen=True, eq=False)
class StepNumbersAt:
    """Where launches of one kind of step find its numbers (`gaussian_renderer.step.RecordedNumbers`, `MaskMemory`)."""

    factors: Tensor
    masks: MaskMemory
    tables: RegionTables | None


class StepMemory:
    """The device's memory for B views, and a ring of host copies that are still on their way.

    factors: (6, ADAM_FACTORS), `Optimizer.factors`. masks: what the masks read. tables: who draws what, of several
    ranks.
    """

    def __init__(self, num_views: int, device: torch.device, *, num_behind: int, num_table_words: int = 0) -> None:
        """Args: num_behind: steps that the device may be behind the host; num_table_words: the most in `tables`."""
        self._num_views = num_views
        sizes = (num_views * CAMERA_NUMBERS, len(KERNEL_ATTRIBUTES) * ADAM_FACTORS, MASK_NUMBERS, 1, num_table_words)
        starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        self._places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._there = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        is_pinned = device.type == "cuda"
        # A copy may be written again when its step is over: the one that is written, and those behind.
        ring = [torch.zeros(starts[-1], dtype=torch.float32, pin_memory=is_pinned) for _ in range(num_behind + 2)]
        self._ring = [(host, host.numpy()) for host in ring]
        self._next = 0
        cameras, factors, update, step, tables = (self._there[place] for place in self._places)
        self._cameras = cameras
        self._tables = tables.view(torch.int32)
        self.factors = factors.view(len(KERNEL_ATTRIBUTES), ADAM_FACTORS)
        self.masks = MaskMemory(step.view(torch.int32), update)

    def views(self, sizes: Sequence[tuple[int, int]]) -> Views:
        """The cameras of whatever step is in the memory; sizes: (width, height) of each."""
        num_views, viewmats = self._num_views, self._num_views * VIEWMAT
        return Views(
            self._cameras[:viewmats].view(num_views, 4, 4), self._cameras[viewmats:].view(num_views, 3, 3), tuple(sizes)
        )

    def numbers_at(self, tables: HostTables | None) -> StepNumbersAt:
        """Where a step finds its numbers that has tables of this shape; None for one rank."""
        if tables is None:
            return StepNumbersAt(self.factors, self.masks, None)
        memory = self._tables[: len(tables.packed)]
        return StepNumbersAt(self.factors, self.masks, RegionTables.cut(memory, tables.shape))

    def write(
        self,
        cameras: np.ndarray,
        adam_steps: Sequence[AdamStep],
        gradient_scale: float,
        mask_numbers: Sequence[float],
        noise_step: int,
        tables: np.ndarray | None,
    ) -> None:
        """Queue the copy of a step's numbers. Args: cameras: (B, CAMERA_NUMBERS) float32; tables: int32."""
        host, numbers = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        views, factors, update, step, places_of_tables = self._places
        viewmats = views.start + self._num_views * VIEWMAT
        numbers[views.start : viewmats] = cameras[:, :VIEWMAT].reshape(-1)
        numbers[viewmats : views.stop] = cameras[:, VIEWMAT:].reshape(-1)
        numbers[factors] = adam_table(adam_steps, gradient_scale).reshape(-1)
        if mask_numbers:
            numbers[update] = mask_numbers
        numbers[step].view(np.int32)[0] = noise_step
        if tables is not None:
            first = places_of_tables.start
            numbers[first : first + len(tables)].view(np.int32)[:] = tables
        self._there.copy_(host, non_blocking=True)
