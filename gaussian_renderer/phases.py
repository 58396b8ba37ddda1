# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training goes, seconds per named phase, and which phase it is in.

The host's clock measures what the host does. A GPU works later than the host that queues for it: its own time is
measured by events that it passes, which are read when it has passed them, so that nobody waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

MILLISECONDS = 1e-3


class PhaseTimer:
    """Adds up the host's seconds of phases that do not overlap.

    seconds: of every phase so far. current: the phase that is going on, "" between two; after an exception, the phase
    that it left.
    """

    clock = "host"

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""

    def __call__(self, phase: str) -> Phase:
        """A context whose time counts towards `phase`."""
        return Phase(self, phase, is_timed=True)

    def untimed(self, phase: str) -> Phase:
        """A context of work whose time is counted elsewhere; `current` names it."""
        return Phase(self, phase, is_timed=False)

    def read(self) -> dict[str, float]:
        """A copy of `seconds` with everything so far in it; may wait for the device."""
        return dict(self.seconds)

    def _mark(self) -> Any:
        return time.perf_counter()

    def _count(self, phase: str, start: Any, end: Any) -> None:
        self._add(phase, end - start)

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class Phase:
    """What a `with` statement does about a phase; a generator would take the host six times as long."""

    __slots__ = ("_is_timed", "_name", "_start", "_timer")

    def __init__(self, timer: PhaseTimer, name: str, *, is_timed: bool) -> None:
        """Of a timer."""
        self._timer, self._name, self._is_timed = timer, name, is_timed

    def __enter__(self) -> None:
        """The phase begins."""
        self._timer.current = self._name
        self._start = self._timer._mark() if self._is_timed else None

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """It ends; after an exception it stays the current one."""
        if error is None:
            if self._is_timed:
                self._timer._count(self._name, self._start, self._timer._mark())
            self._timer.current = ""


class Event(Protocol):
    """A place in a device's queue, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Put the event behind what is queued."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this event to `end`."""


class DevicePhaseTimer(PhaseTimer):
    """The same on the current CUDA stream: from when the device begins a phase until it has done it, pauses included.

    Costs the host some 5 us a phase.
    """

    clock = "gpu"

    def __init__(self, new_event: Callable[[], Event] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        super().__init__()
        self._new_event = new_event
        self._pending: deque[tuple[str, Event, Event]] = deque()
        self._free: list[Event] = []

    def read(self) -> dict[str, float]:
        """A copy of `seconds`, when the device has done everything that is queued."""
        if self._pending:
            self._pending[-1][2].synchronize()  # host sync: phase times
        self._collect()
        return super().read()

    def _mark(self) -> Event:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event

    def _count(self, phase: str, start: Event, end: Event) -> None:
        self._pending.append((phase, start, end))
        self._collect()

    def _collect(self) -> None:
        """Count the phases that the device has done, and use their events again."""
        while self._pending and self._pending[0][2].query():
            phase, start, end = self._pending.popleft()
            self._add(phase, start.elapsed_time(end) * MILLISECONDS)
            self._free += [start, end]


def phase_timer(device: torch.device, *, on_device: bool) -> PhaseTimer:
    """The clock of a training on `device`: the device's own where it has one and `on_device` asks for it."""
    return DevicePhaseTimer() if on_device and device.type == "cuda" else PhaseTimer()
