# SPDX-License-Identifier: Apache-2.0
"""NeRF-synthetic ("Blender") scenes: transforms_train.json, transforms_test.json and photos below the same folder.

As 3DGS reads them: one horizontal field of view for all frames, file paths without suffix mean .png, the test views
train, too, unless they are held out, and without points3d.ply the Gaussians start from random points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from scene.cameras import Camera
from scene.errors import InputError
from scene.photo_cameras import PhotoCheck, PosedPhoto
from scene.point_cloud import NUM_RANDOM_POINTS, PointCloud, random_points, read_point_cloud
from scene.transforms import (
    TEST_FILE,
    TRAIN_FILE,
    Frame,
    Transforms,
    angle_of,
    check_frames,
    find_photo,
    lens_of_angle,
    read_transforms,
    refuse_distortion,
)

POINTS_FILE = "points3d.ply"


def read_blender(source: Path, check: PhotoCheck, *, holds_out: bool) -> tuple[list[Camera], list[Camera], PointCloud]:
    """Returns the training cameras, the test cameras and the points of a Blender scene, in the order of its files.

    Args:
        holds_out: with it the frames of transforms_test.json are for testing; without it they are trained on, behind
            those of transforms_train.json (3DGS's --eval).

    Raises:
        InputError: a file is missing or malformed; all photos of a file that cannot be used are listed in one error.
    """
    train = _cameras(source, read_transforms(source / TRAIN_FILE), check)
    test: list[Camera] = []
    if (source / TEST_FILE).is_file():
        test = _cameras(source, read_transforms(source / TEST_FILE), check)
    elif holds_out:
        raise InputError(
            f"{source} has no {TEST_FILE}, whose frames --eval tests on. Put it there, or train without --eval."
        )
    points = _points(source, check.notify)
    return (train, test, points) if holds_out else (train + test, [], points)


def _cameras(source: Path, transforms: Transforms, check: PhotoCheck) -> list[Camera]:
    refuse_distortion(transforms.values, str(transforms.path))
    angle = angle_of(transforms.values, str(transforms.path))
    if angle is None:
        raise InputError(
            f"{transforms.path} has no camera_angle_x, the horizontal field of view in radians. Add it, or read the "
            "file with --dataset_type matrixcity if it has fl_x and fl_y."
        )
    return check_frames(transforms, [_photo(source, frame, angle) for frame in transforms.frames], check)


def _photo(source: Path, frame: Frame, angle: float) -> PosedPhoto:
    relative = PurePosixPath(frame.file_path)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(
            f"{frame.place}: the photo lies outside {source}, where those of a Blender scene are. Correct file_path, "
            "or use --dataset_type matrixcity, which reads photos from anywhere."
        )
    path = find_photo(source / relative)
    name = path.relative_to(source).as_posix()
    return PosedPhoto(name, path, partial(lens_of_angle, angle), frame.rotation, frame.translation)


def _points(source: Path, notify: Callable[[str], None]) -> PointCloud:
    if (source / POINTS_FILE).is_file():
        return read_point_cloud(source / POINTS_FILE)
    notify(f"{source} has no {POINTS_FILE}: training starts from {NUM_RANDOM_POINTS:,} random points, as in 3DGS.")
    return random_points()
