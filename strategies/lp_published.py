# SPDX-License-Identifier: Apache-2.0
"""LP-3DGS as its published program computes it (`--lp_compat`), for comparison with published figures.

It differs from `strategies.lp` in six points. For the first 19 iterations of a window there is no score: opacities are
plain and m gets the regulariser's gradient alone. The regulariser is the mean of sigma(m). Scores are used as measured,
and from the second pass on they are measured through the noisy factors themselves. The window's last iteration updates
no mask. The prune ignores the score: one noisy sample GS(m) < 1/2 decides. Opacities go on without the factor. What
cannot be matched: the program draws new noise for every view of a pass, here a pass has one draw.

Letters: N rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.random import MASK_PRUNE, uniform
from scene.gaussians import GaussianTable
from strategies.base import Gate, RankReducer, spare_best
from strategies.estimators import gumbel_sigmoid
from strategies.importance import SCORES, ScorePass, checked
from strategies.lp import (
    IMPORTANCE,
    REFRESH_EVERY,
    LearnedMask,
    LearnedMaskConfig,
    mask_parameter,
    untouched_masks,
)
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window


class PublishedLearnedMask(LearnedMask):
    """The learned mask of LP-3DGS's program. Args: score: "rad_splat" or "mini_splatting"; else as `LearnedMask`."""

    def __init__(
        self, config: LearnedMaskConfig, score: str, score_views: ScorePass, *, ranks: RankReducer | None = None
    ) -> None:
        super().__init__(config, None, ranks=ranks)
        self._score_views = score_views
        self._score_number = SCORES.index(score)

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """No gate before the first scores; then the factors, which also the later scores are measured through."""
        start = self._window_start(window)
        if start is None:
            return None
        if window.steps_since(start) == 0:
            table.apply(untouched_masks(table))
        if self._is_refresh(window, start):
            factor = self._gate(table, window, seed).opacity_factor if IMPORTANCE in table.statistics else None
            scores = self._score_views(table, factor)[self._score_number]
            table.statistics[IMPORTANCE] = checked(scores, self._ranks)
        return self._gate(table, window, seed) if IMPORTANCE in table.statistics else None

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> dict[str, float]:
        """One AdamW update, in all steps of a window but the last, with lambda * mean(sigma(m)) as regulariser."""
        start = self._window_start(window)
        if start is None or self._window_end(window) is not None:
            return {}
        probability = torch.sigmoid(mask_parameter(table.params["mask_logits"]))
        mean, num_all = self._mean(probability)
        weight = self.config.lambda_mask * hyper.step_weight
        gradient = probability * (1 - probability) * (weight / max(num_all, 1))
        if gate is not None and gate.keep_gradient is not None and d_gate is not None:
            gradient = gradient + d_gate * gate.keep_gradient
        self._update(table, gradient, torch.ones_like(gradient), window.steps_since(start) + 1, hyper)
        return {"mask_loss": weight * mean, "mask_mean": mean}

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, everything."""
        return torch.ones_like(table.ids, dtype=torch.bool)

    def _is_refresh(self, window: Window, start: int) -> bool:
        relative = Window(window.first - start, window.size)
        return Schedule(1, self.config.train_mask_iters - 1, REFRESH_EVERY).fires(relative)

    def _removed(self, table: GaussianTable, event: int, seed: int) -> Tensor:
        mask = mask_parameter(table.params["mask_logits"])
        noise = uniform(seed, event, table.ids, MASK_PRUNE, mask.dtype)
        drawn = gumbel_sigmoid(mask, noise, self.config.gumbel_temp).value
        return spare_best(drawn < 0.5, drawn, table.ids, self._ranks)

    def _settled(self, table: GaussianTable) -> dict[str, Tensor]:
        return {}
