# SPDX-License-Identifier: Apache-2.0
"""Pruning and finetuning of a trained model, as MaskGaussian's prune_finetune.py: the flags' values and rates.

A trained model counts as one of 30 000 iterations: a ply begins there, so that spherical harmonics and the position's
learning rate are where they were. Masks are learned for 5 000 iterations more, without density control; the methods of
LP-3DGS prune at once, or learn their mask in the first 500 iterations. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config import TrainConfig
from scene.errors import InputError

TRAINED_ITERATIONS = 30_000
USUAL_ITERATIONS = 35_000
TEST_INTERVAL = 500
DECAY, DECAY_INTERVAL = 0.95, 400
"""All learning rates but the position's: times 0.95 after every 400 iterations."""

FINETUNE_LAMBDA = 0.02
"""What MaskGaussian's published 0.1 amounts to: there the term stands inside the bracket that --lambda_dssim, 0.2,
multiplies."""


def finetune_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags that --prune_finetune stands for, by name; nothing without it."""
    if not given.get("prune_finetune"):
        return {}
    last = given.get("iterations", USUAL_ITERATIONS)
    tests = (TRAINED_ITERATIONS + 1, *range(TRAINED_ITERATIONS + TEST_INTERVAL, last + 1, TEST_INTERVAL), last)
    return {
        "iterations": last,
        "position_lr_max_steps": USUAL_ITERATIONS,
        **({"lambda_mask": FINETUNE_LAMBDA} if given.get("prune_method", "mask") == "mask" else {}),
        "opacity_decay": 0.0,
        "anneal_share": 0.0,
        "mask_from_iter": 0,
        "mask_until_iter": last,
        "disable_auto_densification": True,
        "prune_iterations": (TRAINED_ITERATIONS,),
        "prune_use_percent_iterations": (TRAINED_ITERATIONS + 1,),
        "test_iterations": given.get("test_iterations", tests),
    }


def trained_before(config: TrainConfig) -> int:
    """The iterations that the model a training starts from counts with, as far as the flags say so; 0 for none."""
    return TRAINED_ITERATIONS if config.prune.prune_finetune or config.prune.start_pointcloud else 0


def check_finetune(config: TrainConfig) -> None:
    """Raises: InputError when there is nothing to finetune, or nothing left to do."""
    prune, start = config.prune, config.checkpoint
    has_model = bool(prune.start_pointcloud or start.start_checkpoint or start.auto_start_checkpoint)
    if prune.prune_finetune and not has_model:
        raise InputError(
            "--prune_finetune has no trained model: give one with --start_pointcloud FILE.ply or --start_checkpoint"
        )
    if prune.prune_finetune and prune.scale_schedules:
        raise InputError("--prune_finetune has schedules of its own; leave --scale_schedules out")
    if prune.start_pointcloud and start.start_checkpoint:
        raise InputError("--start_pointcloud and --start_checkpoint both say where to start; give one of them")
    if prune.start_pointcloud and config.optimization.iterations <= TRAINED_ITERATIONS:
        raise InputError(
            f"a model from --start_pointcloud counts as one of {TRAINED_ITERATIONS} iterations and --iterations is "
            f"{config.optimization.iterations}: nothing is left to train; give --iterations {USUAL_ITERATIONS} for "
            f"{USUAL_ITERATIONS - TRAINED_ITERATIONS} more"
        )


def rate_factor(config: TrainConfig, iteration: int) -> float:
    """What --prune_finetune multiplies the learning rates with at an iteration; the position's is not among them."""
    if not config.prune.prune_finetune:
        return 1.0
    return DECAY ** (max(iteration - TRAINED_ITERATIONS - 1, 0) // DECAY_INTERVAL)
