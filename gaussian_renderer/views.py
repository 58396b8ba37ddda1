# SPDX-License-Identifier: Apache-2.0
"""From cameras and the table's parameters to what the kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from distributed.transfer import sent_to
from masksplat.lazy import LazyRows
from masksplat.types import Gaussians, Views
from scene.cameras import Camera

KERNEL_ATTRIBUTES = ("means", "quats", "scales", "opacities", "sh0", "shN")
"""The table's attributes that the kernels project and update, in the order of `masksplat.types.Gaussians`."""


def views_of(cameras: Sequence[Camera], like: Tensor) -> Views:
    """The cameras as kernels read them, in the dtype and on the device of `like`."""
    viewmats = torch.from_numpy(np.stack([camera.viewmat for camera in cameras])).to(like.dtype)
    intrinsics = torch.from_numpy(np.stack([camera.intrinsics for camera in cameras])).to(like.dtype)
    viewmats, intrinsics = sent_to(viewmats, like.device), sent_to(intrinsics, like.device)
    return Views(viewmats, intrinsics, tuple((camera.width, camera.height) for camera in cameras))


def gaussians_of(params: Mapping[str, Tensor], lazy: LazyRows | None = None) -> Gaussians:
    """The raw parameters of a table (no copy); `lazy` knows which rows are behind, if any can be."""
    return Gaussians(**{name: params[name] for name in KERNEL_ATTRIBUTES}, lazy=lazy)


CAMERA_NUMBERS = 25
"""Of a camera: its world-to-camera matrix (4, 4), then its intrinsics (3, 3)."""


class CameraTable:
    """Cameras that are drawn again and again, as kernels read them: on the device once, nothing to send in a step."""

    def __init__(self, cameras: Sequence[Camera], like: Tensor) -> None:
        """In the dtype and on the device of `like`."""
        self._all = views_of(cameras, like)
        self._numbers = np.empty((len(cameras), CAMERA_NUMBERS), np.float32)
        for row, camera in zip(self._numbers, cameras, strict=True):
            row[:] = np.concatenate([camera.viewmat.reshape(-1), camera.intrinsics.reshape(-1)])

    def sizes(self, numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(width, height) of the cameras with these numbers."""
        return tuple(self._all.sizes[number] for number in numbers)

    def numbers(self, numbers: Sequence[int]) -> np.ndarray:
        """(B, CAMERA_NUMBERS) float32 on the host: the cameras with these numbers."""
        return self._numbers[list(numbers)]

    def views(self, numbers: Sequence[int]) -> Views:
        """The cameras with these numbers, in this order."""
        rows = (_rows(self._all.viewmats, numbers), _rows(self._all.intrinsics, numbers))
        return Views(*rows, self.sizes(numbers))


def _rows(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Rows of a tensor by numbers of the host; one row without a copy."""
    if len(numbers) == 1:
        return values[numbers[0] : numbers[0] + 1]
    return torch.stack([values[number] for number in numbers])
