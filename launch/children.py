# SPDX-License-Identifier: Apache-2.0
"""Programs that this one starts and waits for. However it ends, none of them is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from launch.run import EXIT_TERMINATED

POLL_SECONDS = 0.2


class Children:
    """The programs that the tasks of one `work` run. Nothing starts any more once they have been stopped."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.is_stopped = False

    def work(self, *tasks: Callable[[], None]) -> None:
        """Run tasks in a thread each until all are done. Only the main thread of a program may call it.

        A task that fails, Ctrl-C and SIGTERM end the programs that are running, and then this one. Programs are started
        in other threads than the one that signals interrupt, so that none is lost between its start and its entry here.
        Raises: what a task raised; SystemExit after SIGTERM.
        """
        with _exit_on_sigterm(), ThreadPoolExecutor(len(tasks), thread_name_prefix="work") as pool:
            try:
                working = {pool.submit(task) for task in tasks}
                while working:
                    ended, working = wait(working, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                    for task in ended:
                        task.result()
            finally:
                self._stop()

    def run(self, command: Sequence[str], **how: Any) -> int | None:
        """Start a program, as subprocess.Popen does, and wait for it: its status, or None when nothing may start."""
        with self._lock:
            if self.is_stopped:
                return None
            process = subprocess.Popen(command, **how)
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def _stop(self) -> None:
        with self._lock:
            self.is_stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception, which leaves by every `finally`, while the block runs."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
