# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: `python -m bench.train_profile --help`.

Reads the metrics.jsonl of a training, an existing one or one that train.py's own loop makes here, and says whether
any phase besides rasterization takes more than a quarter of the step. Seconds exclude evaluation and saving; what no
phase claims is listed as "between phases" and judged like a phase.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring import BUSY_CORES, ROOT, Disturbance, describe_machine, load_average
from bench.verdicts import Target, format_table, write_json
from distributed.communicator import Communicator
from launch.cli import parse_render, parse_train
from launch.late_steps import LateSteps
from launch.log_reader import RunLog, read_log
from launch.progress import TrainingProgress
from launch.recorder import Recorder
from launch.run import run_main
from launch.run_logs import open_logs
from launch.training import build_training
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.model_folder import ModelFolder
from scene.ply import load_ply
from train import main as train_main
from train import train_step

RASTERIZATION = ("rasterize", "rasterize backward")
BETWEEN = "between phases"
LARGEST_SHARE = 0.25
LOG_LINES = 10
"""Times that a training made here writes its phases down."""


@dataclass(frozen=True)
class Profile:
    """Seconds of each phase, and in all, of the images after `first` up to `last`."""

    first: int
    last: int
    seconds: Mapping[str, float]
    total: float

    def share(self, phase: str) -> float:
        """The part of the step that a phase takes, in [0, 1]."""
        return self.seconds[phase] / self.total

    def largest_other(self) -> tuple[str, float]:
        """The phase besides rasterization that takes most, and its share."""
        others = [phase for phase in self.seconds if phase not in RASTERIZATION]
        name = max(others, key=lambda phase: self.seconds[phase])
        return name, self.share(name)

    def target(self) -> Target:
        """The promise for this part of the training."""
        name, share = self.largest_other()
        text = f"images {self.first + 1:,}-{self.last:,}: largest phase besides rasterization ({name})"
        return Target(text, 100 * LARGEST_SHARE, 100 * share, "% of the step", at_least=False)


def profile_of(log: RunLog, after: int = 0) -> Profile:
    """The profile of the images after the first logged iteration that is not below `after`; 0: from the start.

    Raises:
        InputError: the log has too few phases.
    """
    clocks = {record["iteration"]: record["seconds"] for record in log.steps}
    marks = [record for record in log.phases if record["iteration"] in clocks]
    starts = [record for record in marks if record["iteration"] >= after] if after else []
    if not marks or (after and (not starts or starts[0] is marks[-1])):
        raise InputError(f"the log has no phases after image {after}; train longer, or with a smaller --log_interval.")
    end, start = marks[-1], starts[0] if after else None
    before: Mapping[str, float] = start["seconds"] if start else {}
    seconds = {phase: value - before.get(phase, 0.0) for phase, value in end["seconds"].items()}
    total = clocks[end["iteration"]] - (clocks[start["iteration"]] if start else 0.0)
    if total <= 0:
        raise InputError("the log's clock does not advance; the training was too short to be measured.")
    seconds[BETWEEN] = total - sum(seconds.values())
    return Profile(start["iteration"] if start else 0, end["iteration"], seconds, total)


def halves_of(log: RunLog, first: int = 0) -> tuple[Profile, Profile]:
    """The profile of a whole training whose first image is `first` + 1, and the one of its second half."""
    whole = profile_of(log)
    last = profile_of(log, first + (whole.last - first) // 2)
    return Profile(first, whole.last, whole.seconds, whole.total), last


def train_from_start(source: Path, folder: Path, iterations: int) -> None:
    """Train from the points of `source` exactly as train.py does."""
    interval = max(1, iterations // LOG_LINES)
    flags = ["--iterations", str(iterations), "--log_interval", str(interval), "--quiet", "--no_report"]
    status = train_main(["-s", str(source), "-m", str(folder), "--eval", *flags])
    if status:
        raise InputError(f"train.py ended with status {status}")


def train_from_model(model: Path, folder: Path, steps: int) -> int:
    """Take `steps` further steps from the newest model saved in `model`; returns the iteration they begin after.

    The moments of Adam and the mask logits start anew (a ply file does not hold them); the work is the same.
    """
    iteration = ModelFolder.open(model).find_iteration()
    source, stop = parse_render(["-m", str(model)]).model.source_path, iteration + steps
    never = str(stop + 1)
    flags = ["--iterations", never, "--log_interval", str(max(1, steps // LOG_LINES)), "--quiet"]
    flags += ["--test_iterations", never, "--save_iterations", never]
    config = parse_train(["-s", str(source), "-m", str(folder), "--eval", *flags])
    training = build_training(config, Communicator.from_environment(), show_progress=False)
    training.table = GaussianTable.from_arrays(load_ply(ModelFolder.open(model).point_cloud(iteration)))
    output = ModelFolder.create(folder)
    with (
        open_logs(output, config, training.communicator, append=False) as logs,
        TrainingProgress(steps, enabled=False) as progress,
    ):
        recorder, step = Recorder(training, output, logs, progress), iteration
        late = LateSteps(training, recorder)
        recorder.start()
        while step < stop:
            step = train_step(training, recorder, late, step)
        late.settle()
        recorder.end()
    return iteration


def print_profiles(profiles: Sequence[Profile]) -> None:
    """One table: milliseconds an image and the share of the step, of each part of the training."""
    head = ["phase"]
    for profile in profiles:
        head += [f"images {profile.first + 1:,}-{profile.last:,}: ms", "share"]
    phases = sorted(profiles[-1].seconds, key=lambda phase: -profiles[-1].seconds[phase])
    rows = []
    for phase in [*phases, "whole step"]:
        row = [phase + (" *" if phase in RASTERIZATION else "")]
        for profile in profiles:
            seconds = profile.total if phase == "whole step" else profile.seconds.get(phase, 0.0)
            milliseconds = 1e3 * seconds / (profile.last - profile.first)
            row += [f"{milliseconds:.2f}", f"{100 * seconds / profile.total:.1f} %"]
        rows.append(row)
    print(format_table(head, rows))
    print("* rasterization; compilation on first use is part of the whole training's times, not of its second half's")


def record_of(profile: Profile) -> dict[str, Any]:
    """A profile as JSON holds it."""
    return {"first": profile.first + 1, "last": profile.last, "seconds": dict(profile.seconds), "total": profile.total}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_profile",
        description="Time per phase of the training step, from an existing log or from a training made for it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--log", type=Path, help="metrics.jsonl of a training, or its folder")
    chosen.add_argument("-m", "--model", type=Path, help="go on from the newest model in this folder of train.py")
    data = ROOT.parent / "shared" / "data" / "tiny-fox"
    chosen.add_argument("-s", "--data", type=Path, default=data, help="train from this data set's points")
    parser.add_argument("--steps", type=int, default=1000, help="images to train on")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "train_profile.json")
    parser.add_argument("--strict", action="store_true", help="end with status 1 when the target is missed")
    return parser.parse_args(arguments)


def profiles_of(options: argparse.Namespace) -> tuple[Profile, Profile]:
    """Profiles of the log that is given or made."""
    if options.log is not None:
        return halves_of(read_log(options.log / "metrics.jsonl" if options.log.is_dir() else options.log))
    with tempfile.TemporaryDirectory(prefix="profile-") as name:
        folder, first = Path(name), 0
        if options.model is not None:
            first = train_from_model(options.model, folder, options.steps)
        else:
            train_from_start(options.data, folder, options.steps)
        return halves_of(read_log(ModelFolder(folder).metrics), first)


def main(arguments: Sequence[str]) -> int:
    """Profile, print, write; 1 with --strict when the target is missed."""
    options = parse(arguments)
    load, disturbance = load_average(), Disturbance()
    profiles = profiles_of(options)
    machine: dict[str, Any] = {}
    if options.log is None:  # an existing log may come from another machine
        machine = {**describe_machine(), "load_before": load, "others": disturbance.cores()}
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        if machine["others"] > BUSY_CORES:
            print(f"DISTURBED: other programs kept {machine['others']:.2f} cores busy; the times are high")
    print_profiles(profiles)
    targets = [profile.target() for profile in profiles]
    print("\n" + "\n".join(target.line() for target in targets))
    content = {"machine": machine, "profiles": [record_of(profile) for profile in profiles]}
    write_json(options.json, {**content, "targets": [target.record() for target in targets]})
    return 1 if options.strict and any(target.verdict != "MET" for target in targets) else 0


if __name__ == "__main__":
    run_main(main)
