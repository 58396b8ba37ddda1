# SPDX-License-Identifier: Apache-2.0
"""Turns a folder with posed photos into a `Scene`: cameras at their trained size, split, points, extent.

COLMAP models are read here; `scene/blender.py` and `scene/matrixcity.py` read the other formats. Reads image headers
only, decodes no pixels, and never writes into the folder.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from scene.blender import POINTS_FILE, read_blender
from scene.cameras import Camera, rotation_from_quaternion
from scene.colmap import (
    PHOTO_SUFFIXES,
    describe_models,
    find_model,
    has_model,
    has_photos,
    numbered_models,
    read_model,
)
from scene.colmap_records import ColmapCamera, ColmapImage, ColmapModel
from scene.errors import InputError
from scene.matrixcity import FOCAL_KEYS, read_matrixcity
from scene.photo_cameras import PhotoCheck, Pinhole, PosedPhoto, check_photos
from scene.point_cloud import PointCloud
from scene.transforms import TRAIN_FILE, read_transforms

DATASET_TYPES = ("auto", "colmap", "blender", "matrixcity")


@dataclass(frozen=True, eq=False)
class Scene:
    """A posed photo collection; `extent` is in world units and positive.

    Both splits are sorted by image name in COLMAP scenes, and in the order of transforms_*.json otherwise, as in 3DGS.
    """

    source: Path
    train: tuple[Camera, ...]
    test: tuple[Camera, ...]
    points: PointCloud
    extent: float


@dataclass(frozen=True)
class SceneOptions:
    """How to read a scene; the fields have the names and meanings of the command line's flags."""

    images: str = "images"
    """Folder of the photos below the source folder (COLMAP only)."""
    resolution: int = -1
    """1, 2, 4, 8: divide the size; -1: reduce to a width of 1600 pixels if wider; other: width in pixels."""
    eval: bool = False
    """Hold images out for testing: every `llffhold`-th in order of names (COLMAP), those of transforms_test.json."""
    llffhold: int = 8
    """Period of the test images of COLMAP scenes, at least 2."""
    num_train_cameras: int = -1
    """Use only the first so many training images; -1: all."""
    num_test_cameras: int = -1
    """Use only the first so many test images; -1: all."""
    dataset_type: str = "auto"
    """One of `DATASET_TYPES`; auto: see `find_type`."""


def load_scene(
    source: Path, options: SceneOptions, *, notify: Callable[[str], None] = print, progress: bool = True
) -> Scene:
    """Returns the scene in `source`.

    Args:
        source: folder with photos and a COLMAP model (sparse/0, sparse or colmap/sparse/0), or transforms_train.json.
        options: see `SceneOptions`.
        notify: receives at most one sentence for each thing that is done without having been asked for.
        progress: show a bar on stderr when reading takes longer than two seconds.

    Raises:
        InputError: something in the folder or the options cannot be used; all bad images are listed in one error.
    """
    _check_options(options)
    check = PhotoCheck(options.resolution, notify, progress)
    try:
        kind = find_type(source, options.dataset_type)
        if kind == "colmap":
            train, test, points = _read_colmap(source, options, check)
        else:
            _notify_unused(options, notify)
            read = read_blender if kind == "blender" else read_matrixcity
            train, test, points = read(source, check, holds_out=options.eval)
    except OSError as error:
        where = error.filename or source
        raise InputError(
            f"{where} cannot be read: {error.strerror or error}. Check the file and its rights."
        ) from error
    _notify_shared(train, test, notify)
    used, held_out = _limited(train, test, options)
    return Scene(source, used, held_out, points, scene_extent(used, points.xyz))


def find_type(source: Path, wanted: str) -> str:
    """Returns colmap, blender or matrixcity for a folder: what is wanted, or with auto what the folder's files say.

    A COLMAP model comes first, as in 3DGS. A transforms_train.json is MatrixCity's when it has focal lengths in pixels,
    lenses of single frames or photos outside the folder, and Blender's otherwise.

    Raises:
        InputError: the folder holds nothing of the kind, or may mean two things.
    """
    if wanted not in DATASET_TYPES:
        raise InputError(f"--dataset_type {wanted}: use one of {', '.join(DATASET_TYPES)}.")
    transforms = source / TRAIN_FILE
    if wanted in ("blender", "matrixcity"):
        if not transforms.is_file():
            raise InputError(f"{source} has no {TRAIN_FILE}, which --dataset_type {wanted} reads. Check -s FOLDER.")
        return wanted
    if wanted == "colmap" or has_model(source) or not transforms.is_file():
        return "colmap"
    if _looks_like_a_city(transforms):
        return "matrixcity"
    clouds = sorted(path.name for path in source.glob("*.ply"))
    if clouds and POINTS_FILE not in clouds:
        raise InputError(
            f"{source} has {TRAIN_FILE} and {clouds[0]}, but no {POINTS_FILE}: it is not clear where to start. Give "
            f"--dataset_type matrixcity to start from {clouds[0]}, or --dataset_type blender for random points."
        )
    return "blender"


def _looks_like_a_city(path: Path) -> bool:
    """Whether a transforms_train.json has what only MatrixCity's reader understands."""
    transforms = read_transforms(path)
    if "fl_x" in transforms.values:
        return True
    return any(
        frame.file_path.startswith("/")
        or ".." in frame.file_path.split("/")
        or not frame.values.keys().isdisjoint(FOCAL_KEYS)
        for frame in transforms.frames
    )


def _notify_unused(options: SceneOptions, notify: Callable[[str], None]) -> None:
    """Says which options for COLMAP folders were changed in vain."""
    for name in ("images", "llffhold"):
        if getattr(options, name) != getattr(SceneOptions, name):
            notify(f"--{name} has no effect: {TRAIN_FILE} says where the photos are and which are for testing.")


def _notify_shared(train: Sequence[Camera], test: Sequence[Camera], notify: Callable[[str], None]) -> None:
    """Says when test views are trained on, which makes their measures meaningless."""
    trained = {camera.image_path for camera in train}
    shared = sum(camera.image_path in trained for camera in test)
    if shared:
        notify(
            f"{shared} of {len(test)} test views are training views, too: their measures say nothing about new views."
        )


def _read_colmap(
    source: Path, options: SceneOptions, check: PhotoCheck
) -> tuple[list[Camera], list[Camera], PointCloud]:
    """Returns the training cameras, the test cameras and the points of a COLMAP scene."""
    if options.eval and options.llffhold < 2:
        raise InputError(
            f"--llffhold {options.llffhold}: it is the period of the test images, so it must be at least 2 (default 8)."
        )
    model = _read_usable_model(source)
    _notify_other_models(model.folder, check.notify)
    folder = _image_folder(source, options.images)
    images = sorted(model.images, key=lambda image: image.name)
    cameras = check_photos(
        [_posed_photo(image, model.cameras[image.camera_id], folder) for image in images],
        check,
        root=folder,
        headline=f"Images of the COLMAP model cannot be used with the folder {folder}",
        fix="Put the right files there, choose another folder with --images, or take them out of the model "
        "(colmap image_deleter).",
    )
    _notify_unposed(folder, [image.name for image in images], check.notify)
    is_test = [options.eval and index % options.llffhold == 0 for index in range(len(cameras))]
    train = [camera for camera, held_out in zip(cameras, is_test, strict=True) if not held_out]
    test = [camera for camera, held_out in zip(cameras, is_test, strict=True) if held_out]
    return train, test, PointCloud(model.xyz.astype(np.float32), model.rgb)


def _posed_photo(image: ColmapImage, camera: ColmapCamera, folder: Path) -> PosedPhoto:
    lens = Pinhole(camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy)
    rotation = rotation_from_quaternion(image.quaternion)
    return PosedPhoto(image.name, folder / image.name, lambda width, height: lens, rotation, image.translation)


def _notify_other_models(folder: Path, notify: Callable[[str], None]) -> None:
    """Says that there are more models than the one that is used: their photos are not trained on."""
    models = numbered_models(folder.parent) if folder.name.isdecimal() else []
    if len(models) > 1:
        notify(
            f"{folder.parent} holds {len(models)} models, as COLMAP writes them when it cannot join all photos: "
            f"{describe_models(models)}. {folder.name} is used; to use another, rename its folder to {folder.name}."
        )


def _notify_unposed(folder: Path, names: Sequence[str], notify: Callable[[str], None]) -> None:
    """Says how many photos have no pose, of the folders where others have one.

    COLMAP leaves out what it cannot place; without a word a user takes them for trained on.
    """
    parents = sorted({str(PurePosixPath(name).parent) for name in names})
    found = {
        str(PurePosixPath(parent, path.name))
        for parent in parents
        for path in (folder / parent).iterdir()
        if path.suffix.lower() in PHOTO_SUFFIXES
    }
    unposed = sorted(found.difference(names))
    if unposed:
        listed = ", ".join(unposed[:3]) + (", ..." if len(unposed) > 3 else "")
        notify(
            f"{len(unposed)} of {len(found)} photos in {folder} have no pose in the COLMAP model and are not used: "
            f"{listed}"
        )


def _read_usable_model(source: Path) -> ColmapModel:
    model = read_model(find_model(source))
    if not model.images:
        raise InputError(f"{model.folder} has no registered image. Run the reconstruction again.")
    if len(model.xyz) == 0:
        raise InputError(
            f"{model.folder} has no 3D points, but the Gaussians start from at least one. Triangulate some with "
            "`colmap point_triangulator`, or run the reconstruction again."
        )
    return model


def _limited(
    train: Sequence[Camera], test: Sequence[Camera], options: SceneOptions
) -> tuple[tuple[Camera, ...], tuple[Camera, ...]]:
    """Returns (train, test) cut to --num_train_cameras and --num_test_cameras.

    Raises:
        InputError: no training view is left, or no test view although `eval` asks for them.
    """
    number = len(train) + len(test)
    train = train[: _limit(options.num_train_cameras, train)]
    test = test[: _limit(options.num_test_cameras, test)]
    if not train:
        raise InputError(
            f"No training view is left of {number} images (--eval {options.eval}, --llffhold {options.llffhold}, "
            f"--num_train_cameras {options.num_train_cameras}). Add photos, or train without --eval."
        )
    if options.eval and not test:
        raise InputError(
            f"--eval asks for test views, but none of {number} images is one (--num_test_cameras "
            f"{options.num_test_cameras}). Raise --num_test_cameras, or train without --eval."
        )
    return tuple(train), tuple(test)


def scene_extent(train: Sequence[Camera], xyz: np.ndarray) -> float:
    """Returns the length in world units that densification and learning rates refer to.

    As 3DGS: 1.1 times the largest distance of a training camera from the mean of all. Where all cameras are in one
    place (one camera, a panorama) that is zero: then the median distance of the points (P, 3) from there; if that is
    zero, too, 1.
    """
    centers = np.stack([camera.center for camera in train])
    mean = centers.mean(axis=0)
    radius = float(np.linalg.norm(centers - mean, axis=1).max())
    depth = float(np.median(np.linalg.norm(xyz - mean, axis=1)))
    if radius > 1e-6 * depth:
        return 1.1 * radius
    return depth if depth > 0 else 1.0


def _limit(number: int, cameras: Sequence[Camera]) -> int:
    return len(cameras) if number == -1 else number


def _check_options(options: SceneOptions) -> None:
    if options.resolution != -1 and options.resolution < 1:
        raise InputError(f"--resolution {options.resolution}: use 1, 2, 4, 8, -1 (default), or a width in pixels.")
    for name in ("num_train_cameras", "num_test_cameras"):
        if getattr(options, name) < -1:
            raise InputError(f"--{name} {getattr(options, name)}: use a number of images, or -1 for all.")


def _image_folder(source: Path, name: str) -> Path:
    folder = source / name
    if not folder.is_dir():
        others = sorted(path.name for path in source.glob("images*") if path.is_dir())
        others += ["input"] if has_photos(source / "input") else []  # where convert.py of 3DGS takes photos from
        hint = "Set --images (-i) to their place."
        if others:
            hint = f"There is {', '.join(others)}: choose with --images, here -i {shlex.quote(others[0])}."
        raise InputError(f"The folder of the photos, {folder}, does not exist. {hint}")
    return folder
