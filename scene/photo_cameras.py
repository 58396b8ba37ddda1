# SPDX-License-Identifier: Apache-2.0
"""From photos with poses to cameras at their trained size, with every file's header checked. Decodes no pixels.

What the formats of data sets have in common; where poses and lenses come from is theirs (`scene/dataset.py`,
`scene/blender.py`, `scene/matrixcity.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
LARGEST_ENLARGEMENT = 4
"""Times the width of a photo. An enlargement adds no detail; a wider one is a slip, and costs 16 times the memory."""
NARROW = 32
"""Pixels of width below which --resolution N was hardly meant as a width."""
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


@dataclass(frozen=True, eq=False)
class _Sized:
    """A camera and the (width, height) in pixels of its file."""

    camera: Camera
    found: tuple[int, int]

    @property
    def enlargement(self) -> float:
        return self.camera.width / self.found[0]

    def change(self) -> str:
        return f"from {self.found[0]}x{self.found[1]} to {self.camera.width}x{self.camera.height} pixels"


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
        InputError: lists every photo that is missing, damaged, of another shape than its lens, or reduced to nothing;
            or --resolution enlarges photos beyond `LARGEST_ENLARGEMENT`.
    """
    resolved = root.resolve() if root is not None else None
    neighbours = functools.cache(_names_below)

    def build(photo: PosedPhoto) -> _Sized | str:
        return _make_camera(photo, resolved, check.resolution, neighbours)

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        results = pool.map(build, photos)
        bar = tqdm(results, "Checking images", len(photos), unit="image", delay=2.0, disable=not check.progress)
        built = list(bar)
    problems = [item for item in built if isinstance(item, str)]
    if problems:
        raise list_problems(headline, problems, fix)
    sized = [item for item in built if isinstance(item, _Sized)]
    if check.resolution == -1:
        _notify_reduction(sized, check.notify)
    elif check.resolution not in DIVISORS:
        _check_width(sized, check)
    return [item.camera for item in sized]


def _notify_reduction(photos: Sequence[_Sized], notify: Callable[[str], None]) -> None:
    """Says once that wide photos are reduced."""
    wide = sum(photo.found[0] > WIDEST_DEFAULT for photo in photos)
    if wide:
        notify(
            f"{wide} of {len(photos)} images are wider than {WIDEST_DEFAULT} pixels and are reduced to that width; "
            "--resolution 1 keeps their size."
        )


def _check_width(photos: Sequence[_Sized], check: PhotoCheck) -> None:
    """Says what a width in pixels as --resolution does that was hardly meant; raises InputError when it is absurd."""
    width = check.resolution
    meaning = f"--resolution {width} is a width in pixels (only 1, 2, 4 and 8 divide the size)"
    larger = [photo for photo in photos if photo.enlargement > 1]
    if larger:
        worst = max(larger, key=lambda photo: photo.enlargement)
        if worst.enlargement > LARGEST_ENLARGEMENT:
            raise InputError(
                f"{meaning}, and would enlarge {worst.camera.name} {worst.change()}. More than {LARGEST_ENLARGEMENT} "
                "times the width is refused: it adds no detail, and memory grows with its square. Give at most "
                f"--resolution {LARGEST_ENLARGEMENT * min(photo.found[0] for photo in photos)} here, or --resolution 1 "
                "for the size of the photos."
            )
        check.notify(
            f"{meaning}: {len(larger)} of {len(photos)} images are enlarged, {worst.camera.name} {worst.change()}. "
            "That adds no detail and costs time and memory; --resolution 1 keeps their size."
        )
    elif width < NARROW and photos:
        widest = max(photos, key=lambda photo: photo.found[0])
        check.notify(
            f"{meaning}: {widest.camera.name} is reduced {widest.change()}. For a part of its size, give the pixels: "
            f"--resolution {max(1, widest.found[0] // width)} is 1/{width} of its width."
        )


def _names_below(folder: Path) -> Mapping[str, str]:
    """Returns the names in a folder by their lower-case form; none when there is no such folder."""
    return {path.name.lower(): path.name for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def _make_camera(
    photo: PosedPhoto, root: Path | None, resolution: int, neighbours: Callable[[Path], Mapping[str, str]]
) -> _Sized | str:
    """Returns the camera of a photo, or what is wrong with its file."""
    try:
        if root is not None and not photo.path.resolve().is_relative_to(root):
            return f"{photo.name}: a link leads out of the image folder"
        if not photo.path.is_file():
            other = neighbours(photo.path.parent).get(photo.path.name.lower())
            hint = f", but {other} is there: rename it" if other else ""
            return f"{photo.name}: the file does not exist{hint}"
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
    return _Sized(_scaled_camera(photo, lens, width, height), found)


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
