# SPDX-License-Identifier: Apache-2.0
"""First Gaussians: the formulas of 3DGS, and clouds that are too small or too regular for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scene.dataset import SceneOptions, load_scene
from scene.point_cloud import PointCloud
from scene.points import initial_gaussians, mean_squared_distances


def cloud(xyz: np.ndarray) -> PointCloud:
    number = len(xyz)
    return PointCloud(np.asarray(xyz, np.float32), np.arange(3 * number).astype(np.uint8).reshape(number, 3))


def brute_force(xyz: np.ndarray) -> np.ndarray:
    squared = ((xyz[:, None].astype(np.float64) - xyz[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    return np.maximum(np.sort(squared, axis=1)[:, :3].mean(axis=1), 1e-7)


@pytest.mark.parametrize("number", [4, 5, 300])
def test_distances_equal_brute_force(number: int) -> None:
    xyz = np.random.default_rng(number).normal(size=(number, 3)).astype(np.float32)
    np.testing.assert_allclose(mean_squared_distances(xyz), brute_force(xyz), rtol=1e-12)


def test_distances_of_a_real_cloud_equal_brute_force(any_scene: Path) -> None:
    xyz = load_scene(any_scene, SceneOptions(), progress=False).points.xyz[:1500]
    np.testing.assert_allclose(mean_squared_distances(xyz), brute_force(xyz), rtol=1e-12)


def test_distances_follow_the_points_when_they_are_reordered() -> None:
    xyz = np.random.default_rng(1).integers(0, 6, size=(500, 3)).astype(np.float32)  # many ties and duplicates
    order = np.random.default_rng(2).permutation(500)
    np.testing.assert_array_equal(mean_squared_distances(xyz)[order], mean_squared_distances(xyz[order]))


def test_more_points_than_one_query_holds() -> None:
    xyz = np.zeros((70_000, 3), np.float32)
    xyz[:, 0] = np.arange(70_000)
    squared = mean_squared_distances(xyz, progress=False)
    np.testing.assert_allclose(squared[1:-1], (1 + 1 + 4) / 3)
    np.testing.assert_allclose(squared[[0, -1]], (1 + 4 + 9) / 3)


def test_small_clouds_use_the_neighbours_there_are() -> None:
    np.testing.assert_allclose(mean_squared_distances(np.zeros((1, 3), np.float32)), [1e-7])
    np.testing.assert_allclose(mean_squared_distances(np.array([[0, 0, 0], [0, 3, 4]], np.float32)), [25, 25])
    three = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0]], np.float32)
    np.testing.assert_allclose(mean_squared_distances(three), [2.5, 3.0, 4.5])
    assert mean_squared_distances(np.zeros((0, 3), np.float32)).shape == (0,)


def test_duplicates_are_clamped() -> None:
    xyz = np.array([[1, 2, 3]] * 5 + [[9, 9, 9]], np.float32)
    squared = mean_squared_distances(xyz)
    np.testing.assert_array_equal(squared[:5], 1e-7)
    np.testing.assert_allclose(squared[5], 8**2 + 7**2 + 6**2)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_parameters_are_those_of_3dgs(number: int, sh_degree: int) -> None:
    points = cloud(np.random.default_rng(0).normal(size=(number, 3)))
    raw = initial_gaussians(points, sh_degree)
    assert {name: array.shape for name, array in raw.items()} == {
        "means": (number, 3),
        "sh0": (number, 3),
        "shN": (number, (sh_degree + 1) ** 2 - 1, 3),
        "opacities": (number,),
        "mask_logits": (number,),
        "scales": (number, 3),
        "quats": (number, 4),
    }
    assert all(array.dtype == np.float32 for array in raw.values())
    assert all(np.isfinite(array).all() for array in raw.values())
    np.testing.assert_array_equal(raw["means"], points.xyz)
    np.testing.assert_allclose(0.28209479177387814 * raw["sh0"] + 0.5, points.rgb / 255, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-raw["opacities"])), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(raw["mask_logits"], 9)
    np.testing.assert_array_equal(raw["quats"], np.tile([1, 0, 0, 0], (number, 1)))
    spread = np.exp(raw["scales"]) ** 2
    expected = mean_squared_distances(points.xyz)
    np.testing.assert_allclose(spread, np.repeat(expected[:, None], 3, axis=1), rtol=1e-5)
    assert not raw["shN"].any()


def test_far_points_stay_finite() -> None:
    raw = initial_gaussians(cloud(np.array([[1e15, 0, 0], [-1e15, 0, 0], [0, 1e15, 0], [0, 0, 0]])), 3)
    assert all(np.isfinite(array).all() for array in raw.values())
