# SPDX-License-Identifier: Apache-2.0
"""LP-3DGS: in a short window after densification a mask on the importance score learns which Gaussians to keep.

A Gaussian with the learned number m and the score S is drawn with opacity sigma(o) GS(m S), GS being a Gumbel-sigmoid
with fresh noise in every step. The loss gets lambda times the mean of GS: it pushes every m down, and the images push
up those that matter. At the end of the window the Gaussians with m S <= 0 go, without noise; a Gaussian that no
training view shows (S = 0) is one of them. Where the published program does something else: docs/parity.md.

m is kept in the table as its mask logit, from which it differs by a constant (`mask_parameter`): a table that no mask
was learned in means m = 1 everywhere. S is kept beside the statistics as long as a window lasts, so that both move with
the rows and are part of a checkpoint.

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from masksplat.masks import mask_update
from masksplat.random import MASK_SAMPLE, uniform
from masksplat.types import AdamStep
from scene.gaussians import INITIAL_MASK_LOGIT, GaussianTable
from scene.row_edit import EditReport, Override, RowEdit, TableEdit, ValueEdit
from strategies.base import Gate, OneRank, RankReducer, spare_best
from strategies.estimators import ESTIMATORS, Factor, gumbel_sigmoid, mean_gumbel_sigmoid, straight_through
from strategies.importance import Importance, with_mean_one
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window

INITIAL_PARAMETER = 1.0
IMPORTANCE = "importance"
LEARNING_RATE = 0.05
WEIGHT_DECAY = 0.01
EPS = 1e-15
REFRESH_EVERY = 20
SCORE_THRESHOLD = 0.5
"""A straight-through factor on a score is 1 where sigma(m S) is above it. Compact-3DGS's 0.01 would ask for
m S <= -4.6, which the low scores, those that are to go, do not reach however negative m is."""


@dataclass(frozen=True)
class LearnedMaskConfig:
    """The window and the form of a mask that is learned in it; iterations count images.

    prune_iterations: each starts a window of train_mask_iters images, at whose end is a prune. gumbel_temp: of the
    Gumbel-sigmoid. lambda_mask: weight of the mean factor in the loss. estimator: "gumbel" or "ste". masks_scales: the
    factor multiplies scales, too (Compact-3DGS).
    """

    prune_iterations: tuple[int, ...] = (19_500,)
    train_mask_iters: int = 500
    gumbel_temp: float = 0.5
    lambda_mask: float = 5e-4
    estimator: str = "gumbel"
    masks_scales: bool = False

    def __post_init__(self) -> None:
        """Raises: ValueError for windows without length or that overlap, or another estimator or temperature."""
        starts = sorted(self.prune_iterations)
        gaps = [later - earlier for earlier, later in zip(starts, starts[1:], strict=False)]
        if self.train_mask_iters < 1 or any(gap < self.train_mask_iters for gap in gaps):
            raise ValueError(
                f"--prune_iterations {starts} with --train_mask_iters {self.train_mask_iters}: each window needs 1 "
                "iteration or more and must end before the next begins"
            )
        if self.estimator not in ESTIMATORS or not self.gumbel_temp > 0:
            raise ValueError(f"unknown estimator {self.estimator!r} or temperature {self.gumbel_temp} not above 0")


def mask_parameter(logits: Tensor) -> Tensor:
    """(N,) the learned number m of LP-3DGS and Compact-3DGS: 1 for a logit that was never touched."""
    return logits - (INITIAL_MASK_LOGIT - INITIAL_PARAMETER)


class LearnedMask:
    """Learns a mask in each window and prunes by it at the window's end.

    Args: importance: measures the score S; None: S = 1, a mask without score. ranks: reductions over all ranks.
    """

    def __init__(
        self, config: LearnedMaskConfig, importance: Importance | None, *, ranks: RankReducer | None = None
    ) -> None:
        self.config = config
        self._importance = importance
        self._ranks = ranks if ranks is not None else OneRank()

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """The factors of a step inside a window, from noise keyed by (seed, iteration, id); None outside.

        The first step of a window makes every m 1; it and every 20th image measure the scores, with plain opacities.
        """
        start = self._window_start(window)
        if start is None:
            return None
        if window.steps_since(start) == 0:
            table.apply(untouched_masks(table))
        if IMPORTANCE not in table.statistics or self._is_refresh(window, start):
            table.statistics[IMPORTANCE] = self._measured(table)
        return self._gate(table, window, seed)

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> dict[str, float]:
        """One AdamW update of m with the images' gradient and that of lambda * mean(factor).

        Returns: mask_loss, the weighted mean; mask_mean, the mean factor of all Gaussians. Outside a window nothing.
        """
        start = self._window_start(window)
        if start is None:
            return {}
        if gate is None or gate.opacity_factor is None or gate.keep_gradient is None:
            raise ValueError("the masks are updated with the gate that the step was drawn with; got none")
        weight, factor = self.config.lambda_mask * hyper.step_weight, gate.opacity_factor
        mean, num_all = self._mean(factor)
        slope = torch.zeros_like(factor) if d_gate is None else d_gate
        self._update(table, slope + weight / max(num_all, 1), gate.keep_gradient, window.steps_since(start) + 1, hyper)
        return {"mask_loss": weight * mean, "mask_mean": mean}

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> tuple[()] | None:
        """Steps are the same outside the windows."""
        return () if self._window_start(window) is None else None

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """In the step that ends a window: the prune, and opacities that carry on what the mean factor made of them."""
        event = self._window_end(window)
        if event is None:
            return
        remove = self._removed(table, event, seed)
        all_rows = torch.arange(len(table), device=table.ids.device)
        settled = {name: Override(all_rows, values) for name, values in self._settled(table).items()}
        edit = replace(RowEdit.identity(table.ids), overrides=settled).keep(~remove)
        report = EditReport(iteration=event, pruned_mask=len(table) - len(edit), num_gaussians=len(edit))
        yield edit.with_report(report, resets_statistics=False)
        table.statistics.pop(IMPORTANCE, None)
        yield untouched_masks(table)

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, the rows that a prune would leave now; all of them outside the windows."""
        if IMPORTANCE not in table.statistics:
            return torch.ones_like(table.ids, dtype=torch.bool)
        return ~self._below_threshold(table)

    def looks_at_rows(self, window: Window) -> bool:
        """In the windows: scores are measured and the mean factor is read in each of their steps."""
        return self._window_start(window) is not None or self._window_end(window) is not None

    def settled(self, table: GaussianTable) -> dict[str, Tensor]:
        """In a window, the opacities (and scales) that a prune would leave now; outside nothing."""
        return self._settled(table) if IMPORTANCE in table.statistics else {}

    def _window_start(self, window: Window) -> int | None:
        """The prune iteration whose window of learning the step belongs to."""
        length = self.config.train_mask_iters
        starts = self.config.prune_iterations
        return next((p for p in starts if Schedule(p + 1, p + length, 1).is_active(window)), None)

    def _window_end(self, window: Window) -> int | None:
        """The end of a window that lies in the step."""
        ends = (start + self.config.train_mask_iters for start in self.config.prune_iterations)
        return next((end for end in ends if window.contains(end)), None)

    def _is_refresh(self, window: Window, start: int) -> bool:
        """Whether the step begins a window or holds an image whose number in the window is a multiple of 20."""
        relative = Window(window.first - start, window.size)
        return window.steps_since(start) == 0 or Schedule(1, self.config.train_mask_iters, REFRESH_EVERY).fires(
            relative
        )

    def _measured(self, table: GaussianTable) -> Tensor:
        """(N,) the scores, with mean 1 over all Gaussians."""
        if self._importance is None:
            return torch.ones_like(table.params["mask_logits"])
        return with_mean_one(self._importance(table), self._ranks)

    def _score_times_mask(self, table: GaussianTable) -> Tensor:
        return mask_parameter(table.params["mask_logits"]) * table.statistics[IMPORTANCE]

    def _gate(self, table: GaussianTable, window: Window, seed: int) -> Gate:
        x = self._score_times_mask(table)
        factor = self._factor(x, table.ids, window.first, seed)
        return Gate(
            keep_gradient=factor.slope * table.statistics[IMPORTANCE],
            opacity_factor=factor.value,
            scale_factor=factor.value if self.config.masks_scales else None,
        )

    def _factor(self, x: Tensor, ids: Tensor, iteration: int, seed: int) -> Factor:
        if self.config.estimator == "ste":
            return straight_through(x, SCORE_THRESHOLD)
        return gumbel_sigmoid(x, uniform(seed, iteration, ids, MASK_SAMPLE, x.dtype), self.config.gumbel_temp)

    def _update(
        self, table: GaussianTable, d_factor: Tensor, slope: Tensor, update: int, hyper: OptimizerScaling
    ) -> None:
        """AdamW (Loshchilov and Hutter, 2019): m shrinks by the rate times 0.01, then Adam with d_factor * slope."""
        rate, logits = LEARNING_RATE * hyper.lr_factor, table.params["mask_logits"]
        logits -= rate * WEIGHT_DECAY * mask_parameter(logits)
        mask_update(
            logits,
            table.exp_avg["mask_logits"],
            table.exp_avg_sq["mask_logits"],
            d_mask=d_factor,
            keep_gradient=slope,
            d_all=0.0,
            adam=AdamStep(rate, *hyper.betas, EPS, update),
        )

    def _below_threshold(self, table: GaussianTable) -> Tensor:
        """(N,) bool, what is pruned: m S <= 0, where a straight-through factor is 0, too."""
        x = self._score_times_mask(table)
        return spare_best(x <= 0, x, table.ids, self._ranks)

    def _removed(self, table: GaussianTable, event: int, seed: int) -> Tensor:
        """(N,) bool, the rows that the prune at iteration `event` takes."""
        return self._below_threshold(table)

    def _settled(self, table: GaussianTable) -> dict[str, Tensor]:
        """What was drawn with a noisy factor gets its mean for good; hard factors are 1 for all that is left.

        Moments stay as they are: after a reset of them Adam's first steps would be three times as large.
        """
        if self.config.estimator == "ste":
            return {}
        factor = mean_gumbel_sigmoid(self._score_times_mask(table), self.config.gumbel_temp)
        settled = {"opacities": _scaled_opacity(table.params["opacities"], factor)}
        if self.config.masks_scales:
            settled["scales"] = table.params["scales"] + torch.log(factor)[:, None]
        return settled

    def _mean(self, factor: Tensor) -> tuple[float, int]:
        """The mean factor over all ranks, and the number of all Gaussians."""
        sums = torch.stack([factor.double().sum(), factor.new_tensor(len(factor), dtype=torch.float64)])
        total, count = self._ranks.sum(sums).tolist()  # host sync, all ranks
        return total / max(count, 1.0), int(count)


def _scaled_opacity(logits: Tensor, factor: Tensor) -> Tensor:
    """(N,) logits of the opacities sigma(logits) * factor, with a factor in (0, 1]."""
    opacity = torch.sigmoid(logits.double()) * factor.double()
    return torch.logit(opacity, eps=1e-12).to(logits.dtype)


def untouched_masks(table: GaussianTable) -> ValueEdit:
    """The edit that makes every m 1 and forgets its moments."""
    return ValueEdit("mask_logits", torch.full_like(table.params["mask_logits"], INITIAL_MASK_LOGIT))
