# SPDX-License-Identifier: Apache-2.0
"""How a strategy's gate enters the drawing, and how gradients come back through it.

A mask goes to the kernels as it is. Factors on opacity and scale (LP-3DGS, Compact-3DGS) do not: the kernels then draw
final opacities sigma(o) f and scales exp(s) g, and the chain rule to the raw parameters and the factors is done here.

Letters: N Gaussians of this rank, M packed splats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from masksplat.ops import Body
from masksplat.statistics import add_statistics
from masksplat.types import GaussianGradients, Gaussians, Optimizer, ProjectionSettings, Splats, Statistics, Views
from scene.gaussians import GaussianTable, StoredRows


class GateOfStep(Protocol):
    """What stands between the table and the drawing in one step (`strategies.base.Gate`): a mask or factors, (N,)."""

    @property
    def mask(self) -> Tensor | None:
        """What each alpha is multiplied with."""

    @property
    def num_drawn(self) -> Tensor | None:
        """() int64: how many masks of this rank are 1."""

    @property
    def opacity_factor(self) -> Tensor | None:
        """What each activated opacity is multiplied with."""

    @property
    def scale_factor(self) -> Tensor | None:
        """What the three activated scales of a Gaussian are multiplied with."""


class GatedGaussians(Protocol):
    """The Gaussians of one step as its gate lets them through: projected first, updated at the end."""

    def project(self, body: Body, views: Views, ids: Tensor) -> Splats:
        """The visible splats of every view, packed."""

    def update(
        self,
        body: Body,
        views: Views,
        splats: Splats,
        d_rows: Tensor,
        *,
        optimizer: Optimizer,
        statistics: Statistics,
        gradient_scale: float,
    ) -> Tensor:
        """Backward, Adam and densify statistics, in place, from the gradient `d_rows` (M, 10) by the packed rows.

        Returns: (N,), times gradient_scale: the gradient by the mask, or the sum of those by the factors.
        """


def gated(gaussians: Gaussians, settings: ProjectionSettings, gate: GateOfStep | None) -> GatedGaussians:
    """The raw `gaussians` behind a gate; without one, all of them.

    Raises: ValueError for a gate with a mask and factors.
    """
    if gate is None or (gate.opacity_factor is None and gate.scale_factor is None):
        return MaskedGaussians(gaussians, settings, None if gate is None else gate.mask)
    if gate.mask is not None:
        raise ValueError("a gate has a mask or factors, not both")
    return FactoredGaussians(gaussians, settings, gate.opacity_factor, gate.scale_factor)


def rows_for(table: GaussianTable, body: Body, gate: GateOfStep | None) -> StoredRows:
    """The table's tensors for a step behind this gate: with factors every row is updated in every step."""
    if gate is None or (gate.opacity_factor is None and gate.scale_factor is None):
        return table.for_step(body)
    return table.for_dense_step()


@dataclass(frozen=True, eq=False)
class MaskedGaussians:
    """Gaussians with a mask (N,), or none: the kernels do everything."""

    gaussians: Gaussians
    settings: ProjectionSettings
    mask: Tensor | None

    def project(self, body: Body, views: Views, ids: Tensor) -> Splats:
        """See `GatedGaussians`."""
        return body.project(self.gaussians, views, self.settings, masks=self.mask, ids=ids)

    def update(
        self,
        body: Body,
        views: Views,
        splats: Splats,
        d_rows: Tensor,
        *,
        optimizer: Optimizer,
        statistics: Statistics,
        gradient_scale: float,
    ) -> Tensor:
        """See `GatedGaussians`."""
        return body.project_backward_update(
            self.gaussians,
            views,
            self.settings,
            splats,
            d_rows,
            optimizer=optimizer,
            statistics=statistics,
            gradient_scale=gradient_scale,
        )


class FactoredGaussians:
    """Gaussians with factors (N,) on opacities and scales; None stands for ones that are not learned."""

    def __init__(
        self,
        gaussians: Gaussians,
        settings: ProjectionSettings,
        opacity_factor: Tensor | None,
        scale_factor: Tensor | None,
    ) -> None:
        self.raw = gaussians
        self.settings = replace(settings, activated=True)
        self.opacity_factor = opacity_factor
        self.scale_factor = scale_factor
        self.opacities = torch.sigmoid(gaussians.opacities)
        self.scales = torch.exp(gaussians.scales)
        self.drawn = replace(
            gaussians,
            opacities=_times(self.opacities, opacity_factor),
            scales=_times(self.scales, _per_axis(scale_factor)),
        )

    def project(self, body: Body, views: Views, ids: Tensor) -> Splats:
        """See `GatedGaussians`."""
        return body.project(self.drawn, views, self.settings, ids=ids)

    def update(
        self,
        body: Body,
        views: Views,
        splats: Splats,
        d_rows: Tensor,
        *,
        optimizer: Optimizer,
        statistics: Statistics,
        gradient_scale: float,
    ) -> Tensor:
        """See `GatedGaussians`."""
        gradients, d_factors = self.backward(body, views, splats, d_rows)
        add_statistics(statistics, views, splats, d_rows)
        raw = self.raw
        table = (raw.means, raw.quats, raw.scales, raw.opacities, raw.sh0, raw.shN)
        moments = (optimizer.exp_avg, optimizer.exp_avg_sq)
        for param, gradient, exp_avg, exp_avg_sq, step in zip(
            table, gradients[:-1], *moments, optimizer.steps, strict=True
        ):
            body.adam(param, gradient * gradient_scale, exp_avg, exp_avg_sq, step)
        return d_factors * gradient_scale

    def backward(self, body: Body, views: Views, splats: Splats, d_rows: Tensor) -> tuple[GaussianGradients, Tensor]:
        """Gradients by the raw parameters, and (N,) the sum of the gradients by the learned factors.

        With O = sigma(o) f and S = exp(s) g: dL/do = dL/dO f sigma(o) (1 - sigma(o)), dL/df = dL/dO sigma(o),
        dL/ds = dL/dS g exp(s), dL/dg = sum over axes of dL/dS exp(s).
        """
        final = body.project_backward(self.drawn, views, self.settings, splats, d_rows)
        d_factors = torch.zeros_like(self.opacities)
        if self.opacity_factor is not None:
            d_factors = d_factors + final.opacities * self.opacities
        if self.scale_factor is not None:
            d_factors = d_factors + (final.scales * self.scales).sum(1)
        d_opacities = _times(final.opacities * self.opacities * (1 - self.opacities), self.opacity_factor)
        d_scales = _times(final.scales * self.scales, _per_axis(self.scale_factor))
        return final._replace(opacities=d_opacities, scales=d_scales), d_factors


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def _per_axis(factor: Tensor | None) -> Tensor | None:
    """(N, 1), to go with (N, 3)."""
    return None if factor is None else factor[:, None]
