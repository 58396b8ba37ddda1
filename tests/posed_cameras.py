# SPDX-License-Identifier: Apache-2.0
"""Cameras for tests of camera paths: the ways in which people take photos, and motions of the whole world."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from scene.camera_paths import Poses
from scene.cameras import Camera

UP = np.array([0.0, 0.0, 1.0])


def looking(centers: np.ndarray, targets: np.ndarray, up: np.ndarray = UP) -> Poses:
    """Poses at centers (N, 3) that look at targets (N, 3) or (3,)."""
    forward = targets - centers
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right, axis=1, keepdims=True)
    return Poses(np.asarray(centers, float), np.stack([right, np.cross(forward, right), forward], axis=2))


def orbit(degrees: float = 360, count: int = 40, seed: int = 0) -> Poses:
    """Handheld around the origin, at a distance of about 4, over an arc of so many degrees."""
    random = np.random.default_rng(seed)
    angles = np.radians(np.arange(count) * degrees / count) + 0.3
    radii, heights = 4 + 0.2 * random.standard_normal(count), 1 + 0.3 * random.standard_normal(count)
    centers = np.stack([radii * np.cos(angles), radii * np.sin(angles), heights], axis=1)
    return looking(centers, 0.05 * random.standard_normal((count, 3)))


def facing(count: int = 25, seed: int = 1) -> Poses:
    """A handheld grid before a wall: 2 wide, 1 high, at a distance of 6 from what it looks at."""
    random = np.random.default_rng(seed)
    centers = np.stack([np.zeros(count), random.uniform(-1, 1, count), random.uniform(-0.5, 0.5, count)], axis=1)
    return looking(centers + 0.05 * random.standard_normal((count, 3)), np.array([6.0, 0.0, 0.2]))


def aerial(seed: int = 2) -> Poses:
    """A flight to and fro at a height of 5, straight down but for tilts of a few degrees, headings alternating."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-4, 4, 9), np.linspace(-3, 3, 6))
    centers = np.stack([x.ravel(), y.ravel(), 5 + 0.1 * random.standard_normal(x.size)], axis=1)
    down = centers + [0, 0, -1] + 0.06 * random.standard_normal(centers.shape) * [1, 1, 0]
    signs = np.where(np.arange(x.size) // 9 % 2, 1.0, -1.0)
    parts = [looking(c[None], d[None], np.array([s, 0.0, 0.0])) for c, d, s in zip(centers, down, signs, strict=True)]
    return Poses(centers, np.concatenate([part.rotations for part in parts]))


def corridor(seed: int = 3) -> Poses:
    """A walk straight ahead."""
    random = np.random.default_rng(seed)
    centers = np.array([20, 0.2, 0.1]) * np.stack([np.linspace(0, 1, 60), *random.standard_normal((2, 60))], axis=1)
    return looking(centers, centers + [1, 0, 0] + 0.1 * random.standard_normal((60, 3)))


def cap(seed: int = 4) -> Poses:
    """Photos of the origin from all sides above, steeply."""
    ways = np.random.default_rng(seed).standard_normal((2000, 3))
    ways = ways / np.linalg.norm(ways, axis=1, keepdims=True)
    return looking(4 * ways[ways[:, 2] > 0.7][:60], np.zeros(3))


SCENES = {"orbit": orbit(), "arc": orbit(150), "facing": facing(), "aerial": aerial()}
SCENES |= {"corridor": corridor(), "cap": cap()}


def moved(poses: Poses, scale: float, turn: Rotation, shift: np.ndarray) -> Poses:
    """The same cameras after the world was scaled, turned and moved."""
    matrix = turn.as_matrix()
    return Poses(scale * poses.centers @ matrix.T + shift, matrix @ poses.rotations)


def as_cameras(poses: Poses, size: tuple[int, int] = (64, 48)) -> list[Camera]:
    """Cameras of a size at some poses, with a principal point beside the middle."""
    lens = Camera("", Path(), *size, 60.0, 61.0, 30.0, 25.0, np.eye(3), np.zeros(3))
    pairs = zip(poses.centers, poses.rotations, strict=True)
    return [dataclasses.replace(lens, rotation=turn.T, translation=-turn.T @ center) for center, turn in pairs]
