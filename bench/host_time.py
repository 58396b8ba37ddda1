# SPDX-License-Identifier: Apache-2.0
"""What the host does in a training step, part by part: `python -m bench.host_time -s DATA --bsz 4`.

A training by train.py's own loop, with a stopwatch around some of its calls. On a GPU these times are what the host
takes to queue work, as long as it does not wait: it waits in "late numbers: read" when the GPU is four steps behind,
and in density control. Parts lie within one another: "train_step" holds all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import train
from bench.measuring import ROOT
from bench.verdicts import format_table
from launch import step_graphs
from launch.late_steps import LateSteps
from launch.run import run_main
from launch.training import Training
from scene.gaussians import GaussianTable
from strategies.base import CombinedStrategy
from strategies.density import DensityControl

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("train_step", train, "train_step"),
    ("photos and cameras", Training, "batch"),
    ("masks: sample", CombinedStrategy, "sample"),
    ("masks, draw, update", train, "compute_step"),
    ("of it: launches", step_graphs, "draw_and_update"),
    ("masks: update", CombinedStrategy, "after_backward"),
    ("late numbers: start", LateSteps, "add"),
    ("late numbers: read", LateSteps, "keep_up"),
    ("densification event", DensityControl, "_densify"),
    ("edit of the table", GaussianTable, "apply"),
)
"""Name, owner and attribute of what is timed."""


@contextmanager
def stopwatches() -> Iterator[dict[str, list[float]]]:
    """A block in which every call of PARTS is timed: seconds of each call, by name."""
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in PARTS}
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(patch.object(owner, attribute, _timed(getattr(owner, attribute), seconds[name])))
        yield seconds


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **named)
        seconds.append(time.perf_counter() - start)
        return result

    return timed


def rows_of(seconds: dict[str, list[float]]) -> list[list[str]]:
    """Calls, median, ninth decile and sum of each part that was called."""
    rows = []
    for name, values in seconds.items():
        if values:
            ordered = sorted(values)
            numbers = (statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))])
            rows.append([name, str(len(values)), *(f"{1e3 * each:.3f}" for each in numbers), f"{sum(values):.2f}"])
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("-s", "--data", type=Path, default=ROOT.parent / "shared" / "data" / "tiny-fox")
    parser.add_argument("--iterations", type=int, default=1500, help="images to train on")
    parser.add_argument("--bsz", type=int, default=1, help="views of a step")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Train, and print what the host's time went into."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="host-time-") as folder, stopwatches() as seconds:
        flags = ["--iterations", str(options.iterations), "--bsz", str(options.bsz), "--quiet", "--no_report"]
        status = train.main(["-s", str(options.data), "-m", folder, "--eval", "--test_iterations", "-1", *flags])
    print(format_table(["part", "calls", "median ms", "9th decile ms", "sum s"], rows_of(seconds)))
    return status


if __name__ == "__main__":
    run_main(main)
