# SPDX-License-Identifier: Apache-2.0
"""The values that flow between the ops: what each holds, its shape and unit.

Legend: N Gaussians on this rank, B views, M packed splats (one row per visible (view, Gaussian) pair),
K SH bases ((degree + 1)^2), h, w pixels of a region. All float tensors of one call share dtype and device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from masksplat.lazy import LazyRows

ROW_COLUMNS = ("mean_x", "mean_y", "conic_a", "conic_b", "conic_c", "opacity", "r", "g", "b", "mask")
"""Column order of `Splats.rows` and of its gradient: pixels, 1/pixel^2, [0, 1], linear colour, [0, 1]."""

NUM_ROW_COLUMNS = len(ROW_COLUMNS)

SLOT_UNSEEN = -1
"""`Splats.slots`: the Gaussian is behind the near plane, or its 3-sigma square misses the image's tile grid."""

SLOT_NO_PIXEL = -2
"""`Splats.slots`: seen by the 3DGS rule (it counts in the densify statistics), but no pixel can reach alpha 1/255."""

TILE = 16
"""Edge of a tile in pixels; the unit in which views are cut over ranks and lists of splats are kept."""

ALPHA_MAX = 0.99
"""Alpha is capped here (3DGS); the gradient through the cap is zero."""

ALPHA_MIN = 1.0 / 255.0
"""Pairs with a smaller alpha are skipped (3DGS)."""

TRANSMITTANCE_MIN = 1e-4
"""A pixel ends before the splat that would bring its transmittance below this (3DGS)."""


@dataclass(frozen=True)
class Gaussians:
    """The parameters of N Gaussians as the kernels read them.

    Raw by default (log scales, logit opacities), final when `ProjectionSettings.activated`. Quaternions are
    (w, x, y, z) and need not be normalised. `sh0` is the degree-0 coefficient, or the colour without SH.
    """

    means: Tensor  # (N, 3) world units
    quats: Tensor  # (N, 4) w, x, y, z
    scales: Tensor  # (N, 3) log of world units
    opacities: Tensor  # (N,) logit
    sh0: Tensor  # (N, 3)
    shN: Tensor  # (N, K - 1, 3)
    # shN's, of the body that made it: rows may be behind, and are caught up when they are drawn.
    lazy: LazyRows | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return int(self.means.shape[0])


class GaussianGradients(NamedTuple):
    """Gradients of a scalar loss, in the shapes of `Gaussians`, and of the masks (N,)."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh0: Tensor
    shN: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Views:
    """B pinhole cameras: world-to-camera matrices (x right, y down, z forward), intrinsics in pixels, sizes."""

    viewmats: Tensor  # (B, 4, 4)
    intrinsics: Tensor  # (B, 3, 3)
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each view

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class ProjectionSettings:
    """How Gaussians become splats. `sh_degree` None means that `sh0` is the final colour."""

    sh_degree: int | None = 3
    near_plane: float = 0.2  # world units; the predecessors' value
    far_plane: float = 1e10
    eps2d: float = 0.3  # pixel^2 added to the diagonal of the 2D covariance
    antialiased: bool = False  # opacity times sqrt(det(cov) / det(cov + eps2d)), as gsplat
    activated: bool = False  # scales and opacities are final, not log and logit


@dataclass
class Splats:
    """Packed projected Gaussians of B views: view b owns the rows view_offsets[b] to view_offsets[b + 1].

    A body that does not know how many they are without asking the device leaves rows at the end of each view's range
    unused and says so in `counts`; what lies there is undefined. `compact` removes them.
    """

    rows: Tensor  # (M, 10) see ROW_COLUMNS
    depths: Tensor  # (M,) camera z
    ids: Tensor  # (M,) int64, breaks ties of depth
    gaussians: Tensor  # (M,) int32 row of the table
    boxes: Tensor  # (M, 4) int32 x0, y0, x1, y1: pixels that can reach alpha 1/255, half open, clipped to the image
    view_offsets: Tensor  # (B + 1,) int64, on the host
    slots: Tensor  # (B, N) int32 packed row, or SLOT_UNSEEN, or SLOT_NO_PIXEL
    state: Any = None  # private to the body
    counts: Tensor | None = None  # (B,) int32 on the device: rows in use at the start of each view's range; None: all

    def __len__(self) -> int:
        return self.rows.shape[0]

    def view_range(self, view: int) -> tuple[int, int]:
        """First and one past the last packed row of `view`."""
        return self._offsets[view], self._offsets[view + 1]

    @cached_property
    def _offsets(self) -> list[int]:
        return self.view_offsets.tolist()


def compact(splats: Splats) -> Splats:
    """The same splats without unused rows: exact `view_offsets`, `counts` None; `splats` itself if it has none."""
    if splats.counts is None:
        return splats
    counts = splats.counts.to(device="cpu", dtype=torch.int64)  # host sync: counts
    starts = splats.view_offsets[:-1]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    ranges = list(zip(starts.tolist(), counts.tolist(), strict=True))

    def used(column: Tensor) -> Tensor:
        return torch.cat([column[:0], *(column[start : start + count] for start, count in ranges)])

    shifts = (offsets[:-1] - starts).to(splats.slots)[:, None]
    return Splats(
        rows=used(splats.rows),
        depths=used(splats.depths),
        ids=used(splats.ids),
        gaussians=used(splats.gaussians),
        boxes=used(splats.boxes),
        view_offsets=offsets,
        slots=torch.where(splats.slots >= 0, splats.slots + shifts, splats.slots),
        state=splats.state,
    )


@dataclass
class Frame:
    """Pixels of rows [row_start, row_stop) of one view, with the background composited. Zero rows are legal."""

    rgb: Tensor  # (h, w, 3)
    transmittance: Tensor  # (h, w) light that passes every splat
    pairs_per_row: Tensor  # (tile rows,) int64 evaluated (pixel, splat) pairs: the cost the balancer learns from
    view: int = 0
    rows: tuple[int, int] = (0, 0)
    state: Any = field(default=None, repr=False)  # private to the body


class ImageGradient(NamedTuple):
    """The gradient of a loss in an image of D channels, for the V splats of a view that it is composited of."""

    colours: Tensor  # (V, D) what the splats contribute
    d_image: Tensor  # (h, w, D)
    behind: Tensor  # (h, w) d_image . image + T_end dL/dT_end: what lies behind the first splat of a pixel


class PhotometricLoss(NamedTuple):
    """Terms of (1 - lambda) * L1 + lambda * (1 - SSIM) over a region, each divided by the whole image's values.

    They stay on the device of the image: reading them is for whoever needs the numbers.
    """

    terms: Tensor  # (2,) float64, L1 and SSIM
    d_rgb: Tensor  # (h, w, 3) gradient of the weighted sum

    @property
    def l1(self) -> Tensor:
        """() float64."""
        return self.terms[0]

    @property
    def ssim(self) -> Tensor:
        """() float64."""
        return self.terms[1]


class AdamStep(NamedTuple):
    """One Adam update (Kingma and Ba, 2015): learning rate, decay rates, epsilon and the 1-based update number.

    drift: subtracted from every value after the update, whatever its gradient; decoupled, as AdamW's weight decay is.
    """

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    update: int
    drift: float = 0.0


class Counted(NamedTuple):
    """The number factor * num, where `num`, () int64, is on the device and nobody has read it."""

    num: Tensor
    factor: float


class Optimizer(NamedTuple):
    """Adam state of the six kernel attributes, in the order of `Gaussians`: moments in their shapes, one step each.

    factors: what the cuda body makes of the steps (`cuda.projection.adam_table`), on the device already; kernels read
    it when they run, so that launches can be recorded once and replayed with others. Other bodies take the steps.
    """

    exp_avg: tuple[Tensor, ...]
    exp_avg_sq: tuple[Tensor, ...]
    steps: tuple[AdamStep, ...]
    factors: Tensor | None = None


class Statistics(NamedTuple):
    """3DGS's densify statistics, both (N,): sum over views of |dL/d(2D mean in NDC)|, and the number of views."""

    grad_norm_sum: Tensor
    view_count: Tensor


def empty_like_gradients(gaussians: Gaussians) -> GaussianGradients:
    """Zero gradients in the shapes of `gaussians`."""
    zeros = torch.zeros_like
    return GaussianGradients(
        zeros(gaussians.means),
        zeros(gaussians.quats),
        zeros(gaussians.scales),
        zeros(gaussians.opacities),
        zeros(gaussians.sh0),
        zeros(gaussians.shN),
        zeros(gaussians.opacities),
    )
