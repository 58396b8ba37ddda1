# SPDX-License-Identifier: Apache-2.0
"""Lazy updates of the cuda body end at the very bits of dense ones. Those of the cpu body: `test_cpu_lazy.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cuda_launchers import launchers, make_launcher
from lazy_scenes import (
    FIRST_UPDATE,
    Twin,
    chosen,
    gradients_of,
    numbers_of_step,
    same_bits,
    turning_views,
)
from masksplat.cuda.body import CudaBody
from masksplat.cuda.compiler import SOURCE_FOLDER
from masksplat.lazy import CAPACITY, FACTORS, LazyRows
from masksplat.ops import get_body

COUNT = 150


@pytest.fixture(params=launchers(is_reversed=True))
def body(request: pytest.FixtureRequest) -> CudaBody:
    """One that updates tables of any size lazily."""
    found = CudaBody(launcher=make_launcher(request.param))
    found.lazy_from = 0
    return found


def degree_at(step: int, highest: int) -> int:
    """Higher and higher, as in training."""
    return min(highest, step // 40)


def assert_same_bits(one: Twin, two: Twin) -> None:
    for place, pair in enumerate(zip(one.tensors(), two.tensors(), strict=True)):
        assert same_bits(*pair), f"tensor {place}"


@pytest.mark.parametrize("highest", [3, 1])
def test_every_bit_is_that_of_dense_updates(body, highest):
    """Through more updates than can be replayed, with one view and several, and moments that underflow."""
    views = turning_views(torch.float32)
    dense, lazy = (Twin.of_scene(COUNT, torch.float32, body.device, highest) for _ in range(2))
    rows = lazy.make_lazy(body, FIRST_UPDATE)
    num_steps, num_drawn, most_behind = 2 * CAPACITY + 40, 0, 0
    for step in range(num_steps):
        update, degree = FIRST_UPDATE + 1 + step, degree_at(step, highest)
        batch = chosen(views, numbers_of_step(update))
        splats = dense.project(body, batch, degree)
        found = lazy.project(body, batch, degree)
        used = found.slots >= 0
        assert torch.equal(used, splats.slots >= 0)
        rows_of = [s.rows[s.slots[used].long()] for s in (splats, found)]
        torch.testing.assert_close(*rows_of, rtol=1e-6, atol=1e-6)  # colours come from another kernel
        table_gradient = gradients_of(COUNT, update).to(body.device)
        results = []
        for twin, own in ((dense, splats), (lazy, found)):
            d_rows = torch.zeros_like(own.rows)
            d_rows[own.slots[used].long()] = table_gradient.expand(len(batch), -1, -1)[used]
            results.append(twin.update(body, batch, degree, own, d_rows, update))
        assert same_bits(*results)
        num_drawn += int(used.sum())
        most_behind = max(most_behind, rows.latest - int(rows.updates.min()))
        if step == 100:
            rows.settle()
            assert_same_bits(dense, lazy)
    assert 0.1 * COUNT < num_drawn / num_steps < 0.6 * COUNT  # some are drawn, most are not
    assert CAPACITY - 3 < most_behind <= CAPACITY
    assert not same_bits(dense.gaussians.shN, lazy.gaussians.shN)
    rows.settle()
    assert_same_bits(dense, lazy)


def test_lazy_updates_do_nothing_after_an_overflow(body):
    """A pass, a projection and an update while the status notes an overflow; then all of it is repeated."""
    views = turning_views(torch.float32)
    dense, lazy = (Twin.of_scene(COUNT, torch.float32, body.device) for _ in range(2))
    rows = lazy.make_lazy(body, FIRST_UPDATE)

    def step(twin: Twin, update: int) -> None:
        batch = chosen(views, numbers_of_step(update))
        splats = twin.project(body, batch, 3)
        d_rows, used = torch.zeros_like(splats.rows), splats.slots >= 0
        gradient = gradients_of(COUNT, update).to(body.device)
        d_rows[splats.slots[used].long()] = gradient.expand(len(batch), -1, -1)[used]
        twin.update(body, batch, 3, splats, d_rows, update)

    updates = range(FIRST_UPDATE + 1, FIRST_UPDATE + 13)
    for update in updates:
        step(dense, update)
    for update in updates[:8]:
        step(lazy, update)
    before, had, ring = [t.clone() for t in lazy.tensors()], rows.updates.clone(), rows.ring.clone()
    body.status[0] = 1
    for update in updates[8:11]:
        step(lazy, update)
        rows.settle()
    assert all(same_bits(one, two) for one, two in zip(before, lazy.tensors(), strict=True))
    assert torch.equal(had, rows.updates) and torch.equal(ring, rows.ring)
    body.status.zero_()
    rows.rewind(3)
    for update in updates[8:]:
        step(lazy, update)
    rows.settle()
    assert_same_bits(dense, lazy)


def test_both_languages_know_the_same_ring():
    text = (Path(SOURCE_FOLDER) / "adam.cuh").read_text(encoding="utf-8")
    assert f"LAZY_CAPACITY = {CAPACITY};" in text and f"ADAM_FACTORS = {FACTORS};" in text


def test_the_reference_body_is_dense():
    values = torch.zeros(4, 15, 3)
    assert get_body("reference").lazy_rows(values, values, values, 0) is None


def test_small_tables_are_dense(body):
    values = torch.zeros(4, 15, 3, device=body.device)
    body.lazy_from = None
    assert body.lazy_rows(values, values, values, 0) is None
    body.lazy_from = 5
    assert body.lazy_rows(values, values, values, 0) is None
    assert body.lazy_rows(values[:0], values[:0], values[:0], 0) is None


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
