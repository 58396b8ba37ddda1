# SPDX-License-Identifier: Apache-2.0
"""Gaussians to splats: activations, EWA projection, spherical harmonics, exact pixel bounds.

`select_visible` decides without gradients which Gaussians become splats; `splat_rows` computes their packed rows
differentiably, so that no culled Gaussian, however wild its numbers, reaches the gradient.

Legend: N Gaussians, B views, n selected Gaussians of one view, M packed splats of all views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from masksplat.reference.harmonics import sh_colors
from masksplat.types import (
    ALPHA_MIN,
    SLOT_NO_PIXEL,
    SLOT_UNSEEN,
    TILE,
    Gaussians,
    ProjectionSettings,
    Splats,
    Views,
)

MARGIN_T = 0.01
"""Added to 2 ln(255 opacity), so that rounding of alpha never finds a pixel outside the box."""

MARGIN_PIXELS = 0.01

FRUSTUM_MARGIN = 0.3
"""x/z and y/z are clamped this share of half the image beyond its edges in the Jacobian (3DGS, gsplat)."""


@dataclass(frozen=True)
class Pinhole:
    """One view's numbers: rotation (3, 3), translation (3,), focal lengths and principal point in pixels."""

    rotation: Tensor
    translation: Tensor
    fx: Tensor
    fy: Tensor
    cx: Tensor
    cy: Tensor
    width: int
    height: int

    @property
    def center(self) -> Tensor:
        """(3,) camera centre in world units."""
        return -self.rotation.T @ self.translation


class ScreenGeometry(NamedTuple):
    """Projected geometry of n Gaussians: mean (n, 2) pixels, covariance (n, 3) = xx, xy, yy pixel^2, depth (n,)."""

    mean: Tensor
    covariance: Tensor
    depth: Tensor


def pinhole(views: Views, view: int) -> Pinhole:
    """The camera of one view."""
    matrix, intrinsics = views.viewmats[view], views.intrinsics[view]
    width, height = views.sizes[view]
    return Pinhole(
        matrix[:3, :3],
        matrix[:3, 3],
        intrinsics[0, 0],
        intrinsics[1, 1],
        intrinsics[0, 2],
        intrinsics[1, 2],
        width,
        height,
    )


def rotation_matrices(quats: Tensor) -> Tensor:
    """(n, 3, 3) rotations of quaternions (n, 4) w, x, y, z, which are normalised first."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    entries = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(entries, dim=-1).reshape(*quats.shape[:-1], 3, 3)


def jacobians(points: Tensor, camera: Pinhole) -> Tensor:
    """(n, 2, 3) derivative of the pixel position at camera-space `points` (n, 3), as EWA uses it.

    x/z and y/z are clamped to the frustum widened by FRUSTUM_MARGIN; a clamped ratio has no gradient.
    """
    x, y, z = points.unbind(-1)
    margin_x = FRUSTUM_MARGIN * 0.5 * camera.width / camera.fx
    margin_y = FRUSTUM_MARGIN * 0.5 * camera.height / camera.fy
    u = torch.clamp(x / z, -camera.cx / camera.fx - margin_x, (camera.width - camera.cx) / camera.fx + margin_x)
    v = torch.clamp(y / z, -camera.cy / camera.fy - margin_y, (camera.height - camera.cy) / camera.fy + margin_y)
    zero = torch.zeros_like(z)
    row_x = torch.stack((camera.fx / z, zero, -camera.fx * u / z), dim=-1)
    row_y = torch.stack((zero, camera.fy / z, -camera.fy * v / z), dim=-1)
    return torch.stack((row_x, row_y), dim=-2)


def screen_geometry(gaussians: Gaussians, camera: Pinhole, activated: bool) -> ScreenGeometry:
    """Projected means and covariances (without the low-pass) of Gaussians in front of the camera.

    cov2d = J W R S S^T R^T W^T J^T with J of `jacobians`, W the camera rotation (EWA, Zwicker et al. 2001).
    """
    points = gaussians.means @ camera.rotation.T + camera.translation
    x, y, z = points.unbind(-1)
    mean = torch.stack((camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy), dim=-1)
    scales = gaussians.scales if activated else torch.exp(gaussians.scales)
    to_screen = jacobians(points, camera) @ camera.rotation
    half = to_screen @ (rotation_matrices(gaussians.quats) * scales[:, None, :])  # cov2d = half half^T
    top, bottom = half.unbind(-2)
    covariance = torch.stack(((top * top).sum(-1), (top * bottom).sum(-1), (bottom * bottom).sum(-1)), dim=-1)
    return ScreenGeometry(mean, covariance, z)


def _determinant(covariance: Tensor, eps2d: float) -> Tensor:
    xx, xy, yy = covariance.unbind(-1)
    return (xx + eps2d) * (yy + eps2d) - xy * xy


def final_opacities(raw: Tensor, covariance: Tensor, settings: ProjectionSettings) -> Tensor:
    """(n,) opacities in [0, 1]; antialiased ones are multiplied by sqrt(max(0, det(cov) / det(cov + eps2d I)))."""
    opacities = raw if settings.activated else torch.sigmoid(raw)
    if not settings.antialiased:
        return opacities
    ratio = _determinant(covariance, 0.0) / _determinant(covariance, settings.eps2d)
    positive = ratio > 0
    return opacities * torch.where(positive, torch.sqrt(torch.where(positive, ratio, 1.0)), 0.0)


def splat_rows(gaussians: Gaussians, masks: Tensor, camera: Pinhole, settings: ProjectionSettings) -> Tensor:
    """(n, 10) packed rows of Gaussians that `select_visible` has chosen; differentiable. `masks` (n,)."""
    geometry = screen_geometry(gaussians, camera, settings.activated)
    xx, xy, yy = geometry.covariance.unbind(-1)
    det = _determinant(geometry.covariance, settings.eps2d)
    conic = ((yy + settings.eps2d) / det, -xy / det, (xx + settings.eps2d) / det)
    opacities = final_opacities(gaussians.opacities, geometry.covariance, settings)
    if settings.sh_degree is None:
        colors = gaussians.sh0
    else:
        directions = F.normalize(gaussians.means - camera.center, dim=-1)
        colors = sh_colors(directions, gaussians.sh0, gaussians.shN, settings.sh_degree)
    columns = (*geometry.mean.unbind(-1), *conic, opacities, *colors.unbind(-1), masks)
    return torch.stack(columns, dim=-1)


def take(gaussians: Gaussians, index: Tensor) -> Gaussians:
    """The Gaussians of the given rows (n,), differentiable."""
    columns = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh0, gaussians.shN)
    return Gaussians(*(column.index_select(0, index) for column in columns))


def _touches_tile_grid(geometry: ScreenGeometry, eps2d: float, camera: Pinhole) -> Tensor:
    """(n,) the rectangle of 16 x 16 tiles that 3DGS gives the splat is not empty.

    3DGS takes the square of half size ceil(3 sqrt(lambda_max)), truncates its edges to tiles towards zero, and
    places pixel centres at integers, hence the half pixel.
    """
    middle = 0.5 * (geometry.covariance[:, 0] + geometry.covariance[:, 2]) + eps2d
    spread = (middle * middle - _determinant(geometry.covariance, eps2d)).clamp(min=0.1)
    radius = torch.ceil(3.0 * torch.sqrt(middle + torch.sqrt(spread)))[:, None]
    mean = geometry.mean - 0.5
    grid = mean.new_tensor([-(-camera.width // TILE), -(-camera.height // TILE)])
    first = torch.minimum(torch.trunc((mean - radius) / TILE).clamp(min=0), grid)
    last = torch.minimum(torch.trunc((mean + radius + (TILE - 1)) / TILE).clamp(min=0), grid)
    return (last > first).all(dim=-1)


def _pixel_boxes(geometry: ScreenGeometry, opacities: Tensor, eps2d: float, camera: Pinhole) -> Tensor:
    """(n, 4) int32 x0, y0, x1, y1, half open: pixels where alpha can reach 1/255; empty boxes are all zero.

    alpha >= 1/255 inside the ellipse d^T conic d <= t = 2 ln(255 opacity), whose half extents are sqrt(t cov).
    """
    t = 2.0 * torch.log(opacities / ALPHA_MIN) + MARGIN_T
    variances = geometry.covariance[:, 0::2] + eps2d
    half = torch.sqrt(t.clamp(min=0.0)[:, None] * variances) + MARGIN_PIXELS
    limit = torch.tensor([camera.width, camera.height], dtype=half.dtype, device=half.device)
    low = torch.minimum(torch.ceil(geometry.mean - half - 0.5).clamp(min=0.0), limit)
    high = torch.minimum((torch.floor(geometry.mean + half - 0.5) + 1).clamp(min=0.0), limit)
    boxes = torch.cat((low, high), dim=-1).to(torch.int32)
    is_empty = (opacities < ALPHA_MIN) | (high <= low).any(dim=-1)
    return torch.where(is_empty[:, None], 0, boxes)


@torch.no_grad()
def select_visible(
    gaussians: Gaussians, camera: Pinhole, settings: ProjectionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Which Gaussians become splats of one view.

    Returns:
        slots (N,) int32: 0 for a splat, else SLOT_UNSEEN or SLOT_NO_PIXEL; boxes (n, 4) int32; depths (n,), both in
        the order of the splats' rows.
    """
    slots = torch.full((len(gaussians),), SLOT_UNSEEN, dtype=torch.int32, device=gaussians.means.device)
    z = gaussians.means @ camera.rotation[2] + camera.translation[2]
    in_front = torch.nonzero((z > settings.near_plane) & (z < settings.far_plane))[:, 0]
    candidates = take(gaussians, in_front)
    geometry = screen_geometry(candidates, camera, settings.activated)
    opacities = final_opacities(candidates.opacities, geometry.covariance, settings)
    seen = (_determinant(geometry.covariance, settings.eps2d) > 0) & torch.isfinite(geometry.mean).all(dim=-1)
    seen &= _touches_tile_grid(geometry, settings.eps2d, camera)
    boxes = _pixel_boxes(geometry, opacities, settings.eps2d, camera)
    has_pixel = seen & (boxes[:, 2] > boxes[:, 0])
    slots[in_front[seen]] = SLOT_NO_PIXEL
    slots[in_front[has_pixel]] = 0
    return slots, boxes[has_pixel], geometry.depth[has_pixel]


def _project_view(
    gaussians: Gaussians, masks: Tensor, camera: Pinhole, settings: ProjectionSettings
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    slots, boxes, depths = select_visible(gaussians, camera, settings)
    index = torch.nonzero(slots == 0)[:, 0]
    rows = splat_rows(take(gaussians, index), masks.index_select(0, index), camera, settings)
    return rows, (slots, index, boxes, depths)


def project(
    gaussians: Gaussians,
    views: Views,
    settings: ProjectionSettings,
    *,
    masks: Tensor | None = None,
    ids: Tensor | None = None,
) -> Splats:
    """Splats of all views, row order inside a view is table order; `rows` carries the autograd graph.

    Args:
        gaussians: N Gaussians, raw or activated as the settings say.
        masks: (N,) in [0, 1], default 1.
        ids: (N,) int64, default the row number.
    """
    count, device = len(gaussians), gaussians.means.device
    masks = gaussians.means.new_ones(count) if masks is None else masks
    ids = torch.arange(count, device=device) if ids is None else ids
    rows, selections = [], []
    for view in range(len(views)):
        view_rows, selection = _project_view(gaussians, masks, pinhole(views, view), settings)
        rows.append(view_rows)
        selections.append(selection)
    offsets = torch.tensor([0, *(len(view_rows) for view_rows in rows)], dtype=torch.int64).cumsum(0)
    slots = torch.stack([selection[0] for selection in selections])
    for view, (_, index, _, _) in enumerate(selections):
        first, last = int(offsets[view]), int(offsets[view + 1])
        slots[view, index] = torch.arange(first, last, dtype=torch.int32, device=device)
    index = torch.cat([selection[1] for selection in selections])
    boxes = torch.cat([selection[2] for selection in selections])
    depths = torch.cat([selection[3] for selection in selections])
    return Splats(torch.cat(rows), depths, ids[index], index.to(torch.int32), boxes, offsets, slots)
