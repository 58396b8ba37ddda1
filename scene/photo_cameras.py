# SPDX-License-Identifier: Apache-2.0
"""From photos with poses to cameras at their trained size, with every file's header checked. Decodes no pixels.

What the formats of data sets have in common; where poses and lenses come from is theirs (`scene/dataset.py`,
`scene/blender.py`, `scene/matrixcity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from scene.cameras import Camera
from scene.errors import InputError, list_problems
from scene.photo import read_size

WIDEST_DEFAULT = 1600  # pixels; 3DGS reduces wider photos unless told otherwise
DIVISORS = (1, 2, 4, 8)
_HEADER_THREADS = 8


@dataclass(frozen=True)
class Pinhole:
    """Intrinsics in pixels of an image of `width` x `height` pixels; pixel (0, 0) has its centre at (0.5, 0.5)."""

    width: float
    height: float
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True, eq=False)
class PosedPhoto:
    """A photo as a data set describes it, its file not opened yet.

    `name` and the pose are those of the `Camera` it becomes. `lens` gives the intrinsics from the (width, height) in
    pixels of the file, at any size that the file's can be a scaling of.
    """

    name: str
    path: Path
    lens: Callable[[int, int], Pinhole]
    rotation: np.ndarray
    translation: np.ndarray


@dataclass(frozen=True)
class PhotoCheck:
    """How photos become cameras: --resolution, who is told what was not asked for, and whether a bar is shown."""

    resolution: int
    notify: Callable[[str], None]
    progress: bool


def training_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Returns the trained (width, height) in pixels of a photo of that size by the 3DGS rule for --resolution."""
    if resolution in DIVISORS:
        return round(width / resolution), round(height / resolution)
    target = min(width, WIDEST_DEFAULT) if resolution == -1 else resolution
    return target, height * target // width


def check_photos(
    photos: Sequence[PosedPhoto], check: PhotoCheck, *, root: Path | None, headline: str, fix: str
) -> list[Camera]:
    """Returns the cameras of the photos, in their order.

    Args:
        root: folder that no photo may lie outside of, links resolved; None: they may lie anywhere.
        headline, fix: the beginning and the end of the error that lists the photos that cannot be used.

    Raises:
        InputError: lists every photo that is missing, damaged, of another shape than its lens, or reduced to nothing.
    """
    resolved = root.resolve() if root is not None else None

    def build(photo: PosedPhoto) -> Camera | str:
        return _make_camera(photo, resolved, check.resolution)

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        results = pool.map(build, photos)
        bar = tqdm(results, "Checking images", len(photos), unit="image", delay=2.0, disable=not check.progress)
        built = list(bar)
    problems = [item for item in built if isinstance(item, str)]
    if problems:
        raise list_problems(headline, problems, fix)
    cameras = [item for item in built if isinstance(item, Camera)]
    if check.resolution == -1:
        _notify_reduction(cameras, check.notify)
    return cameras


def _notify_reduction(cameras: Sequence[Camera], notify: Callable[[str], None]) -> None:
    """Says once that wide photos are reduced; trained widths of exactly 1600 need a second look at the file."""
    candidates = (camera.image_path for camera in cameras if camera.width == WIDEST_DEFAULT)
    wide = sum(read_size(path)[0] > WIDEST_DEFAULT for path in candidates)
    if wide:
        notify(
            f"{wide} of {len(cameras)} images are wider than {WIDEST_DEFAULT} pixels and are reduced to that width; "
            "--resolution 1 keeps their size."
        )


def _make_camera(photo: PosedPhoto, root: Path | None, resolution: int) -> Camera | str:
    """Returns the camera of a photo, or what is wrong with its file."""
    try:
        if root is not None and not photo.path.resolve().is_relative_to(root):
            return f"{photo.name}: a link leads out of the image folder"
        if not photo.path.is_file():
            return f"{photo.name}: the file does not exist"
        found = read_size(photo.path)
    except (OSError, RuntimeError) as error:  # unreadable folder; ring of links
        return f"{photo.name}: {error}"
    except InputError as error:
        return str(error)
    lens = photo.lens(*found)
    if not _same_shape(found, (lens.width, lens.height)):
        return f"{photo.name}: the image has {found[0]}x{found[1]} pixels, its camera {lens.width:g}x{lens.height:g}"
    if not (-lens.width <= lens.cx <= 2 * lens.width and -lens.height <= lens.cy <= 2 * lens.height):
        return f"{photo.name}: its principal point ({lens.cx:g}, {lens.cy:g}) is far outside the image"
    width, height = training_size(*found, resolution)
    if width < 1 or height < 1:
        return f"{photo.name}: nothing is left of its {found[0]}x{found[1]} pixels with --resolution {resolution}"
    return _scaled_camera(photo, lens, width, height)


def _same_shape(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two sizes can be scalings of each other: equal within one pixel of the smaller, in width or in height."""
    small, large = sorted((one, other))
    return abs(large[1] * small[0] / large[0] - small[1]) <= 1 or abs(large[0] * small[1] / large[1] - small[0]) <= 1


def _scaled_camera(photo: PosedPhoto, lens: Pinhole, width: int, height: int) -> Camera:
    """Returns the camera with its intrinsics scaled by the true ratio of sizes, principal point included."""
    scale_x, scale_y = width / lens.width, height / lens.height
    return Camera(
        name=photo.name,
        image_path=photo.path,
        width=width,
        height=height,
        fx=lens.fx * scale_x,
        fy=lens.fy * scale_y,
        cx=lens.cx * scale_x,
        cy=lens.cy * scale_y,
        rotation=photo.rotation,
        translation=photo.translation,
    )
