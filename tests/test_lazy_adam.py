# SPDX-License-Identifier: Apache-2.0
"""Lazy updates end at the very bits of dense ones."""

from __future__ import annotations

import pytest
import torch

from masksplat.cpu.body import CpuBody
from masksplat.lazy import CAPACITY, LazyRows
from lazy_scenes import (
    FIRST_UPDATE,
    Twin,
    chosen,
    gradients_of,
    numbers_of_step,
    same_bits,
    turning_views,
)

CPU = torch.device("cpu")


def degree_at(step: int, highest: int) -> int:
    """Higher and higher, as in training."""
    return min(highest, step // 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("highest", "threads"), [(3, 1), (3, 2), (2, 1), (1, 1)])
def test_every_bit_is_that_of_dense_updates(dtype, highest, threads):
    """Through more updates than can be replayed, with one view and several, and moments that underflow."""
    body, views, count = CpuBody(threads), turning_views(dtype), 61
    dense, lazy = (Twin.of_scene(count, dtype, CPU, highest) for _ in range(2))
    rows = lazy.make_lazy(body, FIRST_UPDATE)
    num_drawn, most_behind = 0, 0
    for step in range(2 * CAPACITY + 40):
        update, degree = FIRST_UPDATE + 1 + step, degree_at(step, highest)
        batch = chosen(views, numbers_of_step(update))
        splats = dense.project(body, batch, degree)
        found = lazy.project(body, batch, degree)
        assert same_bits(splats.rows, found.rows)
        d_rows = gradients_of(splats, update)
        d_masks = dense.update(body, batch, degree, splats, d_rows, update)
        assert same_bits(d_masks, lazy.update(body, batch, degree, found, d_rows, update))
        num_drawn += len(splats)
        most_behind = max(most_behind, rows.latest - int(rows.updates.min()))
        if step == 100:
            rows.settle()
            assert all(same_bits(one, two) for one, two in zip(dense.tensors(), lazy.tensors(), strict=True))
    assert 0.1 * count < num_drawn / (2 * CAPACITY + 40) < 0.6 * count  # some are drawn, most are not
    assert CAPACITY - 3 < most_behind <= CAPACITY
    assert not same_bits(dense.gaussians.shN, lazy.gaussians.shN)
    rows.settle()
    for place, (one, two) in enumerate(zip(dense.tensors(), lazy.tensors(), strict=True)):
        assert same_bits(one, two), f"tensor {place}"


def stub_rows() -> tuple[LazyRows, list[int]]:
    passes: list[int] = []
    values = torch.zeros(3, 2)
    return LazyRows(values, values, values, lambda rows: passes.append(rows.latest), 10), passes


def test_all_rows_are_caught_up_before_the_ring_forgets():
    rows, passes = stub_rows()
    for update in range(11, 11 + 3 * CAPACITY + 5):
        rows.begin(update)
    assert passes == [10 + CAPACITY, 10 + 2 * CAPACITY, 10 + 3 * CAPACITY]


def test_settling_twice_is_one_pass():
    rows, passes = stub_rows()
    rows.settle()
    rows.begin(11)
    rows.settle()
    rows.settle()
    assert passes == [11]


def test_a_gap_between_updates_is_refused():
    rows, _ = stub_rows()
    with pytest.raises(ValueError, match="update 12 cannot follow update 10"):
        rows.begin(12)


def test_what_was_settled_in_vain_is_settled_again():
    """Updates 12 to 15 changed nothing, so a pass after them, or beside them, may have done nothing either."""
    rows, passes = stub_rows()
    for update in range(11, 16):
        rows.begin(update)
        rows.settle()
    rows.rewind(4)
    assert rows.latest == 11
    rows.settle()
    rows.begin(12)
    assert passes == [11, 12, 13, 14, 15, 11]
