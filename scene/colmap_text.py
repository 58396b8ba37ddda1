# SPDX-License-Identifier: Apache-2.0
"""Readers of COLMAP's text files: one camera or point a line, two lines an image; '#' starts a comment line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scene.colmap_records import (
    CAMERA_MODELS,
    REPAIR,
    ColmapCamera,
    ColmapImage,
    check_points,
    make_camera,
    make_image,
    pinhole_params,
)
from scene.errors import InputError

_NUM_PARAMS = dict(CAMERA_MODELS.values())
_CAMERA_LAYOUT = "CAMERA_ID MODEL WIDTH HEIGHT PARAMS..."
_IMAGE_LAYOUT = "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
_POINT_LAYOUT = "POINT3D_ID X Y Z R G B ERROR TRACK..."


def read_cameras_text(path: Path) -> dict[int, ColmapCamera]:
    """Returns the cameras of a cameras.txt by id.

    Raises:
        InputError: malformed line, unsupported camera model, impossible intrinsics, or a repeated id.
    """
    cameras: dict[int, ColmapCamera] = {}
    for place, line in _records(path):
        fields = line.split()
        if len(fields) < 4:
            raise InputError(f"{place}: expected '{_CAMERA_LAYOUT}', found {line[:80]!r}. {REPAIR}")
        camera_id, width, height = _integers(place, (fields[0], fields[2], fields[3]))
        name, params = fields[1][:40], _floats(place, fields[4:])
        num_params = _NUM_PARAMS.get(name, len(params))
        if len(params) != num_params:
            raise InputError(f"{place}: {name} has {num_params} parameters, found {len(params)}. {REPAIR}")
        if camera_id in cameras:
            raise InputError(f"{place}: camera id {camera_id} appears twice. {REPAIR}")
        pinhole = pinhole_params(place, name, params, path.parent)
        cameras[camera_id] = make_camera(place, camera_id, width, height, pinhole)
    return cameras


def read_images_text(path: Path) -> tuple[ColmapImage, ...]:
    """Returns the images of an images.txt; the keypoint line after each is checked for its form only.

    Raises:
        InputError: malformed line, an impossible pose, or a name that leaves the image folder.
    """
    images = []
    lines = _lines(path)
    for place, line in lines:
        if not _is_record(line):
            continue
        fields = line.split(None, 9)
        if len(fields) < 10:
            raise InputError(f"{place}: expected '{_IMAGE_LAYOUT}', found {line[:80]!r}. {REPAIR}")
        image_id, camera_id = _integers(place, (fields[0], fields[8]))
        images.append(make_image(place, image_id, _floats(place, fields[1:8]), camera_id, fields[9].strip()))
        keypoints_place, keypoints = next(lines, (place, ""))  # may be an empty line, or be missing at the end
        _check_keypoints(keypoints_place, keypoints.split())
    return tuple(images)


def read_points_text(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions (P, 3) float64 and the colours (P, 3) uint8 of a points3D.txt.

    Raises:
        InputError: malformed line, a colour outside 0..255, or a position that is not finite.
    """
    positions: list[list[float]] = []
    colors: list[list[int]] = []
    for place, line in _records(path):
        fields = line.split(None, 8)
        if len(fields) < 8:
            raise InputError(f"{place}: expected '{_POINT_LAYOUT}', found {line[:80]!r}. {REPAIR}")
        color = _integers(place, fields[4:7])
        if min(color) < 0 or max(color) > 255:
            raise InputError(f"{place}: the colour {color} is outside 0..255. {REPAIR}")
        positions.append(_floats(place, fields[1:4]))
        colors.append(color)
    xyz = np.array(positions, np.float64).reshape(-1, 3)
    check_points((str(path), "point number"), xyz)
    return xyz, np.array(colors, np.uint8).reshape(-1, 3)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of every line, without its end."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                yield place, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{place}: the line is not UTF-8 text. {REPAIR}") from error


def _is_record(line: str) -> bool:
    stripped = line.strip()
    return bool(stripped) and not stripped.startswith("#")


def _records(path: Path) -> Iterator[tuple[str, str]]:
    return ((place, line) for place, line in _lines(path) if _is_record(line))


def _integers(place: str, fields: Sequence[str]) -> list[int]:
    try:
        values = [int(field) for field in fields]
    except ValueError as error:
        raise InputError(f"{place}: expected whole numbers, found {' '.join(fields)[:80]!r}. {REPAIR}") from error
    return values


def _floats(place: str, fields: Sequence[str]) -> list[float]:
    try:
        return [float(field) for field in fields]
    except ValueError as error:
        raise InputError(f"{place}: expected numbers, found {' '.join(fields)[:80]!r}. {REPAIR}") from error


def _check_keypoints(place: str, fields: Sequence[str]) -> None:
    """Raises InputError unless the fields can be triples X Y POINT3D_ID: catches a lost line at once."""
    if len(fields) % 3:
        raise InputError(
            f"{place}: expected the keypoints of the image above as triples 'X Y POINT3D_ID' (or an empty line), found "
            f"{len(fields)} fields. {REPAIR}"
        )
    _floats(place, [*fields[:3], *fields[-3:]])
