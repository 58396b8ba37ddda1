# SPDX-License-Identifier: Apache-2.0
"""Target sizes: masks whose pressure follows the count, and prunes that end at the wanted number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from late_numbers import read_now
from rank_threads import by_id, run_on_threads, shards
from scene.gaussians import GaussianTable, attributes_for
from strategies.base import OneRank, RankReducer
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Window
from strategies.target import NUM_PRUNES, TargetConfig, TargetSize

NUM, SEED, UNTIL, LAST = 600, 4, 100, 500


def make_table() -> GaussianTable:
    arrays: dict[str, Any] = {spec.name: torch.zeros(NUM, *spec.shape) for spec in attributes_for(0)}
    del arrays["mask_logits"]
    return GaussianTable.from_arrays(arrays, dtype=torch.float64, ids=torch.arange(NUM))


def target(count: int, ranks: RankReducer | None = None) -> TargetSize:
    return TargetSize(TargetConfig(count, mask_lr=0.08), iterations=LAST, starts_after=UNTIL, ranks=ranks)


def value(ids: torch.Tensor) -> torch.Tensor:
    """What the images lose by a Gaussian that is not drawn: from nothing to much, growing with the id."""
    return -2e-3 * (ids.double() / NUM) ** 2


def train(
    strategy: TargetSize, table: GaussianTable, first: int = 1, last: int = LAST
) -> list[tuple[int, int, dict[str, float]]]:
    """(iteration, Gaussians of this rank, numbers of the log) of every step."""
    history = []
    for step in range(first, last + 1):
        window = Window(step, 1)
        gate = strategy.sample(table, window, SEED)
        numbers = read_now(strategy.after_backward(table, window, gate, value(table.ids), OptimizerScaling()))
        table.num_updates += 1
        for edit in strategy.after_step(table, window, SEED):
            table.apply(edit)
        history.append((step, len(table), numbers))
    return history


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_every_target_is_met_exactly_by_what_is_worth_most(share: float) -> None:
    count, table = round(share * NUM), make_table()
    strategy = target(count)
    history = train(strategy, table)
    assert len(table) == count and bool(strategy.keep(table).all())
    best, chance = NUM - 1 - 0.5 * (count - 1), 0.5 * (NUM - 1)
    assert float(table.ids.double().mean()) >= chance + 0.85 * (best - chance)
    sizes = [size for _, size, _ in history]
    assert sizes[UNTIL - 2] == NUM and sizes[UNTIL + (LAST - UNTIL) // 2 - 1] == count  # the second half only trains
    assert len(set(sizes)) == (NUM_PRUNES + 1 if share < 0.9 else len(set(sizes)))
    assert torch.equal(table.params["mask_logits"], torch.full((count,), 9.0, dtype=torch.float64))


def test_the_pressure_follows_the_surplus() -> None:
    """None with a target that is not below the count, and none as soon as no more than wanted are drawn."""
    idle = [numbers["lambda_mask"] for _, _, numbers in train(target(NUM), make_table()) if numbers]
    assert len(idle) == 201 and max(idle) == 0
    active = [numbers for _, _, numbers in train(target(NUM // 4), make_table()) if numbers]
    assert max(numbers["lambda_mask"] for numbers in active) > 0.05
    assert min(numbers["mask_mean"] for numbers in active) > 0.5  # the masks never run away from the prunes


def test_masks_are_drawn_only_while_they_are_learned() -> None:
    strategy, table = target(60), make_table()
    drawn = [step for step in range(1, LAST) if strategy.sample(table, Window(step, 1), SEED) is not None]
    assert (drawn[0], drawn[-1]) == (UNTIL, UNTIL + (LAST - UNTIL) // 2)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_keep_what_one_does(num_ranks: int) -> None:
    def work(table: GaussianTable, ranks: RankReducer) -> GaussianTable:
        train(target(150, ranks), table)
        return table

    expected = by_id([work(make_table(), OneRank())], "means")
    assert by_id(run_on_threads(shards(make_table(), num_ranks), work), "means").keys() == expected.keys()
    assert len(expected) == 150


def test_a_run_goes_on_from_the_table_alone() -> None:
    table = make_table()
    train(target(150), table, 1, 187)
    resumed = copy.deepcopy(table)
    for each in (table, resumed):
        train(target(150), each, 188, LAST)
    assert torch.equal(table.ids, resumed.ids)
    assert torch.equal(table.params["mask_logits"], resumed.params["mask_logits"])


def test_impossible_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 Gaussian"):
        TargetConfig(0)
    with pytest.raises(ValueError, match="there are 10"):
        TargetSize(TargetConfig(5), iterations=110, starts_after=100)
