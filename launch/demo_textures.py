# SPDX-License-Identifier: Apache-2.0
"""Procedural textures of the demo scene: checks, stripes, noise, dots, letters.

A texture maps (3, R) points in a solid's own axes (metres; unit directions for the dome) and the normals there to
(3, R) linear RGB in [0, 1]. Textures are pure functions of the position; their randomness is a fixed lattice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]

LATTICE = 32
"""Edge of the noise lattice, which repeats."""

Stroke = tuple[tuple[float, float], ...]


def color(code: str) -> np.ndarray:
    """Return the (3, 1) linear RGB of an sRGB code such as "e8b04a"."""
    encoded = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float64) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)[:, None]


def mix(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Return first * (1 - amount) + second * amount, amount (R,) clipped to [0, 1]."""
    amount = np.clip(amount, np.float32(0), np.float32(1))
    return first + (second - first) * amount


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """Return a ramp from 0 to 1 as a signed distance (metres) crosses zero within `width`."""
    return np.clip(distance / np.float32(width) + np.float32(0.5), np.float32(0), np.float32(1))


def _noise_lattice() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(20231)).random((LATTICE,) * 3, np.float32)


@dataclass(frozen=True)
class Noise:
    """Smooth value noise in [0, 1] on a repeating lattice."""

    lattice: np.ndarray = field(default_factory=_noise_lattice, repr=False)

    def octave(self, points: np.ndarray) -> np.ndarray:
        """Return (R,) noise of feature size one at (3, R) points."""
        cell = np.floor(points)
        t = points - cell
        t = t * t * (3 - 2 * t)
        low = cell.astype(np.int32) % LATTICE
        high = (low + 1) % LATTICE
        flat = self.lattice.ravel()
        rows = [(x * LATTICE + y) * LATTICE for x in (low[0], high[0]) for y in (low[1], high[1])]
        a, b, c, d = (flat[row + low[2]] * (1 - t[2]) + flat[row + high[2]] * t[2] for row in rows)
        near, far = a + (b - a) * t[1], c + (d - c) * t[1]
        return near + (far - near) * t[0]

    def cloud(self, points: np.ndarray, octaves: int) -> np.ndarray:
        """Return (R,) noise in [0, 1] summed over octaves, each half as strong and twice as fine."""
        total = np.zeros(points.shape[1], np.float32)
        weight, norm = 1.0, 0.0
        for octave in range(octaves):
            total += np.float32(weight) * self.octave(points * np.float32(2**octave) + np.float32(7.3 * octave))
            norm += weight
            weight /= 2
        return total / np.float32(norm)


# Letters in the unit square, y up: lists of strokes, each a polyline.
_BOWL: Stroke = ((0.1, 1.0), (0.6, 1.0), (0.85, 0.9), (0.85, 0.6), (0.6, 0.5), (0.1, 0.5))
GLYPHS: dict[str, tuple[Stroke, ...]] = {
    "A": (((0.05, 0.0), (0.5, 1.0), (0.95, 0.0)), ((0.22, 0.36), (0.78, 0.36))),
    "D": (((0.12, 0.0), (0.12, 1.0), (0.55, 1.0), (0.82, 0.82), (0.9, 0.5), (0.82, 0.18), (0.55, 0.0), (0.12, 0.0)),),
    "E": (((0.85, 0.0), (0.15, 0.0), (0.15, 1.0), (0.85, 1.0)), ((0.15, 0.52), (0.75, 0.52))),
    "G": (
        ((0.88, 0.82), (0.68, 0.98), (0.4, 1.0), (0.17, 0.82), (0.08, 0.5), (0.17, 0.18), (0.4, 0.0), (0.7, 0.02)),
        ((0.7, 0.02), (0.9, 0.18), (0.9, 0.45), (0.58, 0.45)),
    ),
    "K": (((0.14, 0.0), (0.14, 1.0)), ((0.88, 1.0), (0.14, 0.4)), ((0.42, 0.62), (0.92, 0.0))),
    "L": (((0.18, 1.0), (0.18, 0.0), (0.86, 0.0)),),
    "M": (((0.04, 0.0), (0.1, 1.0), (0.5, 0.3), (0.9, 1.0), (0.96, 0.0)),),
    "N": (((0.12, 0.0), (0.12, 1.0), (0.88, 0.0), (0.88, 1.0)),),
    "R": (((0.1, 0.0), (0.1, 1.0)), _BOWL, ((0.5, 0.5), (0.9, 0.0))),
    "S": (
        ((0.85, 0.84), (0.66, 0.98), (0.36, 1.0), (0.14, 0.86), (0.16, 0.66), (0.36, 0.55), (0.64, 0.46)),
        ((0.64, 0.46), (0.86, 0.34), (0.88, 0.14), (0.66, 0.01), (0.34, 0.0), (0.12, 0.15)),
    ),
    "*": tuple(
        ((0.5, 0.5), (0.5 + 0.5 * float(np.sin(a)), 0.5 + 0.5 * float(np.cos(a)))) for a in np.arange(5) * 2 * np.pi / 5
    ),
}


def glyph_distance(letter: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (R,) distances to the strokes of a letter, in units of its height; x, y: (R,) in the unit square."""
    nearest = np.full(x.shape, np.float32(4))
    for stroke in GLYPHS[letter]:
        for (x0, y0), (x1, y1) in zip(stroke[:-1], stroke[1:], strict=True):
            dx, dy = x1 - x0, y1 - y0
            t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), np.float32(0), np.float32(1))
            nearest = np.minimum(nearest, np.hypot(x - (x0 + t * dx), y - (y0 + t * dy)))
    return nearest.astype(np.float32)


def plain(code: str) -> Texture:
    """Return a texture of one colour."""
    paint = color(code)
    return lambda points, normals: np.repeat(paint, points.shape[1], axis=1)


def letter_block(letters: str, half: float, paints: tuple[str, str, str], noise: Noise) -> Texture:
    """Return the texture of a wooden alphabet block with one letter on each of the faces +x -x +y -y +z -z.

    paints: sRGB codes of the letters and frames on the x, y and z faces.
    """
    wood, grain = color("f0d9ae"), color("d9b47c")

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        axis = np.argmax(np.abs(normals), axis=0)
        streaks = noise.cloud(points * np.array([[4.0], [4.0], [26.0]], np.float32) + np.float32(3), 2)
        result = mix(wood, grain, (streaks - np.float32(0.35)) * np.float32(1.6))
        for face, letter in enumerate(letters):
            chosen = np.nonzero((axis == face // 2) & ((normals[face // 2] > 0) == (face % 2 == 0)))[0]
            u, v = _face_coordinates(points[:, chosen] / np.float32(half), face)
            border = np.maximum(np.abs(u), np.abs(v)) - np.float32(0.84)
            stroke = np.float32(0.13) - glyph_distance(letter, (u + 0.5), (v + 0.5))
            paint = np.maximum(step(border, 0.04), step(stroke, 0.04))
            result[:, chosen] = mix(result[:, chosen], color(paints[face // 2]), paint)
        return result

    return albedo


def _face_coordinates(unit: np.ndarray, face: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (R,) u to the right and v up in [-1, 1] as someone sees who looks at that face from outside."""
    sign = np.float32(1 if face % 2 == 0 else -1)
    if face // 2 == 0:
        return sign * unit[1], unit[2]
    if face // 2 == 1:
        return -sign * unit[0], unit[2]
    return unit[0], sign * unit[1]


def checker(size: float, first: str, second: str, noise: Noise, marble: float) -> Texture:
    """Return square tiles of `size` metres with joints and `marble` strength of cloudy veins."""
    one, two, joint = color(first), color(second), color("8d8577")

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        x, y = points[0] / np.float32(size), points[1] / np.float32(size)
        edge_x, edge_y = np.abs(x - np.round(x)), np.abs(y - np.round(y))
        odd = (np.floor(x) + np.floor(y)) % 2
        veins = noise.cloud(points * np.float32(2.2) + odd * np.float32(5.5), 3) - np.float32(0.5)
        tiles = np.where(odd > 0, one, two) * (1 + np.float32(marble) * veins)
        near_joint = np.float32(0.03) - np.minimum(edge_x, edge_y)
        return np.clip(mix(tiles, joint, step(near_joint, 0.03) * np.float32(0.8)), 0, 1)

    return albedo


def segments(codes: tuple[str, ...], cap: str) -> Texture:
    """Return the gores of a beach ball: one colour per sector of longitude, and caps at the poles."""
    paints = np.concatenate([color(code) for code in codes], axis=1)

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        turn = np.arctan2(points[1], points[0]) / np.float32(2 * np.pi) % 1
        result = paints[:, np.minimum((turn * len(codes)).astype(np.int64), len(codes) - 1)]
        return mix(result, color(cap), step(np.abs(normals[2]) - np.float32(0.93), 0.02))

    return albedo


def bands(codes: tuple[str, ...], height: float) -> Texture:
    """Return horizontal stripes of `height` metres that repeat the given colours."""
    paints = np.concatenate([color(code) for code in codes], axis=1)
    return lambda points, normals: paints[:, np.floor(points[2] / np.float32(height)).astype(np.int64) % len(codes)]


def marble(light: str, dark: str, noise: Noise, scale: float) -> Texture:
    """Return veins: a sine of a position that noise has bent; `scale` features per metre."""

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        bent = noise.cloud(points * np.float32(scale), 3)
        wave = np.sin((points[0] + points[2] * np.float32(0.6)) * np.float32(scale * 1.6) + bent * np.float32(9))
        return mix(color(light), color(dark), (np.float32(1) - np.abs(wave)) ** 2)

    return albedo


def dots(ground: str, paint: str, count: int, radius: float) -> Texture:
    """Return `count` round dots of angular `radius` (radians) spread evenly over a ball."""
    index = np.arange(count) + 0.5
    z, turn = 1 - 2 * index / count, index * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - z * z)
    centers = np.stack((ring * np.cos(turn), ring * np.sin(turn), z), axis=1).astype(np.float32)

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        nearest = (centers @ (points / np.sqrt((points**2).sum(axis=0)))).max(axis=0)
        return mix(color(ground), color(paint), step(nearest - np.float32(np.cos(radius)), 0.02))

    return albedo


def label(letters: str, ground: str, paint: str, band: str, radius: float, height: float) -> Texture:
    """Return the paper of a tin: letters around a cylinder of that size, a coloured band above and below."""

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        turn = np.arctan2(points[1], points[0]) / np.float32(2 * np.pi) % 1 * len(letters)
        cell = np.minimum(turn.astype(np.int64), len(letters) - 1)
        width = 2 * np.pi * radius / len(letters)
        glyph_height = 0.42 * height
        u = (turn - cell - np.float32(0.5)) * np.float32(width / (glyph_height * 0.8)) + np.float32(0.5)
        v = points[2] / np.float32(glyph_height) + np.float32(0.5)
        result = np.repeat(color(ground), points.shape[1], axis=1)
        for position, letter in enumerate(letters):
            chosen = np.nonzero(cell == position)[0]
            stroke = np.float32(0.1) - glyph_distance(letter, u[chosen], v[chosen])
            result[:, chosen] = mix(result[:, chosen], color(paint), step(stroke, 0.05))
        trim = np.abs(points[2]) - np.float32(0.36 * height)
        metal = mix(result, color(band), step(trim, 0.01))
        return np.where(np.abs(normals[2]) > 0.5, color("c9cdd2"), metal)

    return albedo


def sky(noise: Noise) -> Texture:
    """Return soft clouds on a gradient from a warm horizon to a blue zenith (points are unit directions)."""
    horizon, zenith, cloud = color("dce9f2"), color("4f93d6"), color("ffffff")

    def albedo(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        up = np.clip(points[2], 0, 1)
        ground = mix(horizon, zenith, np.sqrt(up) * np.float32(1.15))
        stretched = points * np.array([[3.0], [3.0], [7.0]], np.float32)
        cover = noise.cloud(stretched + np.float32(11), 3)
        return mix(ground, cloud, (cover - np.float32(0.5)) * 3 * np.clip(up * 6, 0, 1))

    return albedo
