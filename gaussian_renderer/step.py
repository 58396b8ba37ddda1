# SPDX-License-Identifier: Apache-2.0
"""The forward and backward of one training step: a palindrome of explicit calls, without an autograd graph.

Letters: N Gaussians of this rank, B views, M packed splats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaussian_renderer.phases import PhaseTimer
from gaussian_renderer.views import KERNEL_ATTRIBUTES, gaussians_of, views_of
from masksplat.ops import Body
from masksplat.types import AdamStep, Optimizer, ProjectionSettings, Statistics
from scene.cameras import Camera
from scene.gaussians import GaussianTable


@dataclass(frozen=True)
class Batch:
    """What one step trains on: B cameras, their photos (h, w, 3) uint8, and a background (3,) for each."""

    cameras: Sequence[Camera]
    photos: Sequence[Tensor]
    backgrounds: Sequence[Tensor]


@dataclass(frozen=True)
class StepSettings:
    """Numbers of the step that do not change while it runs.

    view_weight: weight of each view in the gradient. lambda_dssim: weight of 1 - SSIM.
    """

    projection: ProjectionSettings
    lambda_dssim: float
    view_weight: float


@dataclass(frozen=True)
class StepResult:
    """l1, ssim: means over the batch. d_mask: (N,) gradient of the masks. num_pairs: pairs evaluated."""

    l1: float
    ssim: float
    d_mask: Tensor
    num_splats: int
    num_pairs: int

    def image_loss(self, lambda_dssim: float) -> float:
        """(1 - lambda) L1 + lambda (1 - SSIM)."""
        return (1.0 - lambda_dssim) * self.l1 + lambda_dssim * (1.0 - self.ssim)


def draw_and_update(
    body: Body,
    table: GaussianTable,
    batch: Batch,
    mask: Tensor | None,
    settings: StepSettings,
    adam_steps: Sequence[AdamStep],
    phases: PhaseTimer,
) -> StepResult:
    """Draw the batch, compare it with the photos, and update every kernel attribute of the table in place.

    Args: mask: (N,) what each alpha is multiplied with, or None; adam_steps: one for each of KERNEL_ATTRIBUTES.
    """
    gaussians, views = gaussians_of(table.params), views_of(batch.cameras, table.params["means"])
    with phases("project"):
        splats = body.project(gaussians, views, settings.projection, masks=mask, ids=table.ids)
    d_rows = torch.zeros_like(splats.rows)
    l1 = ssim = num_pairs = 0.0
    for view, (photo, background) in enumerate(zip(batch.photos, batch.backgrounds, strict=True)):
        with phases("rasterize"):
            frame = body.rasterize(splats, view, views.sizes[view], background)
        with phases("loss"):
            loss = body.photometric(frame.rgb, photo, settings.lambda_dssim)
        with phases("rasterize backward"):
            body.rasterize_backward(splats, frame, loss.d_rgb, d_rows)
        l1, ssim, num_pairs = l1 + loss.l1, ssim + loss.ssim, num_pairs + int(frame.pairs_per_row.sum())
    with phases("project backward and Adam"):
        d_mask = body.project_backward_update(
            gaussians,
            views,
            settings.projection,
            splats,
            d_rows,
            optimizer=_optimizer(table, adam_steps),
            statistics=Statistics(table.statistics["grad_norm_sum"], table.statistics["view_count"]),
            gradient_scale=settings.view_weight,
        )
    count = len(batch.cameras)
    return StepResult(l1 / count, ssim / count, d_mask, len(splats), int(num_pairs))


def _optimizer(table: GaussianTable, adam_steps: Sequence[AdamStep]) -> Optimizer:
    return Optimizer(
        tuple(table.exp_avg[name] for name in KERNEL_ATTRIBUTES),
        tuple(table.exp_avg_sq[name] for name in KERNEL_ATTRIBUTES),
        tuple(adam_steps),
    )
