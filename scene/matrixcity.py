# SPDX-License-Identifier: Apache-2.0
"""MatrixCity's scenes: transforms_train.json and transforms_test.json with photos in several folders, and a ply.

As Grendel-GS reads them: paths lead anywhere, the two files are the split whatever --eval says, and the *.ply of the
folder is the initial cloud. Intrinsics may be given for the whole file or for each frame.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scene.cameras import Camera
from scene.colmap_records import FOCAL_RANGE, MAX_SIDE
from scene.errors import InputError
from scene.photo_cameras import PhotoCheck, Pinhole, PosedPhoto
from scene.point_cloud import PointCloud, read_point_cloud
from scene.transforms import (
    TEST_FILE,
    TRAIN_FILE,
    Frame,
    Transforms,
    angle_of,
    check_frames,
    find_photo,
    lens_of_angle,
    number_of,
    read_transforms,
    refuse_distortion,
)

FOCAL_KEYS = ("camera_angle_x", "fl_x")
"""A file or a frame with one of these says what its lens is."""


@dataclass(frozen=True)
class _Given:
    """What a file says of a lens, None where it says nothing: focal lengths, centre and size in pixels, radians."""

    angle: float | None
    fl_x: float | None
    fl_y: float | None
    cx: float | None
    cy: float | None
    w: float | None
    h: float | None


def read_matrixcity(
    source: Path, check: PhotoCheck, *, holds_out: bool
) -> tuple[list[Camera], list[Camera], PointCloud]:
    """Returns the training cameras, the test cameras and the points of a MatrixCity scene, in the order of its files.

    Args:
        holds_out: whether transforms_test.json must be there; where it is, its frames are always for testing.

    Raises:
        InputError: a file is missing or malformed; all photos of a file that cannot be used are listed in one error.
    """
    files = [read_transforms(source / TRAIN_FILE)]
    if (source / TEST_FILE).is_file():
        files.append(read_transforms(source / TEST_FILE))
    elif holds_out:
        raise InputError(
            f"{source} has no {TEST_FILE}, whose frames --eval tests on. Put it there, or train without --eval."
        )
    paths = [[_find(source, frame) for frame in transforms.frames] for transforms in files]
    # Sub-folders may repeat names (block_1/0000.png, block_2/0000.png), and "../.." is no part of a name.
    common = os.path.commonpath([_absolute(path.parent) for found in paths for path in found])
    cameras = [_cameras(each, found, common, check) for each, found in zip(files, paths, strict=True)]
    return cameras[0], cameras[1] if len(cameras) > 1 else [], read_point_cloud(_cloud(source))


def _find(source: Path, frame: Frame) -> Path:
    """Returns a frame's photo: seen from the scene's folder, or else from the current one, as Grendel-GS does."""
    path = find_photo(source / frame.file_path)
    if path.is_file():
        return path
    other = find_photo(Path(frame.file_path))
    return other.absolute() if other.is_file() else path


def _absolute(path: Path) -> str:
    """Returns the path from the root without "..", links not resolved: for names, not for opening."""
    return os.path.normpath(path.absolute())


def _cameras(transforms: Transforms, paths: Sequence[Path], common: str, check: PhotoCheck) -> list[Camera]:
    refuse_distortion(transforms.values, str(transforms.path))
    photos = []
    for frame, path in zip(transforms.frames, paths, strict=True):
        name = Path(os.path.relpath(_absolute(path), common)).as_posix()
        lens = partial(_lens, _given(transforms, frame))
        photos.append(PosedPhoto(name, path, lens, frame.rotation, frame.translation))
    return check_frames(transforms, photos, check)


def _given(transforms: Transforms, frame: Frame) -> _Given:
    """Returns what is said about a frame's lens: all of it by the frame when it has a focal length, else by the file.

    Raises:
        InputError: neither says a focal length, or a value is impossible.
    """
    refuse_distortion(frame.values, frame.place)
    has_own = any(frame.values.get(key) is not None for key in FOCAL_KEYS)
    # A frame with a lens of its own may still leave the size, which is that of every photo, to the file.
    shared = {key: transforms.values.get(key) for key in ("w", "h")} if has_own else transforms.values
    values: Mapping[str, Any] = {**shared, **{key: value for key, value in frame.values.items() if value is not None}}
    sides, pixels = (1.0, float(MAX_SIDE)), (-2.0 * MAX_SIDE, 2.0 * MAX_SIDE)
    found = _Given(
        angle=angle_of(values, frame.place),
        fl_x=number_of(values, "fl_x", frame.place, FOCAL_RANGE),
        fl_y=number_of(values, "fl_y", frame.place, FOCAL_RANGE),
        cx=number_of(values, "cx", frame.place, pixels),
        cy=number_of(values, "cy", frame.place, pixels),
        w=number_of(values, "w", frame.place, sides),
        h=number_of(values, "h", frame.place, sides),
    )
    if found.angle is None and found.fl_x is None:
        raise InputError(
            f"{frame.place}: neither the frame nor {transforms.path.name} has camera_angle_x (radians) or fl_x "
            "(pixels). Add the focal length that the photos were taken with."
        )
    return found


def _lens(given: _Given, width: int, height: int) -> Pinhole:
    """Returns the lens for a file of `width` x `height` pixels, at the size that the pixels of `given` refer to.

    The angle comes first, as in Grendel-GS: it holds at any size. Without w and h, pixels are those of the file.
    """
    wide, high = given.w or width, given.h or height
    ratio = given.fl_y / given.fl_x if given.fl_x is not None and given.fl_y is not None else 1.0
    if given.angle is not None:
        fx = lens_of_angle(given.angle, wide, high).fx
    elif given.fl_x is not None:
        fx = given.fl_x
    else:
        raise ValueError("a lens has an angle or a focal length")  # `_given` has refused it
    cx = wide / 2 if given.cx is None else given.cx
    cy = high / 2 if given.cy is None else given.cy
    return Pinhole(wide, high, fx, fx * ratio, cx, cy)


def _cloud(source: Path) -> Path:
    """Returns the one ply of the scene's folder."""
    found = sorted(source.glob("*.ply"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{source} has several clouds ({', '.join(path.name for path in found[:5])}), and training starts from "
            "one: leave only that one in the folder."
        )
    raise InputError(
        f"{source} has no *.ply, and a MatrixCity scene starts from one. Put the point cloud there, or use "
        "--dataset_type blender to start from random points."
    )
