# SPDX-License-Identifier: Apache-2.0
"""Which Gaussians a view sees, and counts in the densify statistics: 3DGS's rule, transcribed independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from masksplat.cpu.body import CpuBody
from masksplat.types import SLOT_UNSEEN, Gaussians, ProjectionSettings, Views

WIDTH, HEIGHT, FOCAL = 151, 100, 90.0


def scattered(count: int, seed: int) -> Gaussians:
    """Gaussians of all sizes in and far around the frustum, also behind the camera."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(count, 3)) * [6.0, 5.0, 3.0] + [0, 0, 2.0]
    scales = generator.normal(-3.0, 1.5, size=(count, 3))
    quats = generator.normal(size=(count, 4))
    arrays = (means, quats, scales, np.full(count, 2.0), np.zeros((count, 3)), np.zeros((count, 0, 3)))
    return Gaussians(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def is_seen_by_3dgs(mean: np.ndarray, quat: np.ndarray, log_scale: np.ndarray) -> bool:
    """radius > 0 and a tile rectangle with area, as in 3DGS's preprocessing (pixel centres at integers there)."""
    x, y, z = mean
    if z <= 0.2:
        return False
    w, a, b, c = quat / np.linalg.norm(quat)
    turn = np.array(
        [
            [1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
            [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
            [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)],
        ]
    )
    covariance = turn @ np.diag(np.exp(2 * log_scale)) @ turn.T
    limit_x, limit_y = 1.3 * WIDTH / (2 * FOCAL), 1.3 * HEIGHT / (2 * FOCAL)
    u, v = np.clip(x / z, -limit_x, limit_x), np.clip(y / z, -limit_y, limit_y)
    jacobian = FOCAL / z * np.array([[1, 0, -u], [0, 1, -v]])
    flat = jacobian @ covariance @ jacobian.T + 0.3 * np.eye(2)
    middle = 0.5 * np.trace(flat)
    radius = math.ceil(3 * math.sqrt(middle + math.sqrt(max(0.1, middle**2 - np.linalg.det(flat)))))
    centre = FOCAL * x / z + WIDTH / 2 - 0.5, FOCAL * y / z + HEIGHT / 2 - 0.5
    area = 1
    for position, size in zip(centre, (WIDTH, HEIGHT), strict=True):
        tiles = (size + 15) // 16
        first = min(tiles, max(0, int((position - radius) / 16)))
        area *= min(tiles, max(0, int((position + radius + 15) / 16))) - first
    return area > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_gaussians_seen_are_those_of_3dgs(seed: int) -> None:
    gaussians = scattered(6000, seed)
    intrinsics = torch.tensor([[[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]], dtype=torch.float64)
    views = Views(torch.eye(4, dtype=torch.float64)[None], intrinsics, ((WIDTH, HEIGHT),))
    splats = CpuBody(1).project(gaussians, views, ProjectionSettings(sh_degree=0))
    rows = zip(gaussians.means.numpy(), gaussians.quats.numpy(), gaussians.scales.numpy(), strict=True)
    expected = [is_seen_by_3dgs(*row) for row in rows]
    assert (splats.slots[0] != SLOT_UNSEEN).tolist() == expected
    assert 0.1 < np.mean(expected) < 0.9  # both kinds are there
