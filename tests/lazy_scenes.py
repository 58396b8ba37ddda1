# SPDX-License-Identifier: Apache-2.0
"""A table that is trained densely and lazily side by side, with everything that can go wrong with floats in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernel_scenes import parameters_of, random_scene, with_parameters
from masksplat.lazy import LazyRows
from masksplat.ops import Body
from masksplat.types import AdamStep, Gaussians, Optimizer, ProjectionSettings, Splats, Statistics, Views

NUM_VIEWS = 8
SIZE = (50, 40)
FIRST_UPDATE = 40


def turning_views(dtype: torch.dtype) -> Views:
    """Cameras that look in different directions, so that each sees a part of the Gaussians."""
    _, views, _ = random_scene(1, SIZE, dtype=dtype, num_views=NUM_VIEWS)
    for k in range(NUM_VIEWS):
        angle = 0.9 * k
        turn = torch.eye(4, dtype=torch.float64)
        turn[0, 0] = turn[2, 2] = math.cos(angle)
        turn[0, 2], turn[2, 0] = math.sin(angle), -math.sin(angle)
        turn[:3, 3] = turn[:3, :3] @ torch.tensor([0.0, 0.0, -4.0], dtype=torch.float64)
        views.viewmats[k] = turn.to(dtype)
    return views


def chosen(views: Views, numbers: list[int]) -> Views:
    """Some of the views."""
    return Views(views.viewmats[numbers], views.intrinsics[numbers], tuple(views.sizes[k] for k in numbers))


def numbers_of_step(update: int) -> list[int]:
    """One view or two; some are seldom drawn."""
    first = (update * update // 3) % NUM_VIEWS
    return [first, (first + 3) % NUM_VIEWS] if update % 5 == 0 else [first]


def adam_steps(update: int, rate: float) -> tuple[AdamStep, ...]:
    """Numbers that differ from attribute to attribute and from update to update."""
    return tuple(AdamStep(rate * (1 + 0.3 * k + 0.1 * (update % 7)), 0.9, 0.999, 1e-15, update) for k in range(6))


def awkward_moments(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Moments (count, 15, 3) of every size: none, ordinary, about to underflow, denormal, -0."""
    generator = torch.Generator().manual_seed(count)
    least = torch.finfo(dtype).tiny
    mean = torch.randn(count, 15, 3, generator=generator, dtype=torch.float64) * 1e-6
    square = (mean * torch.rand(count, 15, 3, generator=generator, dtype=torch.float64) * 3).square()
    kind = torch.arange(count * 45).reshape(count, 15, 3) % 11
    mean = torch.where(kind == 1, mean.sign() * least * 30, mean)
    square = torch.where(kind == 2, least * 1.01, square)
    mean, square = torch.where(kind == 3, mean.sign() * least / 8, mean).to(dtype), square.to(dtype)
    for rows in (slice(0, count // 6), slice(count // 6, count // 5)):
        mean[rows], square[rows] = 0.0, 0.0
    mean[kind == 4] = -0.0
    square[kind == 5] = 0.0
    return mean, square


@dataclass
class Twin:
    """One of two tables: its Gaussians, moments and statistics; `lazy` where its rows may be behind."""

    gaussians: Gaussians
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    statistics: Statistics

    @classmethod
    def of_scene(cls, count: int, dtype: torch.dtype, device: torch.device, degree: int = 3) -> Twin:
        """The same numbers each time."""
        gaussians, _, _ = random_scene(count, SIZE, seed=7, dtype=dtype, log_scale=-2.0)
        gaussians.means[:, :2] *= 1.5
        gaussians.means[:, 2] -= 4
        mean, square = awkward_moments(count, dtype)
        width = (degree + 1) ** 2 - 1
        tensors = [t.to(device) for t in parameters_of(gaussians)]
        tensors[5] = tensors[5][:, :width].contiguous()
        tensors[5][::9] = 0.0
        first = [torch.zeros_like(t) for t in tensors[:5]] + [mean[:, :width].to(device).contiguous()]
        second = [torch.zeros_like(t) for t in tensors[:5]] + [square[:, :width].to(device).contiguous()]
        zeros = torch.zeros(count, dtype=dtype, device=device)
        table = with_parameters(gaussians, tensors)
        return cls(table, first, second, Statistics(zeros, zeros.clone()))

    def make_lazy(self, body: Body, update: int) -> LazyRows:
        """Let its rows be behind from now on."""
        lazy = body.lazy_rows(self.gaussians.shN, self.exp_avg[5], self.exp_avg_sq[5], update)
        assert lazy is not None
        self.gaussians = replace(self.gaussians, lazy=lazy)
        return lazy

    def project(self, body: Body, views: Views, degree: int) -> Splats:
        return body.project(self.gaussians, views, ProjectionSettings(sh_degree=degree))

    def update(self, body: Body, views: Views, degree: int, splats: Splats, d_rows: Tensor, update: int) -> Tensor:
        return body.project_backward_update(
            self.gaussians, views, ProjectionSettings(sh_degree=degree), splats, d_rows,
            optimizer=Optimizer(tuple(self.exp_avg), tuple(self.exp_avg_sq), adam_steps(update, 1e-3)),
            statistics=self.statistics, gradient_scale=0.25,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [*parameters_of(self.gaussians), *self.exp_avg, *self.exp_avg_sq, *self.statistics]


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Equality that tells -0 from 0."""
    kind = torch.int32 if one.dtype == torch.float32 else torch.int64
    return one.dtype == two.dtype and torch.equal(one.contiguous().view(kind), two.contiguous().view(kind))


def gradients_of(count: int, update: int) -> Tensor:
    """(count, 10), the gradient of each Gaussian's splats in an update; one in eight has none."""
    generator = torch.Generator().manual_seed(update)
    values = torch.randn(count, 10, generator=generator) * 1e-4
    values[torch.rand(count, generator=generator) < 0.125] = 0.0
    return values
