# SPDX-License-Identifier: Apache-2.0
"""Ownership as a pure function of (centre, id), and law 5: a move conserves every row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed.communicator import Communicator
from distributed.partition import (
    MORTON_BITS,
    bounding_box,
    morton_codes,
    morton_owners,
    needs_recut,
    random_owners,
    round_robin_owners,
)
from rank_harness import run_ranks
from scene.gaussians import GaussianTable, attributes_for
from scene.repartition import move_rows, plan_move

ALONE = Communicator()


def code_by_hand(x: int, y: int, z: int) -> int:
    code = 0
    for bit in range(MORTON_BITS):
        code |= (x >> bit & 1) << (3 * bit + 2) | (y >> bit & 1) << (3 * bit + 1) | (z >> bit & 1) << (3 * bit)
    return code


@given(st.lists(st.tuples(*[st.integers(0, (1 << MORTON_BITS) - 1)] * 3), min_size=1, max_size=20))
def test_codes_interleave_the_bits(cells: list[tuple[int, int, int]]) -> None:
    means = (torch.tensor(cells, dtype=torch.float64) + 0.5) / (1 << MORTON_BITS)
    codes = morton_codes(means, torch.zeros(3), torch.ones(3))
    assert codes.tolist() == [code_by_hand(*cell) for cell in cells]


def test_codes_of_odd_centres() -> None:
    means = torch.tensor([[5.0, 0.5, 0.5], [torch.nan, -3.0, -3.0], [torch.inf] * 3, [-torch.inf] * 3])
    codes = morton_codes(means, torch.zeros(3), torch.ones(3))
    assert codes[0] == morton_codes(torch.tensor([[1.0, 0.5, 0.5]]), torch.zeros(3), torch.ones(3))[0]
    assert codes[1:].tolist() == [0, (1 << 63) - 1, 0]
    assert morton_codes(torch.ones(2, 3), torch.ones(3), torch.ones(3)).tolist() == [0, 0]


def test_the_box_ignores_what_is_not_finite() -> None:
    means = torch.tensor([[1.0, torch.nan, 3], [-1, 2, torch.inf], [0, 0, -5]])
    low, high = bounding_box(means, ALONE)
    assert low.tolist() == [-1, 0, -5] and high.tolist() == [1, 2, 3]
    assert [end.tolist() for end in bounding_box(torch.empty(0, 3), ALONE)] == [[0, 0, 0], [0, 0, 0]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 9), st.randoms(use_true_random=False))
def test_ranges_are_contiguous_and_equal(codes: list[int], num_parts: int, random: Any) -> None:
    """Many equal codes: ids break the ties. Against sorting everything in one place."""
    ids = random.sample(range(1 << 62, (1 << 62) + 1000), len(codes))
    owners = morton_owners(
        torch.tensor(codes, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64), num_parts, ALONE
    )
    order = sorted(range(len(codes)), key=lambda row: (codes[row], ids[row]))
    bounds = [len(codes) * part // num_parts for part in range(num_parts + 1)]
    for part in range(num_parts):
        assert [int(owners[row]) for row in order[bounds[part] : bounds[part + 1]]] == [part] * (
            bounds[part + 1] - bounds[part]
        )


def test_other_partitions() -> None:
    ids = torch.arange(40_000)
    assert round_robin_owners(ids, 3)[:4].tolist() == [0, 1, 2, 0]
    drawn = random_owners(ids, 3, seed=1, event=5)
    assert (torch.bincount(drawn) - 40_000 / 3).abs().max() < 500
    assert not torch.equal(drawn, random_owners(ids, 3, seed=1, event=6))
    assert torch.equal(drawn[7:], random_owners(ids[7:], 3, seed=1, event=5))


@pytest.mark.parametrize(
    ("counts", "answer"),
    [
        ([10, 10], False),
        ([11, 10], False),
        ([12, 10], True),
        ([1, 0], False),
        ([2, 0], True),
        ([0, 0], False),
        ([5], False),
    ],
)
def test_when_to_recut(counts: list[int], answer: bool) -> None:
    assert needs_recut(counts) == answer


def shard_of(rank: int, size: int, num_rows: int) -> GaussianTable:
    """A badly balanced shard (the last rank owns nothing if it can) with every tensor full of numbers of its own."""
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {spec.name: rng.normal(size=(num_rows, *spec.shape)) for spec in attributes_for(1)}
    arrays["means"][::4] = arrays["means"][:1]  # equal centres
    ids = torch.from_numpy(rng.permutation(num_rows) * 1_000_003)
    table = GaussianTable.from_arrays(arrays, dtype=torch.float64, ids=ids)
    for tensors in (table.exp_avg, table.exp_avg_sq, table.statistics):
        for values in tensors.values():
            values.copy_(torch.from_numpy(rng.random(values.shape)))
    bounds = [0, *sorted(int(num_rows * (part / size) ** 0.3) for part in range(1, size)), num_rows][: size + 1]
    bounds = [0, *bounds[2:], num_rows]  # rank 0 has a double share, the last none
    return cut_out(table, slice(bounds[rank], bounds[rank + 1]))


def cut_out(table: GaussianTable, rows: slice) -> GaussianTable:
    """Some rows of a table."""
    parts = [
        {name: values[rows].clone() for name, values in tensors.items()}
        for tensors in (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
    ]
    return GaussianTable(*parts, ids=table.ids[rows].clone(), num_updates=table.num_updates)


def contents(table: GaussianTable) -> dict[int, bytes]:
    """id -> every number of the row: parameters, moments, statistics."""
    columns = [
        values.reshape(len(table), math.prod(values.shape[1:]))
        for tensors in (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
        for _, values in sorted(tensors.items())
    ]
    joined = torch.cat(columns, dim=1).numpy()
    return {number: joined[row].tobytes() for row, number in enumerate(table.ids.tolist())}


def moves(world: Communicator, num_rows: int) -> list[tuple[dict[int, bytes], dict[int, bytes], list[int], list[int]]]:
    """For each kind: what this rank held before and after, its ids in order, and its codes."""
    answers = []
    table = shard_of(world.rank, world.size, num_rows)
    for kind in ("morton", "random", "round_robin", "morton"):
        before = contents(table)
        move = plan_move(table, world, kind, seed=1, event=2)
        move_rows(table, move)
        assert len(table) == len(move)
        assert all(
            len(values) == len(table) and values.is_contiguous()
            for tensors in (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
            for values in tensors.values()
        )
        codes = morton_codes(table.params["means"], *bounding_box(table.params["means"], world))
        answers.append((before, contents(table), table.ids.tolist(), codes.tolist()))
    return answers


@pytest.mark.parametrize(("size", "num_rows"), [(1, 30), (2, 41), (3, 101), (4, 102), (4, 3), (3, 0)])
def test_a_move_conserves_every_row(size: int, num_rows: int) -> None:
    """Law 5, for each kind of partition, with empty shards and fewer rows than ranks."""
    answers = run_ranks(moves, size, num_rows)
    everything = contents(shard_of(0, 1, num_rows))
    assert len(everything) == num_rows
    for kind in range(4):
        for moment in (0, 1):
            held = [answer[kind][moment] for answer in answers]
            assert sum(map(len, held)) == num_rows
            assert {number: row for mine in held for number, row in mine.items()} == everything
    shards = [answer[3] for answer in answers]
    sizes = [len(ids) for _, _, ids, _ in shards]
    assert max(sizes) - min(sizes) <= 1
    keys = [key for _, _, ids, codes in shards for key in zip(codes, ids, strict=True)]
    assert keys == sorted(keys)  # ranges follow each other, rows are in order within them
    assert [ids for _, _, ids, _ in shards] == [answer[0][2] for answer in answers]  # wherever the rows came from
    if num_rows > 40 and size > 1:
        assert len(answers[0][0][0]) > 1.1 * num_rows / size  # the first move had something to do


def test_a_move_of_other_rows_is_refused() -> None:
    table = shard_of(0, 1, 5)
    move = plan_move(table, ALONE, "morton")
    with pytest.raises(ValueError, match="4 rows do not fit a move of 5"):
        move.carry(torch.zeros(4))
    with pytest.raises(ValueError, match="unknown partition 'hilbert'"):
        plan_move(table, ALONE, "hilbert")
