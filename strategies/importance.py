# SPDX-License-Identifier: Apache-2.0
"""Importance scores as strategies use them: measured by a function that is handed in, checked, made comparable.

RadSplat's score is the largest blending weight alpha T that a Gaussian has in any pixel of any training view,
Mini-Splatting's the sum of all of them. Both are non-negative and 0 for a Gaussian that no training view shows.

Letters: N rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from scene.errors import InputError
from scene.gaussians import GaussianTable
from strategies.base import OneRank, RankReducer

SCORES = ("rad_splat", "mini_splatting")


class ScorePass(Protocol):
    """One pass over all training views."""

    def __call__(self, table: GaussianTable, opacity_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maximum and sum of alpha T, both (N,); opacities are multiplied with `opacity_factor` (N,). All ranks."""


Importance = Callable[[GaussianTable], Tensor]
"""(N,) scores of a table."""


def importance_of(score: str, score_views: ScorePass, ranks: RankReducer | None = None) -> Importance:
    """The function that measures one of SCORES. Raises: ValueError for another name."""
    if score not in SCORES:
        raise ValueError(f"unknown importance score {score!r}; choose one of {', '.join(SCORES)}")
    number, reducer = SCORES.index(score), ranks if ranks is not None else OneRank()

    def measure(table: GaussianTable) -> Tensor:
        return checked(score_views(table)[number], reducer)

    return measure


def checked(scores: Tensor, ranks: RankReducer) -> Tensor:
    """The scores themselves. Raises: InputError, on all ranks, when they are 0 for every Gaussian of all ranks."""
    lowest = torch.zeros(1, dtype=scores.dtype, device=scores.device)
    if not float(ranks.max(torch.cat([scores, lowest]).amax())) > 0:  # host sync, all ranks
        raise InputError(
            "no training view shows any Gaussian: all importance scores are 0. Look at the images of the model "
            "(render.py), check the cameras and the near plane, or prune without scores (--prune_method mask)."
        )
    return scores


def with_mean_one(scores: Tensor, ranks: RankReducer) -> Tensor:
    """The scores divided by their mean over all Gaussians of all ranks, so that the number and the size of the
    training views cancel."""
    sums = ranks.sum(torch.stack([scores.double().sum(), scores.new_tensor(len(scores), dtype=torch.float64)]))
    return scores * (float(sums[1]) / float(sums[0]))  # host sync, all ranks
