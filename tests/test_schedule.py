# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.schedule import Schedule, Window

bounds = st.integers(0, 60)


@given(st.integers(1, 70), st.integers(1, 40), bounds, bounds, st.integers(1, 25))
def test_event_is_the_last_scheduled_iteration_within_the_window(
    first: int, size: int, start: int, stop: int, every: int
) -> None:
    images = range(first, first + size)
    scheduled = [image for image in images if start <= image <= stop and image % every == 0]
    schedule, window = Schedule(start, stop, every), Window(first, size)
    assert schedule.event(window) == (scheduled[-1] if scheduled else None)
    assert schedule.fires(window) == bool(scheduled)
    assert schedule.is_active(window) == (start <= first <= stop)


@given(st.integers(1, 16), st.integers(16, 100))
def test_every_multiple_fires_in_exactly_one_batch(size: int, every: int) -> None:
    schedule = Schedule(0, 1000, every)
    windows = [Window(first, size) for first in range(1, 1001, size)]
    events = [event for window in windows if (event := schedule.event(window)) is not None]
    assert events == list(range(every, 1001, every))


def test_densification_iterations_are_those_of_3dgs() -> None:
    schedule = Schedule(500 + 1, 15_000 - 1, 100)
    events = [first for first in range(1, 30_001) if schedule.fires(Window(first, 1))]
    assert events == [it for it in range(1, 30_001) if it > 500 and it % 100 == 0 and it < 15_000]
    assert len(events) == 144


def test_empty_schedule_never_fires() -> None:
    assert not any(Schedule(10, 9, 1).fires(Window(first, 5)) for first in range(1, 30))


def test_invalid_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="every=0"):
        Schedule(0, 10, 0)
    with pytest.raises(ValueError, match="iteration 1"):
        Window(0, 1)
    with pytest.raises(ValueError, match="1 image"):
        Window(1, 0)


def test_window_knows_its_last_image() -> None:
    assert Window(5, 4).last == 8
