# SPDX-License-Identifier: Apache-2.0
"""Camera paths from the poses of a scene's cameras alone: an ellipse among them, and the spiral of LLFF.

Every law is geometric: when the world is turned, moved or scaled, the path turns, moves and scales with it. Lengths are
in world units. Knows no pixels, files or Gaussians; paths through given cameras are in `scene/camera_splines.py`.

Sources: the ellipse is an idea of mip-NeRF 360's videos (Barron et al. 2022), for which cameras surround what they look
at; where it lies here, and the focus, are our own rules, so that arcs and flights straight down have one, too. The
spiral is that of Local Light Field Fusion (Mildenhall et al. 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scene.cameras import Camera
from scene.errors import InputError

FEWEST_CAMERAS = 3
ALIKE = 0.8  # length of the mean viewing direction from which cameras are said to look the same way
WIDEST_GAP = np.pi / 2  # radians around the focus without a camera that an ellipse may cross
SPIRAL_TURNS = 2
PERCENTILES = (10.0, 90.0)  # what the ellipse spans of the centres along each of its axes
FALLBACK = "take --path interpolate, which goes from camera to camera, or a file"
_STEEPEST = 0.25  # smallest sine of the angle between a viewing direction and up
_FARTHEST = 100.0  # distance of the focus of (nearly) parallel axes, in spreads of the centres
_TABLE = 8192  # samples of a curve for its length

Curve = Callable[[np.ndarray], np.ndarray]
"""Points (N, 3) of a closed curve at parameters (N,), radians."""


@dataclass(frozen=True, eq=False)
class Poses:
    """Camera-to-world poses: centers (N, 3) in world units, rotations (N, 3, 3) with columns right, down, forward."""

    centers: np.ndarray
    rotations: np.ndarray

    @property
    def forward(self) -> np.ndarray:
        """Viewing directions, (N, 3), of length 1."""
        return self.rotations[:, :, 2]

    @property
    def up(self) -> np.ndarray:
        """Up directions of the images, (N, 3), of length 1."""
        return -self.rotations[:, :, 1]


def poses_of(cameras: Sequence[Camera]) -> Poses:
    """Return the poses of cameras."""
    return Poses(np.stack([c.center for c in cameras]), np.stack([c.rotation.T for c in cameras]))


def cameras_at(poses: Poses, lens: Camera) -> tuple[Camera, ...]:
    """Return cameras at some poses, numbered from 0, that have the size and the intrinsics of `lens`."""
    return tuple(
        dataclasses.replace(
            lens, name=f"{number:05d}", image_path=Path(), rotation=rotation.T, translation=-rotation.T @ center
        )
        for number, (center, rotation) in enumerate(zip(poses.centers, poses.rotations, strict=True))
    )


def resized(camera: Camera, width: int = 0, height: int = 0) -> Camera:
    """Return a camera for pictures of another size in pixels, with the principal point in the middle.

    The picture is filled with what the camera sees and never shows more: where the proportions differ, it is cut.
    0: the camera's own, or what keeps its proportions when only the other is given.
    """
    wide = width or (max(1, round(camera.width * height / camera.height)) if height else camera.width)
    high = height or (max(1, round(camera.height * width / camera.width)) if width else camera.height)
    scale = max(wide / camera.width, high / camera.height)
    return dataclasses.replace(
        camera, width=wide, height=high, fx=camera.fx * scale, fy=camera.fy * scale, cx=wide / 2, cy=high / 2
    )


def find_focus(poses: Poses) -> np.ndarray:
    """Return the point that the cameras look at, (3,): the nearest to all optical axes in the least-squares sense.

    It solves sum_i (I - d_i d_i^T) (f - c_i) = 0 for centres c and directions d. When the cameras look the same way and
    their directions do not lead inwards (correlation of offsets and tilts below 1/2), tilts are noise, which draws that
    solution towards the cameras or behind them. Then it is put ahead of their middle, so far away that looking at it
    tilts the cameras as much as they are tilted: at sqrt(sum |c|^2 / sum |d|^2) of the parts across the mean direction.
    It is never among cameras that look the same way, as those of a walk along a corridor do, but ahead of them all.

    Raises:
        InputError: the cameras stand in one place, or most of them look away from that point.
    """
    centers, forward = poses.centers, poses.forward
    middle, mean = centers.mean(axis=0), forward.mean(axis=0)
    spread = _spread(centers)
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    offset = np.linalg.lstsq(across.sum(axis=0), (across @ (centers - middle)[:, :, None]).sum(axis=0)[:, 0])[0]
    if np.linalg.norm(mean) > ALIKE:
        axis = mean / np.linalg.norm(mean)
        beside = (centers - middle) - np.outer((centers - middle) @ axis, axis)
        tilt = forward - np.outer(forward @ axis, axis)
        sizes, along = (np.linalg.norm(beside), np.linalg.norm(tilt)), (centers - middle) @ axis
        is_parallel = sizes[1] * _FARTHEST * spread < sizes[0]
        leads_inwards = -(beside * tilt).sum() >= 0.5 * sizes[0] * sizes[1]
        if is_parallel or not leads_inwards or offset @ axis <= np.percentile(along, 95):
            depth = min(sizes[0] / max(sizes[1], 1e-12), _FARTHEST * spread)
            return middle + axis * max(depth, along.max() + spread)
    ahead = ((middle + offset - centers) * forward).sum(axis=1) > 0
    if ahead.mean() <= 0.5:
        raise InputError(f"the cameras look away from each other, so that there is nothing to fly around: {FALLBACK}.")
    return middle + offset


def find_up(poses: Poses) -> np.ndarray:
    """Return the up direction of the scene, (3,) of length 1.

    The mean of the cameras' up directions; where they cancel, as in flights to and fro that look straight down, the
    axis along which most of them lie.
    """
    mean = poses.up.mean(axis=0)
    if np.linalg.norm(mean) > 0.5:
        return mean / np.linalg.norm(mean)
    axis = np.linalg.eigh(poses.up.T @ poses.up)[1][:, -1]
    return _pointing(axis, mean if abs(axis @ mean) > 1e-6 else poses.up[0])


def look_at(centers: np.ndarray, focus: np.ndarray, up: np.ndarray) -> Poses:
    """Return the poses at `centers` (N, 3) that look at `focus` (3,), images upright by `up` (3,)."""
    forward = focus - centers
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right, axis=1, keepdims=True)
    return Poses(centers, np.stack([right, np.cross(forward, right), forward], axis=2))


def ellipse(poses: Poses, num_frames: int) -> Poses:
    """Return a closed path on an ellipse among the cameras that looks at their focus; its end meets its beginning.

    Its plane is that of the two main axes of the centres; along each axis it spans the 10th to 90th percentile. Where
    the cameras stand around the focus and leave a gap of more than a right angle, an ellipse would cut through the
    scene or show what nobody saw: there the axes are those of azimuth, distance and height about the focus, so that the
    path is an ellipse bent along the arc. Speed is constant but for the tips of a slim ellipse, where it slows down.

    Raises:
        InputError: fewer than three cameras, all in one place, or looking away from each other.
    """
    _check_number(poses, "an ellipse")
    focus, up = find_focus(poses), find_up(poses)
    axes = _main_axes(poses, up)
    local = (poses.centers - focus) @ axes.T
    if _is_arc(local):
        radius, turn = _polar_scale(local)
        unfolded = _unfold(local, radius, turn)
        bent = _ellipse_within(unfolded, _principal_axes(unfolded))
        path = _evenly(lambda t: _fold(bent(t), radius, turn), num_frames)
    else:
        path = _evenly(_ellipse_within(local, np.eye(3)), num_frames)
    centers = focus + path @ axes
    return look_at(centers, focus, _upright(centers, focus, np.stack([up, axes[2], axes[1], axes[0]])))


def spiral(poses: Poses, num_frames: int) -> Poses:
    """Return LLFF's spiral for cameras that look the same way: two turns about their mean pose, looking at the focus.

    c(t) = mean + right rx cos t - up ry sin t - forward rz sin(t / 2), t from 0 to 4 pi, closed; rx, ry, rz are the
    90th percentiles of the cameras' distances from the mean pose along each axis, rx and ry at most half the distance
    of the focus, rz so that the path comes no nearer to it than most cameras.

    Raises:
        InputError: fewer than three cameras, all in one place, or not looking the same way.
    """
    _check_number(poses, "a spiral")
    mean = poses.forward.mean(axis=0)
    if np.linalg.norm(mean) < 0.5:
        raise InputError("a spiral is for cameras that look the same way, and these look at the scene from all sides: "
                         "take --path ellipse.")  # fmt: skip
    focus, forward, middle = find_focus(poses), mean / np.linalg.norm(mean), poses.centers.mean(axis=0)
    distance = max(float((focus - middle) @ forward), _spread(poses.centers))
    up = _upright(middle[None], middle + forward, np.stack([find_up(poses), *_main_axes(poses, find_up(poses))]))
    frame = look_at(middle[None], middle + forward, up).rotations[0]
    closest = np.percentile(np.linalg.norm(poses.centers - focus, axis=1), PERCENTILES[0])
    limits = np.array([distance / 2, distance / 2, max(0.0, np.linalg.norm(focus - middle) - closest)])
    radii = np.minimum(np.percentile(np.abs((poses.centers - middle) @ frame), 90.0, axis=0), limits)
    t = np.linspace(0, 2 * np.pi * SPIRAL_TURNS, num_frames, endpoint=False)
    offsets = radii * np.stack([np.cos(t), np.sin(t), -np.sin(t / 2)], axis=1)
    return look_at(middle + offsets @ frame.T, middle + forward * distance, -frame[:, 1])


def _check_number(poses: Poses, what: str) -> None:
    if len(poses.centers) < FEWEST_CAMERAS:
        raise InputError(f"{what} needs at least {FEWEST_CAMERAS} training cameras, and there are "
                         f"{len(poses.centers)}: {FALLBACK}.")  # fmt: skip


def _spread(centers: np.ndarray) -> float:
    """Root mean square distance of the centres from their mean.

    Raises:
        InputError: it is zero.
    """
    offsets = centers - centers.mean(axis=0)
    spread = float(np.sqrt((offsets**2).sum(axis=1).mean()))
    if spread <= 1e-9 * max(1.0, float(np.abs(centers).max())):
        raise InputError(f"all {len(centers)} cameras stand in one place, so there is no path among them: give a file.")
    return spread


def _pointing(axis: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """The axis or its opposite, whichever makes an acute angle with `towards`."""
    return -axis if axis @ towards < 0 else axis


def _main_axes(poses: Poses, up: np.ndarray) -> np.ndarray:
    """Rows: the longest axis of the centres, the second, and their normal, right-handed.

    Centres that fill a volume have no plane of their own; they get the one across the up direction. Signs come from the
    up direction and the first camera, so that they turn with the world.
    """
    offsets = poses.centers - poses.centers.mean(axis=0)
    variances, vectors = np.linalg.eigh(offsets.T @ offsets)
    normal = vectors[:, 0]
    if variances[0] > 0.5 * variances[1]:
        normal = up
        offsets = offsets - np.outer(offsets @ normal, normal)
        vectors = np.linalg.eigh(offsets.T @ offsets)[1]
    normal = _pointing(normal, up if abs(normal @ up) > 1e-6 else poses.up[0])
    longest = _pointing(vectors[:, -1], offsets[0] if abs(offsets[0] @ vectors[:, -1]) > 1e-9 else offsets[-1])
    return np.stack([longest, np.cross(normal, longest), normal])


def _is_arc(local: np.ndarray) -> bool:
    """Whether cameras, given along the main axes from the focus, stand about it and leave a wide gap."""
    radii = np.hypot(local[:, 0], local[:, 1])
    angles = np.sort(np.arctan2(local[:, 1], local[:, 0]))
    gap = np.diff(np.append(angles, angles[0] + 2 * np.pi)).max()
    return bool(gap > WIDEST_GAP and np.percentile(radii, 10) >= 0.5 * np.median(radii))


def _polar_scale(local: np.ndarray) -> tuple[float, float]:
    """Median distance of the cameras from the vertical through the focus, and the azimuth of their arc's middle."""
    angles = np.sort(np.arctan2(local[:, 1], local[:, 0]))
    gaps = np.diff(np.append(angles, angles[0] + 2 * np.pi))
    widest = int(gaps.argmax())
    return float(np.median(np.hypot(local[:, 0], local[:, 1]))), float(angles[widest] + gaps[widest] / 2 + np.pi)


def _unfold(local: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """Azimuth from `turn` times `radius`, distance from the vertical, height; all (N, 3) in world units."""
    angles = (np.arctan2(local[:, 1], local[:, 0]) - turn + np.pi) % (2 * np.pi) - np.pi
    return np.stack([angles * radius, np.hypot(local[:, 0], local[:, 1]), local[:, 2]], axis=1)


def _fold(points: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """The inverse of `_unfold`."""
    angles = points[:, 0] / radius + turn
    return np.stack([points[:, 1] * np.cos(angles), points[:, 1] * np.sin(angles), points[:, 2]], axis=1)


def _principal_axes(points: np.ndarray) -> np.ndarray:
    """Rows: the principal axes of points, the longest first, each with its largest entry positive."""
    offsets = points - points.mean(axis=0)
    axes = np.linalg.eigh(offsets.T @ offsets)[1].T[::-1]
    return np.stack([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes])


def _ellipse_within(points: np.ndarray, axes: np.ndarray) -> Curve:
    """The ellipse along the first two axes (rows) that spans the percentiles of points, at the median of the third."""
    along = points @ axes.T
    low, high = np.percentile(along, PERCENTILES, axis=0)
    middle = np.append((low + high)[:2] / 2, np.median(along[:, 2])) @ axes
    radii = (high - low)[:2] / 2
    return lambda t: middle + np.stack([radii[0] * np.cos(t), radii[1] * np.sin(t)], axis=1) @ axes[:2]


def _evenly(curve: Curve, count: int) -> np.ndarray:
    """`count` points (count, 3) along a closed curve, the first at parameter 0.

    The steps are even in sqrt(v^2 + (max v / 2)^2) dt, v being the speed by the parameter: nearly even in length, but
    without a sudden turn where a slim ellipse has its tips.
    """
    t = np.linspace(0, 2 * np.pi, _TABLE + 1)
    speed = np.linalg.norm(np.diff(curve(t), axis=0), axis=1)
    lengths = np.append(0.0, np.cumsum(np.hypot(speed, speed.max() / 2)))
    return curve(np.interp(np.arange(count) * (lengths[-1] / count), lengths, t))


def _upright(centers: np.ndarray, focus: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The first of some directions (rows) that no view from `centers` to `focus` comes near to, or the best of them."""
    forward = focus - centers
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    slants = [np.linalg.norm(np.cross(forward, up), axis=1).min() for up in candidates]
    fine = [number for number, slant in enumerate(slants) if slant >= _STEEPEST]
    return candidates[fine[0] if fine else int(np.argmax(slants))]
