# SPDX-License-Identifier: Apache-2.0
"""Trainings of tests on several ranks: a scene with photos of several sizes, cases, what each rank ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launch.training
import train
from colmap_builder import CameraRow, build_model, write_binary, write_photos
from distributed.communicator import Communicator
from gaussian_renderer.views import CameraTable
from launch.cli import parse_train
from launch.config import TrainConfig
from launch.start import Start
from launch.training import Training, build_training
from masksplat.random import SPLIT, normal
from scene.gaussians import GaussianTable
from scene.model_folder import ModelFolder
from scene.ply import load_ply

STEPS = 50
EVENTS = (
    *("--eval", "--densify_from_iter", "10", "--densification_interval", "20", "--densify_until_iter", "90"),
    *("--densify_grad_threshold", "1e-5", "--opacity_reset_interval", "60", "--no-report", "--threads", "1"),
    *("--mask_lr", "0.1", "--lambda_mask", "0.001", "--mask_prune_iter", "30", "--random_background", "--quiet"),
    *("--test_iterations", "--sh_degree", "1", "--check_agreement"),
)


@dataclass(frozen=True)
class Case:
    """One training: flags, precision, and the number of Gaussians to begin with (all points by default)."""

    name: str
    flags: tuple[str, ...]
    dtype: torch.dtype = torch.float64
    num_points: int | None = None
    num_steps: int = STEPS

    @property
    def batch_size(self) -> int:
        return int(self.flags[self.flags.index("--bsz") + 1])


CASES = (
    Case("whole views", ("--bsz", "4", "--test_iterations", "100", "--checkpoint_iterations", "100")),
    Case("strips of one view", ("--bsz", "1")),
    Case(
        "views that no number of ranks divides",
        ("--bsz", "3", "--prune_method", "3dgs", "--antialiasing"),
        num_steps=24,
    ),
    Case("three points", ("--bsz", "2", "--prune_method", "3dgs"), num_points=3, num_steps=24),
    Case("random shards", ("--bsz", "2", "--redistribute_gaussians_mode", "random_redistribute"), num_steps=24),
    Case("single precision", ("--bsz", "2"), dtype=torch.float32, num_steps=9),
)


def write_scene(source: Path) -> Path:
    """12 photos of three sizes, 64 x 48, 52 x 41 and 40 x 17 pixels (3, 3 and 2 rows of tiles), around 60 points."""
    model = build_model(num_views=12, size=(64, 48), num_points=60)
    for number, (width, height) in enumerate([(52, 41), (40, 17)], start=2):
        focal = 0.9 * width
        model.cameras.append(CameraRow(number, "PINHOLE", width, height, [focal, focal, 0.5 * width, 0.5 * height]))
    for index, image in enumerate(model.images):
        image.camera_id = 1 + index % 3
    write_binary(source / "sparse" / "0", model)
    write_photos(source / "images", model)
    return source


@dataclass(frozen=True)
class Outcome:
    """What one rank has at the end: its rows, what rank 0 logged, and the last ply in the order of x."""

    ids: np.ndarray
    tensors: dict[str, np.ndarray]
    records: list[dict[str, Any]]
    saved: dict[str, np.ndarray]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def varied(table: GaussianTable, dtype: torch.dtype, num_points: int | None) -> GaussianTable:
    """The table in another precision, with Gaussians that are no balls, and only those with the lowest ids.

    A ball has no gradient by its rotation but rounding errors, and Adam makes full steps of them.
    """
    rows = torch.arange(len(table)) if num_points is None else torch.nonzero(table.ids < num_points).flatten()
    arrays = {name: values[rows].to(dtype) for name, values in table.params.items()}
    arrays["scales"] += 0.3 * normal(0, 0, table.ids[rows], SPLIT, dtype)
    arrays["quats"][:, 1:] += 0.5 * normal(0, 1, table.ids[rows], SPLIT, dtype)
    return GaussianTable.from_arrays(arrays, dtype=dtype, ids=table.ids[rows])


def config_of(source: Path, target: Path, case: Case) -> TrainConfig:
    """The configuration of a case; every step is logged."""
    iterations = str(case.num_steps * case.batch_size)
    arguments = ["-s", str(source), "-m", str(target), "--iterations", iterations, *EVENTS, *case.flags]
    return parse_train([*arguments, "--log_interval", str(case.batch_size)])


def built(world: Communicator, source: Path, target: Path, case: Case) -> Training:
    training = build_training(config_of(source, target, case), world, show_progress=False)
    training.table = varied(training.table, case.dtype, case.num_points)
    training.cameras = CameraTable(training.scene.train, training.table.params["means"])  # in that precision, too
    return training


def outcome(training: Training, folder: ModelFolder) -> Outcome:
    table = training.table
    groups = {"params": table.params, "exp_avg": table.exp_avg, "exp_avg_sq": table.exp_avg_sq}
    groups["statistics"] = table.statistics
    tensors = {f"{group}.{name}": values.numpy() for group, each in groups.items() for name, values in each.items()}
    lines = folder.metrics.read_text().splitlines() if training.communicator.is_main else []
    saved = load_ply(folder.point_cloud(folder.find_iteration())) if training.communicator.is_main else {}
    order = np.lexsort(saved["means"].T) if saved else []
    saved = {name: values[order] for name, values in saved.items()}
    return Outcome(table.ids.numpy(), tensors, [json.loads(line) for line in lines], saved)


def run_loop(training: Training, folder: ModelFolder, start: Start) -> None:
    """The steps of train.py; the first degree of spherical harmonics begins at image 30."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.training, "SH_DEGREE_INTERVAL", 30)
        train.train(training, folder, start)


def trajectory(world: Communicator, source: Path, target: Path, case: Case) -> Outcome:
    """A case from its beginning to its end."""
    target = target / f"{case.name} on {world.size}{world.has_group}"
    folder = ModelFolder.create(target)
    training = built(world, source, target, case)
    run_loop(training, folder, Start())
    return outcome(training, folder)


def trajectories(world: Communicator, source: Path, target: Path, cases: Sequence[Case]) -> list[Outcome]:
    return [trajectory(world, source, target, case) for case in cases]


def gathered(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """The tensors of all ranks in the order of ids, and the ids."""
    ids = np.concatenate([each.ids for each in outcomes])
    order = np.argsort(ids)
    assert len(np.unique(ids)) == len(ids)
    tensors = {name: np.concatenate([each.tensors[name] for each in outcomes])[order] for name in outcomes[0].tensors}
    return {"ids": ids[order], **tensors}
