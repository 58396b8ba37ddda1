# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM in a training: the step under way is finished, and what was trained is kept in a checkpoint.

One process only: the ranks of several would be in different steps, and end as their launcher ends them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distributed.communicator import Communicator
from launch.late_steps import LateSteps
from launch.recorder import Recorder
from launch.run import EXIT_TERMINATED
from launch.training import Training

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether a signal has asked the training to end, and which. A second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is remembered."""
        if self.signal is not None:
            self.end()
        self.signal = number
        print("\nfinishing this step and saving a checkpoint; once more ends at once", file=sys.stderr)

    def end(self) -> None:
        """End as the signal would have. Raises: KeyboardInterrupt or SystemExit."""
        if self.signal == signal.SIGTERM:
            sys.exit(EXIT_TERMINATED)
        raise KeyboardInterrupt


@contextmanager
def noticed_interruption(ranks: Communicator) -> Iterator[Interruption]:
    """A block in which signals are noted in what it gets, for one process in its main thread."""
    found = Interruption()
    if ranks.size > 1 or threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, found.note) for number in SIGNALS}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_and_end(training: Training, recorder: Recorder, late: LateSteps, step: int, found: Interruption) -> None:
    """Save what the steps before `step` have left, say how to go on, and end. Raises: as `Interruption.end`."""
    again = late.settle()
    step = step if again is None else again
    if step > training.first_step:
        path = recorder.save_checkpoint(step - 1)
        done, iterations = training.window(step - 1).last, training.config.optimization.iterations
        print(
            f"interrupted behind image {done} of {iterations}; all of it is in {path}: the same command with "
            "--auto_start_checkpoint goes on there"
        )
    found.end()
