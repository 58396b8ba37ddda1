# SPDX-License-Identifier: Apache-2.0
"""Writes small COLMAP scenes for tests, independently of the readers (struct and text only)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

MODEL_IDS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "FULL_OPENCV": 6}
MODEL_IDS |= {"FOV": 7, "RADIAL_FISHEYE": 9, "THIN_PRISM_FISHEYE": 10, "SIMPLE_DIVISION": 12, "DIVISION": 13}


@dataclass
class CameraRow:
    camera_id: int
    model: str
    width: int
    height: int
    params: list[float]


@dataclass
class ImageRow:
    image_id: int
    quaternion: list[float]
    translation: list[float]
    camera_id: int
    name: str
    keypoints: list[tuple[float, float, int]] = field(default_factory=list)


@dataclass
class PointRow:
    xyz: list[float]
    rgb: list[int]
    track: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Model:
    cameras: list[CameraRow]
    images: list[ImageRow]
    points: list[PointRow]


def build_model(num_views: int = 6, size: tuple[int, int] = (64, 48), num_points: int = 20, seed: int = 0) -> Model:
    """Cameras on a ring of radius 4 that look at the origin, the principal point off the centre, points around it."""
    generator = np.random.default_rng(seed)
    width, height = size
    camera = CameraRow(1, "PINHOLE", width, height, [0.9 * width, 0.91 * width, 0.47 * width, 0.52 * height])
    images = []
    for index in range(num_views):
        angle = 2 * np.pi * index / num_views
        # A turn about y: the centre (-4 sin, 0, -4 cos) is always seen at z = 4.
        quaternion = [float(np.cos(angle / 2)), 0.0, -float(np.sin(angle / 2)), 0.0]
        images.append(ImageRow(index + 1, quaternion, [0.0, 0.0, 4.0], 1, f"view{index:03d}.png", [(1.5, 2.5, -1)] * 2))
    points = [
        PointRow(generator.uniform(-0.6, 0.6, 3).tolist(), generator.integers(0, 256, 3).tolist(), [(1, 0)] * (i % 4))
        for i in range(num_points)
    ]
    return Model([camera], images, points)


def write_binary(folder: Path, model: Model) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cameras = [struct.pack("<Q", len(model.cameras))]
    for c in model.cameras:
        cameras.append(struct.pack("<iiQQ", c.camera_id, MODEL_IDS[c.model], c.width, c.height))
        cameras.append(struct.pack(f"<{len(c.params)}d", *c.params))
    images = [struct.pack("<Q", len(model.images))]
    for i in model.images:
        images.append(struct.pack("<i7di", i.image_id, *i.quaternion, *i.translation, i.camera_id))
        images.append(i.name.encode() + b"\0" + struct.pack("<Q", len(i.keypoints)))
        images += [struct.pack("<ddq", *keypoint) for keypoint in i.keypoints]
    points = [struct.pack("<Q", len(model.points))]
    for number, p in enumerate(model.points, start=1):
        points.append(struct.pack("<Q3d3BdQ", number, *p.xyz, *p.rgb, 0.5, len(p.track)))
        points += [struct.pack("<ii", *element) for element in p.track]
    for name, parts in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.bin").write_bytes(b"".join(parts))


def write_text(folder: Path, model: Model) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cameras = ["# Camera list with one line of data per camera:"]
    cameras += [f"{c.camera_id} {c.model} {c.width} {c.height} {_join(c.params)}" for c in model.cameras]
    images = ["# Image list with two lines of data per image:"]
    for i in model.images:
        images.append(f"{i.image_id} {_join(i.quaternion)} {_join(i.translation)} {i.camera_id} {i.name}")
        images.append(" ".join(_join(keypoint) for keypoint in i.keypoints))
    points = ["# 3D point list with one line of data per point:"]
    for number, p in enumerate(model.points, start=1):
        points.append(f"{number} {_join(p.xyz)} {_join(p.rgb)} 0.5 {' '.join(_join(t) for t in p.track)}".rstrip())
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _join(values: list[float] | tuple[float, ...]) -> str:
    return " ".join(repr(value) for value in values)


def write_photos(folder: Path, model: Model, scale: float = 1.0) -> None:
    """Writes a smooth photo for each image, at its camera's size times `scale`."""
    cameras = {c.camera_id: c for c in model.cameras}
    for number, image in enumerate(model.images):
        camera = cameras[image.camera_id]
        path = folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_pixels(round(camera.width * scale), round(camera.height * scale), number)).save(path)


def smooth_pixels(width: int, height: int, number: int) -> np.ndarray:
    """Returns (height, width, 3) uint8 that varies smoothly and differs from number to number."""
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    phase = np.array([0.0, 2.0, 4.0]) + 0.7 * number
    return np.rint(127.5 + 127.5 * np.sin(5 * x + 3 * y + phase)).astype(np.uint8)
