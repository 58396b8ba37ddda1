# SPDX-License-Identifier: Apache-2.0
"""The probabilistic masks of MaskGaussian: sampled in every step, learned, and pruned when they vanish.

Every Gaussian has a keep probability p = sigmoid(logit). A training step draws each Gaussian with probability p; the
sample's gradient reaches the logit straight through (`masksplat.masks`). The loss lambda * (mean of all samples)^2
pushes towards fewer Gaussians, the images push back for those that matter. What is evaluated and saved has p >= 1/2.

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from masksplat.masks import mask_sample, mask_update, update_numbers
from masksplat.random import MASK_PRUNE, uniform
from masksplat.types import AdamStep, Counted
from scene.gaussians import GaussianTable
from scene.row_edit import EditReport, RowEdit, TableEdit
from strategies.base import Gate, LateNumber, MaskMemory, Numbers, OneRank, RankReducer, spare_best
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window

NUM_PRUNE_DRAWS = 10


@dataclass(frozen=True)
class MaskConfig:
    """The flags of the masks; iterations count images and both ends of the window are inclusive.

    lambda_mask: weight of the squared mean, active in [mask_from_iter, mask_until_iter]. mask_lr: learning rate of each
    of the paper's two logits (ours gets twice that). mask_prune_iter: period of the prunes after densification.
    """

    lambda_mask: float = 5e-4
    mask_from_iter: int = 0
    mask_until_iter: int = 30_000
    mask_lr: float = 0.01
    mask_prune_iter: int = 1000


MASK_SETTINGS: Mapping[str, MaskConfig] = MappingProxyType(
    {
        "alpha": MaskConfig(lambda_mask=0.1, mask_from_iter=19_000, mask_until_iter=20_000),
        "beta": MaskConfig(lambda_mask=5e-4, mask_from_iter=0, mask_until_iter=30_000),
        "gamma": MaskConfig(lambda_mask=1e-3, mask_from_iter=0, mask_until_iter=30_000),
    }
)
"""The paper's settings: alpha for quality, beta the default, gamma for the smallest model."""


class MaskPruning:
    """Samples, learns and prunes by masks.

    Args: iterations: the last image of the run; densify_until_iter: from there on this strategy prunes by itself
    (before, density control calls `prune_test` in its events); ranks: reductions over all ranks; status: see
    `masksplat.masks.mask_update`.
    """

    def __init__(
        self,
        config: MaskConfig,
        *,
        iterations: int,
        densify_until_iter: int,
        ranks: RankReducer | None = None,
        status: Tensor | None = None,
    ) -> None:
        self.config = config
        self._status = status
        self._ranks = ranks if ranks is not None else OneRank()
        self._loss_window = Schedule(config.mask_from_iter, config.mask_until_iter, 1)
        first_prune = max(densify_until_iter, config.mask_from_iter)
        self._prunes = Schedule(first_prune, iterations, config.mask_prune_iter)
        self._counted: Tensor | None = None  # the ids that were counted, and how many there are on all ranks
        self._count = 0

    def sample(self, table: GaussianTable, window: Window, seed: int, memory: MaskMemory | None = None) -> Gate:
        """A hard sample from noise keyed by (seed, the window's first iteration, id)."""
        step_at = None if memory is None else memory.step
        drawn = mask_sample(table.params["mask_logits"], table.ids, seed, window.first, step_at=step_at)
        return Gate(mask=drawn.mask, keep_gradient=drawn.keep_gradient, num_drawn=drawn.num_drawn)

    def after_backward(
        self,
        table: GaussianTable,
        window: Window,
        gate: Gate | None,
        d_gate: Tensor | None,
        hyper: OptimizerScaling,
        memory: MaskMemory | None = None,
    ) -> Numbers:
        """One Adam update of the logits, with the images' gradient and that of lambda * mean(m)^2.

        Returns: mask_loss, the weighted squared mean; mask_mean, the fraction of all Gaussians that was drawn.
        """
        return self.learn(table, gate, d_gate, hyper, self._weight(window, hyper), memory)

    def learn(
        self,
        table: GaussianTable,
        gate: Gate | None,
        d_gate: Tensor | None,
        hyper: OptimizerScaling,
        weight: float,
        memory: MaskMemory | None = None,
    ) -> Numbers:
        """`after_backward` with any `weight` of the squared mean, that of the batch included."""
        if gate is None or gate.mask is None or gate.keep_gradient is None or gate.num_drawn is None:
            raise ValueError("the masks are updated with the gate that the step was drawn with; got none")
        known, num_all = gate.num_drawn_of_all, max(self._num_all(table), 1)  # all ranks
        num_drawn = known if known is not None else self._ranks.sum(gate.num_drawn)  # all ranks
        mask_update(
            table.params["mask_logits"],
            table.exp_avg["mask_logits"],
            table.exp_avg_sq["mask_logits"],
            d_mask=d_gate if d_gate is not None else torch.zeros_like(gate.mask),
            keep_gradient=gate.keep_gradient,
            d_all=_pull(num_drawn, num_all, weight),
            adam=self._adam_step(table, hyper),
            numbers=None if memory is None else memory.update,
            status=self._status,
        )
        return _numbers(num_drawn, num_all, weight)

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> Sequence[float]:
        """The factor of the regulariser's gradient, and those of Adam."""
        pull = _pull_factor(max(self._num_all(table), 1), self._weight(window, hyper))
        return update_numbers(pull, self._adam_step(table, hyper))

    def numbers_of(self, table: GaussianTable, window: Window, hyper: OptimizerScaling, num_drawn: Tensor) -> Numbers:
        """What `after_backward` returns, in a step that was replayed."""
        return _numbers(num_drawn, max(self._num_all(table), 1), self._weight(window, hyper))

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """The prune that is due after densification has ended, if any; kept rows keep everything."""
        event = self._prunes.event(window)
        if event is None:
            return
        logits = table.params["mask_logits"]
        remove = spare_best(self.prune_test(logits, table.ids, event, seed), logits, table.ids, self._ranks)
        edit = RowEdit.identity(table.ids).keep(~remove)
        report = EditReport(iteration=event, pruned_mask=len(table) - len(edit), num_gaussians=len(edit))
        yield edit.with_report(report, resets_statistics=False)

    def prune_test(self, logits: Tensor, ids: Tensor, event: int, seed: int) -> Tensor:
        """(N,) bool, True where ten draws of the mask would all be 0: with probability (1 - p)^10, from one number."""
        log_vanished = NUM_PRUNE_DRAWS * torch.nn.functional.logsigmoid(-logits.double())
        return uniform(seed, event, ids, MASK_PRUNE, torch.float64) < log_vanished.exp()

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, the rows with p >= 1/2; never none of all."""
        logits = table.params["mask_logits"]
        return ~spare_best(logits < 0, logits, table.ids, self._ranks)

    def _weight(self, window: Window, hyper: OptimizerScaling) -> float:
        """Of the squared mean in this step, that of the batch included."""
        return self.config.lambda_mask * hyper.step_weight if self._loss_window.is_active(window) else 0.0

    def _num_all(self, table: GaussianTable) -> int:
        """Gaussians of all ranks; asked for again only when the rows are others than before. All ranks."""
        if self._counted is not table.ids:
            self._counted, self._count = table.ids, int(self._ranks.sum(torch.tensor(len(table))))
        return self._count

    def _adam_step(self, table: GaussianTable, hyper: OptimizerScaling) -> AdamStep:
        """This step's numbers of Adam; the attribute's factor 2 turns the paper's two logits into one."""
        spec = next(spec for spec in table.attributes if spec.name == "mask_logits")
        rate = self.config.mask_lr * spec.learning_rate_factor * hyper.lr_factor
        return AdamStep(rate, *hyper.betas, hyper.eps, table.num_updates + 1)


def _pull(num_drawn: Tensor, num_all: int, weight: float) -> float | Counted:
    """The gradient of weight * mean(m)^2 by each sample; on a GPU it stays there."""
    if num_drawn.device.type == "cpu":
        return weight * 2 * (int(num_drawn) / num_all) / num_all
    return Counted(num_drawn, _pull_factor(num_all, weight))


def _pull_factor(num_all: int, weight: float) -> float:
    """What the number of drawn masks is multiplied with in the gradient of weight * mean(m)^2 by each."""
    return weight * 2 / num_all / num_all


def _numbers(num_drawn: Tensor, num_all: int, weight: float) -> Numbers:
    """The loss and the mean of the masks, for the log."""
    return {
        "mask_loss": LateNumber(num_drawn, lambda drawn: weight * (drawn / num_all) ** 2),
        "mask_mean": LateNumber(num_drawn, lambda drawn: drawn / num_all),
    }
