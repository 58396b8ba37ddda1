# SPDX-License-Identifier: Apache-2.0
"""Compact-3DGS: a hard mask on opacity and scale that is learned during the whole training.

A Gaussian with the learned number m is drawn with opacity and scales times b = 1[sigma(m) > 0.01]; b has the gradient
of sigma(m) (straight through). The loss gets lambda times the mean of sigma(m). Gaussians with b = 0 go in every
densification event, after densification at multiples of a period, and are neither evaluated nor saved. They cannot
come back: what is not drawn has no gradient by the images.

m is kept in the table as its mask logit, from which it differs by a constant (`strategies.lp.mask_parameter`).

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masksplat.masks import mask_update
from masksplat.types import AdamStep
from scene.gaussians import GaussianTable
from scene.row_edit import EditReport, RowEdit, TableEdit
from strategies.base import Gate, OneRank, RankReducer, spare_best
from strategies.estimators import straight_through
from strategies.lp import mask_parameter
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window


@dataclass(frozen=True)
class CompactConfig:
    """The flags of the mask: weight of the mean of sigma(m), learning rate of m, period of prunes in images."""

    lambda_mask: float = 5e-4
    mask_lr: float = 0.01
    mask_prune_iter: int = 1000


class CompactMask:
    """Learns and prunes by the mask of Compact-3DGS.

    Args: iterations: the last image of the run; densify_until_iter: from there on this strategy prunes by itself
    (before, density control calls `prune_test` in its events); ranks: reductions over all ranks.
    """

    def __init__(
        self, config: CompactConfig, *, iterations: int, densify_until_iter: int, ranks: RankReducer | None = None
    ) -> None:
        self.config = config
        self._ranks = ranks if ranks is not None else OneRank()
        self._prunes = Schedule(densify_until_iter, iterations, config.mask_prune_iter)

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate:
        """The hard factors; no noise."""
        factor = straight_through(mask_parameter(table.params["mask_logits"]))
        return Gate(keep_gradient=factor.slope, opacity_factor=factor.value, scale_factor=factor.value)

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> dict[str, float]:
        """One Adam update of m with the images' gradient and that of lambda * mean(sigma(m)).

        Returns: mask_loss, the weighted mean; mask_mean, the fraction of all Gaussians that was drawn.
        """
        if gate is None or gate.opacity_factor is None or gate.keep_gradient is None:
            raise ValueError("the masks are updated with the gate that the step was drawn with; got none")
        logits = table.params["mask_logits"]
        num_drawn, probability, num_all = self._totals(gate.opacity_factor, torch.sigmoid(mask_parameter(logits)))
        weight = self.config.lambda_mask * hyper.step_weight
        mask_update(
            logits,
            table.exp_avg["mask_logits"],
            table.exp_avg_sq["mask_logits"],
            d_mask=d_gate if d_gate is not None else torch.zeros_like(logits),
            keep_gradient=gate.keep_gradient,
            d_all=weight / num_all,
            adam=AdamStep(self.config.mask_lr * hyper.lr_factor, *hyper.betas, hyper.eps, table.num_updates + 1),
        )
        return {"mask_loss": weight * probability / num_all, "mask_mean": num_drawn / num_all}

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """The prune that is due after densification has ended, if any; kept rows keep everything."""
        event = self._prunes.event(window)
        if event is None:
            return
        edit = RowEdit.identity(table.ids).keep(self.keep(table))
        report = EditReport(iteration=event, pruned_mask=len(table) - len(edit), num_gaussians=len(edit))
        yield edit.with_report(report, resets_statistics=False)

    def prune_test(self, logits: Tensor, ids: Tensor, event: int, seed: int) -> Tensor:
        """(N,) bool, True where the factor is 0."""
        return straight_through(mask_parameter(logits)).value == 0

    def looks_at_rows(self, window: Window) -> bool:
        """Always: sums over the masks are read in every step."""
        return True

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, the rows with factor 1; never none of all."""
        logits = table.params["mask_logits"]
        return ~spare_best(self.prune_test(logits, table.ids, 0, 0), logits, table.ids, self._ranks)

    def _totals(self, drawn: Tensor, probability: Tensor) -> tuple[float, float, float]:
        """Sums over all ranks: factors, probabilities, Gaussians (at least 1)."""
        count = drawn.new_tensor(len(drawn), dtype=torch.float64)
        sums = self._ranks.sum(torch.stack([drawn.double().sum(), probability.double().sum(), count]))
        num_drawn, total, num_all = sums.tolist()  # host sync, all ranks
        return num_drawn, total, max(num_all, 1.0)
