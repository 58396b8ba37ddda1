# SPDX-License-Identifier: Apache-2.0
"""Quality against the share of Gaussians that is pruned, as Figure 1 of LP-3DGS's paper, for the price of one training.

    python -m launch.sweep -s DATA -o OUT --score rad_splat -- --eval --iterations 7000 --scale_schedules

Everything behind `--` goes to train.py. One training runs to the start of the mask window and leaves a checkpoint; from
there one end is trained for each ratio, one with the learned mask, and one without pruning. The results are in
OUT/sweep.json, OUT/sweep.md and OUT/sweep.png. Ends that are finished are not trained again, so that further ratios
cost no more than themselves; ends of another score, other data or other flags are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.children import Children
from launch.cli import parse_train
from launch.config import TrainConfig
from launch.origin import Origin, check_origin
from launch.prune_checks import SCORES
from launch.run import run_main
from scene.errors import InputError
from scene.model_folder import ModelFolder, write_json_atomically

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98)
"""The ratios of LP-3DGS's scripts."""

LEARNED, UNPRUNED = "learned", "unpruned"
MEASURES = ("PSNR", "SSIM", "LPIPS")


@dataclass(frozen=True)
class Sweep:
    """What is swept: data, folder for everything, score, ratios, and the flags of train.py."""

    source: Path
    output: Path
    score: str
    ratios: tuple[float, ...]
    flags: tuple[str, ...]

    def config(self, *flags: str) -> TrainConfig:
        """The training that these further flags make of it. Raises: InputError as train.py."""
        return parse_train([*self._common, "-m", str(self.output), *flags])

    def origin(self, training: Training) -> Origin:
        """What one of its trainings is started with."""
        return Origin(self.source.absolute(), (*self.flags, *training.flags))

    def command(self, training: Training) -> list[str]:
        """The call of train.py for one of its trainings."""
        model = ["-m", str(self.output / training.name)]
        return [sys.executable, str(ROOT / "train.py"), *self._common, *model, *training.flags, *training.other_flags]

    @property
    def _common(self) -> list[str]:
        return ["-s", str(self.source), *self.flags]


@dataclass(frozen=True)
class Training:
    """One training of a sweep: its name, the flags that decide it, others, and the file or folder that it ends with."""

    name: str
    flags: tuple[str, ...]
    marker: Path
    other_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """One end: its name, the share of Gaussians that is gone (compared with the unpruned end), and its measures."""

    name: str
    ratio: float
    num_gaussians: int
    measures: dict[str, float]


def run_sweep(sweep: Sweep) -> list[Point]:
    """Train what is not trained yet and measure everything; the points in the order of the ratios, learned one last.

    Raises: InputError when flags do not fit, a folder holds another training, one fails, or there are no test views.
    """
    config = sweep.config(*_learning(sweep))
    base, *ends = trainings_of(sweep, fork_iteration(config))
    for training in (base, *ends):
        notice = check_origin(sweep.output / training.name, sweep.origin(training))
        if notice:
            print(f"sweep: {notice}", flush=True)
    _train_missing(sweep, (base, *ends))
    last = config.optimization.iterations
    found = {end.name: _measured(sweep.output / end.name, last) for end in ends}
    whole = found[UNPRUNED][0]
    names = [*(f"{ratio:g}" for ratio in sorted(sweep.ratios)), LEARNED]
    return [Point(name, 1 - found[name][0] / whole, *found[name]) for name in names]


def trainings_of(sweep: Sweep, fork: int) -> list[Training]:
    """The training to the fork, and the ends that begin there: unpruned, with the learned mask, and of each ratio."""
    checkpoint = sweep.output / "base" / "checkpoints" / str(fork)
    start = ("--start_checkpoint", str(checkpoint), "--checkpoint_iterations", "--render_and_evaluate")
    ends = {UNPRUNED: ("--prune_method", "3dgs"), LEARNED: _learning(sweep)}
    for ratio in sweep.ratios:
        ends[f"{ratio:g}"] = ("--prune_method", sweep.score, "--prune_percent", f"{ratio:g}")
    base = Training("base", ("--prune_method", "3dgs", "--stop_after", str(fork)), checkpoint)
    return [
        base,
        *(Training(name, flags, sweep.output / name / "results.json", start) for name, flags in ends.items()),
    ]


def _learning(sweep: Sweep) -> tuple[str, ...]:
    return ("--prune_method", sweep.score, "--use_importance_mask")


def fork_iteration(config: TrainConfig) -> int:
    """Where all ends begin: before the learned mask's window and before the first percent prune, at a whole step."""
    size, prune = config.optimization.bsz, config.prune
    first = min(*prune.prune_iterations, *(each - 1 for each in prune.prune_use_percent_iterations))
    fork = first // size * size
    if fork < 1:
        raise InputError(
            f"the sweep forks before the first prune and mask window, which begin at {first}: give later "
            "--prune_iterations and --prune_use_percent_iterations"
        )
    return fork


def _train_missing(sweep: Sweep, trainings: Sequence[Training]) -> None:
    """Train, one after another, what has not ended yet. Raises: InputError when a training fails."""
    children = Children()

    def train() -> None:
        for training in trainings:
            if not training.marker.exists():
                _train(sweep, training, children)

    children.work(train)


def _train(sweep: Sweep, training: Training, children: Children) -> None:
    """One training. Raises: InputError when it fails, or leaves nothing."""
    print(f"sweep: training {training.name}", flush=True)
    folder = ModelFolder.create(sweep.output / training.name).path
    sweep.origin(training).write(folder)
    status = children.run(sweep.command(training))
    if status != 0 or not training.marker.exists():
        log = ModelFolder(folder).train_log
        where = f"its log is {log}" if log.exists() else "what it said stands above"
        raise InputError(f"the training of {folder} ended with status {status}; {where}")


def _measured(model: Path, iteration: int) -> tuple[int, dict[str, float]]:
    """The number of Gaussians that was saved, and the means over the test views. Raises: InputError without them."""
    folder = ModelFolder.open(model)
    try:
        results: dict[str, Any] = json.loads(folder.results("test").read_text(encoding="utf-8"))[f"ours_{iteration}"]
        lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{model} has no measures of its test views ({error}); the sweep needs --eval") from error
    saved = [line["num_gaussians"] for line in lines if line.get("kind") == "saved" and line["iteration"] == iteration]
    return int(saved[-1]), {name: float(results[name]) for name in MEASURES if results.get(name) is not None}


def table_of(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    measures = [name for name in MEASURES if all(name in point.measures for point in points)]
    lines = [f"| | pruned | Gaussians | {' | '.join(measures)} |", "|---|---:|---:|" + "---:|" * len(measures)]
    for point in points:
        values = " | ".join(f"{point.measures[name]:.4f}" for name in measures)
        lines.append(f"| {point.name} | {100 * point.ratio:.1f} % | {point.num_gaussians:,} | {values} |")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], path: Path) -> None:
    """A curve for each measure against the pruned share, the learned point marked, as PNG or SVG."""
    import matplotlib  # imported here: only the plot needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = [name for name in MEASURES if all(name in point.measures for point in points)]
    figure, axes = pyplot.subplots(1, len(measures), figsize=(4.5 * len(measures), 3.5), squeeze=False)
    for axis, name in zip(axes[0], measures, strict=True):
        curve = [(point.ratio, point.measures[name]) for point in points if point.name != LEARNED]
        axis.plot(*zip(*sorted(curve), strict=True), marker="o", label="percent pruning")
        for point in points:
            if point.name == LEARNED:
                axis.plot(point.ratio, point.measures[name], "r*", markersize=14, label="learned mask")
        axis.set_xlabel("share of Gaussians pruned")
        axis.set_ylabel(name + (" (dB)" if name == "PSNR" else ""))
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def parse(arguments: Sequence[str]) -> Sweep:
    """The sweep that a command line describes. Raises: InputError for a ratio outside [0, 1] or data not given."""
    parser = argparse.ArgumentParser(prog="python -m launch.sweep", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-s", "--source_path", type=Path, required=True, help="folder of the data set")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for all runs and the results")
    parser.add_argument("--score", choices=SCORES, default=SCORES[0], help="importance score [%(default)s]")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="shares to prune, 0 to 1")
    own, flags = split_arguments(arguments)
    values = parser.parse_args(own)
    if any(not 0.0 <= ratio <= 1.0 for ratio in values.ratios):
        raise InputError(f"--ratios {values.ratios}: a share of Gaussians lies between 0 and 1")
    flags = flags if "--eval" in flags or "--no_eval" in flags else ["--eval", *flags]
    return Sweep(values.source_path, values.output, values.score, tuple(values.ratios), tuple(flags))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first `--`."""
    own = list(arguments)
    place = own.index("--") if "--" in own else len(own)
    return own[:place], own[place + 1 :]


def main(arguments: Sequence[str]) -> int:
    """Run the sweep and write its table, numbers and plot."""
    sweep = parse(arguments)
    points = run_sweep(sweep)
    write_json_atomically(sweep.output / "sweep.json", {"score": sweep.score, "points": [asdict(p) for p in points]})
    (sweep.output / "sweep.md").write_text(table_of(points), encoding="utf-8")
    draw(points, sweep.output / "sweep.png")
    print(table_of(points), end="")
    return 0


if __name__ == "__main__":
    run_main(main)
