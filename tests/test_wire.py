# SPDX-License-Identifier: Apache-2.0
"""Rows on their way between ranks: nothing of them is lost, whatever the number of bytes their ids take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed.wire import OPACITY, Wire
from masksplat.types import ALPHA_MIN, Splats


def packed_splats(count: int, dtype: torch.dtype, bound: int) -> Splats:
    """Rows of all magnitudes; opacities up to both ends of their range; ids below `bound`, the last included."""
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(rng.normal(size=(count, 10)) * 10.0 ** rng.integers(-30, 30, size=(count, 10))).to(dtype)
    rows[:, OPACITY] = torch.from_numpy(rng.uniform(ALPHA_MIN, 1.0, count)).to(dtype)
    rows[:2, OPACITY] = torch.tensor([ALPHA_MIN, 1.0], dtype=dtype)
    rows[:, 9] = 1.0
    ids = torch.from_numpy(rng.integers(0, bound, count))
    ids[:2] = torch.tensor([0, bound - 1])
    nothing = torch.zeros((count, 4), dtype=torch.int32)
    offsets = torch.tensor([0, count])
    return Splats(rows, rows[:, 0].abs() + 0.2, ids, nothing[:, 0], nothing, offsets, torch.empty((1, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bound", "id_bytes"), [(2, 0), (32, 0), (33, 1), (4000, 1), (1 << 13, 1), (1 << 40, 5)])
def test_rows_arrive_bit_for_bit(dtype: torch.dtype, bound: int, id_bytes: int) -> None:
    splats = packed_splats(200, dtype, bound)
    before = splats.rows.clone()
    wire = Wire.of(splats, bound, sends_boxes=False, in_words=False)
    assert wire.row_bytes == 10 * dtype.itemsize + id_bytes
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:150]
    packed = wire.pack(splats, chosen)
    assert packed.shape == (150, wire.row_bytes) and packed.dtype == torch.uint8
    rows, depths, ids = wire.unpack(packed, torch.ones(150, dtype=dtype))
    assert torch.equal(rows.view(torch.uint8), splats.rows[chosen].view(torch.uint8))
    assert torch.equal(depths, splats.depths[chosen]) and torch.equal(ids, splats.ids[chosen])
    assert torch.equal(splats.rows, before), "packing does not touch what it packs"
