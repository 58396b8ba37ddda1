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

import train
from distributed.communicator import Communicator
from gaussian_renderer.views import KERNEL_ATTRIBUTES
from launch.cli import parse_train
from launch.config import TrainConfig
from launch.finetune import rate_factor, trained_before
from launch.log_reader import read_log
from launch.prune_checks import last_prune
from launch.pruning import adopt_masks
from launch.training import build_training
from scene.checkpoint import load_checkpoint
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from scene.model_folder import ModelFolder
from scene.model_import import import_model
from scene.ply import load_ply, save_ply
from strategies.schedule import Window

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


def test_other_methods_prune_a_trained_model_at_once() -> None:
    scored = parsed("--prune_finetune --start_pointcloud a.ply --prune_method rad_splat")
    assert scored.prune.prune_use_percent_iterations == (30_001,)
    learned = parsed("--prune_finetune --start_pointcloud a.ply --prune_method rad_splat --use_importance_mask")
    assert (learned.prune.prune_iterations, learned.mask.lambda_mask) == ((30_000,), 0.02)
    assert parsed("--prune_finetune --start_pointcloud a.ply --prune_method compact_3dgs").mask.lambda_mask == 5e-4
    assert trained_before(learned) == 30_000 and trained_before(parsed("--start_checkpoint a")) == 0
    assert last_prune(learned) == 30_500 and last_prune(scored) == 30_001
    assert last_prune(parsed("--prune_finetune --start_pointcloud a.ply --target_mb 3")) == 32_500
    assert last_prune(parsed("")) is None


def test_all_rates_but_that_of_the_centres_fall(any_scene: Path, tmp_path: Path) -> None:
    config = parse_train(["-s", str(any_scene), "-m", str(tmp_path), *shlex.split("--prune_finetune --start_chec a")])
    training = build_training(config, Communicator(), show_progress=False)
    first, later = Window(30_001, 1), Window(30_801, 1)
    rates = zip(training.adam_steps(first), training.adam_steps(later), strict=True)
    ratios = dict(zip(KERNEL_ATTRIBUTES, (two.learning_rate / one.learning_rate for one, two in rates), strict=True))
    assert ratios.pop("means") == pytest.approx(0.01 ** (800 / 35_000))
    assert list(ratios.values()) == pytest.approx([0.95**2] * len(KERNEL_ATTRIBUTES[1:]))
    assert training.mask_scaling(later).lr_factor / training.mask_scaling(first).lr_factor == pytest.approx(0.95**2)


def test_a_trained_ply_is_pruned_and_finetuned(any_scene: Path, tmp_path: Path) -> None:
    """From the ply of another training, through train.py: what is evaluated before the first step is that model."""
    common = ["-s", str(any_scene), "--eval", "--quiet", "--no_report"]
    assert train.main([*common, "-m", str(tmp_path / "a"), "--prune_method", "3dgs", "--iterations", "40"]) == 0
    ply = ModelFolder.open(tmp_path / "a").point_cloud(40)
    start = ["--prune_finetune", "--start_pointcloud", str(ply), "--mask_prune_iter", "10", "--iterations", "30030"]
    masks = ["--lambda_mask", "3", "--mask_lr", "0.5"]
    assert train.main([*common, "-m", str(tmp_path / "b"), *start, *masks]) == 0
    log, count = read_log(tmp_path / "b" / "metrics.jsonl"), len(load_ply(ply)["means"])
    assert [edit["iteration"] for edit in log.edits] == [30_010, 30_020, 30_030]
    assert log.saved[-1]["num_gaussians"] < count == log.evaluations[0]["num_gaussians"]
    before = read_log(tmp_path / "a" / "metrics.jsonl").evaluations[-1]
    assert log.evaluations[0]["psnr"] == pytest.approx(before["psnr"], abs=1.0)
    printed = (tmp_path / "b" / "train.log").read_text()
    assert f"{ply} is a model without history: Adam starts anew" in printed and "another program" not in printed


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
        ("--prune_finetune --start_checkpoint a --scale_schedules", "has schedules of its own"),
        (
            "--start_pointcloud a --iterations 35000 --prune_method rad_splat --use_importance_mask",
            "lies before iteration 30000, which the model to start from counts with",
        ),
        (
            "--start_pointcloud a --iterations 35000 --prune_method rad_splat",
            "none of which lies behind 30000 and before --iterations 35000, when the model is saved",
        ),
        ("--prune_finetune --start_pointcloud a --iterations 30015 --target_mb 1", "needs 20 iterations or more"),
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
    found = import_model(tmp_path / "a.ply", 30_000, degree)
    assert found.iteration == 30_000 and np.isnan(found.extent) and found.table.num_updates == 0
    for name, values in table.params.items():
        expected = torch.full_like(values, 9.0) if name == "mask_logits" else values
        assert torch.equal(found.table.params[name], expected), name
    assert found.table.ids.tolist() == list(range(7))
    assert all(not values.any() for values in found.table.exp_avg.values())


def test_a_ply_of_a_lower_degree_gets_room(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {spec.name: rng.normal(size=(7, *spec.shape)).astype(np.float32) for spec in attributes_for(1)}
    save_ply(tmp_path / "a.ply", GaussianTable.from_arrays(arrays).params)
    found = import_model(tmp_path / "a.ply", 30_000, 3)
    assert found.table.sh_degree == 3 and "those that it lacks begin at 0" in found.notices[0]
    assert np.array_equal(found.table.params["shN"][:, :3].numpy(), arrays["shN"])
    assert not found.table.params["shN"][:, 3:].any()
    assert import_model(tmp_path / "a.ply", 30_000, 0).table.sh_degree == 1  # refused later, with the flag to give


@pytest.mark.parametrize(("before", "now"), [("mask", "compact_3dgs"), ("compact_3dgs", "mask"), ("mask", "rad_splat")])
def test_masks_of_another_method_begin_anew(before: str, now: str) -> None:
    """One logit means a probability to one method and a hard mask to the other: misread, most Gaussians would go."""
    arrays = {spec.name: np.zeros((6, *spec.shape), np.float32) for spec in attributes_for(0)}
    arrays["mask_logits"] = np.array([9.0, 5.0, 3.0, 0.5, -0.5, -9.0], np.float32)
    table = GaussianTable.from_arrays(arrays)
    notices = adopt_masks(table, before, now, Communicator())
    saved = [0, 1, 2, 3] if before == "mask" else [0, 1]  # by compact_3dgs: sigma(logit - 8) > 0.01
    assert table.ids.tolist() == saved and table.params["mask_logits"].tolist() == [9.0] * len(saved)
    assert f"learned by --prune_method {before} and begin anew for {now}; the {6 - len(saved)} Gaussians" in notices[0]
    assert adopt_masks(table, before, now, Communicator()) == []


def test_the_same_method_goes_on_with_its_masks() -> None:
    arrays = {spec.name: np.zeros((2, *spec.shape), np.float32) for spec in attributes_for(0)}
    arrays["mask_logits"] = np.array([3.0, -1.0], np.float32)
    for method in ("mask", "compact_3dgs"):
        table = GaussianTable.from_arrays(arrays)
        assert adopt_masks(table, method, method, Communicator()) == []
        assert table.params["mask_logits"].tolist() == [3.0, -1.0]


def test_a_target_that_is_past_is_refused(any_scene: Path, tmp_path: Path) -> None:
    common = ["-s", str(any_scene), "--eval", "--quiet", "--no_report", "--test_iterations"]
    first = ["--prune_method", "3dgs", "--iterations", "60", "--checkpoint_iterations", "60"]
    assert train.main([*common, "-m", str(tmp_path / "a"), *first]) == 0
    start = ["--start_checkpoint", str(tmp_path / "a"), "--iterations", "80", "--densify_until_iter", "10"]
    with pytest.raises(InputError, match=r"the last prune to the target size of 5 Gaussians would be at iteration 45"):
        train.main([*common, "-m", str(tmp_path / "b"), *start, "--target_gaussians", "5"])
    assert train.main([*common, "-m", str(tmp_path / "c"), *start, "--target_gaussians", "900000"]) == 0


RECORDER = """#!/bin/sh
printf '%s\\n' "$@" end >> "$0.calls"
case "$*" in
    *bicycle*) exit 2 ;;
    *"my room"*) mkdir -p "$LOGGED" && echo "$$" > "$LOGGED/train.log" && exit 1 ;;
esac
"""
"""In place of Python: writes down how it is called, and fails for two scenes, for one of them with a train.log."""


def models_of_four_scenes(folder: Path) -> None:
    for path in (
        *("bicycle/chkpnt7000.pth", "bicycle/chkpnt30000.pth", "bicycle/point_cloud/iteration_30000/point_cloud.ply"),
        *("my room/point_cloud/iteration_7000/point_cloud.ply", "my room/point_cloud/iteration_900/point_cloud.ply"),
        *("train/chkpnt7000.pth", "train/chkpnt_best.pth", "train/point_cloud/iteration_12000/point_cloud.ply"),
        "truck/point_cloud/iteration_30000/other.ply",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def run_script(folder: Path, *arguments: str, num_processes: int = 1) -> tuple[subprocess.CompletedProcess, list[list]]:
    """What run_prune_finetune.sh does with the folders data, models and "the out" below `folder`, and its calls."""
    program = folder / "python"
    program.write_text(RECORDER)
    program.chmod(0o755)
    environment = {"PYTHON": str(program), "NPROC": str(num_processes), "LOGGED": str(folder / "the out" / "my room")}
    done = subprocess.run(
        [str(ROOT / "launch/run_prune_finetune.sh"), *(str(folder / name) for name in ("data", "models", "the out"))]
        + list(arguments),
        env={**environment, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = folder / "python.calls"
    texts = calls.read_text().split("end\n")[:-1] if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, [text.splitlines() for text in texts]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_the_script_finetunes_the_newest_model_of_every_scene(tmp_path: Path, num_processes: int) -> None:
    models, out = tmp_path / "models", tmp_path / "the out"
    models_of_four_scenes(models)
    done, calls = run_script(tmp_path, "--", "--lambda_mask", "0.1", num_processes=num_processes)
    split = [call.index(str(ROOT / "train.py")) for call in calls]
    configs = [parse_train(call[place + 1 :], {}) for call, place in zip(calls, split, strict=True)]
    assert [config.model.model_path for config in configs] == [out / "bicycle", out / "my room", out / "train"]
    assert [config.model.source_path.name for config in configs] == ["bicycle", "my room", "train"]
    assert configs[0].checkpoint.start_checkpoint == f"{models}/bicycle/chkpnt30000.pth"
    assert [config.prune.start_pointcloud for config in configs] == [
        "",
        f"{models}/my room/point_cloud/iteration_7000/point_cloud.ply",
        f"{models}/train/point_cloud/iteration_12000/point_cloud.ply",
    ]
    assert all(config.prune.prune_finetune and config.mask.lambda_mask == 0.1 for config in configs)
    assert all(("--nproc-per-node=3" in call) == (num_processes == 3) for call in calls)
    assert f"my room: pruning and finetuning iteration 7000, {configs[1].prune.start_pointcloud}\n" in done.stdout
    assert done.returncode == 1 and done.stderr.endswith(
        "failed:\n  bicycle: what train.py said stands above\n"
        f"  my room: see {out}/my room/train.log\n"
        "  truck: there is neither chkpntN.pth nor point_cloud/iteration_N/point_cloud.ply in "
        f"{models}/truck; train it first\n"
    )


def test_the_script_leaves_alone_what_is_done_and_what_is_not_named(tmp_path: Path) -> None:
    models_of_four_scenes(tmp_path / "models")
    for name in ("train", "my room"):
        (tmp_path / "the out" / name).mkdir(parents=True)
    (tmp_path / "the out" / "train" / "results.json").touch()
    done, calls = run_script(tmp_path, "train", "--")
    assert (done.returncode, calls) == (0, []) and "train: " in done.stdout and "is left alone" in done.stdout
    (tmp_path / "the out" / "train" / "results.json").unlink()
    (tmp_path / "the out" / "my room" / "train.log").write_text("of an earlier training")
    done, calls = run_script(tmp_path, "my room", "train")
    assert [Path(call[call.index("-m") + 1]).name for call in calls] == ["my room", "train"]
    assert done.stderr.endswith(f"failed:\n  my room: see {tmp_path}/the out/my room/train.log\n")


def test_a_log_of_an_earlier_training_is_not_named(tmp_path: Path) -> None:
    models_of_four_scenes(tmp_path / "models")
    (tmp_path / "the out" / "bicycle").mkdir(parents=True)
    (tmp_path / "the out" / "bicycle" / "train.log").write_text("of an earlier training")
    done, _ = run_script(tmp_path, "bicycle")
    assert done.stderr.endswith("failed:\n  bicycle: what train.py said stands above\n")


def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path)
    assert (done.returncode, calls) == (2, []) and f"no folder of a model in {tmp_path}/models" in done.stderr
    usage = subprocess.run([str(ROOT / "launch/run_prune_finetune.sh")], capture_output=True, text=True, check=False)
    assert usage.returncode == 2 and usage.stderr.startswith("  launch/run_prune_finetune.sh DATA MODELS OUT [SCENE")
    assert usage.stderr.endswith("NPROC=4 launch/run_prune_finetune.sh ...\n")


def test_a_ply_without_gaussians_is_refused(tmp_path: Path) -> None:
    arrays = {spec.name: np.empty((0, *spec.shape), np.float32) for spec in attributes_for(3)}
    save_ply(tmp_path / "a.ply", GaussianTable.from_arrays(arrays).params)
    with pytest.raises(InputError, match="holds no Gaussian"):
        import_model(tmp_path / "a.ply", 30_000, 3)
    with pytest.raises(InputError, match="b.ply"):
        import_model(tmp_path / "b.ply", 30_000, 3)


def test_a_shorter_training_of_ours_counts_as_a_whole_one(any_scene: Path, tmp_path: Path) -> None:
    """From a checkpoint of 40 iterations, moments included; its clocks and its shares are not those of the finetune."""
    common = ["-s", str(any_scene), "--eval", "--quiet", "--no_report", "--test_iterations"]
    first = ["--prune_method", "3dgs", "--iterations", "40", "--checkpoint_iterations", "40"]
    assert train.main([*common, "-m", str(tmp_path / "a"), *first]) == 0
    start = ["--prune_finetune", "--start_checkpoint", str(tmp_path / "a")]
    until = ["--iterations", "30020", "--checkpoint_iterations", "30010", "30020"]
    assert train.main([*common, "-m", str(tmp_path / "b"), *start, *until]) == 0
    end = load_checkpoint(tmp_path / "b" / "checkpoints" / "30020")
    assert (end.state.iteration, end.table.num_updates) == (30_020, 60)
    assert end.state.clocks["untimed_images"] == 30_000
    printed = (tmp_path / "b" / "train.log").read_text()
    assert "of 40 images counts as trained for 30000" in printed and "Going on behind image 30000" in printed
    (tmp_path / "b" / "checkpoints" / "30020").rename(tmp_path / "away")
    assert train.main([*common, "-m", str(tmp_path / "b"), *start, *until, "--auto_start_checkpoint"]) == 0
    again = load_checkpoint(tmp_path / "b" / "checkpoints" / "30020")
    for name, values in end.table.params.items():
        assert torch.equal(again.table.params[name], values), name
