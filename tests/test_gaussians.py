# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from scene.gaussians import ATTRIBUTES, GaussianTable, attributes_for
from scene.row_edit import Override, RowEdit, ValueEdit


def random_table(num_rows: int, sh_degree: int = 1, dtype: torch.dtype = torch.float32) -> GaussianTable:
    generator = torch.Generator().manual_seed(num_rows)
    arrays = {spec.name: torch.randn(num_rows, *spec.shape, generator=generator) for spec in attributes_for(sh_degree)}
    table = GaussianTable.from_arrays(arrays, dtype=dtype)
    for tensors in (table.exp_avg, table.exp_avg_sq, table.statistics):
        for tensor in tensors.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    table.num_updates = 17
    return table


def snapshot(table: GaussianTable) -> dict[str, torch.Tensor]:
    groups = {"p": table.params, "m": table.exp_avg, "v": table.exp_avg_sq, "s": table.statistics}
    flat = {f"{key}.{name}": tensor.clone() for key, group in groups.items() for name, tensor in group.items()}
    return {**flat, "ids": table.ids.clone()}


@pytest.mark.parametrize(("degree", "num_higher"), [(0, 0), (1, 3), (2, 8), (3, 15)])
def test_attributes_have_the_shapes_and_columns_of_the_degree(degree: int, num_higher: int) -> None:
    specs = {spec.name: spec for spec in attributes_for(degree)}
    assert specs["shN"].shape == (num_higher, 3)
    assert [specs[name].shape for name in ("means", "sh0", "opacities", "mask_logits", "scales", "quats")] == [
        (3,), (3,), (), (), (3,), (4,),
    ]  # fmt: skip
    for spec in specs.values():
        assert spec.is_in_ply == (spec.name != "mask_logits")
    assert GaussianTable.from_arrays({s.name: np.zeros((5, *s.shape)) for s in specs.values()}).sh_degree == degree


def test_higher_coefficients_are_stored_channel_by_channel() -> None:
    columns = next(spec for spec in ATTRIBUTES if spec.name == "shN").ply_columns
    grid = np.array(columns).reshape(15, 3)
    assert list(grid[0]) == ["f_rest_0", "f_rest_15", "f_rest_30"]
    assert list(grid[14]) == ["f_rest_14", "f_rest_29", "f_rest_44"]


def test_learning_rates_follow_3dgs_and_the_two_logits() -> None:
    rates = {spec.name: (spec.learning_rate, spec.learning_rate_factor) for spec in ATTRIBUTES}
    assert rates["shN"] == ("feature_lr", 1 / 20)
    assert rates["mask_logits"] == ("mask_lr", 2.0)
    assert rates["means"] == ("position_lr_init", 1.0)


def test_from_arrays_fills_mask_logits_ids_and_zeros() -> None:
    rng = np.random.default_rng(0)
    arrays = {spec.name: rng.random((6, *spec.shape)) for spec in ATTRIBUTES if spec.name != "mask_logits"}
    table = GaussianTable.from_arrays(arrays, dtype=torch.float64)
    assert len(table) == 6
    assert table.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(table.params["mask_logits"], torch.full((6,), 9.0, dtype=torch.float64))
    assert np.array_equal(table.params["shN"].numpy(), arrays["shN"])
    assert table.num_updates == 0
    for group in (table.exp_avg, table.exp_avg_sq, table.statistics):
        assert all(not tensor.any() and tensor.dtype == torch.float64 for tensor in group.values())
    assert set(table.statistics) == {"grad_norm_sum", "view_count"}


def test_from_arrays_owns_its_memory() -> None:
    arrays = {spec.name: torch.zeros(4, *spec.shape) for spec in ATTRIBUTES}
    ids = torch.tensor([5, 6, 7, 8])
    table = GaussianTable.from_arrays(arrays, ids=ids)
    arrays["means"].fill_(1)
    ids.fill_(0)
    assert not table.params["means"].any()
    assert table.ids.tolist() == [5, 6, 7, 8]


def test_from_arrays_refuses_what_does_not_fit() -> None:
    good = {spec.name: np.zeros((4, *spec.shape)) for spec in ATTRIBUTES}
    with pytest.raises(ValueError, match=r"'quats' must have shape \(4, 4\), got \(4, 3\)"):
        GaussianTable.from_arrays({**good, "quats": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="'scales' is missing"):
        GaussianTable.from_arrays({name: values for name, values in good.items() if name != "scales"})
    with pytest.raises(ValueError, match="colour"):
        GaussianTable.from_arrays({**good, "colour": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="7 bases"):
        GaussianTable.from_arrays({**good, "shN": np.zeros((4, 7, 3))})
    with pytest.raises(ValueError, match="shN"):
        GaussianTable.from_arrays({**good, "shN": np.zeros((4, 45))})
    with pytest.raises(ValueError, match="ids"):
        GaussianTable.from_arrays(good, ids=torch.zeros(3, dtype=torch.int64))


def test_rows_move_with_moments_statistics_and_ids() -> None:
    table = random_table(6)
    before = snapshot(table)
    order = torch.tensor([4, 0, 5, 2])
    edit = RowEdit(source=order, is_new=torch.zeros(4, dtype=torch.bool), ids=table.ids[order])
    table.apply(edit)
    for name, values in snapshot(table).items():
        assert torch.equal(values, before[name][order]), name
    assert table.num_updates == 17
    assert all(tensor.is_contiguous() for tensor in table.params.values())


def test_new_rows_start_without_moments_and_statistics() -> None:
    table = random_table(3)
    before = snapshot(table)
    edit = RowEdit.identity(table.ids).append(torch.tensor([1, 1]), torch.tensor([100, 101]))
    table.apply(edit)
    after = snapshot(table)
    for name, values in after.items():
        assert torch.equal(values[:3], before[name]), name
    assert torch.equal(after["p.shN"][3:], before["p.shN"][[1, 1]])
    assert all(not after[name][3:].any() for name in after if name[0] in "mvs")
    assert after["ids"].tolist() == [0, 1, 2, 100, 101]


def test_an_edit_writes_to_no_tensor_of_the_old_table() -> None:
    table = random_table(5)
    old = {name: (tensor, tensor.clone()) for name, tensor in table.params.items()}
    table.apply(RowEdit.identity(table.ids).append(torch.tensor([0]), torch.tensor([9]), {"means": torch.ones(1, 3)}))
    table.apply(ValueEdit("opacities", torch.zeros(6)))
    assert all(torch.equal(tensor, copy) for tensor, copy in old.values())


def test_statistics_are_reset_on_demand_only() -> None:
    table = random_table(4)
    table.apply(RowEdit.identity(table.ids))
    assert table.statistics["view_count"].all()
    edit = RowEdit.identity(table.ids)
    table.apply(RowEdit(edit.source, edit.is_new, edit.ids, resets_statistics=True))
    assert not table.statistics["view_count"].any()
    assert not table.statistics["grad_norm_sum"].any()
    assert table.exp_avg["means"].all()


def test_value_edit_replaces_one_attribute_and_its_moments() -> None:
    table = random_table(4)
    before = snapshot(table)
    table.apply(ValueEdit("opacities", torch.arange(4.0)))
    after = snapshot(table)
    assert torch.equal(after["p.opacities"], torch.arange(4.0))
    assert not after["m.opacities"].any()
    assert not after["v.opacities"].any()
    for name in before:
        assert name.endswith("opacities") or torch.equal(after[name], before[name])


def test_edits_that_do_not_fit_change_nothing() -> None:
    table = random_table(4)
    before = snapshot(table)
    rows = torch.tensor([0, 4])
    edits = [
        RowEdit(rows, torch.zeros(2, dtype=torch.bool), rows),
        RowEdit.identity(table.ids).append(rows[:1], rows[:1], {"colour": torch.zeros(1)}),
        RowEdit.identity(table.ids).append(rows[:1], rows[:1], {"means": torch.zeros(1, 2)}),
        RowEdit(rows[:1], torch.zeros(1, dtype=torch.bool), rows[:1], {"means": Override(rows[:1], torch.zeros(2, 3))}),
        ValueEdit("opacities", torch.zeros(5)),
        ValueEdit("colour", torch.zeros(4)),
    ]
    for edit in edits:
        with pytest.raises(ValueError, match=r"edit|do not fit"):
            table.apply(edit)
    after = snapshot(table)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_table_may_be_emptied() -> None:
    table = random_table(3)
    table.apply(RowEdit.identity(table.ids).keep(torch.zeros(3, dtype=torch.bool)))
    assert len(table) == 0
    assert table.params["shN"].shape == (0, 3, 3)
    assert table.sh_degree == 1
