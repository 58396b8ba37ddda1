# SPDX-License-Identifier: Apache-2.0
"""Which flags each pruning method reads, what fits together, and schedules that follow --iterations. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from launch.config import TrainConfig
from launch.finetune import trained_before
from launch.flag_groups import DensityFlags, MaskFlags, OptimizationConfig, PruneFlags
from launch.parser import flags_of
from scene.errors import InputError

SCORES = ("rad_splat", "mini_splatting")
USUAL_LENGTH = 30_000
WINDOW_LAMBDA = 0.02
"""--lambda_mask where a mask is learned in a window: a Gaussian goes when the images lose less by its factor than this
divided by the number of Gaussians (docs/log.md)."""

SHORTEST_TARGET = 20
"""Iterations after densification that a target size needs at least."""

SCALED_FLAGS: Mapping[str, type] = MappingProxyType(
    {
        "position_lr_max_steps": OptimizationConfig,
        "densify_from_iter": DensityFlags,
        "densify_until_iter": DensityFlags,
        "opacity_reset_interval": DensityFlags,
        "mask_from_iter": MaskFlags,
        "mask_until_iter": MaskFlags,
        "mask_prune_iter": MaskFlags,
        "prune_iterations": PruneFlags,
        "train_mask_iters": PruneFlags,
        "prune_use_percent_iterations": PruneFlags,
    }
)
"""The flags that --scale_schedules multiplies, and the groups that hold their defaults."""

PULL_EXPONENT = 4 / 3
"""Of the length in the weight of the masks' loss: with it 7 000 images find about the share that 30 000 find."""

WINDOW_FLAGS = frozenset({"lambda_mask", "prune_iterations", "train_mask_iters", "gumbel_temp", "mask_estimator"})
TARGET_FLAGS = frozenset({"target_gaussians", "target_mb"})
ALWAYS_READ = frozenset(
    {"prune_method", "scale_schedules", "prune_finetune", "start_pointcloud", "use_importance_mask"}
)


def window_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The weight of the loss of a mask that is learned in a window, by flag name; nothing for other methods.

    The published 5e-4 belongs to the published arithmetic (--lp_compat).
    """
    is_window = given.get("use_importance_mask") or given.get("mask_estimator") == "gumbel"
    if given.get("prune_method") not in (*SCORES, "compact_3dgs") or not is_window or given.get("lp_compat"):
        return {}
    return {"lambda_mask": WINDOW_LAMBDA}


def scaled_schedules(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """With --scale_schedules: every schedule that is not given times iterations / 30000, at least 1 (or 0 if it was).

    The weight of the masks' loss is divided by a power of that: a smaller pull for as long moves a logit as far as a
    larger one for a shorter time (docs/log.md, 17 and 18).

    Args: values: those given and those of a preset; given: those of the command line.
    """
    if not values.get("scale_schedules"):
        return {}
    factor = values.get("iterations", USUAL_LENGTH) / USUAL_LENGTH
    scaled = {}
    for name, group in SCALED_FLAGS.items():
        usual = values.get(name, getattr(group, name))
        if name not in given:
            scaled[name] = (
                tuple(_scaled(x, factor) for x in usual) if isinstance(usual, tuple) else _scaled(usual, factor)
            )
    if values.get("prune_method", "mask") == "mask" and "lambda_mask" not in given:
        scaled["lambda_mask"] = values.get("lambda_mask", MaskFlags.lambda_mask) / factor**PULL_EXPONENT
    return scaled


def _scaled(iteration: int, factor: float) -> int:
    return max(round(iteration * factor), min(iteration, 1))


def flags_without_method(config: TrainConfig) -> list[str]:
    """A sentence for each flag of a pruning method that was given and that the chosen method does not read."""
    method, read = config.mask.prune_method, _flags_read(config) | ALWAYS_READ
    known = [each for group in (MaskFlags, PruneFlags) for each in flags_of(group) if not each.spec.inert]
    return [
        f"--{each.name} has no effect: --prune_method {method}{_mode(config)} does not read it."
        for each in known
        if each.name in config.given and each.name not in read
    ]


def masks_without_pull(config: TrainConfig) -> list[str]:
    """A sentence when nothing ever pushes the masks towards fewer Gaussians."""
    mask, last = config.mask, config.optimization.iterations
    before = trained_before(config)
    is_pulled = before < mask.mask_until_iter and mask.mask_from_iter <= last
    if mask.prune_method != "mask" or has_target(config) or is_pulled or mask.lambda_mask == 0:
        return []
    return [
        f"The masks will hardly prune: --lambda_mask {mask.lambda_mask:g} acts from --mask_from_iter "
        f"{mask.mask_from_iter} to --mask_until_iter {mask.mask_until_iter}, and this training goes from "
        f"{before + 1} to --iterations {last}. --scale_schedules fits the schedules to its length."
    ]


def _mode(config: TrainConfig) -> str:
    """What decides which kind of its method is meant, for messages."""
    if config.prune.use_importance_mask:
        return " --use_importance_mask"
    return " with a target size" if has_target(config) else ""


def _flags_read(config: TrainConfig) -> frozenset[str]:
    """The flags that decide how the chosen method prunes."""
    method, prune = config.mask.prune_method, config.prune
    if method == "mask":
        masks = {"lambda_mask", "mask_from_iter", "mask_until_iter", "mask_prune_iter", "setting"}
        return TARGET_FLAGS | {"mask_lr"} | (frozenset() if has_target(config) else frozenset(masks))
    if method == "compact_3dgs":
        return WINDOW_FLAGS if learns_in_window(config) else _COMPACT_FLAGS
    if method in SCORES and prune.use_importance_mask:
        return WINDOW_FLAGS | {"lp_compat"}
    if method in SCORES:
        share = frozenset[str]() if has_target(config) else frozenset({"prune_percent"})
        return TARGET_FLAGS | {"prune_use_percent_iterations"} | share
    return frozenset()


_COMPACT_FLAGS = frozenset({"lambda_mask", "mask_lr", "mask_prune_iter", "mask_estimator"})


def learns_in_window(config: TrainConfig) -> bool:
    """Whether the method learns its mask in the windows that --prune_iterations starts."""
    method, prune = config.mask.prune_method, config.prune
    return prune.use_importance_mask or (method == "compact_3dgs" and prune.mask_estimator == "gumbel")


def has_target(config: TrainConfig) -> bool:
    """Whether the model shall end at a given size."""
    return bool(config.prune.target_gaussians or config.prune.target_mb)


def last_prune(config: TrainConfig) -> int | None:
    """The iteration behind which nothing is pruned any more; None for methods that prune to the end, or never."""
    method, prune = config.mask.prune_method, config.prune
    if learns_in_window(config):
        return max(prune.prune_iterations) + prune.train_mask_iters
    if method in SCORES:
        return max(prune.prune_use_percent_iterations)
    if method == "mask" and has_target(config):
        first = target_start(config)
        return first + (config.optimization.iterations - first) // 2
    return None


def target_start(config: TrainConfig) -> int:
    """The iteration after which --prune_method mask begins to choose for a target size."""
    density = config.density
    return max(0 if density.disable_auto_densification else density.densify_until_iter, trained_before(config))


def check_pruning(config: TrainConfig) -> None:
    """Raises: InputError for pruning flags that are fine alone and impossible together."""
    _check_method(config)
    if learns_in_window(config):
        _check_windows(config)
    elif config.mask.prune_method in SCORES:
        _check_iterations(config)
    if has_target(config):
        _check_target(config)


def _check_method(config: TrainConfig) -> None:
    method, prune = config.mask.prune_method, config.prune
    if prune.use_importance_mask and method not in SCORES:
        raise InputError(
            f"--use_importance_mask learns a mask on an importance score and --prune_method {method} measures none; "
            "choose --prune_method rad_splat or mini_splatting, or leave the flag out"
        )
    if prune.lp_compat and (method not in SCORES or not prune.use_importance_mask or prune.mask_estimator == "ste"):
        raise InputError(
            "--lp_compat is a form of LP-3DGS's learned mask; it goes with --prune_method rad_splat or mini_splatting "
            "and --use_importance_mask, and not with --mask_estimator ste"
        )


def _check_windows(config: TrainConfig) -> None:
    """Windows must lie one behind the other, behind densification and before the end."""
    starts, length = sorted(config.prune.prune_iterations), config.prune.train_mask_iters
    last, density = config.optimization.iterations, config.density
    if not starts:
        raise InputError("--prune_iterations is empty, so no mask would be learned; give the start of a window")
    if starts[-1] + length > last:
        raise InputError(
            f"the mask would be learned from {starts[-1] + 1} to {starts[-1] + length} and --iterations is {last}: "
            "nothing would be pruned. Give --prune_iterations and --train_mask_iters, or --scale_schedules"
        )
    if length < config.optimization.bsz:
        raise InputError(
            f"--train_mask_iters {length} is less than one step of --bsz {config.optimization.bsz}: no mask would be "
            "learned; give a longer window or a smaller batch"
        )
    if any(later - earlier < length for earlier, later in zip(starts, starts[1:], strict=False)):
        raise InputError(f"--prune_iterations {starts} are less than --train_mask_iters {length} apart")
    before = trained_before(config)
    if starts[0] < before:
        raise InputError(
            f"the mask window after --prune_iterations {starts[0]} lies before iteration {before}, which the model to "
            f"start from counts with: nothing would be pruned; give --prune_iterations {before} or more"
        )
    first = 0 if density.disable_auto_densification else density.densify_until_iter - 1
    if starts[0] < first:
        raise InputError(
            f"the mask window after --prune_iterations {starts[0]} would begin before density control ends "
            f"(--densify_until_iter {density.densify_until_iter}), and new Gaussians have no score; change one of them"
        )


def _check_iterations(config: TrainConfig) -> None:
    iterations, last = config.prune.prune_use_percent_iterations, config.optimization.iterations
    before = trained_before(config)
    if not any(before < each < last for each in iterations):
        raise InputError(
            f"--prune_method {config.mask.prune_method} prunes at --prune_use_percent_iterations {list(iterations)}, "
            f"none of which lies behind {before} and before --iterations {last}, when the model is saved: nothing "
            "would be pruned. Give other ones, or --scale_schedules, or learn a mask with --use_importance_mask"
        )


def _check_target(config: TrainConfig) -> None:
    method, prune = config.mask.prune_method, config.prune
    if prune.target_gaussians and prune.target_mb:
        raise InputError("--target_gaussians and --target_mb both say how large the model shall be; give one of them")
    if method not in ("mask", *SCORES) or prune.use_importance_mask:
        raise InputError(
            "a target size goes with --prune_method mask, rad_splat or mini_splatting, not with "
            f"{method}{' --use_importance_mask' if prune.use_importance_mask else ''}"
        )
    ends = target_start(config)
    first_prune = min((each for each in prune.prune_use_percent_iterations if each > trained_before(config)), default=0)
    if method in SCORES and first_prune < ends - 1:
        raise InputError(
            f"the prune to the target size, at --prune_use_percent_iterations {first_prune}, would come before density "
            f"control ends (--densify_until_iter {ends}), and new Gaussians would follow; change one of them"
        )
    if method == "mask" and config.optimization.iterations - ends < SHORTEST_TARGET:
        raise InputError(
            f"a target size needs {SHORTEST_TARGET} iterations or more after density control: lower "
            f"--densify_until_iter {ends} or raise --iterations {config.optimization.iterations}, or give "
            "--scale_schedules"
        )
