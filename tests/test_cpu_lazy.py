# SPDX-License-Identifier: Apache-2.0
"""Updates that the cpu body makes up for in closed form, against dense updates and a stepwise oracle in long double."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import masksplat.cpu.body
from lazy_scenes import FIRST_UPDATE, Twin, awkward_moments, chosen, gradients_of, turning_views
from masksplat.cpu.body import CpuBody
from masksplat.cpu.lazy_adam import BLOCK, LEG
from masksplat.lazy import CAPACITY, LazyRows
from masksplat.types import AdamStep

NUM_BLOCKS = 12
COUNT = NUM_BLOCKS * BLOCK - 37
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
DTYPES = list(ROUNDING)
EPS = 1e-15
MOST_BEHIND = next(gap for gap in range(CAPACITY - LEG + 1, CAPACITY + 1) if (FIRST_UPDATE + gap) % LEG == 0)
"""Updates after which rows that nobody has seen since FIRST_UPDATE are caught up: at the end of a leg, which leaves no
trace, and before the ring has lost one."""


def adam_step(update: int) -> AdamStep:
    """Rates that change, as annealing and schedules make them."""
    return AdamStep(1e-3 * (1 + 0.1 * (update % 7)), 0.9, 0.999, EPS, update)


def behind(count: int, dtype: torch.dtype, gap: int) -> LazyRows:
    """Rows of (15, 3) numbers with every kind of moments that lack the `gap` updates after FIRST_UPDATE."""
    generator = torch.Generator().manual_seed(gap)
    param = torch.randn(count, 15, 3, generator=generator, dtype=torch.float64).mul(0.1).to(dtype)
    rows = CpuBody(1).lazy_rows(param, *awkward_moments(count, dtype), FIRST_UPDATE)
    assert rows is not None
    for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 1 + gap):
        rows.begin(update)
        factors = masksplat.cpu.body._adam_factors(adam_step(update))
        rows.ring[update % CAPACITY] = torch.tensor(factors, dtype=torch.float64).to(dtype)
    return rows


def exactly(rows: LazyRows) -> list[np.ndarray]:
    """Parameter, both moments and the bound of what legs leave out, update by update in long double.

    The bound of a leg: its move times the variance of the terms with eps over (sqrt(v) + their mean)^2.
    """
    wide = [tensor.numpy().astype(np.longdouble) for tensor in (rows.param, rows.exp_avg, rows.exp_avg_sq)]
    ring = rows.ring.numpy().astype(np.longdouble)
    param, mean, square = wide
    left_out = np.zeros_like(param)
    leg: list[tuple[np.ndarray, np.ndarray]] = []  # moves and terms of a leg, in units of its beginning
    root = np.sqrt(square)
    shrunk = np.longdouble(1)
    for update in range(FIRST_UPDATE + 1, rows.latest + 1):
        beta1, beta2, rate, correction, eps, _, _ = ring[update % CAPACITY]
        mean, square = beta1 * mean, beta2 * square
        move = rate * mean / (np.sqrt(square) * correction + eps)
        param = param - move
        shrunk = shrunk * np.sqrt(beta2)
        leg.append((np.abs(move), eps / correction / shrunk))
        if update % LEG == 0 or update == rows.latest:
            left_out = left_out + bound_of(leg, root)
            leg, root, shrunk = [], np.sqrt(square), np.longdouble(1)
    return [param, mean, square, left_out]


def bound_of(leg: Sequence[tuple[np.ndarray, np.ndarray]], root: np.ndarray) -> np.ndarray:
    """What the mean of the terms leaves out: their variance is at most a quarter of their range squared (Popoviciu)."""
    terms = [term for _, term in leg]
    spread = (max(terms) - min(terms)) / 2
    return sum(move for move, _ in leg) * (spread / (root + min(terms))) ** 2


@pytest.mark.parametrize("gap", [1, 2, 9, 10, 11, 57, MOST_BEHIND])
@pytest.mark.parametrize("dtype", DTYPES)
def test_legs_are_the_updates_they_stand_for(dtype: torch.dtype, gap: int) -> None:
    """Within the rounding of every leg, and of what the formula says that it leaves out."""
    rows = behind(300, dtype, gap)
    param, mean, square, left_out = exactly(rows)
    before = rows.param.numpy().astype(np.longdouble)
    num_legs = -(-gap // LEG) + 1
    rows.settle()
    unit, least = ROUNDING[dtype], torch.finfo(dtype).tiny
    of_legs = LEG if dtype == torch.float64 else 0  # roundings in legs themselves, which are float64
    moved = np.abs(param - before)
    largest = np.maximum(np.abs(param), np.abs(before))
    found = rows.param.numpy().astype(np.longdouble)
    allowed = num_legs * unit * (largest + (6 + 3 * of_legs) * moved) + 1.01 * left_out
    is_worth = rows_worth_asking(rows, least)
    assert np.all(np.abs(found - param)[is_worth] <= allowed[is_worth])
    for tensor, value in ((rows.exp_avg, mean), (rows.exp_avg_sq, square)):
        error = np.abs(tensor.numpy().astype(np.longdouble) - value)
        assert np.all(error <= (2 + of_legs) * num_legs * unit * np.abs(value) + num_legs * least * unit)
    assert np.max(moved) > 1e-3 * min(gap, 5)  # rates of 1e-3: there was something to make up for


def rows_worth_asking(rows: LazyRows, least: float) -> np.ndarray:
    """Where the moments are no denormal numbers, whose own rounding moves the parameter."""
    mean, square = rows.exp_avg.numpy(), rows.exp_avg_sq.numpy()
    return ((mean == 0) | (np.abs(mean) > least)) & ((square == 0) | (square > least))


@pytest.mark.parametrize("gap", [10, 57, MOST_BEHIND])
def test_legs_are_no_less_accurate_than_steps(gap: int) -> None:
    """In float32, root of the mean square of the error against long double, both from the same numbers.

    Where sqrt(v) is 1e-13 and more, or nothing moves: below that the terms with eps are left out in part.
    """
    rows = behind(300, torch.float32, gap)
    is_worth = (rows.exp_avg_sq > 1e-26).numpy() | (rows.exp_avg == 0).numpy()
    exact = exactly(rows)[0]
    body, dense = CpuBody(1), [t.clone() for t in (rows.param, rows.exp_avg, rows.exp_avg_sq)]
    for update in range(FIRST_UPDATE + 1, rows.latest + 1):
        body.adam(dense[0], torch.zeros_like(dense[0]), dense[1], dense[2], adam_step(update))
    rows.settle()
    errors = [np.sqrt(np.mean((t.numpy() - exact)[is_worth] ** 2)) for t in (rows.param, dense[0])]
    assert np.mean(is_worth) > 0.6 and errors[0] < errors[1]


def spread_out(dtype: torch.dtype) -> Twin:
    """A table along a ring around the cameras of `turning_views`: a view draws some blocks and leaves others."""
    twin = Twin.of_scene(COUNT, dtype, torch.device("cpu"))
    means = twin.gaussians.means
    angle = torch.linspace(0, 2 * math.pi, COUNT, dtype=dtype)
    radius = 4 + means[:, 0].tanh()
    means.copy_(torch.stack([radius * angle.sin(), means[:, 1].tanh(), 4 + radius * angle.cos()], dim=1))
    # As gradients leave them, and none so small that terms with eps count: another test is about those.
    least = torch.maximum(twin.exp_avg[5].square() / 16, torch.tensor(1e-18, dtype=dtype))
    torch.maximum(twin.exp_avg_sq[5], least, out=twin.exp_avg_sq[5])
    return twin


def views_of(update: int) -> list[int]:
    """One view of four or two; a fifth now and then; the others never."""
    first = 4 if update % 60 == 0 else update % 4
    return [first, (first + 1) % 4] if update % 5 == 0 else [first]


def step(twin: Twin, body: CpuBody, update: int) -> torch.Tensor:
    """One step with gradients that depend on the row alone; which rows it drew."""
    batch = chosen(turning_views(twin.gaussians.means.dtype), views_of(update))
    splats = twin.project(body, batch, 3)
    used = splats.slots >= 0
    d_rows = torch.zeros_like(splats.rows)
    gradient = gradients_of(COUNT, update).to(d_rows.dtype)
    d_rows[splats.slots[used].long()] = gradient.expand(len(batch), -1, -1)[used]
    twin.update(body, batch, 3, splats, d_rows, update)
    return used.any(0)


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - two).double().norm() / two.double().norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_lazy_table_is_a_dense_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float) -> None:
    """Through more updates than can be made up for, with one view and two."""
    monkeypatch.setattr(masksplat.cpu.body, "LAZY_BELOW", 1.0)
    body = CpuBody(2)
    dense, lazy = spread_out(dtype), spread_out(dtype)
    rows = lazy.make_lazy(body, FIRST_UPDATE)
    most_behind, num_behind = 0, 0.0
    updates = range(FIRST_UPDATE + 1, FIRST_UPDATE + 2 * CAPACITY)
    for update in updates:
        assert torch.equal(step(dense, body, update), step(lazy, body, update))
        gaps = rows.latest - rows.updates
        most_behind, num_behind = max(most_behind, int(gaps.max())), num_behind + float((gaps > 0).double().mean())
    assert num_behind > 0.3 * len(updates) and CAPACITY - LEG < most_behind <= CAPACITY
    rows.settle()
    assert int(rows.updates.min()) == rows.latest
    for one, two in zip(lazy.tensors(), dense.tensors(), strict=True):
        assert relative(one, two) < limit


def ended(look_at: Sequence[int], *, threads: int = 1, holds: bool = False) -> list[torch.Tensor]:
    """The table after some updates, settled after those in `look_at`; then as before again, when the look `holds`."""
    body, twin = CpuBody(threads), spread_out(torch.float32)
    rows = twin.make_lazy(body, FIRST_UPDATE)
    for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 48):
        step(twin, body, update)
        if update in look_at:
            assert int(rows.updates.min()) < rows.latest
            held = rows.hold()
            assert (held is None) == (update % LEG == 0)
            rows.settle()
            if holds and held is not None:
                rows.fall_back(held)
    rows.settle()
    return twin.tensors()


def test_looking_at_the_end_of_a_leg_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """So checkpoints, evaluations and edits there do not change later bits; and threads never do."""
    monkeypatch.setattr(masksplat.cpu.body, "LAZY_BELOW", 1.0)
    plain = ended([])
    ends = [update for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 48) if update % LEG == 0]
    for found in (ended(ends), ended([], threads=2)):
        assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))


def test_a_look_that_holds_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a leg, where another one does."""
    monkeypatch.setattr(masksplat.cpu.body, "LAZY_BELOW", 1.0)
    looks = [update for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 48) if update % 7 == 3]
    plain = ended([])
    assert all(torch.equal(one, two) for one, two in zip(ended(looks, holds=True), plain, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(ended(looks), plain, strict=True))


def test_views_that_draw_most_blocks_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then every bit is that of dense updates."""
    monkeypatch.setattr(masksplat.cpu.body, "LAZY_BELOW", -1.0)
    body = CpuBody(1)
    dense, lazy = spread_out(torch.float32), spread_out(torch.float32)
    rows = lazy.make_lazy(body, FIRST_UPDATE)
    for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 12):
        step(dense, body, update)
        step(lazy, body, update)
        assert int(rows.updates.min()) == rows.latest
    assert all(torch.equal(one, two) for one, two in zip(lazy.tensors(), dense.tensors(), strict=True))


def test_blocks_left_behind_are_caught_up_by_a_dense_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that draws most of a table finds blocks that others have left."""
    body = CpuBody(1)
    dense, lazy = spread_out(torch.float64), spread_out(torch.float64)
    rows = lazy.make_lazy(body, FIRST_UPDATE)
    for update in range(FIRST_UPDATE + 1, FIRST_UPDATE + 13):
        monkeypatch.setattr(masksplat.cpu.body, "LAZY_BELOW", 0.6 if update < FIRST_UPDATE + 12 else -1.0)
        was_behind = int(rows.updates.min()) < rows.latest
        step(dense, body, update)
        step(lazy, body, update)
    assert was_behind and int(rows.updates.min()) == rows.latest
    assert relative(lazy.gaussians.shN, dense.gaussians.shN) < 1e-12


def test_drifts_add_up() -> None:
    """A drift that is the same for all rows is taken off as often as updates were missed."""
    rows = behind(5, torch.float64, 23)
    plain = behind(5, torch.float64, 23)
    rows.ring[:, 6] = 1e-3
    rows.settle()
    plain.settle()
    torch.testing.assert_close(rows.param, plain.param - 23e-3, rtol=1e-15, atol=1e-15)
