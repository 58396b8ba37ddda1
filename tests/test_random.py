# SPDX-License-Identifier: Apache-2.0
"""Philox against the published vectors, its two bodies against each other, and what is drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masksplat import random

# Known-answer vectors of Random123 1.09 (kat_vectors, philox4x32 with 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected):
    from_torch = random.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in from_torch) == expected
    from_numba = random.philox_numba(*(np.uint64(c) for c in counter), *(np.uint64(k) for k in key))
    assert tuple(int(word) for word in from_numba) == expected


def _philox_in_integers(counter, key):
    """Independent transcription of the paper's figure, on unbounded Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right % 2**32, (left >> 32) ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@settings(max_examples=200, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_both_bodies_equal_integer_arithmetic(counter, key):
    expected = _philox_in_integers(counter, key)
    assert [int(w) for w in random.philox(tuple(torch.tensor([c]) for c in counter), key)] == expected
    assert [int(w) for w in random.philox_numba(*map(np.uint64, counter), *map(np.uint64, key))] == expected


def test_words_use_the_counter_layout():
    seed, step, stream = (5 << 32) | 7, 11, random.SPLIT
    ids = torch.tensor([0, 3, (9 << 32) | 2, 2**63 - 1])
    drawn = random.words(seed, step, ids, stream)
    for row, value in enumerate(ids.tolist()):
        expected = _philox_in_integers((value & 0xFFFFFFFF, value >> 32, step, stream), (7, 5))
        assert drawn[row].tolist() == expected


def test_a_number_belongs_to_its_id_and_to_nothing_else():
    ids = torch.arange(1000) * 7919
    whole = random.uniform(3, 4, ids, random.MASK_SAMPLE)
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random.uniform(3, 4, ids[shuffle], random.MASK_SAMPLE), whole[shuffle])
    for other in (
        random.uniform(4, 4, ids, random.MASK_SAMPLE),
        random.uniform(3, 5, ids, random.MASK_SAMPLE),
        random.uniform(3, 4, ids, random.MASK_PRUNE),
        random.uniform(3 + 2**32, 4, ids, random.MASK_SAMPLE),
        random.uniform(3, 4, ids + 2**32, random.MASK_SAMPLE),
    ):
        assert (other == whole).float().mean() < 0.01


def test_uniform_stays_strictly_inside_and_is_the_same_in_both_precisions():
    extremes = torch.tensor([0, 2**32 - 1])
    for dtype in (torch.float32, torch.float64):
        low, high = random.to_unit_interval(extremes, dtype).tolist()
        assert low == 2.0**-24 and high == 1.0 - 2.0**-24
    ids = torch.arange(10_000)
    single = random.uniform(0, 0, ids, 0, torch.float32)
    assert torch.equal(single.double(), random.uniform(0, 0, ids, 0, torch.float64))


def test_uniform_and_normal_have_the_right_distribution():
    from scipy import stats

    ids = torch.arange(50_000)
    assert stats.kstest(random.uniform(1, 2, ids, 0, torch.float64).numpy(), "uniform").pvalue > 1e-3
    drawn = random.normal(1, 2, ids, random.SPLIT, torch.float64)
    assert drawn.shape == (50_000, 3)
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(drawn.numpy().T)
    assert np.abs(correlation - np.eye(3)).max() < 0.02


def test_child_ids_are_unique_and_depend_on_parent_event_and_child():
    parents = torch.arange(20_000)
    made = [random.child_ids(parents, event, child) for event in (600, 700) for child in (0, 1)]
    everything = torch.cat(made)
    assert len(everything.unique()) == len(everything)
    assert bool((everything >= 2**62).all())
    assert torch.equal(random.child_ids(parents.flip(0), 600, 1), made[1].flip(0))
    grandchildren = random.child_ids(everything, 600, 0)
    assert len(torch.cat((everything, grandchildren)).unique()) == 2 * len(everything)


def test_permutation_is_one_and_changes_with_epoch_and_seed():
    orders = [random.permutation(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4
    assert random.permutation(0, 0, 50) == orders[0]
    assert random.permutation(0, 0, 0) == [] and random.permutation(0, 0, 1) == [0]


def test_every_place_of_a_permutation_is_equally_likely():
    first = np.bincount([random.permutation(0, epoch, 5)[0] for epoch in range(2000)], minlength=5)
    assert np.abs(first / 2000 - 0.2).max() < 0.05


def test_wrong_arguments_are_refused():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="seed is -1"):
        random.uniform(-1, 0, ids, 0)
    with pytest.raises(ValueError, match="step is 4294967296"):
        random.uniform(0, 2**32, ids, 0)
    with pytest.raises(ValueError, match=r"ids must be \(N,\) int64"):
        random.uniform(0, 0, ids.float(), 0)
    assert random.uniform(0, 0, ids[:0], 0).shape == (0,)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("num_views", [1, 43, 5000])
def test_an_order_of_views_follows_from_the_words_of_their_numbers(seed: int, num_views: int) -> None:
    drawn = random.words(seed, 7, torch.arange(num_views), random.VIEW_ORDER)
    keys = (drawn[:, 0] << 31) | (drawn[:, 1] >> 1)
    assert random.permutation(seed, 7, num_views) == torch.argsort(keys, stable=True).tolist()
