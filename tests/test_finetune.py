# SPDX-License-Identifier: Apache-2.0
"""Pruning and finetuning trained models: the flags' values, the rates, and models of other trainers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.cli import parse_train
from launch.config import TrainConfig
from launch.finetune import rate_factor
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from scene.model_import import import_model
from scene.ply import save_ply

ROOT = Path(__file__).resolve().parents[1]


def parsed(command: str) -> TrainConfig:
    return parse_train(shlex.split(f"-s data -m out {command}"), {})


def test_the_flag_stands_for_the_published_settings() -> None:
    config = parsed("--prune_finetune --start_pointcloud a.ply")
    assert (config.optimization.iterations, config.optimization.position_lr_max_steps) == (35_000, 35_000)
    assert config.density.disable_auto_densification and config.mask.prune_method == "mask"
    assert (config.mask.lambda_mask, config.mask.mask_from_iter, config.mask.mask_until_iter) == (0.02, 0, 35_000)
    assert config.logging.test_iterations == (30_001, *range(30_500, 35_001, 500))
    assert config.logging.save_iterations == (30_000, 35_000) or config.logging.save_iterations == (
        7000,
        30_000,
        35_000,
    )
    given = parsed("--prune_finetune --start_checkpoint a.pth --iterations 31000 --lambda_mask .1 --test_iterations 5")
    assert (given.optimization.iterations, given.mask.lambda_mask, given.mask.mask_until_iter) == (31_000, 0.1, 31_000)
    assert given.logging.test_iterations == (5,)
    assert not parsed("").density.disable_auto_densification


def test_rates_fall_by_a_twentieth_every_400_iterations() -> None:
    """Twelve times in 5 000 iterations, to 0.54."""
    config = parsed("--prune_finetune --start_pointcloud a.ply")
    factors = [rate_factor(config, iteration) for iteration in (1, 30_001, 30_400, 30_401, 30_800, 30_801, 35_000)]
    assert factors == pytest.approx([1, 1, 1, 0.95, 0.95, 0.95**2, 0.95**12])
    assert rate_factor(parsed("--iterations 40000"), 35_000) == 1


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--prune_finetune", "--prune_finetune has no trained model"),
        ("--start_pointcloud a.ply --start_checkpoint b --iterations 35000", "both say where to start"),
        ("--start_pointcloud a.ply", "counts as one of 30000 iterations and --iterations is 30000"),
    ],
)
def test_what_is_missing_is_said(command: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        parsed(command)
    with pytest.raises(InputError, match="train.py has no data"):
        parse_train(shlex.split("--prune_finetune --start_pointcloud a.ply"), {})


@pytest.mark.parametrize("degree", [0, 3])
def test_a_ply_becomes_rows_without_history(tmp_path: Path, degree: int) -> None:
    rng = np.random.default_rng(degree)
    arrays = {spec.name: rng.normal(size=(7, *spec.shape)).astype(np.float32) for spec in attributes_for(degree)}
    table = GaussianTable.from_arrays(arrays)
    save_ply(tmp_path / "a.ply", table.params)
    found = import_model(tmp_path / "a.ply", 30_000)
    assert found.iteration == 30_000 and np.isnan(found.extent) and found.table.num_updates == 0
    for name, values in table.params.items():
        expected = torch.full_like(values, 9.0) if name == "mask_logits" else values
        assert torch.equal(found.table.params[name], expected), name
    assert found.table.ids.tolist() == list(range(7))
    assert all(not values.any() for values in found.table.exp_avg.values())


@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_script_finetunes_every_scene_that_is_not_done(tmp_path: Path, num_processes: int) -> None:
    """With a program in place of Python that writes down how it is called, and fails for one scene."""
    for scene in ("bicycle", "my room", "train", "truck"):
        (tmp_path / "models" / scene.replace(" ", "_")).mkdir(parents=True)
    (tmp_path / "models" / "train" / "chkpnt30000.pth").touch()
    (tmp_path / "out" / "truck").mkdir(parents=True)
    (tmp_path / "out" / "truck" / "results.json").touch()
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\ncase "$*" in *bicycle*) exit 2;; esac\n')
    stub.chmod(0o755)
    folders = [str(tmp_path / name) for name in ("data", "models", "out")]
    done = subprocess.run(
        [str(ROOT / "launch" / "run_prune_finetune.sh"), *folders, "--", "--lambda_mask", "0.1"],
        env={"PYTHON": str(stub), "NPROC": str(num_processes), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "failed: bicycle (see train.log" in done.stderr
    lines = calls.read_text().splitlines()
    assert [re.findall(r"-m \S*/(\w+) ", line)[-1] for line in lines] == ["bicycle", "my_room", "train"]
    parsed_lines = [parse_train(shlex.split(line.partition("train.py ")[2]), {}) for line in lines]
    assert [Path(each.prune.start_pointcloud).name for each in parsed_lines] == ["point_cloud.ply"] * 2 + [""]
    assert parsed_lines[2].checkpoint.start_checkpoint.endswith("train/chkpnt30000.pth")
    assert all(each.prune.prune_finetune and each.mask.lambda_mask == 0.1 for each in parsed_lines)
    assert all(("--nproc-per-node=3" in line) == (num_processes == 3) for line in lines)


def test_a_ply_without_gaussians_is_refused(tmp_path: Path) -> None:
    arrays = {spec.name: np.empty((0, *spec.shape), np.float32) for spec in attributes_for(3)}
    save_ply(tmp_path / "a.ply", GaussianTable.from_arrays(arrays).params)
    with pytest.raises(InputError, match="holds no Gaussian"):
        import_model(tmp_path / "a.ply", 30_000)
    with pytest.raises(InputError, match="b.ply"):
        import_model(tmp_path / "b.ply", 30_000)
