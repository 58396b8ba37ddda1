# SPDX-License-Identifier: Apache-2.0
"""A model of a wanted size: masks under a controlled pressure decide which Gaussians it consists of.

Until density control has ended nothing is masked, so that there is something to choose from. Then, for the first half
of what is left, the masks of MaskGaussian are sampled and learned. The weight of their loss follows the expected count:
none while no more Gaussians are drawn than the next prune will leave, more the more there are. Ten prunes, each by the
same factor, remove the least probable Gaussians and end at the wanted number exactly; with fewer there is nothing to
prune. In the second half the remaining Gaussians are trained without masks.

Everything is a function of the table and the iteration: there is no state that a checkpoint would have to hold.

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scene.gaussians import INITIAL_MASK_LOGIT, GaussianTable
from scene.row_edit import EditReport, RowEdit, TableEdit, ValueEdit
from strategies.base import Gate, Numbers, OneRank, RankReducer
from strategies.mask import MaskConfig, MaskPruning
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Schedule, Window
from strategies.selection import smallest

NUM_PRUNES = 10
SHARE_OF_REST = 0.5
"""Part of the iterations after densification in which masks are learned and prunes happen."""

STRONGEST_LAMBDA = 0.3
"""Weight of the squared mean when far too many Gaussians are drawn: three times the paper's strongest setting."""

BAND = 0.2
"""Relative surplus of drawn Gaussians from which on the weight is the strongest."""


@dataclass(frozen=True)
class TargetConfig:
    """How many Gaussians the model shall have, and the learning rate of each of the paper's two mask logits."""

    num_gaussians: int
    mask_lr: float = 0.01

    def __post_init__(self) -> None:
        if self.num_gaussians < 1:
            raise ValueError(f"a model has at least 1 Gaussian, got the target {self.num_gaussians}")


class TargetSize:
    """Masks that end at a given number of Gaussians.

    Args: iterations: the last image of the run; starts_after: the image after which masks are learned, where density
    control has ended; ranks: reductions over all ranks; status: see `masksplat.masks.mask_update`.
    Raises: ValueError when less than 20 iterations are left.
    """

    def __init__(
        self,
        config: TargetConfig,
        *,
        iterations: int,
        starts_after: int,
        ranks: RankReducer | None = None,
        status: Tensor | None = None,
    ) -> None:
        length = int(SHARE_OF_REST * (iterations - starts_after))
        if length < NUM_PRUNES:
            raise ValueError(
                f"a target size needs {int(NUM_PRUNES / SHARE_OF_REST)} iterations or more after density control; "
                f"from {starts_after} to --iterations {iterations} there are {iterations - starts_after}"
            )
        self.config = config
        self._ranks = ranks if ranks is not None else OneRank()
        self._prunes = tuple(starts_after + length * k // NUM_PRUNES for k in range(1, NUM_PRUNES + 1))
        self._learning = Schedule(starts_after, self._prunes[-1], 1)
        self._masks = MaskPruning(
            MaskConfig(mask_lr=config.mask_lr), iterations=0, densify_until_iter=1, ranks=self._ranks, status=status
        )

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """A hard sample of the masks while they are learned; None before and after."""
        return self._masks.sample(table, window, seed) if self._learning.is_active(window) else None

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> Numbers:
        """One Adam update of the logits under the present weight of their loss.

        Returns: mask_loss, mask_mean as `MaskPruning`; lambda_mask, the weight. Nothing while masks are not learned.
        """
        if gate is None or gate.mask is None or not self._learning.is_active(window):
            return {}
        counts = torch.tensor([int(torch.count_nonzero(gate.mask)), len(gate.mask)])  # host sync
        num_drawn, num_all = self._ranks.sum(counts).tolist()  # host sync, all ranks
        next_prune = next(k for k, prune in enumerate(self._prunes) if prune >= window.first)
        wanted = self._size_after(num_all, next_prune)
        weight = STRONGEST_LAMBDA * min(max(num_drawn / max(wanted, 1) - 1.0, 0.0) / BAND, 1.0)
        numbers = self._masks.learn(table, gate, d_gate, hyper, weight * hyper.step_weight)
        return {**numbers, "lambda_mask": weight}

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> tuple[()] | None:
        """Steps are the same but while masks are learned, whose weight the host works out."""
        return None if self._learning.is_active(window) else ()

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """The prune that is due, if any; after the last one every Gaussian is certain again."""
        for number, iteration in enumerate(self._prunes):
            if not window.contains(iteration):
                continue
            num_all = int(self._ranks.sum(torch.tensor([len(table)])))  # all ranks
            improbability = torch.sigmoid(-table.params["mask_logits"].double())
            is_kept = smallest(improbability, table.ids, self._size_after(num_all, number), self._ranks)
            edit = RowEdit.identity(table.ids).keep(is_kept)
            report = EditReport(iteration=iteration, pruned_mask=len(table) - len(edit), num_gaussians=len(edit))
            yield edit.with_report(report, resets_statistics=False)
            if number == NUM_PRUNES - 1:
                yield ValueEdit("mask_logits", torch.full_like(table.params["mask_logits"], INITIAL_MASK_LOGIT))

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, everything: what is not wanted is pruned."""
        return torch.ones_like(table.ids, dtype=torch.bool)

    def _size_after(self, num_all: int, number: int) -> int:
        """How many of `num_all` Gaussians prune `number` leaves: equal factors on the way to the target."""
        if num_all <= self.config.num_gaussians:
            return num_all
        left = NUM_PRUNES - number
        return round(num_all * (self.config.num_gaussians / num_all) ** (1.0 / left))
