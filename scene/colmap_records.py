# SPDX-License-Identifier: Apache-2.0
"""The records of a COLMAP model and the checks that both file formats share. Reads no file.

A `place` is text such as "cameras.bin, byte 40" or "images.txt, line 7", and opens every message.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from scene.errors import InputError

# COLMAP's model id -> (name, number of parameters).
CAMERA_MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
    11: ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
    12: ("SIMPLE_DIVISION", 4),
    13: ("DIVISION", 5),
    14: ("SIMPLE_FISHEYE", 3),
    15: ("FISHEYE", 4),
    16: ("EUCM", 6),
    17: ("EQUIRECTANGULAR", 2),
}
# Models that are a pinhole when all that follows the intrinsics is 0 -> number of intrinsics. Fisheye models never are.
UNDISTORTED_AT_ZERO = {
    "SIMPLE_RADIAL": 3,
    "RADIAL": 3,
    "OPENCV": 4,
    "FULL_OPENCV": 4,
    "FOV": 4,
    "SIMPLE_DIVISION": 3,
    "DIVISION": 4,
}
MAX_SIDE = 1 << 20  # pixels
MAX_NAME_BYTES = 4096
MAX_COORDINATE = 1e15  # squared distances must stay finite in float32
FOCAL_RANGE = (1e-2, 1e9)  # pixels
REPAIR = "Export the model from COLMAP again, or take an intact copy."


@dataclass(frozen=True)
class ColmapCamera:
    """Pinhole intrinsics; `width` and `height` and the rest are in pixels of the photos that COLMAP saw."""

    camera_id: int
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """One registered photo: `quaternion` (4,) wxyz of length 1 and `translation` (3,), world to camera, float64."""

    image_id: int
    name: str
    camera_id: int
    quaternion: np.ndarray
    translation: np.ndarray
    place: str


@dataclass(frozen=True, eq=False)
class ColmapModel:
    """A sparse model; `xyz` (P, 3) float64 in world units, `rgb` (P, 3) uint8; images in the file's order."""

    folder: Path
    cameras: dict[int, ColmapCamera]
    images: tuple[ColmapImage, ...]
    xyz: np.ndarray
    rgb: np.ndarray


def undistort_advice(sparse: Path) -> str:
    """Returns both commands that turn a model with lens distortion into a pinhole one."""
    sparse = sparse.absolute()
    source = next(parent for parent in sparse.parents if parent.name not in ("sparse", "colmap"))
    images, output = source / "images", source.parent / f"{source.name}_undistorted"
    colmap = (
        f"colmap image_undistorter --image_path {shlex.quote(str(images))} --input_path {shlex.quote(str(sparse))} "
        f"--output_path {shlex.quote(str(output))}"
    )
    folders = ", ".join(json.dumps(str(folder)) for folder in (output, sparse, images))
    call = f"import pycolmap; pycolmap.undistort_images({folders})"
    return (
        f"Undistort the photos with `{colmap}`, or without COLMAP itself by `pip install pycolmap` and "
        f"`python -c {shlex.quote(call)}`, then train on {output}."
    )


def pinhole_params(place: str, name: str, params: Sequence[float], sparse: Path) -> Sequence[float]:
    """Returns (f, cx, cy) or (fx, fy, cx, cy) of a camera of the model `name` that has no lens distortion.

    Raises InputError for all others: splats are drawn through a pinhole.
    """
    if name in ("SIMPLE_PINHOLE", "PINHOLE"):
        return params
    number = UNDISTORTED_AT_ZERO.get(name, len(params))
    if number < len(params) and not any(params[number:]):  # NaN counts as distortion
        return params[:number]
    raise InputError(
        f"{place}: the camera model {name} is not supported: only PINHOLE and SIMPLE_PINHOLE are, and models of which "
        "all distortion parameters are exactly 0, because splats are drawn without lens distortion. "
        + undistort_advice(sparse)
    )


def make_camera(place: str, camera_id: int, width: int, height: int, params: Sequence[float]) -> ColmapCamera:
    """Returns a checked camera from the parameters of SIMPLE_PINHOLE (f, cx, cy) or PINHOLE (fx, fy, cx, cy)."""
    fx, fy, cx, cy = params if len(params) == 4 else (params[0], *params)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise InputError(f"{place}: camera {camera_id} has the impossible size {width}x{height} pixels. {REPAIR}")
    for name, focal in (("fx", fx), ("fy", fy)):
        if not FOCAL_RANGE[0] <= focal <= FOCAL_RANGE[1]:  # false for NaN, too
            raise InputError(
                f"{place}: camera {camera_id} has the focal length {name} = {focal:g} pixels; it must be positive and "
                f"finite. {REPAIR}"
            )
    for name, center, side in (("cx", cx, width), ("cy", cy, height)):
        if not -side <= center <= 2 * side:
            raise InputError(
                f"{place}: camera {camera_id} has the principal point {name} = {center:g}, which is far outside its "
                f"{width}x{height} pixels. {REPAIR}"
            )
    return ColmapCamera(camera_id, width, height, fx, fy, cx, cy)


def make_image(place: str, image_id: int, pose: Sequence[float], camera_id: int, name: str) -> ColmapImage:
    """Returns a checked image from `pose` = (qw, qx, qy, qz, tx, ty, tz)."""
    quaternion, translation = np.array(pose[:4], np.float64), np.array(pose[4:7], np.float64)
    length = math.hypot(*quaternion)
    if not 1e-6 <= length <= 1e6:
        raise InputError(f"{place}: image {image_id} has a rotation quaternion of length {length:g}. {REPAIR}")
    if not np.all(np.abs(translation) <= MAX_COORDINATE):
        raise InputError(f"{place}: image {image_id} has the translation {translation.tolist()}. {REPAIR}")
    return ColmapImage(image_id, checked_name(place, name), camera_id, quaternion / length, translation, place)


def checked_name(place: str, name: str) -> str:
    """Returns an image name in normal form ("a/b.jpg"), which cannot leave the image folder.

    Raises InputError for absolute names, "..", control characters, and names too long for a file system.
    """
    cause = None
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:
        cause = "is empty"
    elif path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        cause = "leaves the image folder"
    elif any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        cause = "holds a control character"
    elif len(name.encode()) > MAX_NAME_BYTES or any(len(part.encode()) > 255 for part in path.parts):
        cause = "is too long"
    if cause is not None:
        raise InputError(
            f"{place}: the image name {name[:80]!r} {cause}. Names must be relative to the image folder; run COLMAP "
            "with --image_path set to the folder that holds all photos."
        )
    return str(path)


def check_points(places: tuple[str, str], xyz: np.ndarray) -> None:
    """Raises InputError naming the first point whose coordinates are not usable numbers.

    `places` holds the file and the word for one record in it ("points3D.txt", "point number").
    """
    good = (np.abs(xyz) <= MAX_COORDINATE).all(axis=1)
    if not good.all():
        first = int(np.flatnonzero(~good)[0])
        raise InputError(
            f"{places[0]}: {places[1]} {first + 1} has the position {xyz[first].tolist()}, which is not finite or "
            f"absurdly far away ({int((~good).sum())} such points). {REPAIR}"
        )


def check_model(folder: Path, cameras: dict[int, ColmapCamera], images: Sequence[ColmapImage]) -> None:
    """Raises InputError for duplicate image ids or names and for images of an unknown camera."""
    ids: dict[int, str] = {}
    names: dict[str, str] = {}
    for image in images:
        if image.image_id in ids:
            raise InputError(f"{image.place}: image id {image.image_id} was used at {ids[image.image_id]}. {REPAIR}")
        if image.name in names:
            raise InputError(
                f"{image.place}: the image name {image.name!r} was used at {names[image.name]}. Two images cannot "
                "share one file: delete one of them from the model (colmap image_deleter), or rename the photo."
            )
        if image.camera_id not in cameras:
            raise InputError(
                f"{image.place}: image {image.name!r} refers to camera {image.camera_id}, which the cameras file of "
                f"{folder} does not have. {REPAIR}"
            )
        ids[image.image_id] = image.place
        names[image.name] = image.place
