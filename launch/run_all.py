# SPDX-License-Identifier: Apache-2.0
"""Scenes x methods x seeds: every run trained, rendered and measured, several at once, and one table at the end.

    python -m launch.run_all --protocol mipnerf360 tanks_and_temples deep_blending --data DATA -o OUT
    python -m launch.run_all --data DATA/fox DATA/garden -o OUT --methods 3dgs beta rad_splat --seeds 0 1 2
    python -m launch.run_all --data DATA/fox -o OUT --add small "--target_mb 20" -- --iterations 7000 --scale_schedules
    python -m launch.run_all --data DATA/fox -o OUT --add postrad "--prune_finetune --prune_method rad_splat"

What stands behind `--` goes to every train.py. Each run has a folder OUT/SCENE/METHOD-SEED with its train.log, and
started.json with what it was started with. A GPU has one run at a time; without GPUs, --jobs runs share the cores.
Stopped and started again, finished runs are not repeated, one that is trained is only measured, and one that was cut
off goes on from its newest checkpoint if it wrote any (-- --checkpoint_iterations). A folder of other flags or data is
refused. The results of all runs in OUT are in OUT/table.md, OUT/table.json and OUT/table.html, which are written anew
after every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from launch.children import POLL_SECONDS, Children
from launch.finetune import TRAINED_ITERATIONS
from launch.machine import available_cores
from launch.origin import Origin, check_origin
from launch.protocols import (
    METHODS,
    PROTOCOL_FLAGS,
    PROTOCOLS,
    USUAL_METHODS,
    BenchmarkScene,
    Method,
    methods_of,
    own_scenes,
    scenes_of,
)
from launch.run import run_main
from launch.run_results import (
    Result,
    finished_runs,
    is_measured,
    is_trained,
    read_result,
    result_of,
    run_folder,
)
from launch.run_table import write_tables
from launch.sweep import split_arguments
from scene.errors import InputError
from scene.model_folder import ModelFolder

ROOT = Path(__file__).resolve().parent.parent
CONSOLE = "console.log"


@dataclass(frozen=True)
class Suite:
    """What is run: scenes, methods, seeds, flags for all; where; on which GPUs, or how many at once on the CPU."""

    output: Path
    scenes: tuple[BenchmarkScene, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    flags: tuple[str, ...]
    post_iterations: int
    gpus: tuple[str, ...]
    jobs: int

    @property
    def runs(self) -> list[Run]:
        """Every run, seed by seed, so that a stopped suite has whole tables of the first seeds."""
        return [
            Run(self, scene, method, seed) for seed in self.seeds for scene in self.scenes for method in self.methods
        ]


@dataclass(frozen=True)
class Run:
    """One training of a suite."""

    suite: Suite
    scene: BenchmarkScene
    method: Method
    seed: int

    @property
    def folder(self) -> Path:
        """Its model folder."""
        return run_folder(self.suite.output, self.scene.name, self.method.name, self.seed)

    @property
    def base(self) -> Run | None:
        """The run whose model it starts from."""
        return Run(self.suite, self.scene, METHODS[self.method.base], self.seed) if self.method.base else None

    @property
    def flags(self) -> list[str]:
        """The flags of train.py that decide the result, but for the base's model; later ones win."""
        flags = [*self.scene.flags, *PROTOCOL_FLAGS.get((self.scene.protocol, self.method.name), ())]
        flags += self.suite.flags
        if self.method.base:
            last = TRAINED_ITERATIONS + self.suite.post_iterations
            flags += ["--no_scale_schedules", "--iterations", str(last)]
        return [*flags, *self.method.flags, "--seed", str(self.seed)]

    @property
    def origin(self) -> Origin:
        """What it is started with."""
        base = self.base
        return Origin(self.scene.source, tuple(self.flags), None if base is None else tuple(base.flags))

    def commands(self, threads: int) -> list[list[str]]:
        """The programs that finish it: a training that has ended is only measured, one that was cut off goes on."""
        python, model, share = sys.executable, str(self.folder), ["--threads", str(threads)]
        frames = [python, "-m", "launch.frame_rate", model, *share]
        if not is_trained(self.folder):
            return [self._training(share), frames]
        if is_measured(self.folder):
            return [frames]
        render, measure = ([python, str(ROOT / f"{name}.py"), "-m", model, *share] for name in ("render", "metrics"))
        report = [[python, "-m", "launch.report", model]] if self.origin.config().logging.report else []
        return [render, measure, *report, frames]

    def result(self) -> Result | None:
        """What came out, if it is finished. Raises: InputError when the folder holds a run with other flags."""
        notice = check_origin(self.folder, self.origin)
        if notice:
            print(notice, flush=True)
        return read_result(self.folder)

    def gather(self) -> Result:
        """What came out of a run that has just ended. Raises: InputError when a part is missing."""
        scene, name = self.scene, self.method.name
        return result_of(self.folder, scene, name, self.seed, origin=self.origin, common_flags=self.suite.flags)

    def _training(self, share: Sequence[str]) -> list[str]:
        """The call of train.py."""
        place = ["-s", str(self.scene.source), "-m", str(self.folder), *share]
        how = ["--quiet", "--render_and_evaluate", "--auto_start_checkpoint"]
        if self.base is not None:
            base = ModelFolder.open(self.base.folder)
            how += ["--start_pointcloud", str(base.point_cloud(base.find_iteration()))]
        return [sys.executable, str(ROOT / "train.py"), *place, *self.flags, *how]


@dataclass
class Schedule:
    """Deals runs out to places (GPUs, or shares of the cores), one at a time to each; a base comes before its user.

    A run that fails does not stop the others; those that start from it fail with it.
    """

    suite: Suite
    results: list[Result] = field(default_factory=list)
    failures: dict[Path, str] = field(default_factory=dict)
    _others: list[Result] = field(default_factory=list)
    _waiting: list[Run] = field(default_factory=list)
    _done: set[Path] = field(default_factory=set)
    _children: Children = field(default_factory=Children)
    _change: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        """Run everything that is not finished yet. Raises: InputError for a folder of other flags, before any run."""
        self._look_around()
        if self.results:
            print(f"{len(self.results)} runs are finished already", flush=True)
        self._write()
        places = self.suite.gpus or tuple("" for _ in range(self.suite.jobs))
        self._children.work(*(partial(self._work, place) for place in places))

    def _look_around(self) -> None:
        """Find out what is finished: runs of this suite, and others in its folder, which the table has, too."""
        runs = self.suite.runs
        for run in runs:
            result = run.result()
            if result is None:
                self._waiting.append(run)
            else:
                self.results.append(result)
                self._done.add(run.folder)
        own = {run.folder for run in runs}
        kept = finished_runs(self.suite.output)
        self._others = [result for folder, result in kept.items() if folder not in own]

    def _work(self, gpu: str) -> None:
        """Take one run after another on one GPU ("": on the CPU)."""
        while (run := self._next()) is not None:
            print(f"started   {run.folder}{f' on GPU {gpu}' if gpu else ''}", flush=True)
            try:
                failure = self._train(run, gpu)
                result = None if failure else run.gather()
            except (InputError, OSError) as error:
                failure, result = str(error), None
            with self._change:
                if result is not None:
                    self.results.append(result)
                    self._done.add(run.folder)
                    print(f"finished  {run.folder}: {result}", flush=True)
                elif not self._children.is_stopped:
                    self.failures[run.folder] = failure
                    print(f"failed    {run.folder}: {failure}", flush=True)
                self._write()
                self._change.notify_all()

    def _next(self) -> Run | None:
        """The next run whose base is there; waits for bases that are being trained. None when nothing is left."""
        with self._change:
            while self._waiting and not self._children.is_stopped:
                for run in list(self._waiting):
                    base = run.base.folder if run.base else None
                    if base in self.failures:
                        self._waiting.remove(run)
                        self.failures[run.folder] = f"{base}, which it starts from, failed"
                    elif base is None or base in self._done:
                        self._waiting.remove(run)
                        return run
                self._change.wait(POLL_SECONDS)
        return None

    def _train(self, run: Run, gpu: str) -> str:
        """Train, render, measure; returns what went wrong, "" if nothing."""
        threads = max(1, available_cores() // (len(self.suite.gpus) or self.suite.jobs))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}  # "" hides every GPU
        run.folder.mkdir(parents=True, exist_ok=True)
        run.origin.write(run.folder)
        for command in run.commands(threads):
            with (run.folder / CONSOLE).open("ab") as console:
                status = self._children.run(
                    command, stdout=console, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                )
            if status is None:
                return "stopped"
            if status != 0:
                return f"status {status}: {_last_paragraph(run.folder / CONSOLE)}"
        return ""

    def _write(self) -> None:
        failures = {str(path): why for path, why in self.failures.items()}
        write_tables(self.suite.output, [*self._others, *self.results], failures)


def _last_paragraph(console: Path) -> str:
    """The error at the end of what a run has printed."""
    text = console.read_text(encoding="utf-8", errors="replace").strip()
    start = text.rfind("error: ")
    return " ".join(text[start if start >= 0 else -300 :].split()) or "it printed nothing"


def parse(arguments: Sequence[str]) -> Suite:
    """The suite that a command line describes. Raises: InputError."""
    summary = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m launch.run_all", description=summary)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FOLDER",
                        help="data sets; with --protocol, the folder that holds the scenes")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all runs and the table")
    parser.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), nargs="+", default=(), help="benchmarks, with their flags"
    )
    parser.add_argument("--scenes", nargs="+", default=(), help="only these scenes of the benchmarks")
    parser.add_argument("--methods", nargs="+", default=USUAL_METHODS, metavar="NAME",
                        help=f"of {', '.join(METHODS)} [{' '.join(USUAL_METHODS)}]")  # fmt: skip
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("NAME", "FLAGS"),
                        help="one more method; with --prune_finetune it starts from 3dgs, as post")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="seeds; the table has means and spreads [0]")
    parser.add_argument("--post_iterations", type=int, default=5000,
                        help="length of what starts from 3dgs, behind its end [%(default)s]")  # fmt: skip
    parser.add_argument("--gpus", nargs="*", metavar="N", help="GPUs to use, one run each [all]; none: the CPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once on the CPU [%(default)s]")
    own, flags = split_arguments(arguments)
    values = parser.parse_args(own)
    if values.jobs < 1 or values.post_iterations < 1:
        raise InputError("--jobs and --post_iterations are 1 or more")
    if values.protocol:
        if len(values.data) != 1:
            raise InputError("with --protocol, --data is the one folder that holds the scenes")
        scenes = scenes_of(values.protocol, values.data[0], values.scenes)
    else:
        scenes = own_scenes(values.data)
    return Suite(
        output=values.output.absolute(),
        scenes=tuple(scenes),
        methods=tuple(methods_of(values.methods, values.add)),
        seeds=tuple(dict.fromkeys(values.seeds)),
        flags=tuple(flags),
        post_iterations=values.post_iterations,
        gpus=tuple(values.gpus) if values.gpus is not None else _all_gpus(),
        jobs=values.jobs,
    )


def _all_gpus() -> tuple[str, ...]:
    """Every GPU that this process may use, by the name that its children know it by."""
    import torch  # imported here: --help need not wait for it

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = chosen.split(",") if chosen else [str(number) for number in range(torch.cuda.device_count())]
    return tuple(name.strip() for name in names[: torch.cuda.device_count()])


def main(arguments: Sequence[str]) -> int:
    """Run a suite; the status is 1 when a run failed."""
    suite = parse(arguments)
    suite.output.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(suite)
    schedule.run()
    print((suite.output / "table.md").read_text(encoding="utf-8"), end="")
    print(f"Tables: {suite.output / 'table.md'}, table.json, table.html")
    return 1 if schedule.failures else 0


if __name__ == "__main__":
    run_main(main)
