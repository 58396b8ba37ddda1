# SPDX-License-Identifier: Apache-2.0
"""Smooth paths through given cameras, in their order or in one that is short.

Lengths are in world units; where a turn is compared with a move, one radian counts as two spreads of the centres, so
that nothing depends on the unit. Paths that are made from scratch are in `scene/camera_paths.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from scene.camera_paths import Poses, cameras_at, poses_of
from scene.cameras import Camera
from scene.errors import InputError

RADIAN = 2.0  # spreads of the centres that a turn of one radian counts as: turning is slower to look at than moving
FRAMES_PER_CAMERA = 8  # a path passes through fewer cameras rather than hurry
MOST_ORDERED = 2000  # cameras that are put into order; of more, as many are taken evenly
_MOST_PASSES = 50
_NEAREST = 0.05  # of the mean step: cameras that are closer together count as one, or the path would jerk there


def through_all(cameras: Sequence[Camera], num_frames: int) -> tuple[Camera, ...]:
    """Return a smooth path through cameras of equal size, in an order that makes it short.

    Where more cameras than one for every eight frames would be passed, it leaves some out, evenly along the way.

    Raises:
        InputError: fewer than two different cameras.
    """
    if len(cameras) < 2:
        raise InputError(f"a path from camera to camera needs at least 2 training cameras, and there are "
                         f"{len(cameras)}: give a file.")  # fmt: skip
    taken = np.unique(np.linspace(0, len(cameras) - 1, min(len(cameras), MOST_ORDERED)).round().astype(int))
    chosen = [cameras[index] for index in taken]
    ordered = [chosen[index] for index in short_order(poses_of(chosen))]
    return through(_thinned(ordered, max(4, num_frames // FRAMES_PER_CAMERA)), num_frames)


def through(cameras: Sequence[Camera], num_frames: int) -> tuple[Camera, ...]:
    """Return a smooth path through cameras of equal size, in their order, from the first to the last.

    The time between two cameras is proportional to their distance (see `distances`). Centres and logarithms of focal
    lengths follow cubic Hermite splines, rotations cubic Bezier curves on the rotation group (see `_turn`): velocities
    are continuous, and limited so that nothing swings out beyond the cameras, as splines with continuous accelerations
    do where short steps follow long ones.

    Raises:
        InputError: fewer than two different cameras.
    """
    cameras = _different(cameras)
    times, poses = _times(cameras), poses_of(cameras)
    wanted = np.linspace(0, times[-1], num_frames)
    focal = np.log([[camera.fx, camera.fy] for camera in cameras])
    lengths = np.exp(_glide(times, focal, wanted).clip(focal.min(axis=0), focal.max(axis=0)))
    centers = _glide(times, poses.centers, wanted)
    path = cameras_at(Poses(centers, _turn(times, poses.rotations, wanted)), cameras[0])
    return tuple(
        dataclasses.replace(camera, fx=float(fx), fy=float(fy)) for camera, (fx, fy) in zip(path, lengths, strict=True)
    )


def _velocities(times: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Velocities (N, D) at N times from the moves (N - 1, D) between them.

    The means of the velocities before and after, the shorter time counting more, as in a parabola through three points;
    at most as fast as the slower of the two. The first and the last are those of their only move.
    """
    steps = np.diff(times)[:, None]
    slopes = moves / steps
    before, after = slopes[:-1], slopes[1:]
    mean = (before * steps[1:] + after * steps[:-1]) / (steps[1:] + steps[:-1])
    slower = np.minimum(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1))
    sizes = np.maximum(np.linalg.norm(mean, axis=1), 1e-300)
    return np.concatenate([slopes[:1], mean * np.minimum(1.0, slower / sizes)[:, None], slopes[-1:]])


def _glide(times: np.ndarray, points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Points (F, D) at the wanted times on a cubic Hermite spline through points (N, D)."""
    from scipy.interpolate import CubicHermiteSpline  # imported here: scipy takes longer to load than numpy

    return np.asarray(CubicHermiteSpline(times, points, _velocities(times, np.diff(points, axis=0)))(wanted))


def _turn(times: np.ndarray, rotations: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rotations (F, 3, 3) at the wanted times through rotations (N, 3, 3), each turn the short way around.

    Between two of them R(s) = R_0 exp(a b_1(s)) exp(b b_2(s)) exp(c b_3(s)) with the cumulative Bernstein polynomials
    b_i (Kim, Kim and Shin, 1995); a and c are a third of the time by the angular velocities at the ends, b the rest.
    """
    from scipy.spatial.transform import Rotation  # imported here: scipy takes longer to load than numpy

    keys = Rotation.from_matrix(rotations)
    angular = _velocities(times, (keys[:-1].inv() * keys[1:]).as_rotvec())
    thirds = np.diff(times)[:, None] / 3
    first, last = angular[:-1] * thirds, angular[1:] * thirds
    ends = Rotation.from_rotvec(-first) * (keys[:-1].inv() * keys[1:]) * Rotation.from_rotvec(-last)
    piece = np.clip(np.searchsorted(times, wanted, side="right") - 1, 0, len(times) - 2)
    s = ((wanted - times[piece]) / np.diff(times)[piece])[:, None]
    path = keys[piece] * Rotation.from_rotvec(first[piece] * (1 - (1 - s) ** 3))
    path = path * Rotation.from_rotvec(ends.as_rotvec()[piece] * (3 * s**2 - 2 * s**3))
    return np.asarray((path * Rotation.from_rotvec(last[piece] * s**3)).as_matrix())


def distances(poses: Poses, others: Poses) -> np.ndarray:
    """Return how far apart poses are, (N, M): distance of the centres plus angle of the rotations, in spreads.

    The spread is the root mean square distance of the first poses' centres from their mean (1 if that is zero).
    """
    moves = np.linalg.norm(poses.centers[:, None] - others.centers[None], axis=2)
    return _weighed(poses, moves, poses.rotations.reshape(-1, 9) @ others.rotations.reshape(-1, 9).T)


def _weighed(poses: Poses, moves: np.ndarray, traces: np.ndarray) -> np.ndarray:
    """Moves in spreads of the poses, plus what the turns with these traces count as."""
    offsets = poses.centers - poses.centers.mean(axis=0)
    spread = float(np.sqrt((offsets**2).sum(axis=1).mean())) or 1.0
    return np.asarray(moves / spread + RADIAN * np.arccos(((traces - 1) / 2).clip(-1, 1)))


def short_order(poses: Poses) -> np.ndarray:
    """Return an order (N,) of poses in which going from each to the next is a short way, by `distances`.

    It starts from the given order, which is often that of the capture, and from going to the nearest that is left; both
    are improved by reversing stretches while that makes the way shorter (2-opt), and the shorter one is taken.
    """
    count = len(poses.centers)
    table = np.zeros((count + 1, count + 1))  # the last row is nowhere, at no distance: the tour is cut there
    table[:count, :count] = distances(poses, poses)
    ways = [_untangled(start, table) for start in (np.arange(count), _by_nearest(table[:count, :count]))]
    best = min(ways, key=lambda way: table[way[:-1], way[1:]].sum())
    return best if best[0] < best[-1] else best[::-1]


def _by_nearest(table: np.ndarray) -> np.ndarray:
    """From the pose that is farthest from the others on average, always to the nearest that is left."""
    order, left = [int(table.sum(axis=1).argmax())], np.ones(len(table), bool)
    for _ in range(len(table) - 1):
        left[order[-1]] = False
        order.append(int(np.where(left, table[order[-1]], np.inf).argmin()))
    return np.array(order)


def _untangled(order: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The order after reversals of stretches that shorten it, until none does."""
    tour = np.append(order, len(table) - 1)
    for _ in range(_MOST_PASSES):
        before = tour.copy()
        for first in range(len(tour) - 2):
            here, then, ends = tour[first], tour[first + 1], tour[first + 2 :]
            after = np.append(tour[first + 3 :], tour[0])
            gains = table[here, then] + table[ends, after] - table[here, ends] - table[then, after]
            best = int(gains.argmax())
            if gains[best] > 1e-9:
                tour[first + 1 : first + 3 + best] = tour[first + 1 : first + 3 + best][::-1].copy()
        if np.array_equal(tour, before):
            break
    cut = int(np.flatnonzero(tour == len(table) - 1)[0])
    return np.append(tour[cut + 1 :], tour[:cut])


def _times(cameras: Sequence[Camera]) -> np.ndarray:
    """(N,) the way from the first camera to each."""
    poses = poses_of(cameras)
    moves = np.linalg.norm(np.diff(poses.centers, axis=0), axis=1)
    traces = (poses.rotations[:-1] * poses.rotations[1:]).sum(axis=(1, 2))
    return np.append(0.0, np.cumsum(_weighed(poses, moves, traces)))


def _thinned(cameras: Sequence[Camera], most: int) -> list[Camera]:
    """At most so many of the cameras, the first and the last among them, evenly along the way."""
    if len(cameras) <= most:
        return list(cameras)
    times = _times(cameras)
    nearest = np.abs(times[:, None] - np.linspace(0, times[-1], most)[None]).argmin(axis=0)
    return [cameras[index] for index in np.unique(nearest)]


def _different(cameras: Sequence[Camera]) -> list[Camera]:
    """The cameras without those that are next to the one before, the first and the last among them.

    Raises:
        InputError: fewer than two are left.
    """
    times = _times(cameras)
    nearest = _NEAREST * times[-1] / max(len(cameras) - 1, 1)
    kept = [0]
    for number in range(1, len(cameras)):
        if times[number] - times[kept[-1]] > nearest:
            kept.append(number)
    if len(kept) < 2:
        raise InputError("there is no path through cameras of which no two differ in place or direction; give others.")
    return [cameras[number] for number in (*kept[:-1], len(cameras) - 1)]
