# SPDX-License-Identifier: Apache-2.0
"""Pruning a share of the Gaussians, or down to a number, by either score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rank_threads import run_on_threads, shards
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from strategies.base import RankReducer
from strategies.importance import SCORES
from strategies.percent import Count, ScorePruning, Share
from strategies.schedule import Window

NUM, SEED = 1000, 8


def make_table(num: int = NUM) -> GaussianTable:
    arrays: dict[str, Any] = {spec.name: torch.zeros(num, *spec.shape) for spec in attributes_for(0)}
    return GaussianTable.from_arrays(arrays, ids=torch.randperm(num, generator=torch.Generator().manual_seed(1)))


def score_views(table: GaussianTable, opacity_factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """RadSplat's score grows with the id in steps of five rows; Mini-Splatting's is 9 for every third, else 1."""
    return (table.ids // 5).float() / 200, torch.where(table.ids % 3 == 0, 9.0, 1.0)


def pruned(score: str, size: Callable[[int], int], table: GaussianTable, ranks: RankReducer | None = None) -> list[int]:
    """Ids that are left after the prune at iteration 50, ascending."""
    strategy = ScorePruning(score, (50, 90), size, score_views, ranks=ranks)
    assert list(strategy.after_step(table, Window(49, 1), SEED)) == []
    (edit,) = strategy.after_step(table, Window(48, 4), SEED)
    table.apply(edit)
    assert edit.report is not None and edit.report.iteration == 50 and edit.report.num_gaussians == len(table)
    return sorted(table.ids.tolist())


@pytest.mark.parametrize(("share", "count"), [(0.0, 1000), (0.6, 400), (0.613, 387), (0.98, 20), (1.0, 1)])
def test_the_lowest_scores_go_and_ties_by_id(share: float, count: int) -> None:
    kept = pruned("rad_splat", Share(share), make_table())
    assert len(kept) == count
    whole, rest = divmod(count, 5)
    last = 995 - 5 * whole  # of the group that is cut, the lowest ids stay
    assert kept == list(range(last, last + rest)) + list(range(1000 - 5 * whole, 1000))


def test_mini_splatting_draws_with_the_scores_as_chances() -> None:
    kept = pruned("mini_splatting", Share(0.6), make_table())
    assert len(kept) == len(set(kept)) == 400
    heavy = sum(number % 3 == 0 for number in kept)
    # Times are exponential: of 334 a part 1 - exp(-9 t) and of 666 a part 1 - exp(-t) are 400 at t = 0.2003.
    assert heavy == pytest.approx(334 * 0.8351, abs=4 * (334 * 0.8351 * 0.1649) ** 0.5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_prune_what_one_does(score: str, num_ranks: int) -> None:
    def work(table: GaussianTable, ranks: RankReducer) -> list[int]:
        return pruned(score, Share(0.6), table, ranks)

    found = run_on_threads(shards(make_table(), num_ranks), work)
    assert sorted(number for part in found for number in part) == pruned(score, Share(0.6), make_table())


@pytest.mark.parametrize("score", SCORES)
def test_a_number_of_gaussians_is_met_exactly(score: str) -> None:
    assert len(pruned(score, Count(123), make_table())) == 123
    assert len(pruned(score, Count(5000), make_table())) == NUM


def test_shares_outside_their_range_are_refused() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="--prune_percent is a share between 0 and 1"):
            Share(share)


def test_scores_of_zero_are_an_error() -> None:
    def nothing(table: GaussianTable, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(table)), torch.zeros(len(table))

    strategy = ScorePruning("rad_splat", (50,), Share(0.5), nothing)
    with pytest.raises(InputError, match="all importance scores are 0"):
        list(strategy.after_step(make_table(), Window(50, 1), SEED))
