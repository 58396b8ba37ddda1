# SPDX-License-Identifier: Apache-2.0
"""LP-3DGS: the window, what is learned in it, the prune at its end, and the published program's arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.communicator import Communicator
from masksplat.random import MASK_SAMPLE, uniform
from rank_threads import by_id, run_on_threads, shards
from scene.checkpoint import load_checkpoint, save_checkpoint
from scene.checkpoint_manifest import RunState
from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for
from strategies.base import OneRank, RankReducer
from strategies.density import DensityConfig
from strategies.estimators import mean_gumbel_sigmoid
from strategies.importance import importance_of
from strategies.lp import IMPORTANCE, LearnedMask, LearnedMaskConfig, mask_parameter
from strategies.lp_published import PublishedLearnedMask
from strategies.mask import MaskConfig
from strategies.methods import PruneConfig, build_strategy
from strategies.optimizer_scaling import OptimizerScaling, scaling_for
from strategies.schedule import Window

SEED, START, LENGTH = 5, 100, 60
CONFIG = LearnedMaskConfig(prune_iterations=(START,), train_mask_iters=LENGTH, lambda_mask=0.02)
NUM = 50


def make_table(num: int = NUM) -> GaussianTable:
    arrays: dict[str, Any] = {
        spec.name: torch.zeros(num, *spec.shape, dtype=torch.float64) for spec in attributes_for(0)
    }
    arrays["opacities"] = torch.linspace(-2, 2, num, dtype=torch.float64)
    arrays["mask_logits"] = torch.full((num,), 3.0)  # of some earlier training
    return GaussianTable.from_arrays(arrays, dtype=torch.float64, ids=torch.arange(num) * 3 + 1)


class Scores:
    """A pass whose scores depend on the id, and that remembers what it was asked."""

    def __init__(self, factor: float = 1.0, *, unseen: int = 3) -> None:
        self.factor, self.unseen = factor, unseen
        self.calls: list[tuple[int, torch.Tensor | None]] = []

    def __call__(
        self, table: GaussianTable, opacity_factor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((len(table), opacity_factor))
        largest = self.factor * (1.2 + torch.sin(table.ids.double()))
        largest[table.ids < 3 * self.unseen] = 0
        return largest, 100 * largest


def strategy(scores: Scores, ranks: RankReducer | None = None, config: LearnedMaskConfig = CONFIG) -> LearnedMask:
    return LearnedMask(config, importance_of("rad_splat", scores, ranks), ranks=ranks)


def pull(ids: torch.Tensor) -> torch.Tensor:
    """The images' gradient by the factor: some Gaussians are wanted, some are in the way."""
    return 1e-3 * torch.cos(ids.double())


def train(
    masks: LearnedMask,
    table: GaussianTable,
    first: int,
    last: int,
    *,
    size: int = 1,
    gradient: Callable[[torch.Tensor], torch.Tensor] = pull,
) -> list[dict[str, float]]:
    """The steps of images first..last, as the training loop makes them."""
    numbers = []
    for start in range(first, last + 1, size):
        window = Window(start, size)
        gate = masks.sample(table, window, SEED)
        d_gate = gradient(table.ids) if gate is not None else None
        numbers.append(masks.after_backward(table, window, gate, d_gate, OptimizerScaling()))
        table.num_updates += 1
        for edit in masks.after_step(table, window, SEED):
            table.apply(edit)
    return numbers


def test_nothing_happens_outside_the_window() -> None:
    table, scores = make_table(), Scores()
    masks = strategy(scores)
    before = {name: values.clone() for name, values in table.params.items()}
    assert train(masks, table, START - 5, START) == [{}] * 6
    assert all(torch.equal(before[name], table.params[name]) for name in before)
    assert scores.calls == [] and bool(masks.keep(table).all())
    train(masks, table, START + 1, START + LENGTH)
    count, calls = len(table), len(scores.calls)
    assert train(masks, table, START + LENGTH + 1, START + LENGTH + 30) == [{}] * 30
    assert (len(table), len(scores.calls)) == (count, calls)


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_scores_are_measured_at_the_start_and_every_20_images(size: int) -> None:
    table, scores = make_table(), Scores()
    masks = strategy(scores)
    first = START + 1 - START % size  # so that steps are where a run from the first image has them
    numbers = train(masks, table, first, START + LENGTH + size, size=size)
    assert len(scores.calls) == 4
    assert all(factor is None for _, factor in scores.calls)  # plain opacities
    assert IMPORTANCE not in table.statistics and 0 < len(table) < NUM
    assert abs(sum(map(bool, numbers)) - LENGTH / size) <= 1


def test_what_is_learned_is_torch_adamw_on_the_written_loss() -> None:
    """lambda * mean(GS(m S)) + sum(pull * GS(m S)), with S of mean 1, by autograd and torch.optim.AdamW."""
    table, scores = make_table(), Scores()
    masks = strategy(scores)
    mine = torch.nn.Parameter(torch.ones(NUM, dtype=torch.float64))
    optimizer = torch.optim.AdamW([mine], lr=0.05, eps=1e-15)
    score = scores(table)[0]
    score = score / score.mean()
    for step in range(1, LENGTH):
        noise = uniform(SEED, START + step, table.ids, MASK_SAMPLE, torch.float64)
        factor = torch.sigmoid((mine * score + torch.logit(noise)) / 0.5)
        loss = 0.02 * factor.mean() + (pull(table.ids) * factor).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (numbers,) = train(masks, table, START + step, START + step)
        assert numbers["mask_mean"] == pytest.approx(float(factor.detach().mean()), rel=1e-9)
        torch.testing.assert_close(mask_parameter(table.params["mask_logits"]), mine.detach(), rtol=1e-7, atol=1e-9)
    assert float(mine.detach().min()) < -0.5 and float(mine.detach().max()) > 1.5


def test_the_prune_takes_what_has_no_positive_product_and_settles_opacities() -> None:
    table, masks = make_table(), strategy(Scores())
    train(masks, table, START + 1, START + LENGTH - 1)
    before = copy.deepcopy(table)
    window = Window(START + LENGTH, 1)
    gate = masks.sample(table, window, SEED)
    masks.after_backward(table, window, gate, pull(table.ids), OptimizerScaling())
    product = mask_parameter(table.params["mask_logits"]) * table.statistics[IMPORTANCE]
    evaluated, ids, opacities = masks.keep(table), table.ids.clone(), table.params["opacities"].clone()
    reports = []
    for edit in masks.after_step(table, window, SEED):
        reports.append(edit.report)
        table.apply(edit)
    assert torch.equal(evaluated, product > 0)
    assert torch.equal(table.ids, ids[product > 0])
    assert not set(table.ids.tolist()) & {1, 4, 7}  # no training view shows them
    assert reports[0] is not None and reports[0].pruned_mask == NUM - len(table) > 5
    expected = torch.sigmoid(opacities) * mean_gumbel_sigmoid(product, 0.5)
    torch.testing.assert_close(torch.sigmoid(table.params["opacities"]), expected[product > 0])
    assert torch.equal(table.params["mask_logits"], torch.full((len(table),), 9.0, dtype=torch.float64))
    assert bool(masks.keep(table).all()) and len(before) == NUM


def test_number_and_size_of_views_do_not_matter() -> None:
    """Scores a thousand times as large, as from larger and more images, learn and prune the same."""
    results = []
    for factor in (1.0, 1000.0):
        table = make_table()
        numbers = train(strategy(Scores(factor)), table, START + 1, START + LENGTH)
        results.append((by_id([table], "opacities"), [n["mask_mean"] for n in numbers]))
    assert results[0][0].keys() == results[1][0].keys()
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_learn_and_prune_what_one_does(num_ranks: int) -> None:
    def work(table: GaussianTable, ranks: RankReducer) -> GaussianTable:
        train(strategy(Scores(), ranks), table, START + 1, START + LENGTH)
        return table

    expected = by_id([work(make_table(), OneRank())], "opacities")
    found = by_id(run_on_threads(shards(make_table(), num_ranks), work), "opacities")
    assert found.keys() == expected.keys() and 0 < len(found) < NUM
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), rel=1e-10)


def test_a_window_goes_on_from_the_table_alone() -> None:
    """What a checkpoint holds is enough: a new strategy ends where the old one would, bit for bit."""
    table = make_table()
    train(strategy(Scores()), table, START + 1, START + 33)
    resumed = copy.deepcopy(table)
    train(strategy(Scores()), table, START + 34, START + LENGTH)
    train(strategy(Scores()), resumed, START + 34, START + LENGTH)
    assert by_id([table], "opacities") == by_id([resumed], "opacities")
    assert torch.equal(table.ids, resumed.ids) and len(table) < NUM


def test_a_checkpoint_inside_a_window_holds_everything(tmp_path: Path) -> None:
    table = make_table()
    train(strategy(Scores()), table, START + 1, START + 33)
    state = RunState(iteration=START + 33, next_step=START + 33, batch_size=1, seed=SEED, extent=1.0)
    resumed = load_checkpoint(save_checkpoint(tmp_path, START + 33, table, state, Communicator())).table
    assert torch.equal(resumed.statistics[IMPORTANCE], table.statistics[IMPORTANCE])
    for each in (table, resumed):
        train(strategy(Scores()), each, START + 34, START + LENGTH)
    assert by_id([table], "opacities") == by_id([resumed], "opacities") and len(table) < NUM
    assert (
        IMPORTANCE
        not in load_checkpoint(save_checkpoint(tmp_path, START + LENGTH, table, state, Communicator())).table.statistics
    )


def test_several_windows_prune_several_times() -> None:
    config = LearnedMaskConfig(prune_iterations=(100, 200), train_mask_iters=40, lambda_mask=0.001)
    table, counts = make_table(), []
    for first, last in ((101, 140), (201, 240)):
        train(strategy(Scores(), config=config), table, first, last, gradient=lambda ids: pull(ids * 7 + 13))
        counts.append(len(table))
    assert NUM > counts[0] >= counts[1] > 0
    with pytest.raises(ValueError, match="must end before the next begins"):
        LearnedMaskConfig(prune_iterations=(100, 120), train_mask_iters=40)


def test_never_everything_is_pruned() -> None:
    table, masks = make_table(), strategy(Scores())
    train(masks, table, START + 1, START + LENGTH - 1, gradient=lambda ids: torch.ones_like(ids, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="all 50 Gaussians"):
        train(masks, table, START + LENGTH, START + LENGTH)
    assert len(table) == 1


def test_scores_that_are_all_zero_are_an_error() -> None:
    masks = strategy(Scores(0.0))
    with pytest.raises(InputError, match="no training view shows any Gaussian"):
        masks.sample(make_table(), Window(START + 1, 1), SEED)


def test_straight_through_on_the_score() -> None:
    """The ablation of the paper's Table 4: hard factors, pruned where they are 0, low scores too; opacities stay."""
    config = LearnedMaskConfig((START,), LENGTH, lambda_mask=0.02, estimator="ste")
    table, masks = make_table(), strategy(Scores(), config=config)
    train(masks, table, START + 1, START + LENGTH - 1, gradient=lambda ids: 1.0 - 2.0 * (ids % 2).double())
    gate = masks.sample(table, Window(START + LENGTH, 1), SEED)
    assert gate is not None and gate.opacity_factor is not None and gate.scale_factor is None
    assert set(gate.opacity_factor.tolist()) <= {0.0, 1.0}
    kept = (gate.opacity_factor == 1) & (table.statistics[IMPORTANCE] > 0)
    low = table.statistics[IMPORTANCE] < table.statistics[IMPORTANCE].median()
    assert bool((~kept & low & (table.statistics[IMPORTANCE] > 0)).any())
    opacities, ids = table.params["opacities"].clone(), table.ids.clone()
    train(masks, table, START + LENGTH, START + LENGTH, gradient=lambda ids: torch.zeros(len(ids), dtype=torch.float64))
    assert set(table.ids.tolist()) <= set(ids[kept].tolist())
    rows = torch.isin(ids, table.ids)
    assert torch.equal(table.params["opacities"], opacities[rows])


def test_mask_on_opacity_and_scale_without_a_score() -> None:
    """The ablation of the paper's Table 3."""
    config = LearnedMaskConfig((START,), LENGTH, lambda_mask=0.02, masks_scales=True)
    table, masks = make_table(), LearnedMask(config, None)
    gate = masks.sample(table, Window(START + 1, 1), SEED)
    assert gate is not None and gate.opacity_factor is gate.scale_factor is not None
    train(masks, table, START + 1, START + LENGTH)
    assert 0 < len(table) < NUM
    assert bool((table.params["scales"] < 0).all())  # the mean factor is part of them now


def published(scores: Scores, length: int = 500, weight: float = 5e-4) -> PublishedLearnedMask:
    return PublishedLearnedMask(LearnedMaskConfig((START,), length, lambda_mask=weight), "rad_splat", scores)


def test_published_masks_lose_their_start_before_the_first_score() -> None:
    """The specification's derived numbers: m is 0.030 after 19 steps, whatever the images say."""
    table, scores = make_table(), Scores()
    masks = published(scores)
    train(masks, table, START + 1, START + 19)
    found = mask_parameter(table.params["mask_logits"])
    assert found.tolist() == pytest.approx([0.030] * NUM, abs=0.002)
    assert scores.calls == [] and masks.sample(table, Window(START + 19, 1), SEED) is None
    train(masks, table, START + 20, START + 45)
    assert [factor is None for _, factor in scores.calls] == [True, False]  # the second pass is masked
    assert bool(masks.keep(table).all())


def test_published_masks_without_image_gradient_end_at_minus_five() -> None:
    table, masks = make_table(), published(Scores())
    nothing = lambda ids: torch.zeros(len(ids), dtype=torch.float64)  # noqa: E731
    train(masks, table, START + 1, START + 499, gradient=nothing)
    assert mask_parameter(table.params["mask_logits"]).tolist() == pytest.approx([-5.04] * NUM, abs=0.01)
    logits = table.params["mask_logits"].clone()
    assert masks.after_backward(table, Window(START + 500, 1), None, None, OptimizerScaling()) == {}
    assert torch.equal(table.params["mask_logits"], logits)  # the last iteration learns nothing


def test_published_prune_is_one_draw_that_ignores_the_score() -> None:
    table, masks = make_table(4000), published(Scores(), length=20)
    opacities = table.params["opacities"].clone()
    train(masks, table, START + 1, START + 20, gradient=lambda ids: torch.zeros(len(ids), dtype=torch.float64))
    assert len(table) == pytest.approx(4000 * 0.5, abs=130)  # m is 0.03: half survives by chance
    assert torch.equal(table.params["opacities"], opacities[torch.isin(make_table(4000).ids, table.ids)])


def test_batches_scale_the_rate_as_everything_else() -> None:
    table, masks = make_table(), strategy(Scores())
    scaling = scaling_for("sqrt", 4)
    window = Window(START + 1, 4)
    gate = masks.sample(table, window, SEED)
    masks.after_backward(table, window, gate, pull(table.ids), scaling)
    moved = mask_parameter(table.params["mask_logits"]) - 1
    seen = table.statistics[IMPORTANCE] > 0
    assert moved[seen].abs().max() == pytest.approx(0.05 * 2 * 1.01, rel=0.02)


def test_methods_are_built_from_flags() -> None:
    common: dict[str, Any] = {"density": DensityConfig(), "mask": MaskConfig(), "extent": 1.0, "iterations": 30_000}
    scores = Scores()

    def parts(method: str, **values: Any) -> list[str]:
        built = build_strategy(method, **common, prune=PruneConfig(**values), score_views=scores)
        return [type(each).__name__ for each in built.strategies]

    assert parts("rad_splat") == ["DensityControl", "ScorePruning"]
    assert parts("mini_splatting", use_importance_mask=True) == ["DensityControl", "LearnedMask"]
    assert parts("rad_splat", use_importance_mask=True, lp_compat=True) == ["DensityControl", "PublishedLearnedMask"]
    assert parts("compact_3dgs") == ["DensityControl", "CompactMask"]
    assert parts("compact_3dgs", mask_estimator="gumbel") == ["DensityControl", "LearnedMask"]
    assert parts("mask", target_gaussians=100) == ["DensityControl", "TargetSize"]
    assert parts("3dgs") == ["DensityControl"]
    with pytest.raises(ValueError, match="needs score_views"):
        build_strategy("rad_splat", **common)
