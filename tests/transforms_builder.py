# SPDX-License-Identifier: Apache-2.0
"""Writes small NeRF-synthetic and MatrixCity scenes for tests, independently of the readers: Blender's axes only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BALLS = np.array([[0.0, 0.0, 0.0], [0.6, 0.1, 0.2], [-0.3, 0.5, -0.4], [0.2, -0.6, 0.5]])
"""Centres in world units."""
COLORS = np.array([[230, 60, 40], [40, 200, 80], [50, 90, 230], [240, 220, 60]])
RADIUS = 0.14
ANGLE = 0.8
"""Horizontal field of view, radians."""


def looking_at_origin(position: np.ndarray) -> np.ndarray:
    """Camera-to-world, (4, 4), of a Blender camera: its columns are right, up, backwards and the position; z is up."""
    back = position / np.linalg.norm(position)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, position], axis=1)
    return matrix


def ring(number: int, *, phase: float = 0.0, radius: float = 4.0) -> list[np.ndarray]:
    """Poses around the z axis, at changing heights."""
    angles = phase + 2 * np.pi * np.arange(number) / number
    return [looking_at_origin(radius * np.array([np.cos(a), np.sin(a), 0.4 + 0.2 * np.sin(3 * a)])) for a in angles]


def in_blender_camera(matrix: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    """World points (P, 3) as right, up and backwards of a camera."""
    return (xyz - matrix[:3, 3]) @ matrix[:3, :3]


def project(matrix: np.ndarray, xyz: np.ndarray, size: tuple[int, int], focal: tuple[float, float], centre=None):
    """Pixels (P, 2) of world points (P, 3): to the right, and down from the top-left corner."""
    right, up, back = in_blender_camera(matrix, xyz).T
    cx, cy = centre or (size[0] / 2, size[1] / 2)
    return np.stack([cx + focal[0] * right / -back, cy + focal[1] * up / back], axis=1)


def focal_of(angle: float, width: int) -> float:
    """Pixels: half the width is seen under half the angle."""
    return 0.5 * width / math.tan(0.5 * angle)


def draw(matrix: np.ndarray, size: tuple[int, int], focal: tuple[float, float], centre=None) -> np.ndarray:
    """The balls as discs on transparent ground, (height, width, 4) uint8; the nearest covers the others."""
    pixels = np.zeros((size[1], size[0], 4), np.uint8)
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    spots, back = project(matrix, BALLS, size, focal, centre), in_blender_camera(matrix, BALLS)[:, 2]
    for index in np.argsort(back):  # most distant first: `back` is negative in front of the camera
        extent = RADIUS * focal[0] / -back[index]
        distance = np.hypot(x - spots[index, 0], (y - spots[index, 1]) * focal[0] / focal[1])
        cover = np.clip(extent - distance + 0.5, 0, 1)
        inside = cover > 0
        pixels[inside, :3] = COLORS[index]
        pixels[inside, 3] = np.maximum(pixels[inside, 3], np.rint(255 * cover[inside]))
    return pixels


def write_json(path: Path, frames: list[dict[str, Any]], **values: Any) -> None:
    path.write_text(json.dumps({**values, "frames": frames}))


def write_blender(source: Path, num_train: int = 8, num_test: int = 3, size: tuple[int, int] = (48, 40)) -> Path:
    """A scene as Blender's exporter of NeRF writes it: RGBA photos, file paths without suffix."""
    for split, poses in (("train", ring(num_train)), ("test", ring(num_test, phase=0.3))):
        (source / split).mkdir(parents=True)
        frames = []
        for number, matrix in enumerate(poses):
            focal = focal_of(ANGLE, size[0])
            Image.fromarray(draw(matrix, size, (focal, focal))).save(source / split / f"r_{number}.png")
            frames.append({"file_path": f"./{split}/r_{number}", "rotation": 0.1, "transform_matrix": matrix.tolist()})
        write_json(source / f"transforms_{split}.json", frames, camera_angle_x=ANGLE)
    return source


def write_cloud(path: Path, number: int = 300, kind: str = "<f4", order: str = "binary_little_endian") -> np.ndarray:
    """A ply with coloured points around the balls; returns the positions, (P, 3)."""
    generator = np.random.default_rng(5)
    chosen = generator.integers(0, len(BALLS), number)
    xyz = BALLS[chosen] + generator.normal(0, 0.08, (number, 3))
    names = {"<f4": "float", "<f8": "double"}[kind]
    vertices = np.zeros(number, [(axis, kind) for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")])
    for axis in range(3):
        vertices["xyz"[axis]] = xyz[:, axis]
        vertices[("red", "green", "blue")[axis]] = COLORS[chosen, axis]
    header = ["ply", f"format {order} 1.0", f"element vertex {number}"]
    header += [f"property {names} {axis}" for axis in "xyz"]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    path.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode() + vertices.tobytes())
    return xyz


def write_city(root: Path, num_blocks: int = 2, size: tuple[int, int] = (48, 40)) -> Path:
    """A scene in MatrixCity's folders: photos in train/block_N, the poses in pose/block_A; returns the latter."""
    source = root / "pose" / "block_A"
    source.mkdir(parents=True)
    for split, per_block in (("train", 4), ("test", 1)):
        poses, frames = iter(ring(per_block * num_blocks, phase=0.0 if split == "train" else 0.4)), []
        for block in range(1, num_blocks + 1):
            folder = root / split / f"block_{block}"
            folder.mkdir(parents=True)
            for number in range(per_block):
                matrix, focal = next(poses), (60.0 + 5 * block, 62.0 + 5 * block)
                Image.fromarray(draw(matrix, size, focal)[..., :3]).save(folder / f"{number:04d}.png")
                path = f"../../{split}/block_{block}/{number:04d}.png"
                lens = {"fl_x": focal[0], "fl_y": focal[1]}
                frames.append({"file_path": path, "transform_matrix": matrix.tolist(), **lens})
        write_json(source / f"transforms_{split}.json", frames)
    write_cloud(source / "points.ply")
    return source
