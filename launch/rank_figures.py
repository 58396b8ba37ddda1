# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training on several processes, for documents: shards in space, rows over ranks, load.

    python -m launch.rank_figures MODEL OTHER -o docs/images

MODEL was trained with --save_strategy_history and has a checkpoint; OTHER was trained the same way with
--no_heuristics_update, so that its pixels were shared out by their number alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.run import run_main
from scene.checkpoint import load_checkpoint
from scene.checkpoint_manifest import read_manifest
from scene.errors import InputError
from scene.model_folder import ModelFolder

SHOWN_STEPS = 60
LARGEST_PERCENTILE = 98.0  # of the coordinates; the rest is background far away
MOVING_STEPS = 20


def read_history(folder: ModelFolder) -> list[dict[str, Any]]:
    """The steps in strategy_history.jsonl. Raises: InputError when there is none."""
    try:
        lines = folder.strategy_history.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{folder.strategy_history} cannot be read: {error.strerror}; train with --save_strategy_history"
        ) from error
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def newest_checkpoint(folder: ModelFolder) -> Path:
    """The checkpoint with the highest number. Raises: InputError when there is none."""
    found = [entry for entry in folder.checkpoints.glob("[0-9]*") if entry.name.isdecimal()]
    if not found:
        raise InputError(f"{folder.path} has no checkpoint; train with --checkpoint_iterations")
    return max(found, key=lambda entry: int(entry.name))


def draw_shards(axes: Any, checkpoint: Path) -> None:
    """Every Gaussian as a dot in the colour of its rank, along the two widest axes of the scene."""
    shards = [
        load_checkpoint(checkpoint, shards=[rank]).table.params["means"].numpy()
        for rank in range(read_manifest(checkpoint).world_size)
    ]
    everything = np.concatenate(shards)
    ends = np.percentile(everything, [100 - LARGEST_PERCENTILE, LARGEST_PERCENTILE], axis=0)
    x, y = np.sort(np.argsort(ends[1] - ends[0])[1:])
    for rank, means in enumerate(shards):
        axes.scatter(means[:, x], means[:, y], s=0.4, linewidths=0, label=f"rank {rank}: {len(means):,}")
    axes.set_xlim(*ends[:, x])
    axes.set_ylim(*ends[:, y])
    axes.set_title("Gaussians by owner")
    axes.legend(markerscale=12, fontsize=7, loc="upper right")


def draw_rows(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    """The rows of tiles of each step's views above each other, in the colour of the rank that draws them."""
    for column, step in enumerate(steps):
        regions = sorted(
            (view, start, stop, rank) for rank, mine in enumerate(step["regions"]) for view, start, stop in mine
        )
        bottom = 0
        for _, start, stop, rank in regions:
            axes.bar(column, stop - start, 0.9, bottom=bottom, color=f"C{rank}", edgecolor="white", linewidth=0.3)
            bottom += stop - start
    axes.set_title("rows of tiles by who draws them")
    axes.set_xlabel("step")
    axes.set_ylabel("rows of tiles, view after view")


def draw_load(axes: Any, histories: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Largest load over the mean, counted in pairs, as a mean over some steps."""
    for label, steps in histories.items():
        ratios = np.array([max(step["counted"]) * len(step["counted"]) / sum(step["counted"]) for step in steps])
        smooth = np.convolve(ratios, np.ones(MOVING_STEPS) / MOVING_STEPS, mode="valid")
        axes.plot(
            np.arange(len(smooth)) + MOVING_STEPS, smooth, label=f"{label}: {ratios[len(ratios) // 2 :].mean():.2f}"
        )
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.set_title(f"largest load / mean (over {MOVING_STEPS} steps; second half)")
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


def main(arguments: Sequence[str]) -> None:
    """Draw the three pictures. Raises: InputError when a folder lacks what they show."""
    parser = argparse.ArgumentParser(description="Pictures of a training on several processes.")
    parser.add_argument("model", type=Path, help="its model folder")
    parser.add_argument("before", type=Path, help="one of a training with --no_heuristics_update")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)
    folder = ModelFolder.open(options.model)
    steps = read_history(folder)
    plots = importlib.import_module("matplotlib.figure")  # it takes a second, and only documents need it
    drawings = {
        "shards": lambda axes: draw_shards(axes, newest_checkpoint(folder)),
        "rows": lambda axes: draw_rows(axes, steps[-SHOWN_STEPS:]),
        "load": lambda axes: draw_load(
            axes, {"by pixels": read_history(ModelFolder.open(options.before)), "by counted cost": steps}
        ),
    }
    for name, draw in drawings.items():
        figure = plots.Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
        draw(figure.subplots())
        figure.savefig(options.output / f"ranks-{name}.png")


if __name__ == "__main__":
    run_main(main)
