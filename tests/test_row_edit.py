# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scene.gaussians import GaussianTable
from scene.row_edit import EditReport, RowEdit, ValueEdit

NUM_ROWS = 6

operations = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.integers(0, 2**20)),
        st.tuples(st.just("append"), st.lists(st.integers(0, NUM_ROWS - 1), max_size=3), st.booleans()),
    ),
    max_size=6,
)


def small_table() -> GaussianTable:
    shapes = {"means": (3,), "sh0": (3,), "shN": (0, 3), "opacities": (), "scales": (3,), "quats": (4,)}
    arrays = {name: torch.arange(NUM_ROWS * 12.0)[: NUM_ROWS * _size(shape)].reshape(NUM_ROWS, *shape)
              for name, shape in shapes.items()}  # fmt: skip
    table = GaussianTable.from_arrays(arrays, ids=torch.arange(50, 50 + NUM_ROWS))
    for group in (table.exp_avg, table.exp_avg_sq, table.statistics):
        for tensor in group.values():
            tensor.fill_(2.0)
    return table


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _compose(table: GaussianTable, steps: list[Any]) -> tuple[RowEdit, list[tuple[int, int, bool, float | None]]]:
    """The composed edit, and the same as a plain list of (source, id, is new, overriding opacity)."""
    edit = RowEdit.identity(table.ids)
    model: list[tuple[int, int, bool, float | None]] = [(row, 50 + row, False, None) for row in range(NUM_ROWS)]
    next_id = 1000
    for step in steps:
        if step[0] == "keep":
            kept = [bool(step[1] >> row & 1) for row in range(len(model))]
            model = [entry for entry, is_kept in zip(model, kept, strict=True) if is_kept]
            edit = edit.keep(torch.tensor(kept, dtype=torch.bool))
        else:
            sources, has_values = step[1], step[2]
            ids = list(range(next_id, next_id + len(sources)))
            next_id += len(sources)
            values = [-float(identity) for identity in ids]
            pairs = zip(sources, ids, values, strict=True)
            model += [(source, identity, True, value if has_values else None) for source, identity, value in pairs]
            overrides = {"opacities": torch.tensor(values)} if has_values else None
            source = torch.tensor(sources, dtype=torch.int64)
            edit = edit.append(source, torch.tensor(ids, dtype=torch.int64), overrides)
    return edit, model


@settings(deadline=None, max_examples=150)
@given(operations)
def test_compositions_equal_a_plain_list_of_rows(steps: list[Any]) -> None:
    table = small_table()
    opacities, means = table.params["opacities"].clone(), table.params["means"].clone()
    edit, model = _compose(table, steps)
    expected = torch.tensor([opacities[source] if value is None else value for source, _, _, value in model])
    assert torch.equal(edit.preview("opacities", opacities), expected)
    table.apply(edit)
    assert table.ids.tolist() == [identity for _, identity, _, _ in model]
    assert torch.equal(table.params["opacities"], expected)
    assert torch.equal(table.params["means"], means[[source for source, *_ in model]])
    moments = torch.tensor([0.0 if is_new else 2.0 for _, _, is_new, _ in model])
    assert torch.equal(table.exp_avg["opacities"], moments)
    assert torch.equal(table.statistics["view_count"], moments)


@settings(deadline=None, max_examples=150)
@given(operations)
def test_rows_beside_their_sources_are_the_same_rows(steps: list[Any]) -> None:
    """Each with its override, and children behind their parents."""
    one, two = small_table(), small_table()
    edit, model = _compose(one, steps)
    one.apply(edit)
    two.apply(edit.beside_sources())
    order = sorted(range(len(model)), key=lambda row: model[row][0])  # stable
    if any(is_new for _, _, is_new, _ in model):
        assert two.ids.tolist() == [model[row][1] for row in order]
    place = {identity: row for row, identity in enumerate(two.ids.tolist())}
    rows = torch.tensor([place[identity] for identity in one.ids.tolist()], dtype=torch.int64)
    assert len(place) == len(model)
    for tensors in ("params", "exp_avg", "statistics"):
        for name, values in getattr(one, tensors).items():
            assert torch.equal(values, getattr(two, tensors)[name][rows])


@given(st.permutations(range(NUM_ROWS)))
def test_a_permutation_conserves_the_rows(order: list[int]) -> None:
    table = small_table()
    before = {int(i): row for i, row in zip(table.ids, table.params["quats"].clone(), strict=True)}
    source = torch.tensor(order)
    table.apply(RowEdit(source, torch.zeros(NUM_ROWS, dtype=torch.bool), table.ids[source]))
    assert sorted(table.ids.tolist()) == list(range(50, 50 + NUM_ROWS))
    for identity, row in zip(table.ids, table.params["quats"], strict=True):
        assert torch.equal(row, before[int(identity)])


def test_composition_leaves_earlier_edits_as_they_were() -> None:
    table = small_table()
    first = RowEdit.identity(table.ids).append(torch.tensor([0]), torch.tensor([7]), {"opacities": torch.tensor([5.0])})
    first.append(torch.tensor([1]), torch.tensor([8]), {"opacities": torch.tensor([6.0])})
    assert len(first) == NUM_ROWS + 1
    assert first.overrides["opacities"].values.tolist() == [5.0]


def test_shapes_and_types_are_checked() -> None:
    rows, no = torch.arange(2), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="common shape"):
        RowEdit(rows, no, rows[:1])
    with pytest.raises(ValueError, match="int64"):
        RowEdit(rows.int(), no, rows)
    with pytest.raises(ValueError, match="is_kept"):
        RowEdit(rows, no, rows).keep(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_kept"):
        RowEdit(rows, no, rows).keep(torch.ones(2))


def test_report_counts_prunes_only() -> None:
    report = EditReport(iteration=600, cloned=4, split=3, pruned_opacity=2, pruned_size=1, pruned_mask=5)
    assert report.num_pruned == 8
    assert ValueEdit("opacities", torch.zeros(1)).report is None
