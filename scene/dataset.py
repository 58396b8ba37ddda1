# SPDX-License-Identifier: Apache-2.0
"""Turns a folder with photos and a COLMAP model into a `Scene`: cameras at their trained size, split, points, extent.

Reads image headers only, decodes no pixels, and never writes into the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scene.cameras import Camera, rotation_from_quaternion
from scene.colmap import find_model, read_model
from scene.colmap_records import ColmapCamera, ColmapImage, ColmapModel
from scene.errors import InputError, list_problems
from scene.photo import read_size

WIDEST_DEFAULT = 1600  # pixels; 3DGS reduces wider photos unless told otherwise
DIVISORS = (1, 2, 4, 8)
_HEADER_THREADS = 8


@dataclass(frozen=True, eq=False)
class PointCloud:
    """The points of the sparse model: `xyz` (P, 3) float32 in world units, `rgb` (P, 3) uint8; P >= 1."""

    xyz: np.ndarray
    rgb: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A posed photo collection; both splits are sorted by image name; `extent` is in world units and positive."""

    source: Path
    train: tuple[Camera, ...]
    test: tuple[Camera, ...]
    points: PointCloud
    extent: float


@dataclass(frozen=True)
class SceneOptions:
    """How to read a scene; the fields have the names and meanings of the command line's flags."""

    images: str = "images"
    """Folder of the photos below the source folder."""
    resolution: int = -1
    """1, 2, 4, 8: divide the size; -1: reduce to a width of 1600 pixels if wider; other: width in pixels."""
    eval: bool = False
    """Hold out every `llffhold`-th image, in order of names, for testing."""
    llffhold: int = 8
    """Period of the test images, at least 2."""
    num_train_cameras: int = -1
    """Use only the first so many training images; -1: all."""
    num_test_cameras: int = -1
    """Use only the first so many test images; -1: all."""


def load_scene(
    source: Path, options: SceneOptions, *, notify: Callable[[str], None] = print, progress: bool = True
) -> Scene:
    """Returns the scene in `source`.

    Args:
        source: folder with photos and a COLMAP model (sparse/0, sparse or colmap/sparse/0).
        options: see `SceneOptions`.
        notify: receives at most one sentence for each thing that is done without having been asked for.
        progress: show a bar on stderr when reading takes longer than two seconds.

    Raises:
        InputError: something in the folder or the options cannot be used; all bad images are listed in one error.
    """
    _check_options(options)
    try:
        model = _read_usable_model(source)
        cameras = _load_cameras(model, _image_folder(source, options.images), options.resolution, notify, progress)
    except OSError as error:
        where = error.filename or source
        raise InputError(
            f"{where} cannot be read: {error.strerror or error}. Check the file and its rights."
        ) from error
    train, test = split_cameras(cameras, options)
    points = PointCloud(model.xyz.astype(np.float32), model.rgb)
    return Scene(source, train, test, points, scene_extent(train, model.xyz))


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


def split_cameras(cameras: Sequence[Camera], options: SceneOptions) -> tuple[tuple[Camera, ...], tuple[Camera, ...]]:
    """Returns (train, test) of cameras sorted by name: with `eval`, index % llffhold == 0 is for testing.

    Raises:
        InputError: no training view is left, or no test view although `eval` asks for them.
    """
    is_test = [options.eval and index % options.llffhold == 0 for index in range(len(cameras))]
    train = [camera for camera, held_out in zip(cameras, is_test, strict=True) if not held_out]
    test = [camera for camera, held_out in zip(cameras, is_test, strict=True) if held_out]
    train = train[: _limit(options.num_train_cameras, train)]
    test = test[: _limit(options.num_test_cameras, test)]
    if not train:
        raise InputError(
            f"No training view is left of {len(cameras)} images (--eval {options.eval}, --llffhold {options.llffhold}, "
            f"--num_train_cameras {options.num_train_cameras}). Add photos, or train without --eval."
        )
    if options.eval and not test:
        raise InputError(
            f"--eval asks for test views, but none of {len(cameras)} images is one (--num_test_cameras "
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


def training_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Returns the trained (width, height) in pixels of a photo of that size by the 3DGS rule for --resolution."""
    if resolution in DIVISORS:
        return round(width / resolution), round(height / resolution)
    target = min(width, WIDEST_DEFAULT) if resolution == -1 else resolution
    return target, height * target // width


def _limit(number: int, cameras: Sequence[Camera]) -> int:
    return len(cameras) if number == -1 else number


def _check_options(options: SceneOptions) -> None:
    if options.resolution != -1 and options.resolution < 1:
        raise InputError(f"--resolution {options.resolution}: use 1, 2, 4, 8, -1 (default), or a width in pixels.")
    if options.eval and options.llffhold < 2:
        raise InputError(
            f"--llffhold {options.llffhold}: it is the period of the test images, so it must be at least 2 (default 8)."
        )
    for name in ("num_train_cameras", "num_test_cameras"):
        if getattr(options, name) < -1:
            raise InputError(f"--{name} {getattr(options, name)}: use a number of images, or -1 for all.")


def _image_folder(source: Path, name: str) -> Path:
    folder = source / name
    if not folder.is_dir():
        others = sorted(path.name for path in source.glob("images*") if path.is_dir())
        hint = f"There is {', '.join(others)}: choose with --images." if others else "Set --images (-i) to their place."
        raise InputError(f"The folder of the photos, {folder}, does not exist. {hint}")
    return folder


def _load_cameras(
    model: ColmapModel, folder: Path, resolution: int, notify: Callable[[str], None], progress: bool
) -> list[Camera]:
    """Returns all cameras sorted by name, after checking every image's header."""
    images = sorted(model.images, key=lambda image: image.name)
    root = folder.resolve()

    def build(image: ColmapImage) -> Camera | str:
        return _make_camera(image, model.cameras[image.camera_id], root, folder, resolution)

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        results = pool.map(build, images)
        built = list(tqdm(results, "Checking images", len(images), unit="image", delay=2.0, disable=not progress))
    problems = [item for item in built if isinstance(item, str)]
    if problems:
        raise list_problems(
            f"Images of the COLMAP model cannot be used with the folder {folder}",
            problems,
            "Put the right files there, choose another folder with --images, or take them out of the model "
            "(colmap image_deleter).",
        )
    cameras = [item for item in built if isinstance(item, Camera)]
    _notify_reduction(cameras, model, resolution, notify)
    return cameras


def _notify_reduction(
    cameras: Sequence[Camera], model: ColmapModel, resolution: int, notify: Callable[[str], None]
) -> None:
    """Says once that wide photos are reduced; trained widths of exactly 1600 need a second look at the file."""
    if resolution != -1:
        return
    candidates = (camera.image_path for camera in cameras if camera.width == WIDEST_DEFAULT)
    wide = sum(read_size(path)[0] > WIDEST_DEFAULT for path in candidates)
    if wide:
        notify(
            f"{wide} of {len(cameras)} images are wider than {WIDEST_DEFAULT} pixels and are reduced to that width; "
            "--resolution 1 keeps their size."
        )


def _make_camera(image: ColmapImage, camera: ColmapCamera, root: Path, folder: Path, resolution: int) -> Camera | str:
    """Returns the camera of an image, or what is wrong with its file."""
    path = folder / image.name
    try:
        if not path.resolve().is_relative_to(root):
            return f"{image.name}: a link leads out of the image folder"
        if not path.is_file():
            return f"{image.name}: the file does not exist"
        found = read_size(path)
    except (OSError, RuntimeError) as error:  # unreadable folder; ring of links
        return f"{image.name}: {error}"
    except InputError as error:
        return str(error)
    if not _same_shape(found, (camera.width, camera.height)):
        return f"{image.name}: the image has {found[0]}x{found[1]} pixels, its camera {camera.width}x{camera.height}"
    width, height = training_size(*found, resolution)
    if width < 1 or height < 1:
        return f"{image.name}: nothing is left of its {found[0]}x{found[1]} pixels with --resolution {resolution}"
    return _scaled_camera(image, camera, path, width, height)


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes can be scalings of each other: equal within one pixel of the smaller, in width or in height."""
    small, large = sorted((one, other))
    return abs(large[1] * small[0] / large[0] - small[1]) <= 1 or abs(large[0] * small[1] / large[1] - small[0]) <= 1


def _scaled_camera(image: ColmapImage, camera: ColmapCamera, path: Path, width: int, height: int) -> Camera:
    """Returns the camera with its intrinsics scaled by the true ratio of sizes, principal point included."""
    scale_x, scale_y = width / camera.width, height / camera.height
    return Camera(
        name=image.name,
        image_path=path,
        width=width,
        height=height,
        fx=camera.fx * scale_x,
        fy=camera.fy * scale_y,
        cx=camera.cx * scale_x,
        cy=camera.cy * scale_y,
        rotation=rotation_from_quaternion(image.quaternion),
        translation=image.translation,
    )
