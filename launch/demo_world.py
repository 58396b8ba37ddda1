# SPDX-License-Identifier: Apache-2.0
"""The demo's still life and the ray tracer that photographs it: area light, soft shadows, ambient occlusion, gloss.

This is the known answer that the trainer has to find: solids with procedural textures, not Gaussians.
World axes and array layout as in `demo_solids`. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.demo_solids import FAR, Box, Cylinder, Dome, Floor, Solid, Sphere, dot, near_bound, normalized
from launch.demo_textures import (
    Noise,
    Texture,
    bands,
    checker,
    color,
    dots,
    label,
    letter_block,
    marble,
    mix,
    plain,
    segments,
    sky,
    step,
)

SAMPLES = 3
"""Rays per pixel along each axis; ray (i, j) also sees its own point of the area light."""

LIGHT_CENTER = (-3.6, -3.4, 6.0)
LIGHT_RADIUS = 0.8
LIGHT_COLOR = (1.18, 1.1, 0.96)
SKY_AMBIENT = (0.52, 0.56, 0.64)
GROUND_AMBIENT = (0.26, 0.24, 0.2)
SKY_GAIN = 1.3


@dataclass(frozen=True, eq=False)
class Thing:
    """A solid with its texture.

    gloss: strength of the highlight, 0 for matt; emits: shown as it is, without light (the sky).
    """

    solid: Solid
    texture: Texture
    gloss: float = 0.0
    emits: bool = False


def still_life() -> tuple[Thing, ...]:
    """Return the demo's scene: four blocks that spell MASK before toys, on a terrace under a cloudy sky."""
    noise = Noise()
    return (*_surroundings(noise), *_blocks(noise), *_stacking_toy(), *_toys(noise))


def _surroundings(noise: Noise) -> list[Thing]:
    return [Thing(Dome(14.0), sky(noise), emits=True), Thing(Floor(13.9), _terrace(noise))]


def _terrace(noise: Noise) -> Texture:
    """Return a round checkered terrace of 2.5 m radius in a meadow that fades to the horizon."""
    tiles = checker(0.5, "efe6d2", "5d7f8c", noise, marble=0.5)
    rim, grass, moss, haze = color("b5563c"), color("9fb36b"), color("7c9655"), color("d9e2dc")

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        distance = np.hypot(points[0], points[1])
        meadow = mix(grass, moss, (noise.cloud(points * np.float32(0.9), 2) - np.float32(0.3)) * np.float32(2.5))
        meadow = mix(meadow, haze, (distance - 4) / np.float32(8))
        inside = mix(tiles(points, normals), rim, step(distance - np.float32(2.5), 0.02))
        return mix(inside, meadow, step(distance - np.float32(2.62), 0.02))

    return albedo


def _blocks(noise: Noise) -> list[Thing]:
    half = 0.28
    places = (  # letters on +x -x +y -y +z -z; centre; yaw; paints of the x, y and z faces
        ("KG*MMS", (-0.98, -0.36, half), 0.2, ("2e7d5b", "d8452e", "2c6fb0")),
        ("ER*AAM", (-0.34, -0.5, half), 0.05, ("c98a1b", "2c6fb0", "d8452e")),
        ("NDASSA", (0.31, -0.5, half), -0.06, ("d8452e", "2e7d5b", "c98a1b")),
        ("LSMKKR", (0.95, -0.37, half), -0.22, ("2c6fb0", "c98a1b", "2e7d5b")),
        ("RENDGL", (-0.03, -0.47, 3 * half), 0.55, ("2e7d5b", "d8452e", "2c6fb0")),
    )
    return [
        Thing(Box(center, (half,) * 3, yaw), letter_block(letters, half, paints, noise), gloss=0.06)
        for letters, center, yaw, paints in places
    ]


def _stacking_toy() -> list[Thing]:
    things, bottom = [], 0.0
    for radius, code in ((0.46, "c8372d"), (0.37, "e9892b"), (0.28, "f2c230"), (0.19, "3f9b57")):
        things.append(Thing(Cylinder((-0.95, 0.72, bottom), radius, 0.2), plain(code), gloss=0.2))
        bottom += 0.2
    things.append(Thing(Sphere((-0.95, 0.72, bottom + 0.17), 0.17), plain("2b62a8"), gloss=0.3))
    return things


def _toys(noise: Noise) -> list[Thing]:
    gores = ("e04a3a", "fbf3e4", "f0b52e", "fbf3e4", "2f7fc1", "fbf3e4", "3f9b57", "fbf3e4")
    pages = bands(("7a2f2b", "f4ecd8", "e7dcc0", "f4ecd8", "7a2f2b"), 0.056)
    return [
        Thing(Sphere((0.78, 0.78, 0.5), 0.5, yaw=0.4), segments(gores, "fbf3e4"), gloss=0.25),
        Thing(Box((-0.06, 0.42, 0.07), (0.42, 0.28, 0.07), 0.35), pages, gloss=0.0),
        Thing(Sphere((-0.06, 0.42, 0.44), 0.3), marble("f2efe9", "34424f", noise, 2.4), gloss=0.3),
        Thing(Cylinder((1.52, 0.1, 0.0), 0.27, 0.66), label("GRENDEL*", "f6ecd4", "35444f", "c8372d", 0.27, 0.66), 0.2),
        Thing(Sphere((-1.6, 0.0, 0.25), 0.25), dots("c8372d", "fbf3e4", 26, 0.22), gloss=0.25),
        Thing(Sphere((0.42, -1.2, 0.16), 0.16), marble("3fb3a6", "f0fbf4", noise, 5.0), gloss=0.35),
        Thing(Sphere((-0.75, -1.15, 0.13), 0.13), plain("f0b52e"), gloss=0.35),
        Thing(Cylinder((0.02, 1.38, 0.0), 0.3, 0.5), bands(("f6ecd4", "2f7fc1"), 0.1), gloss=0.1),
    ]


def light_points() -> np.ndarray:
    """Return (SAMPLES**2, 3) points spread over the disk of the area light."""
    count = SAMPLES**2
    index = np.arange(count) + 0.5
    ring, turn = LIGHT_RADIUS * np.sqrt(index / count), index * np.pi * (3 - np.sqrt(5))
    disk = np.stack((ring * np.cos(turn), ring * np.sin(turn), np.zeros(count)), axis=1)
    return (np.array(LIGHT_CENTER) + disk).astype(np.float32)


def nearest_hits(things: Sequence[Thing], origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the (R,) distance to the first surface and the (R,) index of the thing hit.

    origins: (3, R) or (3, 1); directions: (3, R) unit vectors.
    """
    distances = np.full(directions.shape[1], FAR)
    indices = np.zeros(directions.shape[1], np.int64)
    for thing_index, thing in enumerate(things):
        rays = near_bound(thing.solid, origins, directions)
        chosen = slice(None) if rays is None else rays
        starts = origins if origins.shape[1] == 1 else origins[:, chosen]
        found = thing.solid.intersect(starts, directions[:, chosen])
        closer = found < distances[chosen]
        distances[chosen] = np.where(closer, found, distances[chosen])
        indices[chosen] = np.where(closer, thing_index, indices[chosen])
    return distances, indices


def radiance(things: Sequence[Thing], origin: np.ndarray, directions: np.ndarray, lights: np.ndarray) -> np.ndarray:
    """Return (3, R) linear RGB seen along rays from one origin.

    origin: (3, 1); directions: (3, R) unit; lights: (3, R) the point of the area light that each ray uses.
    """
    distances, indices = nearest_hits(things, origin, directions)
    points = origin + distances * directions
    result = np.zeros_like(points)
    lit = np.array([not thing.emits for thing in things])[indices]
    normals = np.zeros_like(points)
    gloss = np.zeros(points.shape[1], np.float32)
    for thing_index, thing in enumerate(things):
        rays = np.nonzero(indices == thing_index)[0]
        normals[:, rays] = thing.solid.normals(points[:, rays])
        local, facing = thing.solid.local(points[:, rays]), _local_normals(thing.solid, normals[:, rays])
        result[:, rays] = thing.texture(local, facing)
        gloss[rays] = thing.gloss
    rays = np.nonzero(lit)[0]
    result[:, ~lit] *= np.float32(SKY_GAIN)
    result[:, rays] = _illuminated(things, points[:, rays], normals[:, rays], result[:, rays], lights[:, rays])
    result[:, rays] += gloss[rays] * _highlight(points[:, rays], normals[:, rays], directions[:, rays])
    return result


def _local_normals(solid: Solid, normals: np.ndarray) -> np.ndarray:
    """Return the (3, R) normals in the axes in which the texture is defined."""
    bounds = solid.bounds()
    return normals if bounds is None else solid.local(normals + bounds[0][:, None])


def _illuminated(
    things: Sequence[Thing], points: np.ndarray, normals: np.ndarray, albedo: np.ndarray, lights: np.ndarray
) -> np.ndarray:
    """Return (3, R) albedo times ambient and direct light."""
    to_light = normalized(lights - points)
    lambert = np.maximum(dot(normals, to_light), np.float32(0))
    facing = np.nonzero(lambert > 0)[0]
    lambert[facing] *= ~_shadowed(things, (points + normals * np.float32(2e-3))[:, facing], to_light[:, facing])
    ambient = mix(_rgb(GROUND_AMBIENT), _rgb(SKY_AMBIENT), (normals[2] + 1) / np.float32(2))
    return albedo * (ambient * _openness(things, points, normals) + _rgb(LIGHT_COLOR) * lambert)


def _rgb(values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def _shadowed(things: Sequence[Thing], points: np.ndarray, to_light: np.ndarray) -> np.ndarray:
    """Return (R,) True where a solid stands between the point and its light (the light is beyond them all)."""
    blocked = np.zeros(points.shape[1], bool)
    for thing in things:
        rays = near_bound(thing.solid, points, to_light)
        if rays is not None:
            blocked[rays] |= thing.solid.intersect(points[:, rays], to_light[:, rays]) < FAR
    return blocked


def _openness(things: Sequence[Thing], points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return the (R,) part of the sky that the solids leave open, each taken for a ball somewhat inside its bound."""
    openness = np.ones(points.shape[1], np.float32)
    for thing in things:
        bounds = thing.solid.bounds()
        if bounds is None:
            continue
        offset = bounds[0][:, None] - points
        squared = dot(offset, offset)
        cosine = dot(normals, offset) / np.sqrt(squared)
        outside = squared > np.float32((0.99 * bounds[1]) ** 2) if isinstance(thing.solid, Sphere) else np.True_
        cover = np.float32((0.8 * bounds[1]) ** 2) / np.maximum(squared, np.float32(1e-6))
        openness *= 1 - np.float32(0.85) * np.clip(cover * np.maximum(cosine, np.float32(0)) * outside, 0, 1)
    return openness


def _highlight(points: np.ndarray, normals: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return (R,) Blinn-Phong highlights of a broad light (no shadow: the exponent keeps them on lit sides)."""
    halfway = normalized(normalized(_rgb(LIGHT_CENTER) - points) - directions)
    return np.maximum(dot(normals, halfway), np.float32(0)) ** 24


def encode(linear: np.ndarray) -> np.ndarray:
    """Return linear RGB as sRGB in [0, 1]; values above 0.8 are bent softly towards 1."""
    linear = np.maximum(linear * np.float32(0.86), np.float32(0))
    over = np.maximum(linear - np.float32(0.8), np.float32(0))
    linear = np.minimum(linear, np.float32(0.8)) + np.float32(0.2) * (1 - np.exp(-over * 5))
    return np.where(linear <= 0.0031308, linear * np.float32(12.92), 1.055 * linear ** np.float32(1 / 2.4) - 0.055)
