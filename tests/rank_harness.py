# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks that talk over gloo, and returns or raises what it returned or raised.

The ranks are forked from a clean server that has imported torch and numba and has run neither (a forked process must
not inherit their threads), so after the first job (seconds) a job of four ranks costs about 0.2 s. Ranks meet in a
file: no port is opened.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch.distributed", "numba", "scipy.optimize", "pytest", "hypothesis"]
STEP_SECONDS = 20.0


class RankFailure(AssertionError):
    """A rank raised; the message holds every failed rank's traceback."""


def run_ranks(
    check: Callable[..., Any], size: int, *values: Any, seconds: float = 60.0, device_type: str = "cpu"
) -> list[Any]:
    """What `check(communicator, *values)` returns on each of `size` ranks. `check` is a function of a test module.

    device_type: "cuda" gives each rank a GPU and nccl beside gloo.

    Raises: RankFailure when any rank raised, died or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[BaseProcess, Connection]] = []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank,
                args=(check, Path(folder) / "store", rank, size, values, theirs, device_type),
                daemon=True,
            )
            process.start()
            theirs.close()
            jobs.append((process, mine))
        answers = [_answer(rank, process, pipe, seconds) for rank, (process, pipe) in enumerate(jobs)]
        for process, pipe in jobs:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
    failures = [text for failed, text in answers if failed]
    if failures:
        raise RankFailure("\n".join(failures))
    return [value for _, value in answers]


def _answer(rank: int, process: BaseProcess, pipe: Connection, seconds: float) -> tuple[bool, Any]:
    """(whether it failed, its value or what happened)."""
    if not pipe.poll(seconds):
        return True, f"rank {rank} did not end within {seconds} s"
    try:
        return pipe.recv()
    except EOFError:
        process.join(5)
        return True, f"rank {rank} died with exit code {process.exitcode}"


def _run_rank(
    check: Callable[..., Any],
    store: Path,
    rank: int,
    size: int,
    values: tuple[Any, ...],
    pipe: Connection,
    device_type: str,
) -> None:
    """The body of one process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from distributed.communicator import Communicator

    torch.set_num_threads(1)
    try:
        communicator = Communicator.from_file(store, rank, size, device_type=device_type, step_seconds=STEP_SECONDS)
        pipe.send((False, check(communicator, *values)))
        communicator.close()
    except BaseException:
        pipe.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
        raise
