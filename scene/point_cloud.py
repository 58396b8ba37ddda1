# SPDX-License-Identifier: Apache-2.0
"""The points that a training starts from: read from a ply file, or drawn in a cube. Knows neither photos nor poses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scene.colmap_records import MAX_COORDINATE
from scene.errors import InputError
from scene.ply import read_vertices

NUM_RANDOM_POINTS = 100_000
HALF_SIDE = 1.3  # world units; the objects of NeRF-synthetic lie inside
_MID_GREY = 127  # 3DGS draws colours within 1/255 of grey and stores them as 8 bits, which makes all of them 127
_SEED = 0


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Points in world units: `xyz` (P, 3) float32 and `rgb` (P, 3) uint8; P >= 1."""

    xyz: np.ndarray
    rgb: np.ndarray


def random_points() -> PointCloud:
    """Returns 3DGS's cloud for scenes without one: 100 000 grey points, uniform in [-1.3, 1.3]^3.

    They are the very points that 3DGS draws with the seed 0 that it always sets, so both start alike; --seed does not
    change them.
    """
    uniform = np.random.RandomState(_SEED).random_sample((NUM_RANDOM_POINTS, 3))
    xyz = (uniform * (2 * HALF_SIDE) - HALF_SIDE).astype(np.float32)
    return PointCloud(xyz, np.full(xyz.shape, _MID_GREY, np.uint8))


def read_point_cloud(path: Path) -> PointCloud:
    """Returns the points of a binary ply with x, y, z and red, green, blue in 0..255; other columns are ignored.

    Raises:
        InputError: no such ply, no points in it, a column is missing, or a value is out of range.
    """
    vertices = read_vertices(path)
    missing = [name for name in ("x", "y", "z", "red", "green", "blue") if name not in (vertices.dtype.names or ())]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}: a point cloud has x, y, z, red, green and blue. Save it again "
            "with colours."
        )
    if not len(vertices):
        raise InputError(f"{path} holds no points, but the Gaussians start from at least one. Give another cloud.")
    xyz = np.stack([vertices[name].astype(np.float64) for name in ("x", "y", "z")], axis=1)
    rgb = np.stack([vertices[name].astype(np.float64) for name in ("red", "green", "blue")], axis=1)
    _check_range(path, "position", xyz, (-MAX_COORDINATE, MAX_COORDINATE))
    _check_range(path, "colour", rgb, (0, 255))
    return PointCloud(xyz.astype(np.float32), np.rint(rgb).astype(np.uint8))


def _check_range(path: Path, what: str, values: np.ndarray, bounds: tuple[float, float]) -> None:
    """Raises InputError naming the first row of `values` (P, 3) that is not within the bounds; NaN never is."""
    is_good = ((values >= bounds[0]) & (values <= bounds[1])).all(axis=1)
    if not is_good.all():
        first = int(np.flatnonzero(~is_good)[0])
        raise InputError(
            f"{path}: point number {first + 1} has the {what} {values[first].tolist()}, outside {bounds[0]:g} to "
            f"{bounds[1]:g} ({int((~is_good).sum())} such points). Save the cloud again without them."
        )
