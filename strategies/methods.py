# SPDX-License-Identifier: Apache-2.0
"""The strategies that a run is made of, by the name of its pruning method. Exactly one method prunes in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategies.base import CombinedStrategy, RankReducer, Strategy
from strategies.compact import CompactConfig, CompactMask
from strategies.density import DensityConfig, DensityControl, PruneTest
from strategies.importance import SCORES, ScorePass, importance_of
from strategies.lp import LearnedMask, LearnedMaskConfig
from strategies.lp_published import PublishedLearnedMask
from strategies.mask import MaskConfig, MaskPruning
from strategies.percent import Count, ScorePruning, Share
from strategies.target import TargetConfig, TargetSize

PRUNE_METHODS = ("mask", "3dgs", *SCORES, "compact_3dgs")


@dataclass(frozen=True)
class PruneConfig:
    """The flags of the methods of LP-3DGS and of target sizes; iterations count images.

    use_importance_mask: learn a mask on the score instead of pruning a share by it. prune_iterations,
    train_mask_iters, gumbel_temp: see `LearnedMaskConfig`. prune_use_percent_iterations, prune_percent: when, and the
    share that goes. mask_estimator: "auto", "gumbel" or "ste". lp_compat: the published program's arithmetic.
    target_gaussians: wanted size of the model, 0 for none.
    """

    use_importance_mask: bool = False
    prune_iterations: tuple[int, ...] = (19_500,)
    train_mask_iters: int = 500
    gumbel_temp: float = 0.5
    prune_use_percent_iterations: tuple[int, ...] = (20_000,)
    prune_percent: float = 0.6
    mask_estimator: str = "auto"
    lp_compat: bool = False
    target_gaussians: int = 0


@dataclass(frozen=True, eq=False)
class _Parts:
    """Everything a method may be built from."""

    mask: MaskConfig
    prune: PruneConfig
    densify_until_iter: int
    first_iteration: int
    iterations: int
    ranks: RankReducer | None
    score_views: ScorePass | None
    status: Tensor | None


def build_strategy(
    prune_method: str,
    *,
    density: DensityConfig | None,
    mask: MaskConfig,
    extent: float,
    iterations: int,
    first_iteration: int = 0,
    prune: PruneConfig | None = None,
    ranks: RankReducer | None = None,
    score_views: ScorePass | None = None,
    status: Tensor | None = None,
) -> CombinedStrategy:
    """Density control (absent when `density` is None) and one of PRUNE_METHODS; "3dgs" prunes nothing else.

    Args: extent: the scene's extent in world units; iterations: the last image of the run; first_iteration: how many
    images a model that is pruned afterwards was trained with before; score_views: the pass over
    the training views, which the scores' methods need; status: words of a device that say when nothing may be
    updated (`masksplat.masks.mask_update`).
    Raises: ValueError for another method, or values that do not go together.
    """
    if prune_method not in PRUNE_METHODS:
        raise ValueError(f"--prune_method {prune_method!r} is unknown; choose one of {', '.join(PRUNE_METHODS)}")
    densify_until = density.densify_until_iter if density is not None else 0
    parts = _Parts(mask, prune or PruneConfig(), densify_until, first_iteration, iterations, ranks, score_views, status)
    pruning = _pruning(prune_method, parts)
    strategies: list[Strategy] = []
    if density is not None:
        prune_test: PruneTest | None = pruning.prune_test if isinstance(pruning, MaskPruning | CompactMask) else None
        strategies.append(DensityControl(density, extent, prune_test=prune_test, ranks=ranks))
    if pruning is not None:
        strategies.append(pruning)
    return CombinedStrategy(strategies)


def _pruning(prune_method: str, parts: _Parts) -> Strategy | None:
    """The strategy of one pruning method."""
    if prune_method == "3dgs":
        return None
    if prune_method == "compact_3dgs":
        return _compact(parts)
    if prune_method == "mask":
        return _masks(parts)
    return _scored(prune_method, parts)


def _masks(parts: _Parts) -> Strategy:
    common: Any = {"iterations": parts.iterations, "ranks": parts.ranks, "status": parts.status}
    if parts.prune.target_gaussians:
        config = TargetConfig(parts.prune.target_gaussians, parts.mask.mask_lr)
        return TargetSize(config, starts_after=max(parts.densify_until_iter, parts.first_iteration), **common)
    return MaskPruning(parts.mask, densify_until_iter=parts.densify_until_iter, **common)


def _compact(parts: _Parts) -> Strategy:
    """Compact-3DGS; with the Gumbel-sigmoid the mask of LP-3DGS's window, on opacity and scale (its Table 3)."""
    if parts.prune.mask_estimator == "gumbel":
        return LearnedMask(_window_config(parts, masks_scales=True), None, ranks=parts.ranks)
    config = CompactConfig(parts.mask.lambda_mask, parts.mask.mask_lr, parts.mask.mask_prune_iter)
    return CompactMask(
        config, iterations=parts.iterations, densify_until_iter=parts.densify_until_iter, ranks=parts.ranks
    )


def _scored(score: str, parts: _Parts) -> Strategy:
    """Pruning by a score: with a mask that is learned on it, or a share, or down to a size."""
    prune, score_views = parts.prune, parts.score_views
    if score_views is None:
        raise ValueError(f"--prune_method {score} measures scores; build_strategy needs score_views")
    if not prune.use_importance_mask:
        size: Callable[[int], int] = Share(prune.prune_percent)
        if prune.target_gaussians:
            size = Count(prune.target_gaussians)
        return ScorePruning(score, prune.prune_use_percent_iterations, size, score_views, ranks=parts.ranks)
    config = _window_config(parts, masks_scales=False)
    if prune.lp_compat:
        return PublishedLearnedMask(config, score, score_views, ranks=parts.ranks)
    return LearnedMask(config, importance_of(score, score_views, parts.ranks), ranks=parts.ranks)


def _window_config(parts: _Parts, *, masks_scales: bool) -> LearnedMaskConfig:
    prune = parts.prune
    return LearnedMaskConfig(
        prune.prune_iterations,
        prune.train_mask_iters,
        prune.gumbel_temp,
        parts.mask.lambda_mask,
        "gumbel" if prune.mask_estimator == "auto" else prune.mask_estimator,
        masks_scales,
    )
