# SPDX-License-Identifier: Apache-2.0
"""Reads transforms_*.json, the poses of NeRF's data sets: frames with a file path and a camera-to-world matrix.

Blender's axes (OpenGL: x right, y up, the camera looks along -z) become ours (x right, y down, looks along +z). Which
intrinsics and which paths a data set has is for `scene/blender.py` and `scene/matrixcity.py`. Opens no photo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scene.cameras import Camera
from scene.colmap import PHOTO_SUFFIXES
from scene.colmap_records import MAX_COORDINATE, MAX_NAME_BYTES
from scene.errors import InputError
from scene.photo_cameras import PhotoCheck, Pinhole, PosedPhoto, check_photos

TRAIN_FILE = "transforms_train.json"
TEST_FILE = "transforms_test.json"
REPAIR = "Correct the file, or write it again with the program that made it."
ANGLE_RANGE = (1e-3, 3.1)  # radians, the horizontal field of view
TRIED_SUFFIXES = (".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".tif", ".tiff", ".webp", ".bmp")
_FLIP_Y_AND_Z = np.array([1.0, -1.0, -1.0])
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_LARGEST_FILE = 1 << 30  # bytes
_LARGEST_SHEAR = 1e-3  # of a rotation's entries; matrices printed with four decimals are below 1e-4


@dataclass(frozen=True, eq=False)
class Frame:
    """One photo of the file: where it is said, its path as given, its world-to-camera pose, and the JSON values."""

    place: str
    file_path: str
    rotation: np.ndarray
    translation: np.ndarray
    values: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Transforms:
    """A checked file: its frames in its order (at least one), and the values beside them."""

    path: Path
    frames: tuple[Frame, ...]
    values: Mapping[str, Any]


def read_transforms(path: Path) -> Transforms:
    """Returns the frames of a transforms_*.json.

    Raises:
        InputError: the file is missing or no JSON, has no frames, or a frame's path or matrix cannot be used; the
            message names the file, the frame, the cause and the fix.
    """
    values = _read_object(path)
    frames = values.get("frames")
    if not isinstance(frames, list) or not frames:
        raise InputError(f'{path} has no list of frames ("frames" is {_shown(frames)}). {REPAIR}')
    made = tuple(_make_frame(f"{path}, frame {number}", frame) for number, frame in enumerate(frames))
    return Transforms(path, made, values)


def number_of(values: Mapping[str, Any], key: str, place: str, bounds: tuple[float, float]) -> float | None:
    """Returns the number under a key, None where there is none.

    Raises:
        InputError: the value is no number within the bounds, both inclusive.
    """
    if values.get(key) is None:
        return None
    number = _as_number(values[key])
    if number is None or not bounds[0] <= number <= bounds[1]:
        unit = " radians" if key == "camera_angle_x" else ""
        raise InputError(
            f"{place}: {key} is {_shown(values[key])}; it must be a number from {bounds[0]:g} to {bounds[1]:g}{unit}. "
            f"{REPAIR}"
        )
    return number


def angle_of(values: Mapping[str, Any], place: str) -> float | None:
    """Returns camera_angle_x, the horizontal field of view in radians; None where there is none.

    Raises:
        InputError: the value is no angle that a pinhole camera can have.
    """
    return number_of(values, "camera_angle_x", place, ANGLE_RANGE)


def lens_of_angle(angle: float, width: float, height: float) -> Pinhole:
    """Returns a centred lens with square pixels that sees `angle` radians over an image's width of `width` pixels.

    fx = fy = (width / 2) / tan(angle / 2), which is how 3DGS reads camera_angle_x.
    """
    focal = width / 2 / math.tan(angle / 2)
    return Pinhole(width, height, focal, focal, width / 2, height / 2)


def refuse_distortion(values: Mapping[str, Any], place: str) -> None:
    """Raises InputError when the values of a file or a frame describe a lens with distortion."""
    model = values.get("camera_model", "PINHOLE")
    bent = [key for key in _DISTORTION if values.get(key) is not None and _as_number(values[key]) != 0]
    if bent or model not in ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV"):
        what = f"{bent[0]} = {_shown(values[bent[0]])}" if bent else f"camera_model {_shown(model)}"
        raise InputError(
            f"{place}: {what} is lens distortion, and splats are drawn without it. Undistort the photos, and write the "
            "poses again for a PINHOLE camera."
        )


def find_photo(path: Path) -> Path:
    """Returns the file that a file_path means: itself when it has a photo's suffix, otherwise with .png or another.

    Where none exists, it is the path with .png, the one that 3DGS looks for.
    """
    if path.suffix.lower() in PHOTO_SUFFIXES:
        return path
    candidates = [path.with_name(path.name + suffix) for suffix in TRIED_SUFFIXES]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def check_frames(transforms: Transforms, photos: Sequence[PosedPhoto], check: PhotoCheck) -> list[Camera]:
    """Returns the cameras of a file's frames; `photos` has one entry a frame.

    Raises:
        InputError: two frames mean one photo, or photos cannot be used.
    """
    places: dict[str, str] = {}
    for frame, photo in zip(transforms.frames, photos, strict=True):
        if photo.name in places:
            raise InputError(
                f"{frame.place} means the photo of {places[photo.name]}. One photo has one pose: remove one of the two."
            )
        places[photo.name] = frame.place
    return check_photos(
        photos,
        check,
        root=None,  # links to other disks are the user's own
        headline=f"Photos of {transforms.path} cannot be used",
        fix=f"Put the right files there, or take their frames out of {transforms.path.name}.",
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    num_bytes = path.stat().st_size
    if num_bytes > _LARGEST_FILE:
        raise InputError(f"{path} has {num_bytes:,} bytes, which no list of poses has. {REPAIR}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, absurdly long numbers, absurdly deep lists
        raise InputError(f"{path} is no JSON file: {' '.join(str(error).split())[:200]}. {REPAIR}") from error
    if not isinstance(values, dict):
        raise InputError(f'{path} holds {_shown(values)} instead of an object with "frames". {REPAIR}')
    return values


def _make_frame(place: str, values: Any) -> Frame:
    """Returns a checked frame."""
    if not isinstance(values, dict):
        raise InputError(f"{place} is {_shown(values)} instead of an object. {REPAIR}")
    file_path = values.get("file_path")
    if not isinstance(file_path, str) or not file_path.strip("./\\ "):
        raise InputError(f"{place} has the file_path {_shown(file_path)} instead of a photo's path. {REPAIR}")
    if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in file_path) or (
        len(file_path.encode()) > MAX_NAME_BYTES or max(len(part.encode()) for part in file_path.split("/")) > 250
    ):
        raise InputError(f"{place} has the file_path {file_path[:80]!r}, which no file can have. {REPAIR}")
    place = f"{place} ({file_path[:80]})"
    if "transform_matrix" not in values and "rot_mat" in values:
        raise InputError(
            f"{place} has rot_mat, the raw form of MatrixCity. Make {TRAIN_FILE} and {TEST_FILE} from it with "
            "MatrixCity's scripts/generate_split.py."
        )
    rotation, translation = _pose(place, _matrix(place, values.get("transform_matrix")))
    return Frame(place, file_path.replace("\\", "/"), rotation, translation, values)


def _matrix(place: str, rows: Any) -> np.ndarray:
    """Returns a camera-to-world matrix, (4, 4) float64, finite, with the last row 0 0 0 1."""
    if not isinstance(rows, list) or len(rows) != 4 or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise InputError(f"{place}: transform_matrix is {_shown(rows)} instead of 4 rows of 4 numbers. {REPAIR}")
    numbers = [[_as_number(value) for value in row] for row in rows]
    for row, values in zip(numbers, rows, strict=True):
        for number, value in zip(row, values, strict=True):
            if number is None or not abs(number) <= MAX_COORDINATE:
                raise InputError(
                    f"{place}: transform_matrix holds {_shown(value)}, which is no finite number of a usable size. "
                    f"{REPAIR}"
                )
    matrix = np.array(numbers, np.float64)
    if not np.allclose(matrix[3], (0, 0, 0, 1), rtol=0, atol=1e-6):
        raise InputError(
            f"{place}: the last row of transform_matrix is {matrix[3].tolist()} instead of 0 0 0 1. Is it stored with "
            "rows and columns exchanged?"
        )
    return matrix


def _pose(place: str, camera_to_world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rotation (3, 3) and translation (3,), world to camera, of a matrix in Blender's axes.

    A common factor of the three axes is taken out: it changes no picture, and some exports have one.
    """
    axes = camera_to_world[:3, :3]
    left, stretches, right = np.linalg.svd(axes)
    if stretches[2] <= 1e-9 * max(1.0, stretches[0]):
        raise InputError(f"{place}: transform_matrix is no rotation: its determinant is zero. {REPAIR}")
    if np.linalg.det(left) * np.linalg.det(right) < 0:
        raise InputError(
            f"{place}: transform_matrix mirrors the scene (its determinant is negative). Export it with right-handed "
            "axes: x right, y up, the camera looking along -z."
        )
    nearest = left @ right
    error = float(np.abs(axes / stretches.mean() - nearest).max())
    if error > _LARGEST_SHEAR:
        raise InputError(
            f"{place}: transform_matrix is no rotation times a scale: its axes are stretched by {stretches[2]:.4g} to "
            f"{stretches[0]:.4g}. {REPAIR}"
        )
    rotation = (nearest * _FLIP_Y_AND_Z).T
    return rotation, -rotation @ camera_to_world[:3, 3]


def _as_number(value: Any) -> float | None:
    """Returns a JSON number as a float; None for anything else, and for what no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object with {len(value)} entries"
    return str(value)[:60] if isinstance(value, float) else repr(value)[:60]
