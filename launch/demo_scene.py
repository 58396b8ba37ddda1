# SPDX-License-Identifier: Apache-2.0
"""Write the demo scene as a COLMAP folder: photographs, cameras and a noisy point cloud, the same for the same seed.

The files are what COLMAP would leave behind: images/*.png and sparse/0/{cameras,images,points3D}.txt, in COLMAP's world
(the model's y axis points down, so that viewers show it upright).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from launch.demo_solids import normalized
from launch.demo_world import SAMPLES, Thing, encode, light_points, nearest_hits, radiance, still_life

TO_COLMAP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
"""Turns this program's world (z up) into the world of the files (y down)."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo scene is made of.

    width, height: pixels; focal: pixels; points_per_view: surface points taken from each view; point_noise: standard
    deviation as a fraction of the distance to the camera that saw the point; stray_points: fraction placed at random.
    """

    num_views: int = 56
    width: int = 200
    height: int = 150
    focal: float = 205.0
    points_per_view: int = 110
    point_noise: float = 0.004
    stray_points: float = 0.02
    seed: int = 0


@dataclass(frozen=True, eq=False)
class DemoView:
    """One camera: name, (3, 3) world-to-camera rotation and (3,) centre, both in the axes of `demo_solids`."""

    name: str
    rotation: np.ndarray
    center: np.ndarray


def demo_views(options: DemoOptions) -> tuple[DemoView, ...]:
    """Return the cameras: a walk twice around the still life, bobbing between low and high, looking at its middle."""
    random = np.random.Generator(np.random.PCG64(options.seed))
    views = []
    for index in range(options.num_views):
        turn = 2 * (2 * np.pi) * index / options.num_views
        elevation = np.radians(29 + 15 * np.sin(2.5 * turn + 0.6) + random.uniform(-2, 2))
        distance = 4.15 + 0.35 * np.cos(1.5 * turn) + random.uniform(-0.1, 0.1)
        flat = distance * np.cos(elevation)
        center = np.array([flat * np.sin(turn), -flat * np.cos(turn), distance * np.sin(elevation)])
        target = np.array([0.0, 0.1, 0.38]) + random.uniform(-0.12, 0.12, 3)
        views.append(DemoView(f"view_{index:03d}.png", look_at(center, target), center))
    return tuple(views)


def look_at(center: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the (3, 3) world-to-camera rotation of a level camera: rows are right, down and forward."""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right /= np.linalg.norm(right)
    return np.stack((right, np.cross(forward, right), forward))


def pixel_directions(view: DemoView, options: DemoOptions, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (3, R) unit world directions through the (R,) image positions x, y in pixels from the top-left corner."""
    camera = np.stack(
        ((x - options.width / 2) / options.focal, (y - options.height / 2) / options.focal, np.ones_like(x))
    )
    return normalized((view.rotation.T @ camera).astype(np.float32))


def photograph(things: tuple[Thing, ...], view: DemoView, options: DemoOptions) -> np.ndarray:
    """Return the (height, width, 3) uint8 picture, averaged over SAMPLES x SAMPLES rays per pixel."""
    shape = (options.height, options.width)
    grid_y, grid_x = np.mgrid[: options.height, : options.width].reshape(2, -1).astype(np.float64)
    origin = view.center.astype(np.float32)[:, None]
    total = np.zeros((3, grid_x.size), np.float32)
    for sample, light in enumerate(light_points()):
        # within a pixel, sample and light point are paired in an order that is not that of the rows
        column, row = sample % SAMPLES, (sample // SAMPLES + sample) % SAMPLES
        x, y = grid_x + (column + 0.5) / SAMPLES, grid_y + (row + 0.5) / SAMPLES
        directions = pixel_directions(view, options, x, y)
        lights = np.broadcast_to(light[:, None], directions.shape)
        total += np.minimum(radiance(things, origin, directions, lights), np.float32(2))
    pixels = encode(total / SAMPLES**2)
    return np.round(pixels * 255).astype(np.uint8).T.reshape(*shape, 3)


def surface_points(
    things: tuple[Thing, ...], view: DemoView, picture: np.ndarray, options: DemoOptions, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return (P, 3) noisy surface points that a view sees and their (P, 3) uint8 colours in its picture."""
    x = random.uniform(0, options.width, options.points_per_view)
    y = random.uniform(0, options.height, options.points_per_view)
    directions = pixel_directions(view, options, x, y)
    distances, _ = nearest_hits(things, view.center.astype(np.float32)[:, None], directions)
    points = view.center[:, None] + distances * directions.astype(np.float64)
    points += random.normal(0, options.point_noise, points.shape) * distances
    return points.T, picture[y.astype(np.int64), x.astype(np.int64)]


def point_cloud(
    things: tuple[Thing, ...], views: tuple[DemoView, ...], pictures: list[np.ndarray], options: DemoOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (P, 3) points and (P, 3) uint8 colours of the scene; a few are strays, as in real models."""
    random = np.random.Generator(np.random.PCG64(options.seed + 1))
    pairs = [
        surface_points(things, view, picture, options, random) for view, picture in zip(views, pictures, strict=True)
    ]
    xyz, rgb = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    strays = random.random(len(xyz)) < options.stray_points
    xyz[strays] = random.uniform((-2.5, -2.5, 0.0), (2.5, 2.5, 2.0), (int(strays.sum()), 3))
    return xyz, rgb


def write_demo_scene(
    folder: Path, options: DemoOptions, *, num_threads: int = 2, on_view: Callable[[], None] | None = None
) -> None:
    """Write the scene below `folder`; `on_view` is called after each picture (progress)."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    (folder / "sparse" / "0").mkdir(parents=True, exist_ok=True)
    things, views = still_life(), demo_views(options)

    def take(view: DemoView) -> np.ndarray:
        picture = photograph(things, view, options)
        Image.fromarray(picture).save(images / view.name)
        if on_view is not None:
            on_view()
        return picture

    with ThreadPoolExecutor(num_threads) as pool:
        pictures = list(pool.map(take, views))
    _write_model(folder / "sparse" / "0", views, *point_cloud(things, views, pictures, options), options)


def _write_model(
    folder: Path, views: tuple[DemoView, ...], xyz: np.ndarray, rgb: np.ndarray, options: DemoOptions
) -> None:
    """Write COLMAP's three text files."""
    camera = (
        f"1 PINHOLE {options.width} {options.height} {options.focal} {options.focal} "
        f"{options.width / 2} {options.height / 2}"
    )
    (folder / "cameras.txt").write_text(f"# camera, model, width, height, fx, fy, cx, cy\n{camera}\n", encoding="utf-8")
    lines = ["# image, qw, qx, qy, qz, tx, ty, tz, camera, name; the line after each lists its 2D points: none"]
    for number, view in enumerate(views, start=1):
        rotation = view.rotation @ TO_COLMAP.T
        translation = -view.rotation @ view.center
        numbers = " ".join(f"{value:.12g}" for value in (*quaternion(rotation), *translation))
        lines += [f"{number} {numbers} 1 {view.name}", ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = ["# point, x, y, z, r, g, b, error; tracks: none"]
    for number, (point, paint) in enumerate(zip(xyz @ TO_COLMAP.T, rgb, strict=True), start=1):
        lines.append(f"{number} {point[0]:.6f} {point[1]:.6f} {point[2]:.6f} {paint[0]} {paint[1]} {paint[2]} 0.5")
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """Return the (4,) unit quaternion (w, x, y, z), w >= 0, of a (3, 3) rotation.

    It is the eigenvector, for the largest eigenvalue, of a symmetric matrix made of sums and differences of entries.
    """
    m = rotation
    x = [m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] - m[1, 2]]
    y = [x[1], m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2], m[0, 2] - m[2, 0]]
    z = [x[2], y[2], m[2, 2] - m[0, 0] - m[1, 1], m[1, 0] - m[0, 1]]
    w = [x[3], y[3], z[3], m.trace()]
    vectors = np.linalg.eigh(np.array([x, y, z, w]))[1]
    found = vectors[[3, 0, 1, 2], 3]
    return found * (1.0 if found[0] >= 0 else -1.0)
