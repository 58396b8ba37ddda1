# SPDX-License-Identifier: Apache-2.0
"""Reads camera paths from JSON files: cameras.json of a model folder, and camera_path.json of nerfstudio's viewer.

nerfstudio turns, moves and scales a scene before it trains: its dataparser_transforms.json holds `transform` (3, 4) and
`scale`, x' = scale * (transform @ [x, 1]). When that file lies beside camera_path.json, the path is taken back into the
world of the data set, which is ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scene.cameras import Camera
from scene.errors import InputError

TRANSFORM_FILE = "dataparser_transforms.json"
FIX = "A path file is a list as in cameras.json of a model folder, or camera_path.json of nerfstudio"
_LARGEST_FILE = 1 << 28  # bytes
_LARGEST_SIZE = 1 << 16  # pixels
_LARGEST_SHEAR = 1e-2  # of a rotation's entries
_FLIP_Y_AND_Z = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True, eq=False)
class CameraPath:
    """Cameras in the order of a file, at least one, and the frames per second it asks for (0: it does not say)."""

    cameras: tuple[Camera, ...]
    frames_per_second: float = 0.0


def read_path(path: Path) -> CameraPath:
    """Return the cameras of a path file.

    Raises:
        InputError: there is no such file, it is no JSON of one of the two forms, or a camera lacks a field.
    """
    content = _read_json(path)
    if isinstance(content, list):
        entries, read = content, _our_camera
    elif isinstance(content, dict) and isinstance(content.get("camera_path"), list):
        entries, read = content["camera_path"], _nerfstudio_reader(path, content)
    else:
        raise InputError(f"{path} holds no camera path. {FIX}.")
    if not entries:
        raise InputError(f"{path} holds no camera. {FIX}.")
    cameras = tuple(_checked(path, number, entry, read) for number, entry in enumerate(entries))
    rate = content.get("fps", 0) if isinstance(content, dict) else 0
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or rate < 0:
        raise InputError(f"{path} gives fps = {rate!r}, which is no number of frames per second. Correct it.")
    return CameraPath(cameras, float(rate))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{path} is larger than {_LARGEST_FILE} bytes, so no camera path. {FIX}.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the camera path {path} cannot be read: {error.strerror or error}. --path takes ellipse, "
                         "spiral, interpolate, or a JSON file of cameras.") from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}). {FIX}.") from error


def _checked(path: Path, number: int, entry: Any, read: Any) -> Camera:
    """One camera of the file, with its number in the message when it cannot be used."""
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is no object")
        camera: Camera = read(number, entry)
        if max(camera.width, camera.height) > _LARGEST_SIZE:
            raise ValueError(f"its size {camera.width} x {camera.height} is no picture's")
        return camera
    except (KeyError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"camera {number} of {path} cannot be used: {what}. {FIX}.") from error


def _our_camera(number: int, entry: Mapping[str, Any]) -> Camera:
    """A camera of cameras.json: position and rotation are camera-to-world, with our axes; the lens is centred."""
    width, height = (int(_positive(entry, name)) for name in ("width", "height"))
    rotation, center = _numbers(entry, "rotation", (3, 3)), _numbers(entry, "position", (3,))
    focal = _positive(entry, "fx"), _positive(entry, "fy")
    return _camera(number, (width, height), focal, rotation, center)


def _nerfstudio_reader(path: Path, content: Mapping[str, Any]) -> Any:
    """What reads a camera of nerfstudio's file.

    camera_to_world has 16 numbers, row by row, x right, y up, looking along -z; fov is the vertical field of view in
    degrees.
    """
    kind = content.get("camera_type", "perspective")
    if kind != "perspective":
        raise InputError(f"{path} is for cameras of type {kind!r}; only perspective ones are drawn here. Change it.")
    try:
        size = int(_positive(content, "render_width")), int(_positive(content, "render_height"))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has no usable render_width and render_height in pixels: add them.") from error
    turn, shift, scale = _read_normalization(path.with_name(TRANSFORM_FILE))

    def read(number: int, entry: Mapping[str, Any]) -> Camera:
        pose = _numbers(entry, "camera_to_world", (16,)).reshape(4, 4)
        angle = _positive(entry, "fov")
        if angle >= 179:
            raise ValueError(f"its fov of {angle} degrees is too wide")
        focal = size[1] / 2 / math.tan(math.radians(angle) / 2)
        center = turn.T @ (pose[:3, 3] / scale - shift)
        return _camera(number, size, (focal, focal), turn.T @ pose[:3, :3] @ _FLIP_Y_AND_Z, center)

    return read


def _read_normalization(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Rotation (3, 3), shift (3,) and scale of nerfstudio's world; those that change nothing without the file."""
    if not path.exists():
        return np.eye(3), np.zeros(3), 1.0
    content = _read_json(path)
    try:
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        matrix = _numbers(content, "transform", (3, 4))
        return _rotation(matrix[:, :3]), matrix[:, 3], _positive(content, "scale")
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is beside the path and cannot be used ({error}): a transform of 3 x 4 numbers and a "
                         "scale are needed. Restore the file or move it away.") from error  # fmt: skip


def _camera(
    number: int, size: tuple[int, int], focal: tuple[float, float], rotation: np.ndarray, center: np.ndarray
) -> Camera:
    """A centred camera from its camera-to-world pose."""
    rotation = _rotation(rotation)
    return Camera(
        name=f"{number:05d}", image_path=Path(), width=size[0], height=size[1], fx=focal[0], fy=focal[1],
        cx=size[0] / 2, cy=size[1] / 2, rotation=rotation.T, translation=-rotation.T @ center,
    )  # fmt: skip


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation nearest to a matrix that is one but for rounding, (3, 3).

    Raises:
        ValueError: it is none.
    """
    if np.abs(matrix @ matrix.T - np.eye(3)).max() > _LARGEST_SHEAR or np.linalg.det(matrix) < 0:
        raise ValueError("its axes are not those of a rotation")
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)


def _positive(entry: Mapping[str, Any], name: str) -> float:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} = {value!r} is not a positive number")
    return float(value)


def _numbers(entry: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.array(entry[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not hold numbers") from error
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(f"{name} is not of {' x '.join(map(str, shape))} finite numbers")
    return values
