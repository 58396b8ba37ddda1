# SPDX-License-Identifier: Apache-2.0
"""Target sizes through train.py: the size that is reached, what is measured for its price, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.evaluation import evaluate
from launch.log_reader import read_log
from launch.recorder import Recorder
from launch.size_price import price_iterations, tell_price
from launch.training import Training, build_training
from scene.checkpoint import load_checkpoint
from scene.ply import load_ply

SHORT = (
    *("--iterations", "80", "--densify_from_iter", "10", "--densification_interval", "10", "--no-report", "--quiet"),
    *("--densify_grad_threshold", "1e-5", "--densify_until_iter", "40", "--test_iterations", "--log_interval", "10"),
)


def arguments(source: Path, target: Path, *flags: str) -> list[str]:
    return ["-s", str(source), "-m", str(target), "--eval", *SHORT, *flags]


@pytest.mark.parametrize(
    ("method", "before"), [(("--prune_method", "rad_splat", "--prune_use_percent_iterations", "50"), 50), ((), 40)]
)
def test_a_target_is_reached_and_its_price_is_known(
    any_scene: Path, tmp_path: Path, method: tuple[str, ...], before: int
) -> None:
    target = tmp_path / "m"
    assert train.main(arguments(any_scene, target, *method, "--target_mb", "0.5")) == 0
    (price,) = [
        record
        for record in map(json.loads, (target / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "size_price"
    ]
    ply = target / "point_cloud" / "iteration_80" / "point_cloud.ply"
    assert 0.98 * 0.5e6 <= price["num_bytes"] == ply.stat().st_size <= 0.5e6 + 2000, "the header is extra"
    assert len(load_ply(ply)["means"]) == price["num_gaussians"] == 500_000 // (4 * 62)
    measured = {
        record["iteration"]: record
        for record in read_log(target / "metrics.jsonl").evaluations
        if record["split"] == "test"
    }
    assert sorted(measured) == [before, 80], "nothing else was asked for"
    assert price["num_before"] == measured[before]["num_gaussians"] > price["num_gaussians"]
    assert price["price_db"] == pytest.approx(measured[before]["psnr"] - measured[80]["psnr"])
    printed = (target / "train.log").read_text()
    assert f"(0.50 MB) with test PSNR {price['psnr']:.2f} dB" in printed and f"at iteration {before}" in printed


def test_without_a_target_there_is_no_price(tmp_path: Path) -> None:
    config = parse_train(arguments(tmp_path, tmp_path / "m"))
    assert price_iterations(config) == () and tell_price(config) is None
    assert config.logging.test_iterations == ()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--target_gaussians 9", (15_000, 30_000)),
        ("--target_gaussians 9 --disable_auto_densification", (1, 30_000)),
        ("--target_gaussians 9 --prune_method rad_splat --prune_use_percent_iterations 22000 18000", (18_000, 30_000)),
        ("--target_gaussians 9 --prune_finetune --start_pointcloud a", (30_001, 35_000)),
        ("--target_gaussians 9 --prune_finetune --start_pointcloud a --prune_method rad_splat", (30_001, 35_000)),
    ],
)
def test_what_is_measured_before_pruning(flags: str, expected: tuple[int, int]) -> None:
    config = parse_train(["-s", "data", "-m", "out", *flags.split()])
    assert price_iterations(config) == expected
    assert set(expected) <= set(config.logging.test_iterations)


def test_a_run_that_did_not_measure_before_pruning_says_so(any_scene: Path, tmp_path: Path) -> None:
    """Forked behind the first prune: half of the price is in another run's log."""
    flags = ("--target_gaussians", "2000", "--checkpoint_iterations", "60")
    assert train.main(arguments(any_scene, tmp_path / "a", *flags)) == 0
    start = str(tmp_path / "a" / "checkpoints" / "60")
    assert train.main(arguments(any_scene, tmp_path / "b", *flags, "--start_checkpoint", start)) == 0
    printed = (tmp_path / "b" / "train.log").read_text()
    assert "iteration 40, before pruning, was not measured in this run" in printed
    assert "Nothing will be pruned: the last prune of these flags is at iteration 60" in printed


def built(source: Path, target: Path, *flags: str) -> Training:
    return build_training(parse_train(arguments(source, target, *flags)), Communicator(), show_progress=False)


def test_masks_that_were_never_touched_are_certain_when_a_size_is_wanted(any_scene: Path, tmp_path: Path) -> None:
    training = built(any_scene, tmp_path, "--target_gaussians", "100")
    recorder = Recorder(training, None, None, None)  # type: ignore[arg-type]
    logits = training.table.params["mask_logits"]
    assert recorder._expected_count() == len(logits)
    logits[:4] = torch.tensor([0.0, -50.0, 50.0, 9.0])
    assert recorder._expected_count() == pytest.approx(len(logits) - 1.5)


def test_in_a_window_the_mean_factor_is_evaluated_and_saved(any_scene: Path, tmp_path: Path) -> None:
    """Law 8 between two steps of LP-3DGS's window: what is saved, drawn without any mask, is what was evaluated."""
    window = ("--prune_method", "rad_splat", "--use_importance_mask", "--prune_iterations", "50")
    flags = (*window, "--train_mask_iters", "20", "--lambda_mask", "1", "--test_iterations", "60", "70", "80")
    extra, target = ("--save_iterations", "60", "70", "--checkpoint_iterations", "70"), tmp_path / "m"
    assert train.main(arguments(any_scene, target, *flags, *extra)) == 0
    evaluated = {each["iteration"]: each for each in read_log(target / "metrics.jsonl").evaluations[::2]}
    plain = built(any_scene, tmp_path / "n", "--prune_method", "3dgs")
    for iteration in (60, 70):
        saved = load_ply(target / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply")
        assert len(saved["means"]) == evaluated[iteration]["num_gaussians"]
        params = {name: torch.from_numpy(values) for name, values in saved.items()}
        plain.table = type(plain.table).from_arrays({**params, "mask_logits": torch.full((len(params["means"]),), 9.0)})
        again = next(each for each in evaluate(plain, plain.window(iteration - 1)) if each.split == "test")
        assert again.psnr == pytest.approx(evaluated[iteration]["psnr"], abs=1e-4), (
            "ids, which break ties, are not in a ply"
        )
    pruned = load_checkpoint(target / "checkpoints" / "70").table  # behind the prune at the end of the window
    assert len(pruned) == evaluated[70]["num_gaussians"]
    assert torch.equal(pruned.params["opacities"], params["opacities"])
