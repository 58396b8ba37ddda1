# SPDX-License-Identifier: Apache-2.0
"""Plain threads for kernels that release the GIL.

numba's own thread layers may neither be forked nor entered from two threads at once; kernels here are serial
functions of (task, num_tasks, ...) and this team runs the tasks. Results never depend on the number of threads,
because no two tasks write the same element and every sum has a fixed order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ThreadTeam:
    """Runs kernel tasks on `num_threads` threads, the calling one included."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; at least 1 is needed")
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, "masksplat") if num_threads > 1 else None

    def run(self, kernel: Callable[..., None], num_tasks: int, *args: Any) -> None:
        """Call kernel(task, num_tasks, *args) for every task; tasks are handed out as threads become free."""
        tasks = iter(range(num_tasks))
        if self._pool is None or num_tasks == 1:
            _drain(kernel, tasks, num_tasks, args)
            return
        helpers = min(self.num_threads, num_tasks) - 1
        futures = [self._pool.submit(_drain, kernel, tasks, num_tasks, args) for _ in itertools.repeat(None, helpers)]
        try:
            _drain(kernel, tasks, num_tasks, args)
        finally:
            for future in futures:
                future.result()


def _drain(kernel: Callable[..., None], tasks: Iterator[int], num_tasks: int, args: tuple[Any, ...]) -> None:
    for task in tasks:  # next() of a range iterator is atomic under the GIL
        kernel(task, num_tasks, *args)
