# SPDX-License-Identifier: Apache-2.0
"""Times of phases: on the host's clock, and on a device that is behind the host."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
import torch

from cuda_launchers import DEVICE, make_launcher
from gaussian_renderer.phases import DevicePhaseTimer, PhaseTimer


@dataclass
class Device:
    """A device with a clock of its own; it has passed what is queued up to `done`."""

    milliseconds: float = 0.0
    queued: int = 0
    done: int = 0
    waits: int = 0
    events: list[FakeEvent] = field(default_factory=list)

    def new_event(self) -> FakeEvent:
        self.events.append(FakeEvent(self))
        return self.events[-1]


@dataclass(eq=False)
class FakeEvent:
    device: Device
    place: int = -1
    moment: float = 0.0

    def record(self) -> None:
        self.device.queued += 1
        self.place, self.moment = self.device.queued, self.device.milliseconds

    def query(self) -> bool:
        return self.place <= self.device.done

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.done = max(self.device.done, self.place)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "read before the device has passed it"
        return end.moment - self.moment


def test_the_hosts_seconds_add_up() -> None:
    phases = PhaseTimer()
    for _ in range(2):
        with phases("sleep"):
            assert phases.current == "sleep"
            time.sleep(0.01)
    with phases("nothing"):
        pass
    assert phases.current == ""
    assert phases.read() == phases.seconds
    assert 0.02 <= phases.seconds["sleep"] < 2.0
    assert phases.seconds["nothing"] < 0.01


@pytest.mark.parametrize("timer", [PhaseTimer(), DevicePhaseTimer(Device().new_event)])
def test_after_an_error_the_phase_is_known(timer: PhaseTimer) -> None:
    with pytest.raises(MemoryError), timer("rasterize"):
        raise MemoryError
    assert timer.current == "rasterize"
    with timer.untimed("evaluation"):
        assert timer.current == "evaluation"
    assert timer.current == "" and "evaluation" not in timer.seconds


def test_a_devices_time_is_read_late_and_never_waited_for() -> None:
    device = Device()
    phases = DevicePhaseTimer(device.new_event)
    for number in range(100):
        for phase, milliseconds in (("project", 1.0), ("rasterize", 2.0)):
            with phases(phase):
                device.milliseconds += milliseconds
            device.milliseconds += 0.25  # between phases
        device.done = max(0, device.queued - 12)  # three steps behind
        assert sum(phases.seconds.values()) <= 3e-3 * (number + 1)
    assert device.waits == 0
    assert phases.seconds["rasterize"] == pytest.approx(2e-3 * 97, abs=2.1e-3)
    assert phases.read() == pytest.approx({"project": 0.1, "rasterize": 0.2})
    assert device.waits == 1
    assert len(device.events) < 24, "events are used again"
    assert phases.read() == pytest.approx({"project": 0.1, "rasterize": 0.2})
    assert device.waits == 1


@pytest.mark.gpu
def test_a_gpus_time_is_not_the_hosts() -> None:
    values = torch.zeros(1 << 26, device=make_launcher(DEVICE).device)
    values.add_(1.0)
    torch.cuda.synchronize()
    host, device = PhaseTimer(), DevicePhaseTimer()
    with device("add"), host("add"):
        for _ in range(50):
            values.add_(1.0)
    assert device.read()["add"] > 2 * host.seconds["add"]
    assert 1e-3 < device.read()["add"] < 1.0
