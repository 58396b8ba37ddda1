# SPDX-License-Identifier: Apache-2.0
"""Readers of COLMAP's binary files. Every count is checked against the file's size before anything is allocated.

All numbers are little-endian. Layouts (bytes): camera = id 4, model 4, width 8, height 8, parameters 8 each; image = id
4, quaternion 32, translation 24, camera 4, name with a closing zero, count 8, then 24 per keypoint; point = id 8,
position 24, colour 3, error 8, count 8, then 8 per track element.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scene.colmap_records import (
    CAMERA_MODELS,
    MAX_NAME_BYTES,
    REPAIR,
    ColmapCamera,
    ColmapImage,
    check_points,
    make_camera,
    make_image,
    pinhole_params,
)
from scene.errors import InputError

_CAMERA_HEAD = struct.Struct("<iiQQ")
_IMAGE_HEAD = struct.Struct("<I7di")
_COUNT = struct.Struct("<Q")
_POINT_HEAD_BYTES = 43  # in front of the length of the track
_POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8")])
_GATHER_ROWS = 1 << 18


class _Cursor:
    """A position in a mapped file whose reads cannot leave the file."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.offset = 0

    @property
    def place(self) -> str:
        return f"{self.path}, byte {self.offset}"

    def need(self, num_bytes: int, what: str) -> None:
        """Raises InputError unless so many bytes are left."""
        left = len(self.data) - self.offset
        if num_bytes > left:
            raise InputError(
                f"{self.place}: the file ends within {what}: {num_bytes} more bytes were expected and {left} are left, "
                f"so it is truncated or damaged. {REPAIR}"
            )

    def unpack(self, layout: struct.Struct, what: str) -> tuple[float, ...]:
        """Returns the next record and steps over it."""
        self.need(layout.size, what)
        values = layout.unpack_from(self.data, self.offset)
        self.offset += layout.size
        return values

    def count(self, minimum: int, what: str) -> int:
        """Returns the next count of records of at least `minimum` bytes each, once all of them can fit."""
        place = self.place
        number = int(self.unpack(_COUNT, f"the number of {what}")[0])
        if number * minimum > len(self.data) - self.offset:
            raise InputError(
                f"{place}: {number} {what} are announced, which need at least {number * minimum} bytes, but only "
                f"{len(self.data) - self.offset} follow: the file is truncated or damaged. {REPAIR}"
            )
        return number

    def name(self) -> str:
        """Returns the next zero-terminated name."""
        end = self.data.find(b"\0", self.offset, self.offset + MAX_NAME_BYTES + 1)
        if end < 0:
            raise InputError(f"{self.place}: an image name has no end. {REPAIR}")
        try:
            name = self.data[self.offset : end].decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.place}: an image name is not UTF-8. Rename the photo and run COLMAP again."
            ) from error
        self.offset = end + 1
        return name

    def finish(self, what: str) -> None:
        """Raises InputError when bytes are left over: the count in front was wrong."""
        left = len(self.data) - self.offset
        if left:
            raise InputError(f"{self.place}: {left} bytes follow the last of the announced {what}. {REPAIR}")


@contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # cannot be mapped
            yield _Cursor(path, b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Cursor(path, data)


def read_cameras_binary(path: Path) -> dict[int, ColmapCamera]:
    """Returns the cameras of a cameras.bin by id.

    Raises:
        InputError: truncated or damaged file, unsupported camera model, impossible intrinsics, or a repeated id.
    """
    cameras: dict[int, ColmapCamera] = {}
    with _opened(path) as cursor:
        for _ in range(cursor.count(_CAMERA_HEAD.size + 2 * 8, "cameras")):
            place = cursor.place
            camera_id, model, width, height = (int(v) for v in cursor.unpack(_CAMERA_HEAD, "a camera"))
            if model not in CAMERA_MODELS:
                raise InputError(f"{place}: camera {camera_id} has the unknown model number {model}. {REPAIR}")
            name, num_params = CAMERA_MODELS[model]
            params = cursor.unpack(struct.Struct(f"<{num_params}d"), "a camera's parameters")
            if camera_id in cameras:
                raise InputError(f"{place}: camera id {camera_id} appears twice. {REPAIR}")
            pinhole = pinhole_params(place, name, params, path.parent)
            cameras[camera_id] = make_camera(place, camera_id, width, height, pinhole)
        cursor.finish("cameras")
    return cameras


def read_images_binary(path: Path) -> tuple[ColmapImage, ...]:
    """Returns the images of an images.bin; their keypoints are stepped over.

    Raises:
        InputError: truncated or damaged file, an impossible pose, or a name that leaves the image folder.
    """
    images = []
    with _opened(path) as cursor:
        for _ in range(cursor.count(_IMAGE_HEAD.size + 2 + 8, "images")):
            place = cursor.place
            image_id, *pose, camera_id = cursor.unpack(_IMAGE_HEAD, "an image")
            images.append(make_image(place, int(image_id), pose, int(camera_id), cursor.name()))
            num_keypoints = cursor.count(24, "keypoints")
            cursor.offset += 24 * num_keypoints
        cursor.finish("images")
    return tuple(images)


def read_points_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions (P, 3) float64 and the colours (P, 3) uint8 of a points3D.bin.

    Raises:
        InputError: truncated or damaged file, or a position that is not finite.
    """
    with _opened(path) as cursor:
        number = cursor.count(_POINT_HEAD_BYTES + 8, "points")
        offsets = _point_offsets(cursor, number)
        points = _gather_points(cursor.data, offsets)
    check_points((str(path), "point number"), points["xyz"])
    return np.ascontiguousarray(points["xyz"]), np.ascontiguousarray(points["rgb"])


def _point_offsets(cursor: _Cursor, number: int) -> np.ndarray:
    """Returns where each point starts, (number,) int64. Tracks vary in length, so one walk finds them (0.2 us each)."""
    offsets = np.empty(number, np.int64)
    unpack, data, end = _COUNT.unpack_from, cursor.data, len(cursor.data)
    offset = cursor.offset
    for index in range(number):
        following = offset + _POINT_HEAD_BYTES + 8
        if following <= end:
            following += 8 * unpack(data, offset + _POINT_HEAD_BYTES)[0]
        if following > end:
            cursor.offset = offset
            cursor.need(following - offset, f"point number {index + 1} and its track")
        offsets[index] = offset
        offset = following
    cursor.offset = offset
    cursor.finish("points")
    return offsets


def _gather_points(data: mmap.mmap | bytes, offsets: np.ndarray) -> np.ndarray:
    """Copies the fixed part of each point out of the file: (number,) of `_POINT`."""
    points = np.empty(len(offsets), _POINT)
    raw = np.frombuffer(data, np.uint8)
    for start in range(0, len(offsets), _GATHER_ROWS):
        rows = offsets[start : start + _GATHER_ROWS]
        windows = np.lib.stride_tricks.sliding_window_view(raw, _POINT.itemsize)
        points[start : start + len(rows)] = windows[rows].reshape(-1).view(_POINT)
    return points
