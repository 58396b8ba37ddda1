# SPDX-License-Identifier: Apache-2.0
"""One posed pinhole camera as frozen numbers. Knows neither pixels nor files' contents.

Conventions: the camera looks along +z, +x is right and +y is down; pixel (i, j) has its centre at (i + 0.5, j + 0.5),
so that the principal point of a centred camera is (width / 2, height / 2) and intrinsics scale by ratios of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera at the size it is trained at.

    `name` is the image's name relative to the image folder, with sub-folders and extension. `width`, `height`, `fx`,
    `fy`, `cx`, `cy` are in pixels of the trained size. `rotation` (3, 3) and `translation` (3,) are float64, world to
    camera: x_camera = rotation @ x_world + translation, in the scene's own unit of length.
    """

    name: str
    image_path: Path
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def viewmat(self) -> np.ndarray:
        """World-to-camera transform, (4, 4) float64, acting on columns."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.rotation
        matrix[:3, 3] = self.translation
        return matrix

    @property
    def intrinsics(self) -> np.ndarray:
        """Camera-to-pixel matrix K, (3, 3) float64: pixels = (K @ x_camera)[:2] / z."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @property
    def center(self) -> np.ndarray:
        """Position of the camera in the world, (3,) float64."""
        return -self.rotation.T @ self.translation

    @property
    def camera_to_world(self) -> np.ndarray:
        """Inverse of `viewmat`, (4, 4) float64."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.rotation.T
        matrix[:3, 3] = self.center
        return matrix


def rotation_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Returns the rotation matrix, (3, 3) float64, of a quaternion (w, x, y, z) of any non-zero length."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
