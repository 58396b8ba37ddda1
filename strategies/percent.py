# SPDX-License-Identifier: Apache-2.0
"""Pruning a share of the Gaussians by an importance score, at given iterations.

With RadSplat's score the share with the lowest scores goes. With Mini-Splatting's score the rest is drawn at random
without replacement, a Gaussian's chance growing with its score, as that paper does it: the number -log(u) / S with
uniform u is an exponential time of rate S, and the Gaussians with the earliest times are such a draw (Efraimidis and
Spirakis, 2006). u comes from the Gaussian's id, so nothing depends on rows or ranks.

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masksplat.random import MASK_PRUNE, uniform
from scene.gaussians import GaussianTable
from scene.row_edit import EditReport, RowEdit, TableEdit
from strategies.base import Gate, OneRank, RankReducer
from strategies.importance import ScorePass, importance_of
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Window
from strategies.selection import smallest


@dataclass(frozen=True)
class Share:
    """A number of Gaussians as a share of what there is: all but `removed`, in [0, 1], of them; at least one."""

    removed: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.removed <= 1.0:
            raise ValueError(f"--prune_percent is a share between 0 and 1, got {self.removed}")

    def __call__(self, num_all: int) -> int:
        """How many of `num_all` Gaussians stay."""
        return max(num_all - round(self.removed * num_all), min(num_all, 1))


@dataclass(frozen=True)
class Count:
    """A fixed number of Gaussians, or all of them where there are fewer."""

    kept: int

    def __call__(self, num_all: int) -> int:
        """How many of `num_all` Gaussians stay."""
        return min(self.kept, num_all)


class ScorePruning:
    """Prunes by an importance score, never down to nothing.

    Args: score: "rad_splat" or "mini_splatting"; iterations: when, in images; size: how many of a number of Gaussians
    stay; score_views: the pass over the training views; ranks: reductions over all ranks.
    """

    def __init__(
        self,
        score: str,
        iterations: tuple[int, ...],
        size: Callable[[int], int],
        score_views: ScorePass,
        *,
        ranks: RankReducer | None = None,
    ) -> None:
        self._ranks = ranks if ranks is not None else OneRank()
        self._importance = importance_of(score, score_views, self._ranks)
        self._is_drawn_at_random = score == "mini_splatting"
        self._iterations = tuple(sorted(iterations))
        self._size = size

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """None: everything is drawn."""
        return None

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> dict[str, float]:
        """Nothing is learned."""
        return {}

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> tuple[()]:
        """Nothing: no launch of a step is its own."""
        return ()

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """A prune for each of the iterations that lies in the step; kept rows keep everything."""
        for iteration in self._iterations:
            if window.contains(iteration):
                yield self._prune(table, iteration, seed)

    def looks_at_rows(self, window: Window) -> bool:
        """In steps with a prune."""
        return any(window.contains(iteration) for iteration in self._iterations)

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, everything."""
        return torch.ones_like(table.ids, dtype=torch.bool)

    def _prune(self, table: GaussianTable, iteration: int, seed: int) -> RowEdit:
        scores = self._importance(table)
        num_all = int(self._ranks.sum(torch.tensor([len(table)])))  # all ranks
        order = self._times(scores, table.ids, iteration, seed) if self._is_drawn_at_random else _descending(scores)
        is_kept = smallest(order, table.ids, self._size(num_all), self._ranks)
        edit = RowEdit.identity(table.ids).keep(is_kept)
        report = EditReport(iteration=iteration, pruned_mask=len(table) - len(edit), num_gaussians=len(edit))
        return edit.with_report(report, resets_statistics=False)

    def _times(self, scores: Tensor, ids: Tensor, iteration: int, seed: int) -> Tensor:
        """(N,) exponential times with the scores as rates; inf for a score of 0."""
        return -torch.log(uniform(seed, iteration, ids, MASK_PRUNE, torch.float64)) / scores.double()


def _descending(scores: Tensor) -> Tensor:
    """(N,) numbers of at least 0 that are small where the scores are large."""
    return 1.0 / scores.double()
