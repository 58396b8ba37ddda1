# SPDX-License-Identifier: Apache-2.0
"""Small scenes for tests of masksplat, and a scalar oracle written straight from the formulas.

The oracle is numpy and Python loops; it shares no code with the bodies. Finite differences are only meaningful away
from the thresholds of compositing (alpha at 1/255 and 0.99, T at 1e-4) and from the colour clamp, so `Margins` measures
how near a scene comes, and the tests assert that the nearest threshold is much farther than a difference step.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from masksplat.types import Gaussians, ProjectionSettings, Splats, Views

PARAMETERS = ("means", "quats", "scales", "opacities", "sh0", "shN")


def random_scene(
    count: int,
    size: tuple[int, int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    num_views: int = 1,
    log_scale: float = -1.5,
    sh_degree: int = 3,
) -> tuple[Gaussians, Views, Tensor]:
    """Gaussians in front of `num_views` slightly turned cameras, and masks that mix 0, 1 and fractions."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(count, 3)) * (1.2, 0.9, 0.6) + (0, 0, 4)
    arrays = (
        means,
        rng.normal(size=(count, 4)),
        rng.normal(size=(count, 3)) * 0.4 + log_scale,
        rng.normal(size=count) * 1.5 + 0.5,
        rng.normal(size=(count, 3)) * 0.4,
        rng.normal(size=(count, (sh_degree + 1) ** 2 - 1, 3)) * 0.1,
    )
    gaussians = Gaussians(*(torch.tensor(array, dtype=dtype) for array in arrays))
    masks = torch.tensor(rng.choice([0.0, 1.0, 0.3, 0.8], size=count, p=[0.35, 0.35, 0.15, 0.15]), dtype=dtype)
    return gaussians, make_views(size, num_views=num_views, dtype=dtype), masks


def make_views(size: tuple[int, int], *, num_views: int = 1, dtype: torch.dtype = torch.float64) -> Views:
    """Cameras near the origin that look along +z, with an off-centre principal point and fx != fy."""
    width, height = size
    intrinsics = torch.tensor([[1.0 * width, 0, 0.47 * width], [0, 1.1 * width, 0.55 * height], [0, 0, 1]])
    matrices = []
    for view in range(num_views):
        angle = 0.1 * view + 0.05
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[0, 0] = matrix[2, 2] = math.cos(angle)
        matrix[0, 2], matrix[2, 0] = math.sin(angle), -math.sin(angle)
        matrix[:3, 3] = torch.tensor([-0.2 * view - 0.1, 0.07, 0.1], dtype=torch.float64)
        matrices.append(matrix)
    return Views(
        torch.stack(matrices).to(dtype), intrinsics.to(dtype).expand(num_views, 3, 3).clone(), (size,) * num_views
    )


def with_parameters(gaussians: Gaussians, tensors: list[Tensor] | tuple[Tensor, ...]) -> Gaussians:
    """The Gaussians with their six tensors replaced, in the order of PARAMETERS."""
    return dataclasses.replace(gaussians, **dict(zip(PARAMETERS, tensors, strict=True)))


def parameters_of(gaussians: Gaussians) -> list[Tensor]:
    return [getattr(gaussians, name) for name in PARAMETERS]


@dataclass
class Margins:
    """Smallest distance to each threshold that any (pixel, splat) pair of a scene has."""

    alpha_min: float = math.inf
    alpha_max: float = math.inf
    end: float = math.inf
    num_skipped: int = 0
    num_capped: int = 0
    num_ended: int = 0

    def smallest(self) -> float:
        """The nearest of all."""
        return min(self.alpha_min, self.alpha_max, self.end)


@dataclass
class ScalarImage:
    rgb: np.ndarray
    transmittance: np.ndarray
    scores_max: np.ndarray  # per packed row of the view
    scores_sum: np.ndarray
    margins: Margins


def composite_ray(alphas, masks, colors, background):
    """Colour, transmittance and blend weights of one ray: the forward rule, nothing else."""
    light, color, weights = 1.0, np.zeros(3), np.zeros(len(alphas))
    for i, (alpha, mask) in enumerate(zip(alphas, masks, strict=True)):
        after = light * (1.0 - mask * alpha)
        if after < 1e-4:
            break
        weights[i] = mask * alpha * light
        color = color + weights[i] * colors[i]
        light = after
    return color + light * np.asarray(background), light, weights


def scalar_image(splats: Splats, view: int, size: tuple[int, int], background) -> ScalarImage:
    """Every pixel against every splat of the view, by loops in float64: boxes and tiles are not consulted."""
    first, last = splats.view_range(view)
    rows = splats.rows[first:last].detach().double().numpy()
    depths, ids = splats.depths[first:last].double().numpy(), splats.ids[first:last].numpy()
    order = sorted(range(len(rows)), key=lambda i: (depths[i], ids[i]))
    width, height = size
    image = ScalarImage(
        np.zeros((height, width, 3)), np.zeros((height, width)), np.zeros(len(rows)), np.zeros(len(rows)), Margins()
    )
    for py in range(height):
        for px in range(width):
            kept, alphas = [], []
            for i in order:
                x, y, a, b, c, opacity = rows[i, :6]
                dx, dy = px + 0.5 - x, py + 0.5 - y
                raw = opacity * math.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
                _measure_alpha(image.margins, raw)
                if min(0.99, raw) >= 1 / 255:
                    kept.append(i)
                    alphas.append(min(0.99, raw))
            masks, colors = rows[kept, 9], rows[kept, 6:9]
            color, light, weights = composite_ray(alphas, masks, colors, background)
            _measure_end(image.margins, alphas, masks)
            image.rgb[py, px], image.transmittance[py, px] = color, light
            np.maximum.at(image.scores_max, kept, weights)
            np.add.at(image.scores_sum, kept, weights)
    return image


def _measure_alpha(margins: Margins, raw: float) -> None:
    margins.alpha_min = min(margins.alpha_min, abs(raw - 1 / 255) * 255)
    margins.alpha_max = min(margins.alpha_max, abs(raw - 0.99))
    margins.num_skipped += raw < 1 / 255
    margins.num_capped += raw > 0.99


def _measure_end(margins: Margins, alphas, masks) -> None:
    light = 1.0
    for alpha, mask in zip(alphas, masks, strict=True):
        light *= 1.0 - mask * alpha
        margins.end = min(margins.end, abs(light - 1e-4) / 1e-4)
        if light < 1e-4:
            margins.num_ended += 1
            return


def settings_for(degree: int | None = 3, **changes) -> ProjectionSettings:
    return ProjectionSettings(sh_degree=degree, **changes)
