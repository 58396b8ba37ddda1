# SPDX-License-Identifier: Apache-2.0
"""Steps that the device may still be working on: their numbers are read late, so that the host never waits for it.

On a GPU the loop queues a few steps ahead. A step in which a buffer of the body was too small, and every step queued
behind it, changes nothing; it is found when its numbers arrive, the buffer grows, and the loop goes back to it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distributed.exchange import ExchangeRecord
from distributed.totals import StepNumbers, StepTotals
from distributed.transfer import Fetched
from gaussian_renderer.step import StepResult
from launch.bodies import OverflowWatch, overflow_watch, room_of_windows
from launch.recorder import Recorder, Seen
from launch.training import Training
from scene.errors import InputError
from strategies.base import LateNumber, Numbers
from strategies.schedule import Window


@dataclass(frozen=True, eq=False)
class _Pending:
    """A step that was queued. fetched: the totals, and the late numbers' sources that are not among them."""

    step: int
    window: Window
    exchanged: ExchangeRecord
    totals: StepTotals
    learned: Numbers
    fetched: Fetched


class LateSteps:
    """The steps whose numbers nobody has read yet, in their order."""

    def __init__(self, training: Training, recorder: Recorder) -> None:
        self._training = training
        self._recorder = recorder
        self._watch = overflow_watch(training.body)
        self._room = room_of_windows(training.body, training.communicator)
        self._pending: deque[_Pending] = deque()
        self._free: list[Fetched] = []  # have been read

    def make_way(self, window: Window) -> int | None:
        """Get ready for a step: one that looks at the table waits for all before it, and is complete when it returns.

        Returns: the step to go back to when a buffer was too small.
        """
        if self._watch is None:
            return None
        looks = self._training.strategy.looks_at_rows(window)
        again = self.settle() if looks else None
        self._watch.defers = not looks or again is not None
        return again

    def add(self, step: int, window: Window, result: StepResult, learned: Numbers) -> None:
        """A step was queued; its numbers start on their way to the host."""
        sources = [result.totals.values, *_other_sources(learned, result.totals)]
        fetched = Fetched.start(sources, over=self._free.pop() if self._free else None)
        self._pending.append(_Pending(step, window, result.exchanged, result.totals, learned, fetched))

    def keep_up(self) -> int | None:
        """Read the steps that are too far behind; the step to go back to when a buffer was too small."""
        return self._read(self._training.steps_ahead)

    def settle(self) -> int | None:
        """Read all steps: the table is what they left. The step to go back to when a buffer was too small."""
        return self._read(0)

    def _read(self, leave: int) -> int | None:
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            values, *others = pending.fetched.wait()
            numbers = pending.totals.numbers(values)
            if numbers.has_overflow and self._watch is not None:
                return self._go_back(pending.step, self._watch)
            if self._room is not None and self._room.provide(numbers.needed) and self._training.graphs is not None:
                self._training.graphs.forget()  # they have the smaller windows
            self._finish(pending, numbers, others)
            self._free.append(pending.fetched)
        return None

    def _go_back(self, step: int, watch: OverflowWatch) -> int:
        """Make room, and forget the steps from `step` on, which have changed nothing."""
        self._training.table.rewind(1 + len(self._pending))
        if self._training.graphs is not None:
            self._training.graphs.forget()
        self._pending.clear()
        with self._training.phases.untimed("larger buffers"):
            watch.recover()  # host sync
        return step

    def _finish(self, pending: _Pending, numbers: StepNumbers, others: Sequence[Tensor]) -> None:
        """Learn costs, check the loss, write the logs."""
        training = self._training
        training.pixels.observe(pending.step, numbers)
        learned = _known(pending, numbers, others)
        loss = numbers.image_loss(training.config.optimization.lambda_dssim) + learned.get("mask_loss", 0.0)
        require_finite(loss, pending.window)
        self._recorder.after_update(pending.window, Seen(pending.step, numbers, pending.exchanged, learned, loss))


def _other_sources(learned: Numbers, totals: StepTotals) -> list[Tensor]:
    """What late numbers are made from and `totals` do not bring: how many masks are 1 is in there."""
    late = [number.source for number in learned.values() if isinstance(number, LateNumber)]
    return [source for source in late if source is not totals.num_drawn]


def _known(pending: _Pending, numbers: StepNumbers, others: Sequence[Tensor]) -> dict[str, float]:
    """Every number as a float; `others` has what `_other_sources` held."""
    arrived, learned = iter(others), {}
    for name, number in pending.learned.items():
        if isinstance(number, LateNumber):
            is_total = number.source is pending.totals.num_drawn
            learned[name] = number.formula(float(numbers.num_drawn if is_total else next(arrived)))
        else:
            learned[name] = number
    return learned


def require_finite(loss: float, window: Window) -> None:
    """Raises: InputError when the loss is not a number any more."""
    if not math.isfinite(loss):
        raise InputError(
            f"the training has diverged: the loss of iteration {window.first} is {loss}. Lower the learning rates "
            "(--feature_lr, --opacity_lr, --scaling_lr, --rotation_lr, --position_lr_init), or look for wrong photos "
            "or poses; what was saved before is as it was"
        )
