# SPDX-License-Identifier: Apache-2.0
"""The solids of the demo scene and their ray intersections, in vectorised numpy.

Legend: R rays or points. Vectors are stored component first, (3, R) float32, so that one component is contiguous.
World axes of this module: x right, y away, z up; lengths in metres. Knows nothing of light, colour or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

FAR = np.float32(1e9)
"""Distance that stands for "no hit", metres."""


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (R,) scalar products of two (3, R) fields (either may be (3, 1))."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return (3, R) vectors of length one; a zero vector stays zero."""
    return vectors / np.maximum(np.sqrt(dot(vectors, vectors)), np.float32(1e-12))


class Solid(Protocol):
    """A closed surface that a ray can hit from outside (the dome: from inside)."""

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return the (R,) distance to the first hit in front of the origin, `FAR` where there is none.

        origins: (3, R) or (3, 1); directions: (3, R) unit vectors.
        """
        ...

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) world points in the solid's own axes, centred on it."""
        ...

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return the (3, R) outward unit normals at world points of the surface."""
        ...

    def bounds(self) -> tuple[np.ndarray, float] | None:
        """Return centre (3,) and radius of a sphere around the solid; None for one that is everywhere."""
        ...


def _column(values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def _rotate(vectors: np.ndarray, yaw: float) -> np.ndarray:
    """Turn (3, R) vectors by `yaw` radians about the z axis."""
    cosine, sine = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    x, y, z = vectors
    return np.stack((cosine * x - sine * y, sine * x + cosine * y, np.broadcast_to(z, x.shape)))


@dataclass(frozen=True)
class Sphere:
    """A ball; local axes are turned by `yaw` about z."""

    center: tuple[float, float, float]
    radius: float
    yaw: float = 0.0

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return (R,) distances of the near intersection (rays start outside)."""
        offset = origins - _column(self.center)
        b = dot(offset, directions)
        discriminant = b * b - (dot(offset, offset) - np.float32(self.radius**2))
        distance = -b - np.sqrt(np.maximum(discriminant, np.float32(0)))
        return np.where((discriminant > 0) & (distance > 0), distance, FAR)

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) points relative to the centre, unturned."""
        return _rotate(points - _column(self.center), -self.yaw)

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return the (3, R) directions from the centre."""
        return normalized(points - _column(self.center))

    def bounds(self) -> tuple[np.ndarray, float]:
        """Return the ball itself."""
        return np.array(self.center, np.float32), self.radius


@dataclass(frozen=True)
class Dome:
    """The inside of a large ball around the whole scene: the sky."""

    radius: float

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return (R,) distances of the far intersection (rays start inside)."""
        b = dot(origins, directions)
        return -b + np.sqrt(np.maximum(b * b - dot(origins, origins) + np.float32(self.radius**2), np.float32(0)))

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) points divided by the radius: directions."""
        return points / np.float32(self.radius)

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return the (3, R) inward normals."""
        return normalized(-points)

    def bounds(self) -> None:
        """Return None: every ray hits the dome."""


@dataclass(frozen=True)
class Floor:
    """The disk z = 0 of a given radius, seen from above."""

    radius: float

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return (R,) distances to the disk for rays that go down."""
        falls = directions[2] < -1e-6
        distance = np.where(falls, -origins[2] / np.where(falls, directions[2], np.float32(-1)), FAR)
        x, y = origins[0] + distance * directions[0], origins[1] + distance * directions[1]
        return np.where(falls & (distance > 0) & (x * x + y * y < np.float32(self.radius**2)), distance, FAR)

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return the points unchanged."""
        return points

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) vectors that point up."""
        return np.broadcast_to(_column((0.0, 0.0, 1.0)), points.shape)

    def bounds(self) -> None:
        """Return None: the floor is too large for a bound to help."""


@dataclass(frozen=True)
class Box:
    """A box with the given half sizes, turned by `yaw` about the vertical."""

    center: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float = 0.0

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return (R,) distances by the slab test in the box's own axes."""
        origin, direction = self.local(origins), _rotate(directions, -self.yaw)
        inverse = 1 / np.where(np.abs(direction) < 1e-9, np.float32(1e-9), direction)
        half = _column(self.half)
        low, high = (-half - origin) * inverse, (half - origin) * inverse
        enters = np.minimum(low, high).max(axis=0)
        leaves = np.maximum(low, high).min(axis=0)
        return np.where((enters < leaves) & (enters > 0), enters, FAR)

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) points in the box's axes, metres from its centre."""
        return _rotate(points - _column(self.center), -self.yaw)

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return the (3, R) normal of the face nearest to each point."""
        local = self.local(points)
        axis = np.argmax(np.abs(local) - _column(self.half), axis=0)
        faces = np.where(np.arange(3)[:, None] == axis, np.sign(local), np.float32(0))
        return _rotate(faces.astype(np.float32), self.yaw)

    def bounds(self) -> tuple[np.ndarray, float]:
        """Return the ball through the corners."""
        return np.array(self.center, np.float32), float(np.linalg.norm(self.half))


@dataclass(frozen=True)
class Cylinder:
    """An upright, capped cylinder from z = bottom to z = bottom + height."""

    base: tuple[float, float, float]
    radius: float
    height: float
    yaw: float = 0.0

    @property
    def _center(self) -> tuple[float, float, float]:
        return self.base[0], self.base[1], self.base[2] + self.height / 2

    def intersect(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Return (R,) distances to the side or to a cap, whichever comes first."""
        offset = origins - _column(self._center)
        half = np.float32(self.height / 2)
        a = np.maximum(directions[0] ** 2 + directions[1] ** 2, np.float32(1e-12))
        b = offset[0] * directions[0] + offset[1] * directions[1]
        c = offset[0] ** 2 + offset[1] ** 2 - np.float32(self.radius**2)
        root = np.sqrt(np.maximum(b * b - a * c, np.float32(0)))
        slope = np.where(np.abs(directions[2]) < 1e-9, np.float32(1e-9), directions[2])
        low, high = (-half - offset[2]) / slope, (half - offset[2]) / slope
        enters = np.maximum((-b - root) / a, np.minimum(low, high))
        leaves = np.minimum((-b + root) / a, np.maximum(low, high))
        return np.where((b * b > a * c) & (enters < leaves) & (enters > 0), enters, FAR)

    def local(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) points relative to the middle of the axis, unturned."""
        return _rotate(points - _column(self._center), -self.yaw)

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Return (3, R) normals: radial on the side, vertical on the caps."""
        offset = points - _column(self._center)
        side = np.sqrt(offset[0] ** 2 + offset[1] ** 2) - np.float32(self.radius)
        on_cap = np.abs(offset[2]) - np.float32(self.height / 2) > side
        zero = np.zeros_like(offset[2])
        radial = normalized(np.stack((offset[0], offset[1], zero)))
        caps = np.stack((zero, zero, np.sign(offset[2])))
        return np.where(on_cap, caps, radial)

    def bounds(self) -> tuple[np.ndarray, float]:
        """Return the ball through the rims."""
        return np.array(self._center, np.float32), float(np.hypot(self.radius, self.height / 2))


def near_bound(solid: Solid, origins: np.ndarray, directions: np.ndarray) -> np.ndarray | None:
    """Return the indices of the rays that come near a solid, None for all of them.

    Costs a tenth of `intersect`, and most rays miss most solids.
    """
    bounds = solid.bounds()
    if bounds is None:
        return None
    offset = bounds[0][:, None] - origins
    along = dot(offset, directions)
    near = (dot(offset, offset) - along * along < np.float32(bounds[1] ** 2)) & (along > -np.float32(bounds[1]))
    return np.nonzero(near)[0]
