# SPDX-License-Identifier: Apache-2.0
"""The cpu body's lists of splats per tile against a plain Python count, and the pieces of the tile kernels."""

from __future__ import annotations

import numpy as np
import pytest

from masksplat.cpu.binning import SHORT, bin_splats
from masksplat.cpu.exponential import exp2, exp2_constants
from masksplat.cpu.footprint import LARGE
from masksplat.cpu.kernel import kernel
from masksplat.cpu.simd import (
    LANES,
    broadcast,
    horizontal_sum,
    load,
    lowest_bit,
    num_bits,
    store,
    sums_of_eight,
    vectors_of,
)
from masksplat.cpu.threads import ThreadTeam
from masksplat.types import TILE

WIDTH, HEIGHT = 150, 130


def small_splats(rng, count, dtype):
    """Rows and boxes of splats that are not large, all over the image, and ids in any order."""
    corner = rng.integers(0, (WIDTH - 1, HEIGHT - 1), (count, 2))
    size = rng.integers(1, LARGE + 1, (count, 2))
    end = np.minimum(corner + size, (WIDTH, HEIGHT))
    boxes = np.concatenate((corner, end), axis=1).astype(np.int32)
    rows = np.tile(np.array([0, 0, 1, 0, 1, 0.5, 0, 0, 0, 1], dtype), (count, 1))
    rows[:, :2] = (corner + end) / 2
    return rows, boxes, rng.permutation(count) + 2**40


def listed(boxes, tile, num_columns, rows):
    """The splats whose box meets the tile and the pixel rows of the region."""
    x0, y0 = tile % num_columns * TILE, rows[0] + tile // num_columns * TILE
    x1, y1 = x0 + TILE, min(y0 + TILE, rows[1])
    inside = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    return np.flatnonzero(inside)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [(0, HEIGHT), (0, 16), (37, 61), (112, HEIGHT), (5, 5)])
@pytest.mark.parametrize("depths", ["near and far", "close", "equal"])
def test_lists_hold_the_splats_of_each_tile_by_depth_and_id(dtype, rows, depths):
    rng = np.random.default_rng(0)
    count = 6000
    packed, boxes, ids = small_splats(rng, count, dtype)
    depth = {
        "near and far": np.exp(rng.uniform(-5, 20, count)),
        "close": 3 + 1e-7 * rng.integers(0, 40, count),  # float64 tells what float32 does not
        "equal": np.repeat(2.5, count),
    }[depths].astype(dtype)
    team = ThreadTeam(2)
    lists = bin_splats(packed, boxes, depth, ids, width=WIDTH, pixel_rows=rows, team=team)
    assert lists.num_columns == -(-WIDTH // TILE) and lists.num_rows == -(-(rows[1] - rows[0]) // TILE)
    assert lists.tile_offsets[0] == 0 and lists.tile_offsets[-1] == lists.num_instances
    for tile in range(lists.num_tiles):
        found = lists.splats[lists.tile_offsets[tile] : lists.tile_offsets[tile + 1]]
        expected = listed(boxes, tile, lists.num_columns, rows)
        assert found.tolist() == expected[np.lexsort((ids[expected], depth[expected]))].tolist()
    assert sorted(lists.instances.tolist()) == list(range(lists.num_instances))
    owners = np.searchsorted(lists.instance_offsets, lists.instances, side="right") - 1
    assert np.array_equal(owners, lists.splats)
    assert lists.num_tiles == 0 or np.diff(lists.tile_offsets).max() > 4 * SHORT


def test_large_splats_are_listed_where_their_ellipse_is():
    """A needle along the diagonal: no tile off the diagonal, and every tile that holds a pixel of alpha >= 1/255."""
    angle, along, across = np.pi / 4, 30.0, 0.8
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    conic = np.linalg.inv(turn @ np.diag([along**2, across**2]) @ turn.T)
    rows = np.array([[70.3, 66.1, conic[0, 0], conic[0, 1], conic[1, 1], 0.9, 0, 0, 0, 1]], np.float32)
    boxes = np.array([[0, 0, WIDTH, HEIGHT]], np.int32)
    lists = bin_splats(
        rows,
        boxes,
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        width=WIDTH,
        pixel_rows=(0, HEIGHT),
        team=ThreadTeam(1),
    )
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5 - rows[0, 0], np.arange(HEIGHT) + 0.5 - rows[0, 1])
    alpha = 0.9 * np.exp(-0.5 * (conic[0, 0] * x * x + conic[1, 1] * y * y) - conic[0, 1] * x * y)
    has_list = np.diff(lists.tile_offsets).reshape(lists.num_rows, lists.num_columns)
    for tile_row in range(lists.num_rows):
        for column in range(lists.num_columns):
            part = alpha[tile_row * TILE : (tile_row + 1) * TILE, column * TILE : (column + 1) * TILE]
            assert has_list[tile_row, column] >= (part >= 1 / 255).any()
    assert has_list.sum() < 0.4 * lists.num_tiles


@kernel
def _exp2_of(values, constants, out):
    numbers = vectors_of(constants, NUM_NUMBERS)
    for at in range(0, values.size, LANES):
        store(out, at, exp2(load(values, at), numbers))


NUM_NUMBERS = 16


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_exp2(dtype, limit):
    values = np.linspace(-40, 3, 80_000).astype(dtype)
    constants, out = np.zeros(NUM_NUMBERS, dtype), np.empty_like(values)
    given = exp2_constants(dtype)
    constants[: len(given)] = given
    _exp2_of(values, constants, out)
    assert np.abs(out / np.exp2(values.astype(np.longdouble)) - 1).max() < limit
    _exp2_of(np.full(LANES, -1e4, dtype), constants, out)
    assert out[0] == pytest.approx(2.0**-120, rel=limit)


@kernel
def _sum_rows(rows, out, single):
    a, b, c, d = load(rows, 0), load(rows, 8), load(rows, 16), load(rows, 24)
    e, f, g, h = load(rows, 32), load(rows, 40), load(rows, 48), load(rows, 56)
    store(out, 0, sums_of_eight(a, b, c, d, e, f, g, h))
    store(single, 0, broadcast(horizontal_sum(c)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_eight(dtype):
    rows = np.random.default_rng(1).normal(size=(LANES, LANES)).astype(dtype)
    out, single = np.empty(LANES, dtype), np.empty(LANES, dtype)
    _sum_rows(rows.reshape(-1), out, single)
    assert np.allclose(out, rows.sum(axis=1), rtol=1e-5)
    assert single[0] == out[2]  # the same order of additions


@kernel
def _bits_of(value):
    return lowest_bit(value), num_bits(value)


def test_bits():
    for value in (1, 2, 12, 0x8000_0000, 0xFFFF_FFFF):
        assert _bits_of(value) == ((value & -value).bit_length() - 1, value.bit_count())
