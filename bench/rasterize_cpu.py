# SPDX-License-Identifier: Apache-2.0
"""The cpu body against pure-torch compositing, in one process: `python -m bench.rasterize_cpu --help`.

The peer is masksplat's reference body, as well vectorised as torch allows: it makes only the (splat, tile) instances
whose ellipse meets the tile, sorts once, batches tiles with lists of like length so that an op's operands stay in the
cache, computes separable exponents, sums by matrix products, and stops when a batch's pixels have ended. It goes back
in two ways: one recomputes each batch (recomputed), one lets autograd keep everything (one graph). The faster one
counts. Both sides use the same number of threads, the same inputs, warm-ups and repetitions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba

from bench.contenders import ChainTimes, Contender, Difference, Measurement, contenders, difference, measure
from bench.exact_pairs import PairCount, count_view
from bench.measuring import BUSY_CORES, ROOT, Spread, describe_machine, load_average
from bench.raster_inputs import RasterInput, model_input, random_input, train_model
from bench.verdicts import Target, format_table, write_json
from launch.run import run_main
from scene.errors import InputError

RESULTS = ROOT / "bench" / "results"
DEFAULT_MODEL = RESULTS / "tiny-fox-2000"
DEFAULT_DATA = ROOT.parent / "shared" / "data" / "tiny-fox"

SPEED_UP = 50.0
FORWARD_RATE = 400.0
BOTH_RATE = 100.0
"""Targets: times faster than torch forward + backward; millions of evaluated pairs a second on two AVX2 cores."""


@dataclass(frozen=True)
class Comparison:
    """Everything measured on one input; the first measurement is the cpu body's, the others are its peers'."""

    case: RasterInput
    measured: tuple[Measurement, ...]
    pairs: PairCount
    light_gap: float  # largest difference of the cpu body's transmittance to the exact count's
    differences: tuple[Difference, ...]

    @property
    def ours(self) -> Measurement:
        """The cpu body."""
        return self.measured[0]

    @property
    def peer(self) -> Measurement:
        """The peer that is faster forward + backward."""
        return min(self.measured[1:], key=lambda each: each.compositing.median)

    def speed_up(self, stage: str) -> float:
        """How many times faster than the peer: "forward", "compositing" or "chain"; medians."""
        return float(getattr(self.peer, stage).median / getattr(self.ours, stage).median)

    def rate(self, stage: str, num_pairs: int) -> float:
        """Millions of pairs a second of the cpu body, counting each pair once."""
        return float(num_pairs / getattr(self.ours, stage).median / 1e6)

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs took part of the cores while one side was measured."""
        return any(each.others > BUSY_CORES for each in self.measured)

    @property
    def bodies_agree(self) -> bool:
        """Whether both sides computed the same picture and gradients, and the exact count the same light."""
        return self.light_gap < 0.02 and all(each.is_small() for each in self.differences)


def compare(case: RasterInput, sides: Sequence[Contender], repeats: int) -> Comparison:
    """Measure every side on one input and check that they agree."""
    measured = []
    for side in sides:
        print(f"{case.name}: {side.name} ... ", end="", file=sys.stderr, flush=True)
        measured.append(measure(side, case, repeats))
        print(f"{measured[-1].chain.milliseconds()} ms", file=sys.stderr, flush=True)
    ours = measured[0].result
    total, gap = PairCount(0, 0, 0, 0), 0.0
    for view, size in enumerate(case.views.sizes):
        counted, light = count_view(ours.splats, view, size)
        total, gap = total.plus(counted), max(gap, float((light - ours.lights[view]).abs().max()))
    differences = tuple(difference(measured[0], peer) for peer in measured[1:])
    return Comparison(case, tuple(measured), total, gap, differences)


def targets_of(comparison: Comparison) -> list[Target]:
    """The promised numbers for one input."""
    name, num_pairs = comparison.case.name, comparison.ours.result.num_pairs
    rate = comparison.rate
    return [
        Target(f"{name}: forward + backward against torch", SPEED_UP, comparison.speed_up("compositing"), "x"),
        Target(f"{name}: pairs/s forward", FORWARD_RATE, rate("forward", num_pairs), "M/s"),
        Target(f"{name}: pairs/s forward + backward", BOTH_RATE, rate("compositing", num_pairs), "M/s"),
    ]


def print_comparison(comparison: Comparison) -> None:
    """The tables of one input."""
    case, pairs, ours = comparison.case, comparison.pairs, comparison.ours
    footprint = pairs.footprint / max(1, pairs.num_splats)
    print(f"\n{case.name}: {len(case.gaussians):,} Gaussians, {pairs.num_splats:,} splats, {footprint:.1f} pixels each")
    head = (
        "milliseconds: median (range)",
        *ChainTimes._fields,
        "fwd + bwd",
        "whole chain",
        "first",
        "peak MB",
        "others",
    )
    rows = [_time_row(each) for each in comparison.measured]
    print(format_table([cell.replace("_", " ") for cell in head], rows))
    evaluated, contributing = ours.result.num_pairs, pairs.contributing
    print(
        f"pairs forward: {evaluated / 1e6:.2f} M evaluated (vector lanes), {contributing / 1e6:.2f} M contribute, "
        f"{pairs.unsampled / 1e6:.2f} M more with mask 0 (backward only); torch evaluates "
        f"{comparison.peer.result.num_pairs / 1e6:.2f} M"
    )
    print(
        f"evaluated M pairs/s: {comparison.rate('forward', evaluated):.0f} forward, "
        f"{comparison.rate('compositing', evaluated):.0f} forward + backward; contributing M pairs/s: "
        f"{comparison.rate('forward', contributing):.0f} and {comparison.rate('compositing', contributing):.0f}"
    )
    print(
        f"times faster than '{comparison.peer.contender}': forward {comparison.speed_up('forward'):.1f}, forward + "
        f"backward {comparison.speed_up('compositing'):.1f}, whole chain {comparison.speed_up('chain'):.1f}"
    )
    for each in comparison.differences:
        print(
            f"difference to '{each.contender}': colours at most {each.image:.1e}, mean {each.image_mean:.1e}; "
            f"gradients {each.gradient:.1e} (relative)"
        )
    print(f"light against the exact count: at most {comparison.light_gap:.1e}")
    if comparison.is_disturbed:
        print("DISTURBED: other programs took part of the cores (column others); these times prove nothing")
    print("the bodies agree" if comparison.bodies_agree else "THE BODIES DISAGREE: the times mean nothing")


def _time_row(measured: Measurement) -> list[str]:
    spreads = [*measured.stages, measured.compositing, measured.chain]
    memory = "-" if measured.extra_memory is None else f"{measured.extra_memory / 1e6:.0f}"
    times = [spread.milliseconds() for spread in spreads]
    return [measured.contender, *times, f"{1e3 * measured.first_call:.0f}", memory, f"{measured.others:.2f}"]


def record_of(comparison: Comparison) -> dict[str, Any]:
    """One input as JSON holds it; seconds, bytes, and pairs."""
    case = comparison.case
    return {
        "name": case.name,
        "num_gaussians": len(case.gaussians),
        "sizes": [list(size) for size in case.views.sizes],
        "pairs": {
            "evaluated": comparison.ours.result.num_pairs,
            "evaluated_by_peer": comparison.peer.result.num_pairs,
            **comparison.pairs._asdict(),
        },
        "measured": [_measurement_record(each) for each in comparison.measured],
        "peer": comparison.peer.contender,
        "speed_up": {stage: comparison.speed_up(stage) for stage in ("forward", "compositing", "chain")},
        "differences": [asdict(each) for each in comparison.differences],
        "light_gap": comparison.light_gap,
        "bodies_agree": comparison.bodies_agree,
        "is_disturbed": comparison.is_disturbed,
    }


def _measurement_record(measured: Measurement) -> dict[str, Any]:
    stages: dict[str, Spread] = dict(zip(ChainTimes._fields, measured.stages, strict=True))
    return {
        "contender": measured.contender,
        "first_call": measured.first_call,
        "seconds": {name: asdict(spread) for name, spread in stages.items()},
        "compositing": asdict(measured.compositing),
        "chain": asdict(measured.chain),
        "extra_memory": measured.extra_memory,
        "others": measured.others,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rasterize_cpu",
        description="The cpu body against pure-torch compositing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-m", "--model", type=Path, help="a folder of train.py; else one is trained, 2000 images")
    parser.add_argument("-s", "--data", type=Path, default=DEFAULT_DATA, help="the data set to train that model on")
    parser.add_argument("--views", type=int, default=2, help="test views of the model that are drawn")
    parser.add_argument("--random", type=int, default=100_000, help="random Gaussians")
    parser.add_argument("--size", type=int, nargs=2, default=(400, 300), help="width and height of the random image")
    parser.add_argument("--only", choices=("model", "random"), help="measure one input only")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, more where they take less than a second")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--cpu", help="compile for this processor only, e.g. haswell: AVX2 without AVX-512")
    parser.add_argument("--cold", action="store_true", help="compile anew, so that `first` shows the time it takes")
    parser.add_argument("--json", type=Path, default=RESULTS / "rasterize_cpu.json", help="where the numbers go")
    parser.add_argument("--strict", action="store_true", help="end with status 1 when a target is missed")
    return parser.parse_args(arguments)


def inputs_of(options: argparse.Namespace) -> list[RasterInput]:
    """The inputs that can be measured here; says so when the model cannot. Raises: InputError for a wrong --model."""
    cases = []
    if options.only != "random" and (options.model is not None or options.data.is_dir() or DEFAULT_MODEL.is_dir()):
        if options.model is None:
            train_model(options.data, DEFAULT_MODEL)
        cases.append(model_input(options.model or DEFAULT_MODEL, options.views))
    elif options.only != "random":
        print(f"no trained model is measured: there is no data set {options.data} (give -s FOLDER or -m MODEL)")
    if options.only != "model":
        cases.append(random_input(options.random, tuple(options.size)))
    if not cases:
        raise InputError("there is nothing to measure: give a data set with -s, a model with -m, or leave --only away.")
    return cases


def in_fresh_process(arguments: Sequence[str], options: argparse.Namespace) -> int:
    """Run the same command where numba compiles as asked: it reads these settings when it is imported."""
    with tempfile.TemporaryDirectory(prefix="numba-") as cache:
        environment = dict(os.environ)
        if options.cpu:
            # Without the second setting LLVM would still use every extension of this machine.
            environment.update(NUMBA_CPU_NAME=options.cpu, NUMBA_CPU_FEATURES="")
        if options.cold:
            environment["NUMBA_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "bench.rasterize_cpu", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 1 when the bodies disagree, or with --strict when a target is not met."""
    options = parse(arguments)
    if (options.cpu and options.cpu != numba.config.CPU_NAME) or (options.cold and not numba.config.CACHE_DIR):
        return in_fresh_process(arguments, options)
    machine = {**describe_machine(), "threads": options.threads, "load_before": load_average()}
    comparisons = [compare(case, contenders(options.threads), options.repeats) for case in inputs_of(options)]
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for comparison in comparisons:
        print_comparison(comparison)
    targets = [target for comparison in comparisons for target in targets_of(comparison)]
    print("\n" + "\n".join(target.line() for target in targets))
    inputs, verdicts = [record_of(each) for each in comparisons], [target.record() for target in targets]
    write_json(options.json, {"machine": machine, "inputs": inputs, "targets": verdicts})
    agree = all(each.bodies_agree for each in comparisons)
    missed = options.strict and any(target.verdict != "MET" for target in targets)
    return 1 if missed or not agree else 0


if __name__ == "__main__":
    run_main(main)
