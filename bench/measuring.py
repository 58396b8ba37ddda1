# SPDX-License-Identifier: Apache-2.0
"""Repeated timings, peak memory, and a description of the machine that they were taken on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
import numpy as np
import psutil
import torch

from launch.machine import available_cores

ROOT = Path(__file__).resolve().parents[1]

BUSY_CORES = 0.1
"""With more cores than this busy for other programs during a measurement, its times are called disturbed."""

LONGEST_REPEATING_SECONDS = 1.0
"""Fast calls are repeated until this much time has passed, beyond the wanted number of repetitions."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of repeated measurements in seconds."""

    median: float
    least: float
    largest: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of at least one measurement."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def milliseconds(self) -> str:
        """Median and range, such as "12.3 (11.9-14.0)"."""
        median, least, largest = (_short(1e3 * value) for value in (self.median, self.least, self.largest))
        return f"{median} ({least}-{largest})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def repeat(call: Callable[[], Result], repeats: int) -> list[Result]:
    """Results of `repeats` calls, and of as many more as fit into LONGEST_REPEATING_SECONDS."""
    results: list[Result] = []
    start = time.perf_counter()
    while len(results) < repeats or time.perf_counter() - start < LONGEST_REPEATING_SECONDS:
        results.append(call())
    return results


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which `call` raises the process's resident memory at its peak; None where Linux's /proc is missing."""
    gc.collect()
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
        before = _status_bytes("VmHWM")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _return_free_memory() -> None:
    """Hand memory that malloc keeps for reuse back, so that it cannot hide a later peak (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Disturbance:
    """Cores that other programs keep busy, on average, between its making and `cores()`."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), _busy_seconds() - time.process_time())

    def cores(self) -> float:
        """The average so far; the load average of the system is slower and counts this process, too."""
        passed = time.perf_counter() - self._start[0]
        others = _busy_seconds() - time.process_time() - self._start[1]
        return max(0.0, others / passed) if passed > 0 else 0.0


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0))


def load_average() -> float:
    """Processes that wanted to run in the last minute, on average."""
    return os.getloadavg()[0]


def describe_machine() -> dict[str, Any]:
    """What a figure needs beside it: date, commit, processor, the target that numba compiles for, versions."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": available_cores(),
        "numba_target": numba_target(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


def numba_target() -> str:
    """The processor model that kernels are compiled for, and their widest vector extension."""
    name = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    if numba.config.CPU_FEATURES is not None:
        return f"{name} (its own extensions only)"
    extensions = llvmlite.binding.get_host_cpu_features()
    widest = next((each for each in ("avx512f", "avx2", "avx", "neon") if extensions.get(each)), "none known")
    return f"{name} ({widest})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Short hash of the checkout, with a + when files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
