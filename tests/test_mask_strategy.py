# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from late_numbers import read_now
from masksplat.masks import mask_sample, mask_sample_torch, mask_update, mask_update_torch
from masksplat.random import MASK_SAMPLE, uniform
from masksplat.types import AdamStep
from scene.gaussians import GaussianTable, attributes_for
from strategies.base import CombinedStrategy, Gate, RankReducer
from strategies.density import DensityConfig
from strategies.mask import MASK_SETTINGS, MaskConfig, MaskPruning
from strategies.methods import build_strategy
from strategies.optimizer_scaling import OptimizerScaling, scaling_for
from strategies.schedule import Window

SEED = 11
DTYPES = [torch.float32, torch.float64]


def make_table(logits: torch.Tensor, ids: torch.Tensor | None = None) -> GaussianTable:
    arrays: dict[str, Any] = {spec.name: torch.zeros(len(logits), *spec.shape) for spec in attributes_for(0)}
    arrays["mask_logits"] = logits
    arrays["means"] = torch.arange(3.0 * len(logits)).reshape(-1, 3)
    return GaussianTable.from_arrays(arrays, dtype=logits.dtype, ids=ids)


def masks(config: MaskConfig | None = None, *, until: int = 15_000, ranks: RankReducer | None = None) -> MaskPruning:
    return MaskPruning(config or MaskConfig(), iterations=30_000, densify_until_iter=until, ranks=ranks)


def train(
    strategy: MaskPruning, table: GaussianTable, pull: Callable[[torch.Tensor], torch.Tensor], num_steps: int
) -> list[dict[str, float]]:
    """Steps whose images' loss has the gradient `pull(ids)` by the mask."""
    numbers = []
    for step in range(1, num_steps + 1):
        window = Window(step, 1)
        gate = strategy.sample(table, window, SEED)
        learned = strategy.after_backward(table, window, gate, pull(table.ids), OptimizerScaling())
        numbers.append(read_now(learned))
        table.num_updates += 1
    return numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_torch(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.cat([6 * torch.randn(5000, generator=rng, dtype=dtype), torch.tensor([-700.0, -90.0, 90.0, 700.0])])
    logits = logits.to(dtype)
    ids = torch.randint(0, 1 << 62, (len(logits),), generator=rng)
    mine, oracle = mask_sample(logits, ids, SEED, 77), mask_sample_torch(logits, ids, SEED, 77)
    assert torch.equal(mine.mask, oracle.mask)
    assert mine.mask[-4:].tolist() == [0, 0, 1, 1]
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine.keep_gradient, oracle.keep_gradient, rtol=tolerance, atol=tolerance)
    d_mask = torch.randn(len(logits), generator=rng, dtype=dtype)
    states = [[logits.clone(), 0.1 * d_mask, 0.2 * d_mask**2] for _ in range(2)]
    common = {"d_mask": d_mask, "keep_gradient": mine.keep_gradient, "d_all": 0.03}
    adam = AdamStep(0.02, 0.9, 0.999, 1e-15, 3)
    mask_update(*states[0], **common, adam=adam)
    mask_update_torch(*states[1], **common, adam=adam)
    assert not torch.equal(states[0][0], logits)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_update_is_torch_adam() -> None:
    logits = torch.linspace(-2, 2, 9, dtype=torch.float64)
    mine = [logits.clone(), torch.zeros_like(logits), torch.zeros_like(logits)]
    parameter = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.02, betas=(0.8, 0.95), eps=1e-3)
    for update in range(1, 30):
        d_mask, keep = torch.cos(update * logits), torch.sin(logits) ** 2
        adam = AdamStep(0.02, 0.8, 0.95, 1e-3, update)
        mask_update(*mine, d_mask=d_mask, keep_gradient=keep, d_all=0.1, adam=adam)
        parameter.grad = (d_mask + 0.1) * keep
        optimizer.step()
    torch.testing.assert_close(mine[0], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_one_logit_learns_what_the_papers_two_logits_learn() -> None:
    """MaskGaussian's Gumbel softmax of two logits, by autograd and torch.optim.Adam, against ours for 80 steps."""
    num_rows, strategy = 300, masks(MaskConfig(lambda_mask=0.1, mask_lr=0.2))
    table = make_table(torch.full((num_rows,), 9.0, dtype=torch.float64))
    scores = torch.nn.Parameter(torch.tensor([[10.0, 1.0]], dtype=torch.float64).repeat(num_rows, 1))
    optimizer = torch.optim.Adam([scores], lr=0.2, eps=1e-15)
    pull = 1e-3 * torch.cos(torch.arange(num_rows, dtype=torch.float64))
    for step in range(1, 81):
        u = uniform(SEED, step, table.ids, MASK_SAMPLE, torch.float64)
        noise = torch.stack([torch.log(u / (1 - u)), torch.zeros_like(u)], 1)
        soft = torch.softmax(torch.log_softmax(scores, 1) + noise, 1)[:, 0]
        hard = (soft > 0.5).double() + soft - soft.detach()
        optimizer.zero_grad()
        (0.1 * hard.mean() ** 2 + (pull * hard).sum()).backward()
        optimizer.step()
        gate = strategy.sample(table, Window(step, 1), SEED)
        assert torch.equal(gate.mask, (soft > 0.5).double())
        strategy.after_backward(table, Window(step, 1), gate, pull, OptimizerScaling())
        table.num_updates += 1
        margin = (scores[:, 0] - scores[:, 1]).detach()
        torch.testing.assert_close(table.params["mask_logits"], margin, rtol=1e-9, atol=1e-9)
    assert float(margin.min()) < -1 < 9 < float(margin.max())


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_samples_and_prunes_have_the_right_probability(p: float) -> None:
    num_rows = 40_000
    logits = torch.full((num_rows,), math.log(p / (1 - p)), dtype=torch.float64)
    table, strategy = make_table(logits), masks()
    drawn = strategy.sample(table, Window(5, 1), SEED).mask
    pruned = strategy.prune_test(logits, table.ids, 5, SEED)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    for observed, expected in ((drawn.double().mean(), p), (pruned.double().mean(), (1 - p) ** 10)):
        assert abs(float(observed) - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1e-9) / num_rows) + 1e-4


def test_the_sample_depends_on_id_step_and_seed_alone() -> None:
    logits = torch.linspace(-3, 3, 1000)
    table, strategy, order = make_table(logits), masks(), torch.randperm(1000)
    other = make_table(logits[order], ids=order)
    gate, moved = (strategy.sample(each, Window(9, 1), SEED) for each in (table, other))
    assert torch.equal(gate.mask[order], moved.mask)
    assert torch.equal(gate.keep_gradient[order], moved.keep_gradient)
    assert torch.equal(gate.mask, strategy.sample(table, Window(9, 4), SEED).mask)
    assert not torch.equal(gate.mask, strategy.sample(table, Window(10, 1), SEED).mask)
    assert not torch.equal(gate.mask, strategy.sample(table, Window(9, 1), SEED + 1).mask)
    pruned = strategy.prune_test(logits, table.ids, 1000, SEED)
    assert torch.equal(pruned[order], strategy.prune_test(logits[order], order, 1000, SEED))


def test_the_loss_is_the_squared_mean_within_its_window_only() -> None:
    config = MaskConfig(lambda_mask=0.5, mask_from_iter=3, mask_until_iter=5)
    table = make_table(torch.linspace(-1, 3, 200, dtype=torch.float64))
    numbers = train(masks(config), table, lambda ids: torch.zeros(len(ids), dtype=torch.float64), 7)
    assert [each["mask_loss"] > 0 for each in numbers] == [False, False, True, True, True, False, False]
    for each in numbers[2:5]:
        assert each["mask_loss"] == pytest.approx(0.5 * each["mask_mean"] ** 2, rel=1e-12)


def test_outside_the_window_nothing_moves_without_an_image_gradient() -> None:
    table = make_table(torch.linspace(-1, 3, 50, dtype=torch.float64))
    before = table.params["mask_logits"].clone()
    config = MaskConfig(mask_from_iter=100, mask_until_iter=200)
    train(masks(config), table, lambda ids: torch.zeros(len(ids), dtype=torch.float64), 3)
    assert torch.equal(table.params["mask_logits"], before)
    strategy, window = masks(config), Window(3, 1)
    gate = strategy.sample(table, window, SEED)
    strategy.after_backward(table, window, gate, None, OptimizerScaling())
    assert torch.equal(table.params["mask_logits"], before)
    with pytest.raises(ValueError, match="gate"):
        strategy.after_backward(table, window, None, None, OptimizerScaling())


def test_gaussians_that_matter_stay_and_the_others_vanish() -> None:
    """The images' gradient -1e-3 for even ids outweighs the regulariser; odd ids are needed by none."""
    num_rows = 2000
    table = make_table(torch.full((num_rows,), 9.0))
    train(masks(MaskConfig(lambda_mask=0.1)), table, lambda ids: torch.where(ids % 2 == 0, -1e-3, 0.0), 1500)
    kept = masks().keep(table)
    assert kept[0::2].all()
    assert not kept[1::2].any()
    pruned = masks().prune_test(table.params["mask_logits"], table.ids, 1000, SEED)
    assert not pruned[0::2].any()
    assert pruned[1::2].float().mean() > 0.5


@pytest.mark.parametrize(("mode", "factor", "weight"), [("sqrt", 2.0, 1.0), ("linear", 4.0, 1.0), ("accumu", 1.0, 4.0)])
def test_batches_scale_rate_and_regulariser(mode: str, factor: float, weight: float) -> None:
    """The first Adam update moves each logit by the learning rate, 2 * mask_lr * factor, whatever its gradient."""
    table = make_table(torch.full((100,), 1.0, dtype=torch.float64))
    strategy, window = masks(MaskConfig(lambda_mask=0.3)), Window(1, 4)
    gate = strategy.sample(table, window, SEED)
    numbers = read_now(strategy.after_backward(table, window, gate, None, scaling_for(mode, 4)))
    assert numbers["mask_loss"] == pytest.approx(weight * 0.3 * numbers["mask_mean"] ** 2, rel=1e-12)
    torch.testing.assert_close(
        table.params["mask_logits"], torch.full((100,), 1 - 0.02 * factor, dtype=torch.float64), rtol=1e-6, atol=0
    )


def prune_events(config: MaskConfig, *, until: int, size: int = 1, iterations: int = 30_000) -> list[int]:
    strategy = MaskPruning(config, iterations=iterations, densify_until_iter=until)
    table, events = make_table(torch.tensor([9.0, 9.0])), []
    for first in range(1, iterations + 1, size):
        for edit in strategy.after_step(table, Window(first, size), SEED):
            assert edit.report is not None
            events.append(edit.report.iteration)
    return events


@pytest.mark.parametrize("size", [1, 4, 7])
def test_prunes_run_from_the_end_of_densification_to_the_last_iteration(size: int) -> None:
    assert prune_events(MASK_SETTINGS["beta"], until=15_000, size=size) == list(range(15_000, 30_001, 1000))
    assert prune_events(MASK_SETTINGS["alpha"], until=15_000, size=size) == list(range(19_000, 30_001, 1000))
    assert prune_events(MaskConfig(), until=0, size=size, iterations=3500) == [1000, 2000, 3000]


def test_settings_are_those_of_the_paper_and_immutable() -> None:
    values = {name: (c.lambda_mask, c.mask_from_iter, c.mask_until_iter) for name, c in MASK_SETTINGS.items()}
    assert values == {"alpha": (0.1, 19_000, 20_000), "beta": (5e-4, 0, 30_000), "gamma": (1e-3, 0, 30_000)}
    assert MASK_SETTINGS["beta"] == MaskConfig()
    with pytest.raises(TypeError):
        MASK_SETTINGS["beta"] = MaskConfig()  # type: ignore[index]


def test_a_prune_removes_rows_and_touches_no_other() -> None:
    logits = torch.linspace(-6, 6, 500)
    table, strategy = make_table(logits), masks()
    table.statistics["view_count"].copy_(torch.arange(500.0))
    table.exp_avg["means"].copy_(table.params["means"])
    expected = ~strategy.prune_test(logits, table.ids, 16_000, SEED)
    edits = list(strategy.after_step(table, Window(16_000, 1), SEED))
    (edit,) = edits
    table.apply(edit)
    assert table.ids.tolist() == torch.arange(500)[expected].tolist()
    assert torch.equal(table.statistics["view_count"], torch.arange(500.0)[expected])
    assert torch.equal(table.exp_avg["means"], table.params["means"])
    assert edit.report is not None
    assert edit.report.pruned_mask == 500 - len(table) == edit.report.num_pruned > 0
    assert edit.report.num_gaussians == len(table)


def test_a_prune_never_removes_everything() -> None:
    logits = torch.full((40,), -60.0)
    logits[[7, 21]] = -50.0
    table, strategy = make_table(logits, ids=torch.arange(40).flip(0)), masks()
    with pytest.warns(RuntimeWarning, match="all 40 Gaussians"):
        (edit,) = list(strategy.after_step(table, Window(16_000, 1), SEED))
    table.apply(edit)
    assert table.ids.tolist() == [18]  # rows 7 and 21 tie; the lower id stays
    with pytest.warns(RuntimeWarning, match="id 18"):
        assert strategy.keep(table).tolist() == [True]


def test_kept_for_evaluation_is_exactly_p_of_one_half_and_more() -> None:
    table = make_table(torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 9.0]))
    assert masks().keep(table).tolist() == [False, False, True, True, True]


class ThreadRanks:
    """Reductions over threads that stand for ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=60)
        self.values: dict[int, torch.Tensor] = {}

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        self.values[threading.get_ident()] = values
        self.barrier.wait()
        gathered = torch.stack(list(self.values.values()))
        self.barrier.wait()
        return gathered

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._gather(values).sum(0)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return self._gather(values).amax(0)


def run_ranks(tables: list[GaussianTable], work: Callable[[GaussianTable, RankReducer], Any]) -> list[Any]:
    ranks, results = ThreadRanks(len(tables)), [None] * len(tables)

    def one_rank(rank: int) -> None:
        results[rank] = work(tables[rank], ranks)

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(len(tables))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_several_ranks_learn_and_prune_what_one_does() -> None:
    def pull(ids: torch.Tensor) -> torch.Tensor:
        return 1e-4 * torch.sin(ids.double())

    def work(table: GaussianTable, ranks: RankReducer | None) -> list[dict[str, float]]:
        strategy = masks(MaskConfig(lambda_mask=0.1, mask_lr=0.5), ranks=ranks)
        numbers = train(strategy, table, pull, 40)
        (edit,) = list(strategy.after_step(table, Window(16_000, 1), SEED))
        table.apply(edit)
        return numbers

    logits = torch.linspace(-4, 9, 90, dtype=torch.float64)
    whole, ids = make_table(logits), torch.arange(90)
    parts = [torch.arange(0), torch.arange(0, 50), torch.arange(50, 90).flip(0)]  # one rank owns nothing
    tables = [make_table(logits[part], ids=ids[part]) for part in parts]
    numbers = work(whole, None)
    assert run_ranks(tables, work) == [numbers] * 3
    gathered = {int(i): float(x) for t in tables for i, x in zip(t.ids, t.params["mask_logits"], strict=True)}
    expected = {int(i): float(x) for i, x in zip(whole.ids, whole.params["mask_logits"], strict=True)}
    assert gathered == expected
    assert 0 < len(expected) < 90


def test_the_last_gaussian_of_all_ranks_is_spared_once() -> None:
    tables = [make_table(torch.full((5,), -40.0 - rank), ids=torch.arange(5) + 10 * rank) for rank in range(2)]
    with pytest.warns(RuntimeWarning, match="all 10 Gaussians"):
        kept = run_ranks(tables, lambda table, ranks: masks(ranks=ranks).keep(table).tolist())
    assert kept == [[True] + [False] * 4, [False] * 5]


def test_methods_are_composed_by_name() -> None:
    table = make_table(torch.tensor([-5.0, 5.0]))
    common: dict[str, Any] = {"density": DensityConfig(), "mask": MaskConfig(), "extent": 1.0, "iterations": 30_000}
    plain, masked = build_strategy("3dgs", **common), build_strategy("mask", **common)
    assert plain.sample(table, Window(1, 1), SEED) is None
    assert plain.after_backward(table, Window(1, 1), None, None, OptimizerScaling()) == {}
    assert plain.keep(table).tolist() == [True, True]
    assert masked.keep(table).tolist() == [False, True]
    gate = masked.sample(table, Window(1, 1), SEED)
    assert gate is not None
    assert set(masked.after_backward(table, Window(1, 1), gate, None, OptimizerScaling())) == {"mask_loss", "mask_mean"}
    still = build_strategy("mask", **{**common, "density": None})
    assert list(still.after_step(table, Window(500, 1), SEED)) == []
    assert len(list(still.after_step(table, Window(1000, 1), SEED))) == 1
    with pytest.raises(ValueError, match="--prune_method 'lp'"):
        build_strategy("lp", **common)


def test_density_events_prune_by_mask_before_densification_ends() -> None:
    """A masked-out Gaussian goes in the first event, long before the masks prune by themselves."""
    table = make_table(torch.tensor([-60.0, 9.0, -60.0]))
    table.statistics["view_count"].fill_(1)
    strategy = build_strategy(
        "mask", density=DensityConfig(), mask=MASK_SETTINGS["alpha"], extent=100.0, iterations=30_000
    )
    (edit,) = list(strategy.after_step(table, Window(600, 1), SEED))
    table.apply(edit)
    assert table.ids.tolist() == [1]
    assert edit.report is not None
    assert edit.report.pruned_mask == 2


def test_two_gates_are_refused() -> None:
    with pytest.raises(RuntimeError, match="two strategies gate"):
        CombinedStrategy([masks(), masks()]).sample(make_table(torch.zeros(2)), Window(1, 1), SEED)
    assert Gate(mask=None, keep_gradient=None).mask is None


def test_sampling_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        mask_sample(torch.zeros(3, dtype=torch.float16), torch.arange(3), 0, 0)
    with pytest.raises(ValueError, match="seed"):
        mask_sample(torch.zeros(3), torch.arange(3), -1, 0)
    extreme = mask_sample(torch.tensor([-1e30, 1e30, 0.0]), torch.arange(3), 0, 0)
    assert torch.isfinite(extreme.keep_gradient).all()
