# SPDX-License-Identifier: Apache-2.0
"""The strategies that a run is made of, by the name of its pruning method."""

from __future__ import annotations

from strategies.base import CombinedStrategy, RankReducer, Strategy
from strategies.density import DensityConfig, DensityControl
from strategies.mask import MaskConfig, MaskPruning

PRUNE_METHODS = ("mask", "3dgs")


def build_strategy(
    prune_method: str,
    *,
    density: DensityConfig | None,
    mask: MaskConfig,
    extent: float,
    iterations: int,
    ranks: RankReducer | None = None,
) -> CombinedStrategy:
    """Density control (absent when `density` is None) and, for "mask", the masks; "3dgs" has no masks at all.

    Args: extent: the scene's extent in world units; iterations: the last image of the run.
    Raises: ValueError for another method.
    """
    if prune_method not in PRUNE_METHODS:
        raise ValueError(f"--prune_method {prune_method!r} is unknown; choose one of {', '.join(PRUNE_METHODS)}")
    strategies: list[Strategy] = []
    pruning = None
    if prune_method == "mask":
        densify_until = density.densify_until_iter if density is not None else 0
        pruning = MaskPruning(mask, iterations=iterations, densify_until_iter=densify_until, ranks=ranks)
    if density is not None:
        prune_test = pruning.prune_test if pruning is not None else None
        strategies.append(DensityControl(density, extent, prune_test=prune_test, ranks=ranks))
    if pruning is not None:
        strategies.append(pruning)
    return CombinedStrategy(strategies)
