# SPDX-License-Identifier: Apache-2.0
"""The demo scene: exact intersections, pictures that agree with the written cameras and points, the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from launch.demo_scene import DemoOptions, demo_views, photograph, quaternion, write_demo_scene
from launch.demo_solids import FAR, Box, Cylinder, Dome, Floor, Solid, Sphere, dot, near_bound
from launch.demo_textures import GLYPHS, Noise, checker, glyph_distance, label, letter_block
from launch.demo_world import Thing, nearest_hits, still_life
from scene.dataset import Scene, SceneOptions, load_scene

SMALL = DemoOptions(num_views=9, width=60, height=45, focal=61.5, points_per_view=60)
EXACT = replace(SMALL, point_noise=0.0, stray_points=0.0)

SOLIDS: list[Solid] = [
    Sphere((0.3, -0.2, 0.5), 0.6, yaw=0.3),
    Box((-0.2, 0.1, 0.4), (0.5, 0.2, 0.4), yaw=0.7),
    Cylinder((0.1, 0.2, -0.3), 0.4, 0.9),
]


def inside(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Whether (3, R) points are inside, from the definition of each solid rather than from its intersection."""
    if isinstance(solid, Sphere):
        return np.linalg.norm(points - np.array(solid.center)[:, None], axis=0) < solid.radius
    if isinstance(solid, Box):
        cosine, sine = np.cos(solid.yaw), np.sin(solid.yaw)
        offset = points - np.array(solid.center)[:, None]
        along = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]]) @ offset
        return (np.abs(along) < np.array(solid.half)[:, None]).all(axis=0)
    assert isinstance(solid, Cylinder)
    offset = points - np.array(solid.base)[:, None]
    return (np.hypot(offset[0], offset[1]) < solid.radius) & (offset[2] > 0) & (offset[2] < solid.height)


def random_rays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return origins on a sphere of radius 3 and unit directions towards the middle, (3, count) each."""
    random = np.random.default_rng(5)
    origins = random.normal(size=(3, count))
    origins *= 3 / np.linalg.norm(origins, axis=0)
    directions = random.uniform(-0.9, 0.9, (3, count)) - origins
    directions /= np.linalg.norm(directions, axis=0)
    return origins.astype(np.float32), directions.astype(np.float32)


@pytest.mark.parametrize("solid", SOLIDS, ids=lambda solid: type(solid).__name__)
def test_intersections_agree_with_marching(solid: Solid) -> None:
    origins, directions = random_rays(400)
    distances = solid.intersect(origins, directions)
    steps = np.linspace(0, 6, 3001)
    marched = np.array([inside(solid, origins + t * directions) for t in steps])
    first = np.where(marched.any(axis=0), steps[marched.argmax(axis=0)], FAR)
    grazes = (distances < FAR) != (first < FAR)
    assert grazes.mean() < 0.02 and 0.15 < (first < FAR).mean() < 0.9
    assert np.abs(distances - first)[~grazes].max() < 4e-3


@pytest.mark.parametrize("solid", SOLIDS, ids=lambda solid: type(solid).__name__)
def test_normals_point_out_and_bounds_hold(solid: Solid) -> None:
    origins, directions = random_rays(400)
    hits = np.nonzero(solid.intersect(origins, directions) < FAR)[0]
    points = origins[:, hits] + solid.intersect(origins, directions)[hits] * directions[:, hits]
    normals = solid.normals(points)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-5)
    assert (dot(normals, directions[:, hits]) < 1e-3).all()
    assert not inside(solid, points + 2e-3 * normals).any() and inside(solid, points - 2e-3 * normals).mean() > 0.95
    near = near_bound(solid, origins, directions)
    assert near is not None and set(hits) <= set(near) and len(near) < 400


def test_floor_and_dome() -> None:
    origins = np.array([[0.0, 0.0, 2.0]], np.float32).T
    directions = np.array([[0, 0, -1], [0, 0, 1], [0.8, 0, -0.6]], np.float32).T
    assert Floor(2.0).intersect(origins, directions).tolist() == [2.0, FAR, FAR]
    np.testing.assert_allclose(Dome(5.0).intersect(origins, directions)[:2], [7.0, 3.0], rtol=1e-6)


def test_nothing_stands_inside_anything_else() -> None:
    """Solids may touch, not overlap: a visitor would see blocks melt into each other."""
    things = [thing.solid for thing in still_life() if thing.solid.bounds() is not None]
    random = np.random.default_rng(1)
    points = np.concatenate([random.uniform((-2.2, -2, 0), (2.2, 2, 1.4), (400_000, 3))]).T
    overlap = sum(inside(solid, points).astype(int) for solid in things)
    assert (overlap > 1).sum() == 0 and (overlap == 1).mean() > 0.03


def test_glyphs_are_where_the_letters_are() -> None:
    assert set("MASKGRENDEL*") <= set(GLYPHS)
    ends = np.array([0.04, 0.5]), np.array([0.0, 0.3])
    np.testing.assert_allclose(glyph_distance("M", *ends), 0, atol=1e-6)
    assert glyph_distance("L", np.array([0.8]), np.array([0.8]))[0] > 0.5


def test_letters_are_not_mirrored() -> None:
    """Whoever looks at any side of a block sees the L's foot on the right."""
    texture = letter_block("LLLLLL", 1.0, ("000000",) * 3, Noise())
    for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
        forward = np.zeros(3)
        forward[axis] = -sign
        right = np.cross(forward, [0.0, 0.0, 1.0])
        for side, is_dark in ((0.2, True), (-0.45, False)):
            point = (-forward + right * side + np.array([0, 0, -0.5]))[:, None].astype(np.float32)
            brightness = texture(point, -forward[:, None].astype(np.float32)).max()
            assert (brightness < 0.01) == is_dark, (axis, sign, side)


def test_textures_stay_in_range() -> None:
    random = np.random.default_rng(3)
    points = random.uniform(-0.3, 0.3, (3, 5000)).astype(np.float32)
    normals = np.repeat(np.array([[1.0], [0], [0]], np.float32), 5000, axis=1)
    for texture in (
        checker(0.1, "efe6d2", "5d7f8c", Noise(), 0.5),
        label("GRENDEL*", "f6ecd4", "35444f", "c8372d", 0.27, 0.66),
    ):
        albedo = texture(points, normals)
        assert albedo.shape == (3, 5000) and albedo.min() >= 0 and albedo.max() <= 1 and albedo.std() > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_quaternion_agrees_with_scipy(seed: int) -> None:
    rotation = Rotation.random(random_state=seed)
    x, y, z, w = rotation.as_quat()
    expected = np.array([w, x, y, z]) * (1 if w >= 0 else -1)
    np.testing.assert_allclose(quaternion(rotation.as_matrix()), expected, atol=1e-12)


@pytest.fixture(scope="module")
def exact_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("exact")
    write_demo_scene(folder, EXACT)
    return load_scene(folder, SceneOptions(eval=True))


def test_scene_is_read_back(exact_scene: Scene) -> None:
    views = {view.name: view for view in demo_views(EXACT)}
    cameras = exact_scene.train + exact_scene.test
    assert len(exact_scene.test) == 2 and len(cameras) == EXACT.num_views
    assert len(exact_scene.points.xyz) == EXACT.num_views * EXACT.points_per_view
    for camera in cameras:
        x, y, z = views[camera.name].center
        np.testing.assert_allclose(camera.center, [x, -z, y], atol=1e-9)
        assert (camera.width, camera.height, camera.fx, camera.cx) == (60, 45, 61.5, 30)
        assert camera.rotation[1, 1] > 0.5  # the picture's down is the model's +y


def test_points_project_to_their_colour(exact_scene: Scene) -> None:
    """Cameras, points and pictures agree: each point lies on the pixel of its view from which it took its colour."""
    points, per_view = exact_scene.points, EXACT.points_per_view
    cameras = sorted(exact_scene.train + exact_scene.test, key=lambda camera: camera.name)
    for number, camera in enumerate(cameras):
        chosen = slice(number * per_view, (number + 1) * per_view)
        x, y, z = camera.rotation @ points.xyz[chosen].T.astype(np.float64) + camera.translation[:, None]
        column = np.floor(camera.fx * x / z + camera.cx - 1e-4).astype(int).clip(0, camera.width - 1)
        row = np.floor(camera.fy * y / z + camera.cy - 1e-4).astype(int).clip(0, camera.height - 1)
        picture = np.asarray(Image.open(camera.image_path))
        same = (picture[row, column] == points.rgb[chosen]).all(axis=1)
        assert (z > 0).all() and same.mean() > 0.98


def test_pycolmap_reads_the_model(exact_scene: Scene) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction(str(exact_scene.source / "sparse" / "0"))
    assert len(model.images) == EXACT.num_views and len(model.points3D) == len(exact_scene.points.xyz)
    centers = {image.name: image.projection_center() for image in model.images.values()}
    for camera in exact_scene.train:
        np.testing.assert_allclose(centers[camera.name], camera.center, atol=1e-6)


def test_noise_is_as_asked(exact_scene: Scene, tmp_path: Path) -> None:
    write_demo_scene(tmp_path, replace(EXACT, point_noise=0.01, stray_points=0.1))
    moved = np.linalg.norm(load_scene(tmp_path, SceneOptions()).points.xyz - exact_scene.points.xyz, axis=1)
    assert 0.05 < (moved > 0.6).mean() < 0.15
    assert 0.03 < np.median(moved) < 0.15


def test_same_seed_same_files(tmp_path: Path) -> None:
    tiny = replace(SMALL, num_views=3, width=20, height=15, focal=20.5)
    for name, options, threads in (("a", tiny, 1), ("b", tiny, 3), ("c", replace(tiny, seed=1), 2)):
        write_demo_scene(tmp_path / name, options, num_threads=threads)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        first, second, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == second and (first != other or file.name == "cameras.txt")


def test_pictures_are_antialiased_and_lit() -> None:
    """A grey ball before a black sky: brighter towards the light (up, left), its rim blends into the sky."""
    options = replace(SMALL, width=120, height=90, focal=100.0)
    sky = Thing(Dome(20.0), lambda points, normals: np.zeros_like(points), emits=True)
    ball = Thing(Sphere((0.0, 0.1, 0.4), 0.9), lambda points, normals: np.full_like(points, 0.7))
    picture = photograph((sky, ball), demo_views(options)[0], options).astype(float).mean(axis=2)
    rows, columns = np.nonzero(picture)
    assert 0.05 < len(rows) / picture.size < 0.6
    upper_left = picture[(rows.min() + rows.max()) // 2 - 10, (columns.min() + columns.max()) // 2 - 10]
    lower_right = picture[(rows.min() + rows.max()) // 2 + 14, (columns.min() + columns.max()) // 2 + 14]
    assert upper_left > 1.2 * lower_right > 0
    first_in_row = np.array([picture[row][picture[row] > 0][:2] for row in range(rows.min() + 6, rows.max() - 6)])
    assert (first_in_row[:, 0] < 0.75 * first_in_row[:, 1]).mean() > 0.3


def test_the_demo_is_what_the_readme_says() -> None:
    options = DemoOptions()
    assert options.num_views >= 40 and (options.width, options.height) == (200, 150)
    things, views = still_life(), demo_views(options)
    looks_at_a_toy = []
    for view in views:
        forward = view.rotation[2].astype(np.float32)[:, None]
        distances, indices = nearest_hits(things, view.center.astype(np.float32)[:, None], forward)
        looks_at_a_toy.append(things[indices[0]].solid.bounds() is not None and 1 < distances[0] < 6)
    assert np.mean(looks_at_a_toy) > 0.7
