# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from masksplat.random import SPLIT, child_ids, normal
from scene.gaussians import GaussianTable, attributes_for
from scene.row_edit import EditReport, RowEdit, ValueEdit
from strategies.density import DensityConfig, DensityControl
from strategies.schedule import Window

EXTENT = 5.0
SEED = 3
CONFIG = DensityConfig()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def make_table(num_rows: int = 400, seed: int = 0) -> GaussianTable:
    """Rows on both sides of every threshold, some never seen, with ids that are no row numbers."""
    rng = np.random.default_rng(seed)
    arrays = {spec.name: rng.standard_normal((num_rows, *spec.shape)) for spec in attributes_for(1)}
    arrays["scales"] = np.log(rng.choice([0.001, 0.03, 0.07, 0.3, 0.7], (num_rows, 3)))
    arrays["opacities"] = rng.uniform(-8, 4, num_rows)
    arrays["mask_logits"] = rng.uniform(-3, 3, num_rows)
    table = GaussianTable.from_arrays(
        arrays, dtype=torch.float64, ids=torch.from_numpy(rng.permutation(10_000)[:num_rows])
    )
    count = torch.from_numpy(rng.integers(0, 5, num_rows)).double()
    table.statistics["view_count"].copy_(count)
    table.statistics["grad_norm_sum"].copy_(count * torch.from_numpy(rng.uniform(0, 4e-4, num_rows)))
    for group in (table.exp_avg, table.exp_avg_sq):
        for tensor in group.values():
            tensor.copy_(torch.from_numpy(rng.random(tuple(tensor.shape))))
    return table


def permuted(table: GaussianTable, seed: int = 1) -> GaussianTable:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(table)))
    move = {name: value[order] for name, value in table.params.items()}
    other = GaussianTable.from_arrays(move, dtype=torch.float64, ids=table.ids[order])
    for name in ("exp_avg", "exp_avg_sq", "statistics"):
        for key, value in getattr(table, name).items():
            getattr(other, name)[key].copy_(value[order])
    return other


def run(control: DensityControl, table: GaussianTable, first: int, size: int = 1) -> list[EditReport]:
    reports = []
    for edit in control.after_step(table, Window(first, size), SEED):
        table.apply(edit)
        assert edit.report is not None
        reports.append(edit.report)
    return reports


def rows_by_id(table: GaussianTable) -> dict[int, dict[str, np.ndarray]]:
    groups = {"p": table.params, "m": table.exp_avg, "v": table.exp_avg_sq, "s": table.statistics}
    flat = {f"{key}.{name}": value.numpy() for key, group in groups.items() for name, value in group.items()}
    return {int(i): {name: value[row] for name, value in flat.items()} for row, i in enumerate(table.ids)}


def rotation(quat: np.ndarray) -> np.ndarray:
    w, x, y, z = quat / np.linalg.norm(quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def one_id(parent: int, event: int, child: int) -> int:
    return int(child_ids(torch.tensor([parent]), event, child)[0])


def densified_by_hand(table: GaussianTable, event: int, config: DensityConfig) -> dict[int, dict[str, np.ndarray]]:
    """The event of 3DGS, Gaussian by Gaussian: id -> parameters after it."""
    result = {}
    for identity, row in rows_by_id(table).items():
        params = {name[2:]: value for name, value in row.items() if name.startswith("p.")}
        count = row["s.view_count"]
        gradient = row["s.grad_norm_sum"] / count if count > 0 else 0.0
        largest = math.exp(params["scales"].max())
        if gradient < config.densify_grad_threshold:
            result[identity] = params
        elif largest <= config.percent_dense * EXTENT:
            result[identity] = params
            result[one_id(identity, event, 0)] = params
        else:
            for child in (1, 2):
                child_id = one_id(identity, event, child)
                noise = normal(SEED, event, torch.tensor([child_id]), SPLIT, torch.float64)[0].numpy()
                offset = rotation(params["quats"]) @ (noise * np.exp(params["scales"]))
                smaller = {"means": params["means"] + offset, "scales": np.log(np.exp(params["scales"]) / 1.6)}
                result[child_id] = {**params, **smaller}
    is_sized = event > config.opacity_reset_interval
    return {
        identity: params
        for identity, params in result.items()
        if sigmoid(float(params["opacities"])) >= config.min_opacity
        and not (is_sized and math.exp(params["scales"].max()) > 0.1 * EXTENT)
    }


@pytest.mark.parametrize("event", [600, 3100])
def test_an_event_equals_3dgs_gaussian_by_gaussian(event: int) -> None:
    table = make_table()
    expected = densified_by_hand(table, event, CONFIG)
    before = rows_by_id(table)
    (report,) = run(DensityControl(CONFIG, EXTENT), table, event)
    after = rows_by_id(table)
    assert set(after) == set(expected)
    for identity, params in expected.items():
        for name, value in params.items():
            np.testing.assert_allclose(after[identity][f"p.{name}"], value, rtol=1e-12, atol=1e-12)
    survivors = set(after) & set(before)
    assert survivors
    assert len(after) > len(survivors)
    for identity, row in after.items():
        for name in (name for name in row if name[0] in "mv"):
            assert np.array_equal(row[name], before[identity][name] if identity in before else 0 * row[name])
    assert not table.statistics["view_count"].any()
    assert not table.statistics["grad_norm_sum"].any()
    assert report.num_gaussians == len(after)
    assert len(before) + report.cloned + report.split - report.num_pruned == len(after)
    assert report.cloned > 0
    assert report.split > 0
    assert report.pruned_opacity > 0
    assert (report.pruned_size > 0) == (event > 3000)
    assert report.pruned_mask == 0


def mask_test(logits: torch.Tensor, ids: torch.Tensor, event: int, seed: int) -> torch.Tensor:
    return (logits < 0) & (ids % 2 == 0)


def test_the_mask_test_sees_children_and_is_counted_last() -> None:
    table, plain = make_table(), make_table()
    (report,) = run(DensityControl(CONFIG, EXTENT, prune_test=mask_test), table, 3100)
    (without,) = run(DensityControl(CONFIG, EXTENT), plain, 3100)
    is_masked = mask_test(plain.params["mask_logits"], plain.ids, 3100, SEED)
    assert (is_masked & (plain.ids > 1 << 60)).any()  # children among them
    assert set(table.ids.tolist()) == set(plain.ids[~is_masked].tolist())
    assert report.pruned_mask == int(is_masked.sum())
    assert (report.pruned_opacity, report.pruned_size) == (without.pruned_opacity, without.pruned_size)


def test_the_order_of_rows_plays_no_part() -> None:
    table = make_table()
    other = permuted(table)
    control = DensityControl(CONFIG, EXTENT, prune_test=mask_test)
    assert table.ids.tolist() != other.ids.tolist()
    for event in (600, 700, 3000):
        assert run(control, table, event) == run(control, other, event)
        for each in (table, other):  # something to clone and split in the next event
            each.statistics["view_count"] += 1
            each.statistics["grad_norm_sum"] += (each.ids % 7).double() * 1e-4
    first, second = rows_by_id(table), rows_by_id(other)
    assert set(first) == set(second)
    assert len(first) == len(table)
    for identity, row in first.items():
        assert all(np.array_equal(value, second[identity][name]) for name, value in row.items())


def test_children_of_a_split_follow_the_parents_gaussian() -> None:
    """Over many parents of one shape, the children's offsets have mean 0 and the covariance R S^2 R^T."""
    num_rows = 20_000
    quat, scale = np.array([0.9, -0.3, 0.5, 0.2]), np.array([0.5, 0.2, 0.06])
    arrays = {spec.name: np.zeros((num_rows, *spec.shape)) for spec in attributes_for(0)}
    arrays["means"] += np.array([1.0, -2.0, 3.0])
    arrays["quats"] += 2.5 * quat
    arrays["scales"] += np.log(scale)
    table = GaussianTable.from_arrays(arrays, dtype=torch.float64)
    table.statistics["view_count"] += 1
    table.statistics["grad_norm_sum"] += 1
    (report,) = run(DensityControl(CONFIG, EXTENT), table, 600)
    assert (report.split, report.cloned, len(table)) == (num_rows, 0, 2 * num_rows)
    offsets = table.params["means"].numpy() - np.array([1.0, -2.0, 3.0])
    covariance = rotation(quat) @ np.diag(scale**2) @ rotation(quat).T
    standard_error = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / (2 * num_rows))
    assert (np.abs(np.cov(offsets.T) - covariance) < 4 * standard_error).all()
    assert (np.abs(offsets.mean(0)) < 4 * np.sqrt(np.diag(covariance) / (2 * num_rows))).all()
    siblings = offsets.reshape(2, num_rows, 3)
    assert np.abs((siblings[0] * siblings[1]).mean(0)).max() < 4 * scale.max() ** 2 / math.sqrt(num_rows)
    assert len(set(table.ids.tolist())) == 2 * num_rows


def test_clones_of_the_same_event_are_not_split() -> None:
    """A Gaussian at the border of clone and split is cloned once; its copy, as large, is left alone."""
    table = make_table(1)
    table.params["scales"].fill_(math.log(0.01 * EXTENT))
    table.params["opacities"].fill_(1.0)
    table.statistics["view_count"].fill_(2)
    table.statistics["grad_norm_sum"].fill_(2 * CONFIG.densify_grad_threshold)
    control = DensityControl(replace(CONFIG, percent_dense=0.010001), EXTENT)
    (report,) = run(control, table, 600)
    assert (report.cloned, report.split, len(table)) == (1, 0, 2)
    assert torch.equal(table.params["means"][0], table.params["means"][1])
    assert not table.exp_avg["means"][1].any()


def test_a_row_that_was_never_seen_is_neither_cloned_nor_split() -> None:
    table = make_table()
    table.params["opacities"].fill_(1.0)
    table.statistics["view_count"].zero_()
    (report,) = run(DensityControl(CONFIG, EXTENT), table, 600)
    assert (report.cloned, report.split, len(table)) == (0, 0, 400)


def events_of(config: DensityConfig, size: int = 1, last: int = 16_000) -> tuple[list[int], list[int]]:
    """The iterations of the densify events and of the opacity resets."""
    control, densify, reset = DensityControl(config, EXTENT), [], []
    table = make_table(1)
    for first in range(1, last + 1, size):
        for edit in control.after_step(table, Window(first, size), SEED):
            assert edit.report is not None
            (reset if isinstance(edit, ValueEdit) else densify).append(edit.report.iteration)
    return densify, reset


@pytest.mark.filterwarnings("ignore:pruning would remove all")
@pytest.mark.parametrize("size", [1, 4, 32])
def test_events_fall_on_the_iterations_of_3dgs_for_any_batch(size: int) -> None:
    densify, reset = events_of(CONFIG, size)
    assert densify == list(range(600, 15_000, 100))
    assert reset == [3000, 6000, 9000, 12_000]


@pytest.mark.filterwarnings("ignore:pruning would remove all")
def test_resets_with_a_white_background_and_an_earlier_end() -> None:
    config = replace(CONFIG, white_background=True, opacity_reset_until_iter=6500)
    assert events_of(config)[1] == [500, 3000, 6000]
    assert events_of(replace(config, densify_from_iter=0))[1] == [3000, 6000]
    assert events_of(replace(config, densify_until_iter=3000))[1] == [500]
    assert events_of(replace(CONFIG, densify_until_iter=0)) == ([], [])


def test_opacity_reset_follows_the_event_and_forgets_its_moments_only() -> None:
    table, densified = make_table(), make_table()
    control = DensityControl(CONFIG, EXTENT)
    edits = control.after_step(table, Window(3000, 1), SEED)
    first = next(edits)
    assert isinstance(first, RowEdit)
    table.apply(first)
    table.apply(second := next(edits))
    assert isinstance(second, ValueEdit)
    assert next(edits, None) is None
    densified.apply(first)
    expected = torch.sigmoid(densified.params["opacities"]).clamp(max=0.01)
    torch.testing.assert_close(torch.sigmoid(table.params["opacities"]), expected, rtol=1e-12, atol=0)
    assert not table.exp_avg["opacities"].any()
    assert not table.exp_avg_sq["opacities"].any()
    assert torch.equal(table.exp_avg["means"], densified.exp_avg["means"])
    assert torch.equal(table.params["mask_logits"], densified.params["mask_logits"])
    assert second.report is not None
    assert second.report.opacity_reset


def test_the_table_is_never_emptied() -> None:
    table = make_table(50)
    table.params["opacities"].copy_(torch.linspace(-9, -8, 50))
    table.statistics["grad_norm_sum"].zero_()
    best = int(table.ids[49])
    with pytest.warns(RuntimeWarning, match=f"all 50 Gaussians; the best one .id {best}."):
        run(DensityControl(CONFIG, EXTENT), table, 600)
    assert table.ids.tolist() == [best]


def test_everything_exists_for_evaluation_and_nothing_is_gated() -> None:
    control, table = DensityControl(CONFIG, EXTENT), make_table(5)
    assert control.keep(table).tolist() == [True] * 5
    assert control.sample(table, Window(1, 1), SEED) is None


def test_an_extent_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="extent"):
        DensityControl(CONFIG, 0.0)
