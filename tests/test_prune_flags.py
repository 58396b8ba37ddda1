# SPDX-License-Identifier: Apache-2.0
"""The flags of pruning: what fits together, what a method does not read, schedules that follow the length."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.config import TrainConfig
from launch.pruning import choose_strategy, target_count
from masksplat.ops import get_body
from scene.cameras import Camera
from scene.errors import InputError


def parsed(command: str) -> TrainConfig:
    return parse_train(shlex.split(f"-s data -m out {command}"), {})


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--prune_method 3dgs --use_importance_mask", "--prune_method 3dgs measures none; choose --prune_method rad"),
        ("--prune_method compact_3dgs --use_importance_mask", "--prune_method compact_3dgs measures none"),
        (
            "--prune_method rad_splat --prune_percent 1.2",
            "--prune_percent 1.2 is impossible: give a number from 0 to 1",
        ),
        ("--prune_method rad_splat --prune_percent -.1", "--prune_percent -0.1 is impossible"),
        (
            "--prune_method rad_splat --iterations 7000",
            "nothing would be pruned. Give other ones, or --scale_schedules",
        ),
        (
            "--prune_method rad_splat --use_importance_mask --iterations 7000",
            "from 19501 to 20000 and --iterations is 7000: nothing would be pruned",
        ),
        (
            "--prune_method rad_splat --use_importance_mask --prune_iterations 9000",
            "would begin before density control ends (--densify_until_iter 15000)",
        ),
        (
            "--prune_method rad_splat --use_importance_mask --prune_iterations 16000 16100",
            "[16000, 16100] are less than --train_mask_iters 500 apart",
        ),
        ("--prune_method rad_splat --use_importance_mask --prune_iterations", "--prune_iterations is empty"),
        ("--prune_method rad_splat --lp_compat", "--lp_compat is a form of LP-3DGS's learned mask"),
        (
            "--prune_method rad_splat --use_importance_mask --lp_compat --mask_estimator ste",
            "and not with --mask_estimator ste",
        ),
        ("--target_gaussians 5 --target_mb 1", "give one of them"),
        ("--prune_method 3dgs --target_mb 1", "not with 3dgs"),
        ("--prune_method rad_splat --use_importance_mask --target_mb 1", "not with rad_splat --use_importance_mask"),
        ("--iterations 15010 --target_gaussians 100", "needs 20 iterations or more after density control"),
        ("--prune_method rad_splat --gumbel_temp 0", "--gumbel_temp 0.0 is impossible"),
        (
            "--prune_method rad_splat --use_importance_mask --bsz 4 --train_mask_iters 3",
            "--train_mask_iters 3 is less than one step of --bsz 4: no mask would be learned",
        ),
        (
            "--prune_method rad_splat --target_mb 20 --densify_until_iter 25000",
            "--prune_use_percent_iterations 20000, would come before density control ends (--densify_until_iter 25000)",
        ),
        ("--setting gamma --prune_finetune --start_pointcloud a.ply", "--setting gamma is a preset of whole trainings"),
    ],
)
def test_what_does_not_fit_together_is_refused(command: str, sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        parsed(command)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("--prune_method rad_splat --gumbel_temp 1 --mask_lr .1 --prune_percent .5", ["mask_lr", "gumbel_temp"]),
        ("--prune_method rad_splat --use_importance_mask --gumbel_temp 1 --prune_percent .5", ["prune_percent"]),
        ("--prune_method compact_3dgs --mask_lr .1 --mask_from_iter 5", ["mask_from_iter"]),
        ("--prune_method compact_3dgs --mask_estimator gumbel --mask_lr .1 --gumbel_temp 1", ["mask_lr"]),
        ("--target_mb 3 --lambda_mask 1 --mask_lr .1", ["lambda_mask"]),
        ("--lambda_mask 1 --prune_percent .2", ["prune_percent"]),
        ("--prune_method mini_splatting --target_mb 3 --prune_percent .2", ["prune_percent"]),
    ],
)
def test_what_a_method_does_not_read_is_said(command: str, names: list[str]) -> None:
    assert [notice.split()[0] for notice in parsed(command).notices] == [f"--{name}" for name in names]


@pytest.mark.parametrize("command", ["--setting alpha", "--mask_from_iter 8000", "--mask_until_iter 0"])
def test_masks_that_nothing_pulls_are_said(command: str) -> None:
    assert "masks will hardly prune" in parsed(f"{command} --iterations 7000").notices[-1]


@pytest.mark.parametrize(
    "command", ["", "--setting alpha --scale_schedules", "--lambda_mask 0 --mask_from_iter 8000", "--prune_method 3dgs"]
)
def test_masks_that_are_pulled_or_not_meant_to_be_are_not(command: str) -> None:
    assert not parsed(f"{command} --iterations 7000").notices


def test_schedules_follow_the_length_when_asked() -> None:
    asked = parsed("--prune_method rad_splat --use_importance_mask --iterations 7000 --scale_schedules")
    density, prune = asked.density, asked.prune
    assert (density.densify_from_iter, density.densify_until_iter, density.opacity_reset_interval) == (117, 3500, 700)
    assert (prune.prune_iterations, prune.train_mask_iters) == ((4550,), 117)
    assert (prune.prune_use_percent_iterations, asked.optimization.position_lr_max_steps) == ((4667,), 7000)
    assert (asked.mask.mask_from_iter, asked.mask.mask_until_iter, asked.mask.mask_prune_iter) == (0, 7000, 233)
    assert density.densification_interval == 100
    given = parsed("--iterations 3000 --scale_schedules --setting alpha --densify_until_iter 900 --mask_prune_iter 77")
    assert (given.mask.mask_from_iter, given.mask.mask_until_iter, given.mask.mask_prune_iter) == (1900, 2000, 77)
    assert given.density.densify_until_iter == 900
    assert parsed("--iterations 3000").density.densify_until_iter == 15_000


def test_masks_are_pulled_harder_in_a_shorter_schedule() -> None:
    for setting, usual in (("beta", 5e-4), ("gamma", 1e-3)):
        short = parsed(f"--iterations 3750 --scale_schedules --setting {setting}")
        assert short.mask.lambda_mask == pytest.approx(16 * usual, rel=1e-12)
    assert parsed("--iterations 7500 --scale_schedules --lambda_mask 0.002").mask.lambda_mask == 0.002
    assert parsed("--iterations 7500 --setting gamma").mask.lambda_mask == 1e-3
    learned = parsed("--prune_method rad_splat --use_importance_mask --iterations 7500 --scale_schedules")
    assert learned.mask.lambda_mask == 0.02  # its window is as strong as it is short already


def test_the_weight_of_a_window_has_a_value_of_its_own() -> None:
    window = "--prune_method rad_splat --use_importance_mask"
    assert parsed(window).mask.lambda_mask == parsed("--prune_method compact_3dgs --mask_est gumbel").mask.lambda_mask
    assert parsed(window).mask.lambda_mask == 0.02
    assert parsed(f"{window} --lambda_mask .3").mask.lambda_mask == 0.3
    for other in (f"{window} --lp_compat", "--prune_method compact_3dgs", "", "--prune_method rad_splat"):
        assert parsed(other).mask.lambda_mask == 5e-4


def test_megabytes_are_bytes_of_the_ply() -> None:
    assert target_count(parsed("--target_mb 12.4")) == 50_000  # 62 numbers of 4 bytes
    assert target_count(parsed("--target_mb 1 --sh_degree 0")) == 14_705
    assert target_count(parsed("--target_gaussians 777")) == 777
    assert target_count(parsed("")) == 0
    with pytest.raises(InputError, match="less than one Gaussian needs"):
        target_count(parsed("--target_mb 0.0001"))


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("", ["DensityControl", "MaskPruning"]),
        ("--target_mb 2", ["DensityControl", "TargetSize"]),
        ("--prune_method rad_splat", ["DensityControl", "ScorePruning"]),
        ("--prune_method mini_splatting --use_importance_mask", ["DensityControl", "LearnedMask"]),
        ("--prune_method compact_3dgs --disable_auto_densification", ["CompactMask"]),
        ("--prune_method 3dgs", ["DensityControl"]),
    ],
)
def test_strategies_are_built_from_flags(command: str, kinds: list[str]) -> None:
    camera = Camera("a", Path("a.png"), 8, 8, 8.0, 8.0, 4.0, 4.0, np.eye(3), np.zeros(3))
    common: dict[str, Any] = {"extent": 1.0, "body": get_body("reference"), "communicator": Communicator()}
    built = choose_strategy(parsed(command), cameras=[camera], **common)
    assert [type(each).__name__ for each in built.strategies] == kinds
    if "splat" in command:
        with pytest.raises(InputError, match="importance scores need training views"):
            choose_strategy(parsed(command), cameras=[], **common)
