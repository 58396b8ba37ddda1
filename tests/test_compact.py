# SPDX-License-Identifier: Apache-2.0
"""Compact-3DGS: hard factors on opacity and scale, learned straight through during the whole training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rank_threads import by_id, run_on_threads, shards
from scene.gaussians import GaussianTable, attributes_for
from strategies.base import OneRank, RankReducer
from strategies.compact import CompactConfig, CompactMask
from strategies.density import DensityConfig
from strategies.lp import mask_parameter
from strategies.mask import MaskConfig
from strategies.methods import PruneConfig, build_strategy
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Window

NUM, SEED = 40, 3


def make_table() -> GaussianTable:
    arrays: dict[str, Any] = {spec.name: torch.zeros(NUM, *spec.shape) for spec in attributes_for(0)}
    del arrays["mask_logits"]
    return GaussianTable.from_arrays(arrays, dtype=torch.float64, ids=torch.arange(NUM) * 2)


def masks(ranks: RankReducer | None = None, **changes: float) -> CompactMask:
    config = CompactConfig(**{"lambda_mask": 0.01, "mask_lr": 0.3, **changes})  # type: ignore[arg-type]
    return CompactMask(config, iterations=3000, densify_until_iter=1500, ranks=ranks)


def pull(ids: torch.Tensor) -> torch.Tensor:
    return 1e-3 * torch.cos(ids.double())


def train(strategy: CompactMask, table: GaussianTable, num_steps: int) -> list[dict[str, float]]:
    numbers = []
    for step in range(1, num_steps + 1):
        window = Window(step, 1)
        gate = strategy.sample(table, window, SEED)
        numbers.append(strategy.after_backward(table, window, gate, pull(table.ids), OptimizerScaling()))
        table.num_updates += 1
    return numbers


def test_what_is_learned_is_torch_adam_on_the_written_loss() -> None:
    """lambda * mean(sigma(m)) + sum(pull * b) with b straight through, by autograd and torch.optim.Adam."""
    table, strategy = make_table(), masks()
    mine = torch.nn.Parameter(torch.ones(NUM, dtype=torch.float64))
    optimizer = torch.optim.Adam([mine], lr=0.3, eps=1e-15)
    for step in range(1, 41):
        soft = torch.sigmoid(mine)
        hard = (soft > 0.01).double() + soft - soft.detach()
        optimizer.zero_grad()
        (0.01 * soft.mean() + (pull(table.ids) * hard).sum()).backward()
        optimizer.step()
        gate = strategy.sample(table, Window(step, 1), SEED)
        assert torch.equal(gate.opacity_factor, hard.detach().round()) and gate.scale_factor is gate.opacity_factor
        numbers = strategy.after_backward(table, Window(step, 1), gate, pull(table.ids), OptimizerScaling())
        table.num_updates += 1
        assert numbers["mask_loss"] == pytest.approx(0.01 * float(soft.detach().mean()), rel=1e-9)
        torch.testing.assert_close(mask_parameter(table.params["mask_logits"]), mine.detach(), rtol=1e-8, atol=1e-9)
    assert numbers["mask_mean"] < 1 and float(mine.detach().min()) < -4.6 < 2 < float(mine.detach().max())


def test_what_is_not_drawn_is_pruned_and_not_saved() -> None:
    table, strategy = make_table(), masks()
    train(strategy, table, 40)
    drawn = strategy.sample(table, Window(41, 1), SEED).opacity_factor == 1
    assert torch.equal(strategy.keep(table), drawn) and 0 < int(drawn.sum()) < NUM
    assert list(strategy.after_step(table, Window(1000, 1), SEED)) == []  # density control's events do it until 1500
    ids = table.ids[drawn]
    for edit in strategy.after_step(table, Window(2000, 1), SEED):
        table.apply(edit)
    assert torch.equal(table.ids, ids)
    assert edit.report is not None and edit.report.pruned_mask == NUM - len(ids)


def test_density_events_prune_by_it() -> None:
    table = make_table()
    table.params["mask_logits"][:7] = 8.0 - 4.6  # sigma(m) just below 0.01
    table.statistics["view_count"].fill_(1)
    built = build_strategy(
        "compact_3dgs", density=DensityConfig(), mask=MaskConfig(), extent=100.0, iterations=30_000, prune=PruneConfig()
    )
    (edit,) = built.after_step(table, Window(600, 1), SEED)
    table.apply(edit)
    assert len(table) == NUM - 7


def test_never_everything_is_pruned() -> None:
    table, strategy = make_table(), masks()
    table.params["mask_logits"].fill_(-9.0)
    with pytest.warns(RuntimeWarning, match="all 40 Gaussians"):
        assert int(strategy.keep(table).sum()) == 1


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_learn_what_one_does(num_ranks: int) -> None:
    def work(table: GaussianTable, ranks: RankReducer) -> GaussianTable:
        train(masks(ranks), table, 25)
        return table

    expected = by_id([work(make_table(), OneRank())], "mask_logits")
    found = by_id(run_on_threads(shards(make_table(), num_ranks), work), "mask_logits")
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), rel=1e-10)
