# SPDX-License-Identifier: Apache-2.0
"""The forward and backward of one training step: a palindrome of explicit calls, without an autograd graph.

    project -> exchange -> rasterize -> loss        own Gaussians -> regions of pixels
    update  <- exchange <- rasterize backward       gradients on the way back

Nothing here waits for a device: what the host wants to know of a step is in `StepResult.totals` until it is fetched.

Letters: N Gaussians of this rank, B views, M packed splats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan, ExchangeRecord
from distributed.kernel_passage import RoomForRows
from distributed.numbering import OrderNumbers
from distributed.pixels import PixelPartition, Region
from distributed.totals import StepTotals
from distributed.transfer import sent_to
from gaussian_renderer.gate import GateOfStep, gated, rows_for
from gaussian_renderer.phases import PhaseTimer
from gaussian_renderer.views import KERNEL_ATTRIBUTES, gaussians_of
from masksplat.cuda.exchange import RegionTables
from masksplat.ops import Body
from masksplat.types import AdamStep, Optimizer, PhotometricLoss, ProjectionSettings, Splats, Statistics, Views
from scene.gaussians import GaussianTable, StoredRows


@dataclass(frozen=True)
class Batch:
    """What one step trains on: B views, a background (3,) for each, and who draws which pixels.

    photos: for each region of this rank, (h, w, 3) uint8 of the rows that it draws, halo included.
    """

    views: Views
    backgrounds: Sequence[Tensor]
    partition: PixelPartition
    photos: Sequence[Tensor]


@dataclass(frozen=True)
class StepTools:
    """What draws, what brings splats to other ranks, and what takes the time of it.

    ties: numbers in the order of the table's ids, which break ties of depth; None: the ids themselves. status: words on
    the device of which the first is not 0 once a buffer of the body was too small, after which the body updates
    nothing; several ranks stop together. None: that cannot happen. room: of the windows between the ranks of one
    machine, whose status is that; None: the host reads in every step how many rows travel.
    """

    body: Body
    communicator: Communicator
    phases: PhaseTimer
    ties: OrderNumbers | None = None
    status: Tensor | None = None
    room: RoomForRows | None = None


@dataclass(frozen=True)
class StepSettings:
    """Numbers of the step that do not change while it runs.

    view_weight: weight of each view in the gradient. lambda_dssim: weight of 1 - SSIM.
    """

    projection: ProjectionSettings
    lambda_dssim: float
    view_weight: float


class RecordedNumbers(Protocol):
    """What changes from step to step, on the device."""

    @property
    def factors(self) -> Tensor:
        """(6, ADAM_FACTORS), see `masksplat.types.Optimizer`."""

    @property
    def tables(self) -> RegionTables | None:
        """Who draws what; None for one rank."""


@dataclass(frozen=True)
class StepResult:
    """totals: loss and counts over all ranks, not read yet. d_gate: (N,) gradient by the gate. exchanged: how much."""

    totals: StepTotals
    d_gate: Tensor
    exchanged: ExchangeRecord


def draw_and_update(
    tools: StepTools,
    table: GaussianTable,
    batch: Batch,
    gate: GateOfStep | None,
    settings: StepSettings,
    adam_steps: Sequence[AdamStep],
    memory: RecordedNumbers | None = None,
) -> StepResult:
    """Draw the batch, compare it with the photos, and update every kernel attribute of the table in place. All ranks.

    Args: gate: what stands between the table and the drawing; adam_steps: one for each of KERNEL_ATTRIBUTES; memory:
    where recorded launches find what changes from step to step; None: the host tells them.
    """
    factors, tables = (None, None) if memory is None else (memory.factors, memory.tables)
    body, phases = tools.body, tools.phases
    views = batch.views
    rows = rows_for(table, body, gate)
    gaussians = gated(gaussians_of(rows.params, rows.lazy), settings.projection, gate)
    ids, bound = tools.ties if tools.ties is not None else (table.ids, None)
    with phases("project"):
        splats = gaussians.project(body, views, ids)
    with phases("exchange"):
        plan = ExchangePlan.for_partition(
            tools.communicator, splats, batch.partition, sizes=views.sizes, id_bound=bound, room=tools.room,
            tables=tables,
        )  # fmt: skip
        received = plan.forward(splats)
    drawn = _draw_regions(tools, received, batch, settings.lambda_dssim)
    with phases("exchange"):
        totals = StepTotals.share(  # which stops all ranks before they update, if need be
            tools.communicator,
            batch.partition,
            losses=drawn.losses,
            pairs=drawn.pairs,
            num_splats=_num_splats(splats),
            num_rows=len(table),
            num_drawn=gate.num_drawn if gate is not None else None,
            status=tools.status,
        )
        d_rows = plan.backward(drawn.d_received)
    with phases("project backward and Adam"):
        d_gate = gaussians.update(
            body,
            views,
            splats,
            d_rows,
            optimizer=_optimizer(rows, adam_steps, factors),
            statistics=Statistics(table.statistics["grad_norm_sum"], table.statistics["view_count"]),
            gradient_scale=settings.view_weight,
        )
    return StepResult(totals, d_gate, plan.record)


@dataclass(frozen=True)
class _Drawn:
    """losses: (2,) float64, L1 and SSIM, and pairs of each region; d_received: (R, 10)."""

    losses: Sequence[Tensor]
    pairs: Sequence[Tensor]
    d_received: Tensor


def _draw_regions(tools: StepTools, received: Splats, batch: Batch, lambda_dssim: float) -> _Drawn:
    """Forward and backward of every region of this rank, one after the other."""
    body, phases = tools.body, tools.phases
    d_received = torch.empty_like(received.rows)  # every row in use belongs to one region
    losses, pairs = [], []
    regions = batch.partition.regions[tools.communicator.rank]
    for number, (region, photo) in enumerate(zip(regions, batch.photos, strict=True)):
        size, background = batch.views.sizes[region.view], batch.backgrounds[region.view]
        with phases("rasterize"):
            frame = body.rasterize(received, number, size, background, rows=region.drawn_rows(size[1]))
        with phases("loss"):
            part = _compare(body, frame.rgb, photo, region, size[1], lambda_dssim)
            losses.append(part.terms)
        with phases("rasterize backward"):
            body.rasterize_backward(received, frame, part.d_rgb, d_received, overwrite=True)
        pairs.append(frame.pairs_per_row)
    return _Drawn(losses, pairs, d_received)


def _num_splats(splats: Splats) -> Tensor:
    """(B,) int32 packed splats of each view, where they are."""
    if splats.counts is not None:
        return splats.counts
    return sent_to(splats.view_offsets.diff().to(torch.int32), splats.rows.device)


def _compare(
    body: Body, rgb: Tensor, photo: Tensor, region: Region, height: int, lambda_dssim: float
) -> PhotometricLoss:
    """The loss of a region's own rows, from everything it drew."""
    (first, last), (start, _) = region.own_rows(height), region.drawn_rows(height)
    return body.photometric(
        rgb, photo, lambda_dssim, own_rows=(first - start, last - start), image_height=height, row_start=start
    )


def _optimizer(rows: StoredRows, adam_steps: Sequence[AdamStep], factors: Tensor | None) -> Optimizer:
    return Optimizer(
        tuple(rows.exp_avg[name] for name in KERNEL_ATTRIBUTES),
        tuple(rows.exp_avg_sq[name] for name in KERNEL_ATTRIBUTES),
        tuple(adam_steps),
        factors,
    )
