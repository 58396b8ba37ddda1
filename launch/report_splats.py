# SPDX-License-Identifier: Apache-2.0
"""The model in the form that the 3D pane of report.html reads: 17 bytes a splat, compressed, base64.

Planes of one byte per splat, in this order (N each), then gzip:

    0-5    x, y, z as 16-bit numbers, low byte first, of the contracted centre in [-2, 2]: q = s for |s| <= 1, else
           q = (2 - 1/|s|) s/|s|, where s = (centre - model centre) / model radius; so far splats keep their direction
    6-8    log scales, linear between the two ends of `log_scale`
    9-12   quaternion w, x, y, z as 128 + 127 q of the unit quaternion
    13-15  red, green, blue; 16 opacity

The pane has no spherical harmonics: a splat's colour is its mean colour as seen from the cameras that have it in view.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.world import torch_threads
from masksplat.reference.harmonics import sh_colors
from scene.errors import InputError

MOST_SPLATS = 300_000
MOST_CAMERAS = 150
MOST_TOUR_STOPS = 24
COLOR_CAMERAS = 12
ROWS_PER_BLOCK = 1 << 14  # keeps the intermediate values within the cache
LOG_SCALE_SPAN = 14.0  # e-foldings between the smallest and the largest splat that are told apart


@dataclass(frozen=True)
class PackedModel:
    """`payload` is base64 text; `description` are the JSON values that the viewer needs to unpack and to look at it."""

    payload: str
    description: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ViewerCamera:
    """A camera of cameras.json: camera-to-world `rotation` (3, 3), `position` (3,) world, sizes in pixels."""

    name: str
    position: np.ndarray
    rotation: np.ndarray
    width: int
    height: int
    fx: float
    fy: float

    def plain(self) -> dict[str, Any]:
        """Return the camera as JSON values."""
        return {
            "name": self.name,
            "position": self.position.tolist(),
            "rotation": self.rotation.tolist(),
            **{key: getattr(self, key) for key in ("width", "height", "fx", "fy")},
        }


def read_cameras(path: Path) -> list[ViewerCamera]:
    """Return the cameras of a cameras.json in file order (test views first).

    Raises:
        InputError: the file is missing or is no list of cameras.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            ViewerCamera(
                name=str(entry["img_name"]),
                position=np.asarray(entry["position"], dtype=np.float64).reshape(3),
                rotation=np.asarray(entry["rotation"], dtype=np.float64).reshape(3, 3),
                width=int(entry["width"]),
                height=int(entry["height"]),
                fx=float(entry["fx"]),
                fy=float(entry["fy"]),
            )
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no readable list of cameras ({error!r}); train again or restore the file."
        ) from error


def pack_model(
    params: Mapping[str, np.ndarray],
    cameras: Sequence[ViewerCamera],
    *,
    background: tuple[float, float, float] = (0.0, 0.0, 0.0),
    antialiased: bool = False,
    most: int = MOST_SPLATS,
) -> PackedModel:
    """Return the model for the 3D pane.

    Args:
        params: raw parameters as `scene.ply.load_ply` returns them, N >= 1 rows.
        cameras: where one can stand, at least one; the first is where the pane starts.
        background: colour behind the splats, 0 to 1.
        antialiased: the model was trained with opacities scaled for the low-pass.
        most: splats to keep at most; those with the largest opacity times area stay.
    """
    num_total = len(params["means"])
    center, radius = _frame_of(params["means"])
    rows = _most_visible(params, most)
    kept = {name: values[rows] for name, values in params.items()}
    contracted = _contract((kept["means"].astype(np.float64) - center) / radius)
    order = np.argsort(_morton_codes(contracted), kind="stable")
    kept = {name: values[order] for name, values in kept.items()}
    log_scale = _log_scale_range(kept["scales"])
    planes = _planes(kept, contracted[order], mean_colors(kept, cameras), log_scale)
    payload = base64.b64encode(gzip.compress(planes.tobytes(), compresslevel=9, mtime=0)).decode("ascii")
    shown = [cameras[i] for i in _spread(len(cameras), MOST_CAMERAS)]
    by_name = sorted(range(len(shown)), key=lambda index: shown[index].name)
    description = {
        "num_total": num_total,
        "num_shown": len(rows),
        "center": center.tolist(),
        "radius": radius,
        "log_scale": list(log_scale),
        "background": list(background),
        "antialiased": antialiased,
        "up": up_direction(cameras).tolist(),
        "cameras": [camera.plain() for camera in shown],
        "first_camera": 0,
        "tour": [by_name[i] for i in _spread(len(by_name), MOST_TOUR_STOPS)],
    }
    return PackedModel(payload, description)


def up_direction(cameras: Sequence[ViewerCamera]) -> np.ndarray:
    """Return the unit vector that is up in the mean over the cameras (their -y axes), (3,) float64."""
    mean = -np.mean([camera.rotation[:, 1] for camera in cameras], axis=0)
    length = float(np.linalg.norm(mean))
    return mean / length if length > 1e-6 else np.array([0.0, -1.0, 0.0])


def mean_colors(params: Mapping[str, np.ndarray], cameras: Sequence[ViewerCamera]) -> np.ndarray:
    """Return (N, 3) colours in [0, 1]: means over the cameras that see a splat, the base colour if none does."""
    chosen = [cameras[index] for index in _spread(len(cameras), COLOR_CAMERAS)]
    means, sh0, higher = (torch.from_numpy(np.ascontiguousarray(params[name])) for name in ("means", "sh0", "shN"))
    with torch_threads(1):  # many short operations
        blocks = [
            _block_colors(means[rows], sh0[rows], higher[rows], chosen)
            for rows in torch.arange(len(means)).split(ROWS_PER_BLOCK)
        ]
    return torch.cat(blocks).clamp(0, 1).numpy()


def _block_colors(means: Tensor, sh0: Tensor, higher: Tensor, cameras: Sequence[ViewerCamera]) -> Tensor:
    """Return the mean colours of some rows, (n, 3)."""
    degree = {0: 0, 3: 1, 8: 2, 15: 3}[higher.shape[1]]
    total, num_seen = torch.zeros_like(means), torch.zeros(len(means), 1)
    for camera in cameras:
        offsets = means - torch.from_numpy(camera.position).float()
        x, y, z = (offsets @ torch.from_numpy(camera.rotation).float()).unbind(-1)
        is_seen = (z > 0) & (x.abs() * 2 * camera.fx <= 1.1 * z * camera.width)
        seen = (is_seen & (y.abs() * 2 * camera.fy <= 1.1 * z * camera.height)).nonzero()[:, 0]
        directions = torch.nn.functional.normalize(offsets[seen], dim=-1)
        total[seen] += sh_colors(directions, sh0[seen], higher[seen], degree)
        num_seen[seen] += 1.0
    base = sh_colors(torch.zeros_like(means), sh0, higher, 0)
    return torch.where(num_seen > 0, total / num_seen.clamp(min=1.0), base)


def _frame_of(means: np.ndarray) -> tuple[np.ndarray, float]:
    """Return a robust centre (3,) and radius of the model in world units."""
    center = np.median(means.astype(np.float64), axis=0)
    radius = float(np.quantile(np.linalg.norm(means - center, axis=1), 0.6))
    return center, radius if radius > 0 else 1.0


def _most_visible(params: Mapping[str, np.ndarray], most: int) -> np.ndarray:
    """Return the rows (ascending) of the at most `most` splats with the largest opacity times area."""
    if len(params["means"]) <= most:
        return np.arange(len(params["means"]))
    largest_two = np.sort(params["scales"].astype(np.float64), axis=1)[:, 1:].sum(axis=1)
    # log of sigmoid(opacity) * area: no overflow for any finite logit
    visibility = largest_two - np.logaddexp(0.0, -params["opacities"].astype(np.float64))
    return np.sort(np.argpartition(-visibility, most)[:most])


def _contract(points: np.ndarray) -> np.ndarray:
    """Return points of all space in the ball of radius 2; the unit ball stays as it is."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    safe = np.maximum(lengths, 1.0)
    return np.where(lengths <= 1.0, points, (2.0 - 1.0 / safe) * points / safe)


def _morton_codes(contracted: np.ndarray) -> np.ndarray:
    """Return (N,) codes whose order keeps neighbours in space together, which compresses better."""
    cells = np.clip((contracted + 2.0) * 255.75, 0, 1023).astype(np.uint64)
    codes = np.zeros(len(cells), np.uint64)
    for bit in range(10):
        for axis in range(3):
            codes |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return codes


def _log_scale_range(log_scales: np.ndarray) -> tuple[float, float]:
    high = float(log_scales.max())
    return max(float(log_scales.min()), high - LOG_SCALE_SPAN), high


def _planes(
    params: Mapping[str, np.ndarray], contracted: np.ndarray, colors: np.ndarray, log_scale: tuple[float, float]
) -> np.ndarray:
    """Return the (17, N) uint8 planes of the format in this module's docstring."""
    low, high = log_scale
    words = np.round((contracted + 2.0) / 4.0 * 65535.0).clip(0, 65535).astype("<u2")
    quats = params["quats"].astype(np.float64)
    quats = quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1e-30)
    quats = np.where(quats[:, :1] < 0, -quats, quats)  # one sign: the same rotation, and it compresses better
    scales = (params["scales"].astype(np.float64) - low) / max(high - low, 1e-9)
    opacities = 1.0 / (1.0 + np.exp(-np.clip(params["opacities"].astype(np.float64), -60, 60)))
    columns = [words.view(np.uint8).reshape(-1, 6)]
    columns.append(np.round(255.0 * scales.clip(0, 1)).astype(np.uint8))
    columns.append(np.round(128.0 + 127.0 * quats).astype(np.uint8))
    columns.append(np.round(255.0 * np.column_stack((colors, opacities))).astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(columns, axis=1).T)


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spread, 0 among them."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]
