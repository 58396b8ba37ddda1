# SPDX-License-Identifier: Apache-2.0
"""Packed splats from gsplat's projection and spherical harmonics, and their gradient through gsplat's autograd.

gsplat keeps one row for every (view, Gaussian) pair, visible or not, so nothing is counted and the host never waits.
Rows that cannot be seen have an empty box.

Letters: N Gaussians, B views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masksplat.types import (
    ALPHA_MIN,
    SLOT_UNSEEN,
    GaussianGradients,
    Gaussians,
    ProjectionSettings,
    Splats,
    Views,
)

NUM_GEOMETRY_COLUMNS = 9
"""Columns of a row that depend on the parameters: all but the mask."""


@dataclass(frozen=True)
class ProjectionState:
    """What the backward needs: copies of the parameters that autograd knows, and the rows made of them (B * N, 9)."""

    leaves: tuple[Tensor, ...]
    rows: Tensor
    radii: Tensor  # (B * N, 2) int32, pixels


def project_with_gsplat(
    gsplat: Any, gaussians: Gaussians, views: Views, settings: ProjectionSettings, masks: Tensor | None, ids: Tensor
) -> Splats:
    """Splats of all views, row b * N + n for Gaussian n in view b. Args: gsplat: the imported package."""
    leaves = tuple(_leaf(values) for values in _parameters(gaussians))
    with torch.enable_grad():
        parts = [_project_view(gsplat, leaves, views, view, settings) for view in range(len(views))]
        rows = torch.cat([part[0] for part in parts])
    depths, radii = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    num_views, num_gaussians = len(views), len(gaussians)
    mask_column = torch.ones_like(gaussians.opacities) if masks is None else masks
    visible = (radii > 0).all(dim=1)
    order = torch.arange(num_views * num_gaussians, dtype=torch.int32, device=rows.device)
    slots = torch.where(visible, order, SLOT_UNSEEN).view(num_views, num_gaussians)
    return Splats(
        rows=torch.cat([rows.detach(), mask_column.repeat(num_views)[:, None]], dim=1),
        depths=depths,
        ids=ids.repeat(num_views),
        gaussians=order % max(num_gaussians, 1),
        boxes=_boxes(rows.detach(), radii, visible, views, num_gaussians),
        view_offsets=torch.arange(num_views + 1) * num_gaussians,
        slots=slots,
        state=ProjectionState(leaves, rows, radii),
    )


def backward_through_gsplat(splats: Splats, d_rows: Tensor) -> GaussianGradients:
    """Gradients of the parameters and masks, summed over views, from d_rows (B * N, 10)."""
    state: ProjectionState = splats.state
    means, quats, scales, opacities, sh0, shN = torch.autograd.grad(
        state.rows, state.leaves, d_rows[:, :NUM_GEOMETRY_COLUMNS], retain_graph=True, materialize_grads=True
    )
    d_masks = d_rows[:, NUM_GEOMETRY_COLUMNS].view(splats.slots.shape).sum(dim=0)
    return GaussianGradients(means, quats, scales, opacities, sh0, shN, d_masks)


def _parameters(gaussians: Gaussians) -> tuple[Tensor, ...]:
    return (
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh0, gaussians.shN
    )  # fmt: skip


def _leaf(values: Tensor) -> Tensor:
    """The same memory as a leaf of a new graph."""
    return values.detach().requires_grad_()


def _project_view(
    gsplat: Any, leaves: tuple[Tensor, ...], views: Views, view: int, settings: ProjectionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows (N, 9), depths (N,), radii (N, 2)) of one view."""
    means, quats, scales, opacities, sh0, shN = leaves
    if not settings.activated:
        scales, opacities = scales.exp(), opacities.sigmoid()
    viewmat, (width, height) = views.viewmats[view], views.sizes[view]
    radii, means2d, depths, conics, compensations = gsplat.fully_fused_projection(
        means, None, quats, scales, viewmat[None], views.intrinsics[view][None], width, height,
        eps2d=settings.eps2d, near_plane=settings.near_plane, far_plane=settings.far_plane,
        calc_compensations=settings.antialiased, opacities=opacities.detach(),
    )  # fmt: skip
    if settings.antialiased:
        opacities = opacities * compensations[0]
    colours = _colours(gsplat, means, sh0, shN, viewmat, settings.sh_degree, (radii[0] > 0).all(dim=1))
    rows = torch.cat([means2d[0], conics[0], opacities[:, None], colours], dim=1)
    return rows, depths[0].detach(), radii[0]


def _colours(
    gsplat: Any, means: Tensor, sh0: Tensor, shN: Tensor, viewmat: Tensor, degree: int | None, visible: Tensor
) -> Tensor:
    """(N, 3) colours in the view; those of Gaussians that cannot be seen are of no consequence."""
    if degree is None:
        return sh0
    centre = -viewmat[:3, :3].T @ viewmat[:3, 3]
    coefficients = torch.cat([sh0[:, None], shN], dim=1)
    return (gsplat.spherical_harmonics(degree, means - centre, coefficients, masks=visible) + 0.5).clamp(min=0.0)


def _boxes(rows: Tensor, radii: Tensor, visible: Tensor, views: Views, num_gaussians: int) -> Tensor:
    """(B * N, 4) int32 pixel boxes around what can reach alpha 1/255; gsplat's radii are that reach, rounded up."""
    largest = torch.tensor(views.sizes, dtype=rows.dtype).to(rows.device, non_blocking=True)
    largest = largest.repeat_interleave(num_gaussians, dim=0)
    reach = radii.to(rows.dtype)
    zero = torch.zeros_like(largest)
    low = torch.floor(rows[:, :2] - reach).clamp(min=zero, max=largest)
    high = torch.ceil(rows[:, :2] + reach).clamp(min=zero, max=largest)
    drawn = visible & (rows[:, 5] >= ALPHA_MIN)
    return (torch.cat([low, high], dim=1) * drawn[:, None]).to(torch.int32)
