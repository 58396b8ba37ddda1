# SPDX-License-Identifier: Apache-2.0
"""View order: permutations, no repeats within a batch, and a pure function of (seed, step)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scene.sampler import ViewSampler

SIZES = st.tuples(st.integers(1, 13), st.integers(1, 17))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(sizes: tuple[int, int], seed: int) -> None:
    num_views, batch_size = sizes
    sampler = ViewSampler(num_views, batch_size, seed)
    drawn = [view for step in range(3 * num_views) for view in sampler.batch(step)]
    assert len(drawn) == 3 * num_views * batch_size
    for start in range(0, len(drawn), num_views):
        assert sorted(drawn[start : start + num_views]) == list(range(num_views))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**40))
def test_no_view_twice_in_a_batch(sizes: tuple[int, int], seed: int) -> None:
    num_views, batch_size = sizes
    sampler = ViewSampler(num_views, batch_size, seed)
    for step in range(4 * num_views):
        most = max(Counter(sampler.batch(step)).values())
        if batch_size <= num_views:
            assert most == 1
        else:
            assert most <= -(-batch_size // num_views) + 1


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**40), order=st.lists(st.integers(0, 500), min_size=1, max_size=12))
def test_a_batch_depends_on_seed_and_step_only(sizes: tuple[int, int], seed: int, order: list[int]) -> None:
    """A sampler that was asked in any order, or for the first time (resume), agrees with one that went step by step."""
    walker = ViewSampler(*sizes, seed)
    batches = [walker.batch(step) for step in range(max(order) + 1)]
    jumper = ViewSampler(*sizes, seed)
    for step in order:
        assert jumper.batch(step) == batches[step]
        assert ViewSampler(*sizes, seed).batch(step) == batches[step]


def test_orders_differ_between_epochs_and_seeds() -> None:
    sampler = ViewSampler(40, 40, 0)
    orders = {sampler.batch(step) for step in range(20)} | {ViewSampler(40, 40, seed).batch(0) for seed in range(1, 20)}
    assert len(orders) == 39


def test_neighbours_are_mixed_evenly() -> None:
    """Over many epochs each view is first about equally often, also in batches that span two epochs."""
    num_views, batch_size = 5, 3
    sampler = ViewSampler(num_views, batch_size, 7)
    num_steps = 5000
    firsts = Counter(sampler.batch(step)[0] for step in range(num_steps))
    expected = num_steps / num_views
    chi_squared = sum((firsts[view] - expected) ** 2 / expected for view in range(num_views))
    assert chi_squared < 23.5  # 4 degrees of freedom: exceeded once in 10 000


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (-1, 1, 0)])
def test_empty_requests_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ViewSampler(*arguments)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        ViewSampler(3, 1, 0).batch(-1)
