# SPDX-License-Identifier: Apache-2.0
"""Drawing views for people and measures: deterministic, no gradients, only the Gaussians that exist.

Letters: N rows of this rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan
from distributed.pixels import PixelPartition
from gaussian_renderer.views import gaussians_of, views_of
from masksplat.ops import Body
from masksplat.types import ProjectionSettings, Splats
from scene.cameras import Camera


@dataclass(frozen=True)
class RenderedView:
    """One drawn view.

    rgb: (H, W, 3) in [0, 1], clamped. alpha: (H, W) coverage in [0, 1].
    depth: (H, W) expected camera z of what covers the pixel, world units; 0 where nothing does.
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


def existing(params: Mapping[str, Tensor], keep: Tensor | None) -> Mapping[str, Tensor]:
    """The rows of `params` where `keep` (N,) is True; all of them without `keep`."""
    if keep is None or bool(keep.all()):
        return params
    return {name: values[keep] for name, values in params.items()}


def render_view(
    params: Mapping[str, Tensor],
    camera: Camera,
    *,
    sh_degree: int,
    background: Tensor,
    body: Body,
    keep: Tensor | None = None,
    antialiased: bool = False,
) -> RenderedView:
    """Draw the Gaussians that exist from `camera`, over `background` (3,) in [0, 1].

    Args: params: raw parameters, as in the table; sh_degree: the active degree; keep: (N,) bool, default all rows.
    """
    rows = existing(params, keep)
    settings = ProjectionSettings(sh_degree=sh_degree, antialiased=antialiased)
    splats = body.project(gaussians_of(rows), views_of([camera], background), settings)
    size = (camera.width, camera.height)
    frame = body.rasterize(splats, 0, size, background, has_backward=False)
    alpha = 1.0 - frame.transmittance
    depth = body.rasterize(_coloured_by_depth(splats), 0, size, torch.zeros_like(background), has_backward=False).rgb
    expected = torch.where(alpha > 0, depth[..., 0] / alpha.clamp_min(1e-6), 0.0)
    return RenderedView(frame.rgb.clamp(0.0, 1.0), alpha, expected)


def render_rgb(
    params: Mapping[str, Tensor],
    camera: Camera,
    *,
    sh_degree: int,
    background: Tensor,
    body: Body,
    antialiased: bool = False,
) -> Tensor:
    """Only the colours of `render_view`, (H, W, 3) in [0, 1]: half the work."""
    settings = ProjectionSettings(sh_degree=sh_degree, antialiased=antialiased)
    splats = body.project(gaussians_of(params), views_of([camera], background), settings)
    frame = body.rasterize(splats, 0, (camera.width, camera.height), background, has_backward=False)
    return frame.rgb.clamp(0.0, 1.0)


@dataclass(frozen=True)
class Shard:
    """The part of a model that this rank has: raw parameters of its rows, and their ids."""

    params: Mapping[str, Tensor]
    ids: Tensor

    @classmethod
    def existing(cls, params: Mapping[str, Tensor], ids: Tensor, keep: Tensor) -> Shard:
        """The rows where `keep` (N,) is True: what does not exist never travels."""
        return cls(existing(params, keep), ids[keep])


def render_on_ranks(
    shard: Shard,
    cameras: Sequence[Camera],
    settings: ProjectionSettings,
    *,
    background: Tensor,
    body: Body,
    communicator: Communicator,
) -> Tensor | None:
    """Draw up to W cameras, each on the rank of its number, from the shards of all ranks. All ranks.

    Returns: the colours of this rank's camera, (H, W, 3) in [0, 1], or None when there are fewer cameras than ranks.
    """
    views = views_of(cameras, background)
    splats = body.project(gaussians_of(shard.params), views, settings, ids=shard.ids)
    heights = [camera.height for camera in cameras]
    partition = PixelPartition.of_whole_views(heights, range(len(cameras)), communicator.size)
    received = ExchangePlan.for_partition(communicator, splats, partition, sizes=views.sizes).forward(splats)
    if communicator.rank >= len(cameras):
        return None
    frame = body.rasterize(received, 0, views.sizes[communicator.rank], background, has_backward=False)
    return frame.rgb.clamp(0.0, 1.0)


def _coloured_by_depth(splats: Splats) -> Splats:
    """The same splats with their camera z in the red channel."""
    rows = splats.rows.clone()
    rows[:, 6:9] = splats.depths[:, None]
    return replace(splats, rows=rows)
