# SPDX-License-Identifier: Apache-2.0
"""Camera paths: smooth, closed, looking at the focus, near the cameras, and moving with the world."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from posed_cameras import SCENES, UP, aerial, as_cameras, facing, looking, moved, orbit
from scene.camera_paths import Poses, cameras_at, ellipse, find_focus, find_up, poses_of, resized, spiral
from scene.camera_splines import distances, short_order, through, through_all
from scene.errors import InputError

Path = Callable[[Poses, int], Poses]


def interpolate(poses: Poses, num_frames: int) -> Poses:
    return poses_of(through_all([resized(camera) for camera in as_cameras(poses)], num_frames))


PATHS = [(ellipse, name) for name in SCENES] + [(spiral, name) for name in SCENES if name != "orbit"]
PATHS += [(interpolate, name) for name in SCENES]
CASES = pytest.mark.parametrize(("path", "name"), PATHS, ids=[f"{path.__name__}-{name}" for path, name in PATHS])


def spread(poses: Poses) -> float:
    return float(np.sqrt(((poses.centers - poses.centers.mean(axis=0)) ** 2).sum(axis=1).mean()))


def angles(poses: Poses) -> np.ndarray:
    """Radians from each frame to the next."""
    turns = Rotation.from_matrix(poses.rotations)
    return (turns[:-1].inv() * turns[1:]).magnitude()


@CASES
def test_every_frame_has_a_rotation(path: Path, name: str) -> None:
    frames = path(SCENES[name], 33)
    assert frames.centers.shape == (33, 3)
    assert np.allclose(frames.rotations @ frames.rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(frames.rotations), 1)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, name in PATHS if path is not interpolate])
def test_no_frame_turns_suddenly(path: Path, name: str) -> None:
    """In 240 frames a full circle is 1.5 degrees a frame."""
    assert np.degrees(angles(path(SCENES[name], 240)).max()) < 5


@CASES
def test_second_differences_fall_with_the_square_of_the_number_of_frames(path: Path, name: str) -> None:
    """As those of a curve with a bounded acceleration do; at a corner they would fall with the number alone."""
    poses, coarse, fine = SCENES[name], *((3000, 12_000) if path is interpolate else (1000, 4000))
    worst = []
    for count in (coarse, fine):
        if path is interpolate:  # through the same cameras
            cameras = [resized(camera) for camera in as_cameras(poses)]
            frames = poses_of(through([cameras[index] for index in short_order(poses)], count))
        else:
            frames = path(poses, count)
        turning = np.abs(np.diff(frames.rotations, n=2, axis=0)).max()
        worst.append((np.linalg.norm(np.diff(frames.centers, n=2, axis=0), axis=1).max(), turning))
    for first, second in zip(*worst, strict=True):
        assert second < first * (coarse / fine) ** 2 * 1.3


@pytest.mark.parametrize("path", [ellipse, spiral])
@pytest.mark.parametrize("name", ["facing", "aerial", "corridor", "cap"])
def test_the_end_meets_the_beginning(path: Path, name: str) -> None:
    frames = path(SCENES[name], 200)
    steps = np.linalg.norm(np.diff(frames.centers, axis=0), axis=1)
    assert np.linalg.norm(frames.centers[-1] - frames.centers[0]) < 1.5 * steps.max()
    assert angles(Poses(frames.centers[[-1, 0]], frames.rotations[[-1, 0]])).max() < 1.5 * angles(frames).max() + 1e-9


@pytest.mark.parametrize("name", SCENES)
def test_an_ellipse_looks_at_the_focus_upright(name: str) -> None:
    poses = SCENES[name]
    frames, focus = ellipse(poses, 60), find_focus(poses)
    away = focus - frames.centers
    assert np.allclose(np.cross(away, frames.forward), 0, atol=1e-9 * np.abs(away).max())
    assert ((away * frames.forward).sum(axis=1) > 0).all()
    assert (frames.up @ find_up(poses)).min() > (0.0 if name == "cap" else 0.3)  # nearly all is up where one looks down


@pytest.mark.parametrize("name", ["orbit", "facing"])
def test_a_flat_ellipse_lies_in_a_plane_and_is_one(name: str) -> None:
    """Sums of distances from two points of its longest axis are equal."""
    centers = ellipse(SCENES[name], 400).centers
    offsets = centers - (centers.max(axis=0) + centers.min(axis=0)) / 2
    _, sizes, axes = np.linalg.svd(offsets)
    assert sizes[2] < 1e-9 * sizes[0]
    flat = offsets @ axes.T
    long, short = np.abs(flat).max(axis=0)[:2]
    foci = np.sqrt(max(long**2 - short**2, 0.0))
    sums = np.hypot(flat[:, 0] - foci, flat[:, 1]) + np.hypot(flat[:, 0] + foci, flat[:, 1])
    assert np.allclose(sums, 2 * long, rtol=2e-3)


@pytest.mark.parametrize("name", SCENES)
def test_an_ellipse_stays_among_the_cameras(name: str) -> None:
    """Never much nearer to the scene than they are, never farther from the nearest of them than they are apart."""
    poses = SCENES[name]
    frames, focus = ellipse(poses, 120), find_focus(poses)
    nearest = np.linalg.norm(frames.centers[:, None] - poses.centers[None], axis=2).min(axis=1)
    assert nearest.max() < 0.75 * spread(poses)
    there = np.linalg.norm(poses.centers - focus, axis=1)
    assert np.linalg.norm(frames.centers - focus, axis=1).min() > 0.9 * there.min()


@pytest.mark.parametrize("degrees", [120, 180, 240, 265])
def test_an_arc_is_not_left(degrees: float) -> None:
    """A plane ellipse would cut through the scene, and show its other side."""
    poses = orbit(degrees, seed=5)
    frames = ellipse(poses, 200)
    azimuth = np.degrees(np.arctan2(frames.centers[:, 1], frames.centers[:, 0]) - 0.3) % 360
    assert azimuth.min() > 0.05 * degrees and azimuth.max() < degrees
    assert azimuth.max() - azimuth.min() > 0.7 * degrees
    assert np.linalg.norm(frames.centers[:, :2], axis=1).min() > 3.4


def test_a_ring_is_gone_around() -> None:
    azimuths = np.sort(np.arctan2(*ellipse(SCENES["orbit"], 90).centers[:, :2].T))
    assert np.diff(azimuths).max() < 0.1


def test_a_flight_straight_down_looks_down() -> None:
    """Noise in the tilts does not draw the focus into the cameras, and alternating headings do not turn the image."""
    poses = aerial()
    assert find_focus(poses)[2] < -20
    frames = ellipse(poses, 100)
    tilts = np.degrees(np.arccos(-frames.forward[:, 2]))
    assert tilts.max() < 10
    assert abs(find_up(poses)[0]) > 0.99
    assert angles(frames).max() < 0.02


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_the_focus_is_where_the_axes_meet(noise: float) -> None:
    random = np.random.default_rng(3)
    centers = orbit(200).centers + [1.0, 2.0, 3.0]
    target = np.array([1.0, 2.0, 3.0]) + noise * random.standard_normal(centers.shape)
    assert np.linalg.norm(find_focus(looking(centers, target)) - [1, 2, 3]) < 1e-9 + noise
    assert np.linalg.norm(find_focus(facing()) - [6, 0, 0.2]) < 1e-9


def test_the_focus_is_ahead_of_who_walks() -> None:
    poses = SCENES["corridor"]
    assert find_focus(poses)[0] > poses.centers[:, 0].max() + 1


def test_parallel_axes_have_a_focus_far_ahead() -> None:
    centers = facing().centers
    focus = find_focus(looking(centers, centers + [1.0, 0.0, 0.0]))
    assert focus[0] > 50 * spread(facing()) and np.isfinite(focus).all()


@CASES
def test_a_path_moves_with_the_world(path: Path, name: str) -> None:
    poses = SCENES[name]
    turn, shift = Rotation.from_rotvec([0.4, -1.1, 2.0]), np.array([30.0, -7.0, 11.0])
    expected = moved(path(poses, 50), 3.5, turn, shift)
    found = path(moved(poses, 3.5, turn, shift), 50)
    assert np.allclose(found.centers, expected.centers, atol=1e-7)
    assert np.allclose(found.rotations, expected.rotations, atol=1e-7)


def test_a_spiral_turns_twice_and_keeps_its_direction() -> None:
    poses = facing()
    frames = spiral(poses, 400)
    sideways = frames.centers - frames.centers.mean(axis=0)
    crossings = np.count_nonzero(np.diff(np.sign(sideways[:, 1])))
    assert crossings in (3, 4)
    assert frames.forward[:, 0].min() > 0.95
    widest = np.percentile(np.abs(poses.centers - poses.centers.mean(axis=0)), 90, axis=0)
    assert np.abs(sideways[:, 1:]).max(axis=0) == pytest.approx(widest[1:], rel=0.05)


def test_a_spiral_of_a_cap_comes_no_nearer_than_the_cameras() -> None:
    poses = orbit(150)
    frames = spiral(poses, 100)
    focus = find_focus(poses)
    closest = np.linalg.norm(poses.centers - focus, axis=1).min()
    middle = np.linalg.norm(poses.centers.mean(axis=0) - focus)
    assert np.linalg.norm(frames.centers - focus, axis=1).min() > 0.99 * min(closest, middle)


def test_an_order_is_short() -> None:
    """Shuffled cameras of a ring come back in its order, wherever it is cut; no order is longer than the given one."""
    random = np.random.default_rng(7)
    ring = orbit(count=30)
    shuffle = random.permutation(30)
    shuffled = Poses(ring.centers[shuffle], ring.rotations[shuffle])
    found = shuffle[short_order(shuffled)]
    assert sorted(found) == list(range(30))
    assert set(np.diff(found) % 30) in ({1}, {29})
    table = distances(aerial(), aerial())
    order = short_order(aerial())
    plain = np.diagonal(table, offset=1).sum()
    assert table[order[:-1], order[1:]].sum() <= plain


def test_a_path_passes_through_its_cameras_and_no_faster_than_needed() -> None:
    poses = orbit(150, count=9)
    cameras = as_cameras(poses)
    frames = poses_of(through(cameras, 2001))
    table = distances(poses, frames)
    assert table.min(axis=1).max() < 0.005
    assert np.array_equal(np.argsort(table.argmin(axis=1)), np.arange(9))
    assert np.allclose(frames.centers[[0, -1]], poses.centers[[0, -1]])
    assert np.allclose(frames.rotations[[0, -1]], poses.rotations[[0, -1]])
    moves = np.linalg.norm(np.diff(frames.centers, axis=0), axis=1).sum()
    assert moves < 1.15 * np.linalg.norm(np.diff(poses.centers, axis=0), axis=1).sum()


def test_a_camera_given_twice_does_not_stop_the_path() -> None:
    once = as_cameras(orbit(150, count=6))
    twice = [once[0], *(camera for camera in once for _ in range(2)), once[-1]]
    for found, expected in zip(through(twice, 50), through(once, 50), strict=True):
        assert np.allclose(found.viewmat, expected.viewmat, atol=0.05)


def test_a_half_turn_on_the_way_stays_level() -> None:
    """Cameras that look down with opposite headings: the path turns about the vertical, and shows no horizon."""
    poses = aerial()
    frames = interpolate(poses, 600)
    widest = np.arccos(-poses.forward[:, 2]).max()
    assert np.arccos(-frames.forward[:, 2]).max() < 2 * widest  # an axis that is tilted, too
    low, high = poses.centers.min(axis=0), poses.centers.max(axis=0)
    assert ((frames.centers > low - 0.4) & (frames.centers < high + 0.4)).all()


def test_zooms_are_gone_along() -> None:
    poses = orbit(100, count=5)
    cameras = [resized(camera, 64 * (1 + index), 48 * (1 + index)) for index, camera in enumerate(as_cameras(poses))]
    focal = [camera.fx for camera in through(cameras, 101)]
    assert focal[0] == pytest.approx(60) and focal[-1] == pytest.approx(300)
    assert np.diff(focal).min() >= 0


def test_another_size_shows_no_more_than_the_camera_saw() -> None:
    (camera,) = as_cameras(Poses(np.zeros((1, 3)), np.eye(3)[None]))
    same = resized(camera, width=128)
    assert (same.width, same.height, same.fx, same.fy, same.cx, same.cy) == (128, 96, 120, 122, 64, 48)
    assert (resized(camera, height=24).width, resized(camera).width) == (32, 64)
    for width, height in ((128, 40), (30, 90)):
        cut = resized(camera, width, height)
        assert cut.width / cut.fx <= camera.width / camera.fx + 1e-12
        assert cut.height / cut.fy <= camera.height / camera.fy + 1e-12
        assert cut.fy / cut.fx == pytest.approx(camera.fy / camera.fx)
    (placed,) = cameras_at(looking(np.ones((1, 3)), np.zeros(3)), cut)
    assert np.allclose(placed.center, 1) and (placed.width, placed.fx) == (30, cut.fx)


def _few(poses: Poses, count: int) -> Poses:
    return Poses(poses.centers[:count], poses.rotations[:count])


@pytest.mark.parametrize(
    ("path", "poses", "message"),
    [
        (ellipse, _few(orbit(), 2), "an ellipse needs at least 3 training cameras, and there are 2"),
        (spiral, _few(orbit(), 1), "a spiral needs at least 3"),
        (spiral, orbit(), "a spiral is for cameras that look the same way"),
        (interpolate, _few(orbit(), 1), "at least 2 training cameras, and there are 1"),
        (ellipse, looking(orbit().centers, 2 * orbit().centers, UP), "look away from each other"),
        (ellipse, Poses(np.ones((4, 3)), orbit().rotations[:4]), "all 4 cameras stand in one place"),
        (interpolate, Poses(np.ones((3, 3)), np.stack([np.eye(3)] * 3)), "no two differ"),
    ],
)
def test_what_has_no_path(path: Path, poses: Poses, message: str) -> None:
    with pytest.raises(InputError, match=message):
        path(poses, 10)


@pytest.mark.parametrize("path", [ellipse, interpolate])
def test_a_straight_line_of_cameras_has_a_path(path: Path) -> None:
    """To and fro along it; the tips are no sudden turns."""
    centers = np.stack([np.linspace(-1, 1, 12), np.full(12, -4.0), np.full(12, 0.5)], axis=1)
    frames = path(looking(centers, np.zeros(3)), 200)
    assert np.isfinite(frames.rotations).all()
    assert np.linalg.norm(np.diff(frames.centers, n=2, axis=0), axis=1).max() < 0.004
