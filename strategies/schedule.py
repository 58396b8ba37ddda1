# SPDX-License-Identifier: Apache-2.0
"""When something happens: windows of images and schedules over them.

Iterations count images, from 1. A training step consumes the images of one `Window`; an event of period P happens in
the step whose window holds a multiple of P. Nowhere else in the project is there modulo arithmetic on iterations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The images of one training step: iterations `first`, `first + 1`, ..., `first + size - 1` (counted from 1)."""

    first: int
    size: int

    def __post_init__(self) -> None:
        if self.first < 1 or self.size < 1:
            raise ValueError(f"a window starts at iteration 1 or later and holds 1 image or more, got {self}")

    @property
    def last(self) -> int:
        """The iteration of the last image."""
        return self.first + self.size - 1

    def steps_since(self, iteration: int) -> int:
        """How many steps of this size have begun after `iteration` when this one begins: 0 for the first of them."""
        return (self.first - iteration - 1) // self.size

    def contains(self, iteration: int) -> bool:
        """Whether one of the images is that of `iteration`."""
        return self.first <= iteration <= self.last


@dataclass(frozen=True)
class Schedule:
    """The multiples of `every` in [`start`, `stop`], both inclusive; `start > stop` is the empty schedule."""

    start: int
    stop: int
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"the period of a schedule must be 1 or more, got every={self.every}")

    def event(self, window: Window) -> int | None:
        """The scheduled iteration within the window (the last one if there are several), or None."""
        newest = min(window.last, self.stop)
        multiple = newest - newest % self.every
        return multiple if multiple >= max(window.first, self.start) else None

    def fires(self, window: Window) -> bool:
        """Whether a scheduled iteration lies in the window."""
        return self.event(window) is not None

    def is_active(self, window: Window) -> bool:
        """Whether the window's first image lies in [start, stop]; the period plays no part."""
        return self.start <= window.first <= self.stop
