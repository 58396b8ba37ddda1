# SPDX-License-Identifier: Apache-2.0
"""Packed splats that mean nothing, and partitions cut anywhere: inputs for tests of the exchange."""

from __future__ import annotations

import numpy as np
import torch

from distributed.pixels import PixelPartition, Region, num_tile_rows
from distributed.routes import OPACITY_NEVER_CAPPED
from masksplat.types import Splats

SIDE = 100


def random_splats(view_lengths: list[int], rng: np.random.Generator, dtype: torch.dtype) -> Splats:
    """Rows that mean nothing: masks 0 or 1, opacities up to 1, boxes within SIDE pixels, some of them empty."""
    num_rows = sum(view_lengths)
    rows = torch.from_numpy(rng.normal(size=(num_rows, 10))).to(dtype)
    rows[:, 5] = torch.from_numpy(rng.choice([0.3, 0.9, OPACITY_NEVER_CAPPED, 0.981, 1.0], num_rows)).to(dtype)
    rows[:, 9] = torch.from_numpy(rng.integers(0, 2, num_rows))
    corners = np.sort(rng.integers(0, SIDE + 1, (num_rows, 2, 2)), axis=1).reshape(num_rows, 4)
    return Splats(
        rows=rows,
        depths=torch.from_numpy(rng.random(num_rows)).to(dtype),
        ids=torch.from_numpy(rng.integers(0, 1 << 62, num_rows)),
        gaussians=torch.arange(num_rows, dtype=torch.int32),
        boxes=torch.from_numpy(corners.astype(np.int32)),
        view_offsets=torch.tensor([0, *np.cumsum(view_lengths)], dtype=torch.int64),
        slots=torch.empty((len(view_lengths), 0), dtype=torch.int32),
    )


def random_partition(num_views: int, num_ranks: int, rng: np.random.Generator) -> PixelPartition:
    """Views cut anywhere, parts given to any ranks; some ranks draw nothing, some several views."""
    regions: list[list[Region]] = [[] for _ in range(num_ranks)]
    heights = rng.integers(1, SIDE + 1, num_views).tolist()
    for view, height in enumerate(heights):
        total = num_tile_rows(height)
        parts = int(rng.integers(1, min(total, num_ranks) + 1))
        cuts = [0, *sorted(rng.choice(np.arange(1, total), parts - 1, replace=False).tolist()), total]
        for part, rank in enumerate(rng.permutation(num_ranks)[:parts]):
            regions[rank].append(Region(view, cuts[part], cuts[part + 1]))
    return PixelPartition(tuple(heights), tuple(map(tuple, regions)))


def possible_gradient(received: Splats, rng: np.random.Generator) -> torch.Tensor:
    """(R, 10) as `rasterize_backward` can make it."""
    y = torch.from_numpy(rng.normal(size=(len(received), 10))).to(received.rows.dtype)
    is_drawn, opacity = received.rows[:, 9] != 0, received.rows[:, 5]
    y[~is_drawn, :9] = 0
    equal = is_drawn & (opacity <= OPACITY_NEVER_CAPPED)
    y[equal, 9] = opacity[equal] * y[equal, 5]
    return y
