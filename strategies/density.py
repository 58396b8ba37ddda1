# SPDX-License-Identifier: Apache-2.0
"""Adaptive density control as 3DGS really behaves: clone, split, prune, and the reset of opacities.

Its 20-pixel prune is absent, because in 3DGS it never acts (the radii are zeroed just before). Decisions depend on a
Gaussian's values and id only, never on its row: children's ids and noise come from (parent id, event, child number).

Letters: N rows of this rank, M rows after clone and split, C children.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from masksplat.random import SPLIT, child_ids, normal
from scene.gaussians import GaussianTable
from scene.row_edit import EditReport, RowEdit, TableEdit, ValueEdit
from strategies.base import Gate, OneRank, RankReducer, spare_best
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window

RESET_OPACITY = 0.01
SPLIT_SHRINKAGE = 1.6  # 0.8 times the number of children
MAX_SCALE_OF_EXTENT = 0.1
CLONE_CHILD, SPLIT_CHILDREN = 0, (1, 2)  # child numbers


@dataclass(frozen=True)
class DensityConfig:
    """The flags of density control; iterations count images.

    Events are the multiples of densification_interval strictly between densify_from_iter and densify_until_iter.
    densify_grad_threshold: mean over views of the norm of the NDC position gradient. percent_dense: the largest scale,
    as a fraction of the scene's extent, that is cloned rather than split. min_opacity: below it a Gaussian is pruned.
    opacity_reset_until_iter: last reset at the latest; -1: as long as densification lasts.
    """

    densify_from_iter: int = 500
    densify_until_iter: int = 15_000
    densification_interval: int = 100
    densify_grad_threshold: float = 2e-4
    percent_dense: float = 0.01
    min_opacity: float = 0.005
    opacity_reset_interval: int = 3000
    opacity_reset_until_iter: int = -1
    white_background: bool = False


class PruneTest(Protocol):
    """A further reason to prune, asked in every densification event."""

    def __call__(self, logits: Tensor, ids: Tensor, event: int, seed: int) -> Tensor:
        """(M,) bool, the rows to remove, from mask logits (M,) and ids (M,)."""


class DensityControl:
    """Clones, splits, prunes and resets opacities on the schedule of 3DGS.

    Args: extent: the scene's extent in world units; prune_test: the masks' test, combined with the event's own;
    ranks: reductions over the ranks that share the Gaussians.
    """

    def __init__(
        self,
        config: DensityConfig,
        extent: float,
        *,
        prune_test: PruneTest | None = None,
        ranks: RankReducer | None = None,
    ) -> None:
        if not extent > 0:
            raise ValueError(f"the scene's extent must be positive, got {extent}")
        self.config = config
        self.extent = extent
        self._prune_test = prune_test
        self._ranks = ranks if ranks is not None else OneRank()
        last = config.densify_until_iter - 1
        self._events = Schedule(config.densify_from_iter + 1, last, config.densification_interval)
        last_reset = last if config.opacity_reset_until_iter < 0 else min(last, config.opacity_reset_until_iter)
        self._resets = Schedule(1, last_reset, config.opacity_reset_interval)
        first = config.densify_from_iter
        self._white_reset = Schedule(first, min(first, last_reset) if config.white_background else first - 1, 1)

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """None: density control draws everything."""
        return None

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> dict[str, float]:
        """Nothing: the statistics are gathered by the step itself."""
        return {}

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> tuple[()]:
        """Nothing: no launch of a step is its own."""
        return ()

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """Clone, split and prune when an event is due; after that the reset of opacities when one is due."""
        event = self._events.event(window)
        if event is not None:
            yield self._densify(table, event, seed)
        reset = self._resets.event(window) or self._white_reset.event(window)
        if reset is not None:
            yield _reset_of_opacities(table, reset)

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, everything."""
        return torch.ones_like(table.ids, dtype=torch.bool)

    def _densify(self, table: GaussianTable, event: int, seed: int) -> RowEdit:
        """One event as one edit: clone and split what moves, then prune all rows, children included."""
        is_moving = _mean_gradient(table) >= self.config.densify_grad_threshold
        is_small = _largest_scale(table.params["scales"]) <= self.config.percent_dense * self.extent
        clones = torch.nonzero(is_moving & is_small).flatten()
        parents = torch.nonzero(is_moving & ~is_small).flatten()
        edit = RowEdit.identity(table.ids).keep(~(is_moving & ~is_small))
        edit = edit.append(clones, child_ids(table.ids[clones], event, CLONE_CHILD))
        ids = torch.cat([child_ids(table.ids[parents], event, child) for child in SPLIT_CHILDREN])
        parents_of = parents.repeat(len(SPLIT_CHILDREN))
        edit = edit.append(parents_of, ids, _split_values(table, parents_of, ids, event, seed))
        report = EditReport(iteration=event, cloned=len(clones), split=len(parents))
        return self._prune(table, edit, report, seed)

    def _prune(self, table: GaussianTable, edit: RowEdit, report: EditReport, seed: int) -> RowEdit:
        """The edit without the rows, old or new, that are transparent, too large or masked away."""
        opacities = edit.preview("opacities", table.params["opacities"])
        is_transparent = torch.sigmoid(opacities) < self.config.min_opacity
        is_large = torch.zeros_like(is_transparent)
        if report.iteration > self.config.opacity_reset_interval:
            scales = edit.preview("scales", table.params["scales"])
            is_large = _largest_scale(scales) > MAX_SCALE_OF_EXTENT * self.extent
        is_masked = torch.zeros_like(is_transparent)
        if self._prune_test is not None:
            logits = edit.preview("mask_logits", table.params["mask_logits"])
            is_masked = self._prune_test(logits, edit.ids, report.iteration, seed)
        remove = spare_best(is_transparent | is_large | is_masked, opacities, edit.ids, self._ranks)
        kept = edit.keep(~remove)
        for_size = ~is_transparent & is_large
        for_mask = ~is_transparent & ~is_large
        counts = torch.stack([(remove & reason).sum() for reason in (is_transparent, for_size, for_mask)]).tolist()
        report = replace(
            report,
            pruned_opacity=counts[0],
            pruned_size=counts[1],
            pruned_mask=counts[2],
            num_gaussians=len(kept),
        )
        return kept.with_report(report, resets_statistics=True)


def _mean_gradient(table: GaussianTable) -> Tensor:
    """(N,) mean norm of the NDC position gradient over the views that count; 0 where there was none."""
    count = table.statistics["view_count"]
    return torch.where(count > 0, table.statistics["grad_norm_sum"] / count, 0)


def _largest_scale(log_scales: Tensor) -> Tensor:
    """(N,) largest of the three axes in world units."""
    return log_scales.amax(dim=1).exp()


def _split_values(table: GaussianTable, parents: Tensor, ids: Tensor, event: int, seed: int) -> dict[str, Tensor]:
    """Means (C, 3) drawn from the parents' Gaussians with noise keyed by the child's id, and log scales (C, 3)."""
    log_scales = table.params["scales"][parents]
    offsets = normal(seed, event, ids, SPLIT, log_scales.dtype) * log_scales.exp()
    rotated = _rotate(table.params["quats"][parents], offsets)
    return {"means": table.params["means"][parents] + rotated, "scales": log_scales - math.log(SPLIT_SHRINKAGE)}


def _rotate(quats: Tensor, vectors: Tensor) -> Tensor:
    """(C, 3) vectors rotated by quaternions (C, 4) wxyz of any length: v + 2 w (q x v) + 2 q x (q x v)."""
    unit = torch.nn.functional.normalize(quats, dim=1)
    twice = 2 * torch.linalg.cross(unit[:, 1:], vectors)
    return vectors + unit[:, :1] * twice + torch.linalg.cross(unit[:, 1:], twice)


def _reset_of_opacities(table: GaussianTable, iteration: int) -> ValueEdit:
    """The edit that lowers every opacity to 0.01 or less and forgets the opacities' moments."""
    highest = math.log(RESET_OPACITY / (1 - RESET_OPACITY))
    report = EditReport(iteration=iteration, opacity_reset=True, num_gaussians=len(table))
    return ValueEdit("opacities", table.params["opacities"].clamp(max=highest), report)
