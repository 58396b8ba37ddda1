# SPDX-License-Identifier: Apache-2.0
"""The sides of the comparison, each run through the same chain: project, composite, and both ways back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measuring import Disturbance, Spread, extra_memory, repeat
from bench.raster_inputs import RasterInput
from masksplat.ops import Body, get_body
from masksplat.types import GaussianGradients, Splats


class ChainTimes(NamedTuple):
    """Seconds of the four stages, each over all views of the input."""

    project: float
    rasterize: float
    rasterize_backward: float
    project_backward: float


class ChainResult(NamedTuple):
    """What the chain computes: images (h, w, 3), light that passes (h, w), gradients, pairs evaluated forward."""

    images: tuple[Tensor, ...]
    lights: tuple[Tensor, ...]
    gradients: GaussianGradients
    num_pairs: int
    splats: Splats


@dataclass(frozen=True)
class Contender:
    """One side: a body, on `num_threads` threads, with its own backward or through one autograd graph a view."""

    name: str
    body: Body
    torch_threads: int
    uses_graph: bool = False

    def run(self, case: RasterInput) -> tuple[ChainTimes, ChainResult]:
        """The whole chain once."""
        torch.set_num_threads(self.torch_threads)
        return _run_graph(self.body, case) if self.uses_graph else _run_ops(self.body, case)


def contenders(num_threads: int) -> tuple[Contender, ...]:
    """The cpu body and the pure-torch reference, which has two ways back; the faster one counts.

    While the cpu body runs, torch keeps to one thread, as in train.py: the body brings its own threads.
    """
    reference = get_body("reference")
    return (
        Contender("cpu body", get_body("cpu", num_threads=num_threads), torch_threads=1),
        Contender("torch, recomputed", reference, torch_threads=num_threads),
        Contender("torch, one graph", reference, torch_threads=num_threads, uses_graph=True),
    )


@torch.no_grad()
def _run_ops(body: Body, case: RasterInput) -> tuple[ChainTimes, ChainResult]:
    ticks = [time.perf_counter()]
    splats = body.project(case.gaussians, case.views, case.settings, masks=case.masks)
    ticks.append(time.perf_counter())
    frames = [body.rasterize(splats, view, size, case.background) for view, size in enumerate(case.views.sizes)]
    ticks.append(time.perf_counter())
    d_rows = torch.zeros_like(splats.rows)
    for frame, d_rgb in zip(frames, case.d_rgb, strict=True):
        body.rasterize_backward(splats, frame, d_rgb, d_rows)
    ticks.append(time.perf_counter())
    gradients = body.project_backward(case.gaussians, case.views, case.settings, splats, d_rows)
    ticks.append(time.perf_counter())
    images, lights = tuple(frame.rgb for frame in frames), tuple(frame.transmittance for frame in frames)
    num_pairs = sum(int(frame.pairs_per_row.sum()) for frame in frames)
    return _between(ticks), ChainResult(images, lights, gradients, num_pairs, splats)


def _run_graph(body: Body, case: RasterInput) -> tuple[ChainTimes, ChainResult]:
    """Compositing recorded by autograd instead of recomputed: more memory, fewer operations."""
    ticks = [time.perf_counter()]
    with torch.no_grad():
        splats = body.project(case.gaussians, case.views, case.settings, masks=case.masks)
    ticks.append(time.perf_counter())
    rasterizing = going_back = 0.0
    images, lights, num_pairs, d_rows = [], [], 0, torch.zeros_like(splats.rows)
    for view, size in enumerate(case.views.sizes):
        start = time.perf_counter()
        leaf = splats.rows.detach().requires_grad_()
        frame = body.rasterize(replace(splats, rows=leaf), view, size, case.background)
        drawn = time.perf_counter()
        d_rows += torch.autograd.grad(frame.rgb, leaf, case.d_rgb[view])[0]
        rasterizing, going_back = rasterizing + drawn - start, going_back + time.perf_counter() - drawn
        images.append(frame.rgb.detach())
        lights.append(frame.transmittance.detach())
        num_pairs += int(frame.pairs_per_row.sum())
    start = time.perf_counter()
    gradients = body.project_backward(case.gaussians, case.views, case.settings, splats, d_rows)
    times = ChainTimes(ticks[1] - ticks[0], rasterizing, going_back, time.perf_counter() - start)
    return times, ChainResult(tuple(images), tuple(lights), gradients, num_pairs, splats)


def _between(ticks: Sequence[float]) -> ChainTimes:
    return ChainTimes(*(after - before for before, after in zip(ticks, ticks[1:], strict=False)))


@dataclass(frozen=True)
class Measurement:
    """One contender on one input. Seconds over all views; `first_call` includes compilation or loading a cache."""

    contender: str
    first_call: float
    stages: tuple[Spread, ...]  # in the order of ChainTimes
    compositing: Spread  # rasterize and its backward
    chain: Spread  # all four stages
    extra_memory: int | None  # bytes on top of the process, at the peak of one chain
    others: float  # cores busy for other programs during the repetitions
    result: ChainResult

    @property
    def forward(self) -> Spread:
        """Compositing alone: sort, lists per tile and blending."""
        return self.stages[1]


def measure(contender: Contender, case: RasterInput, repeats: int) -> Measurement:
    """Warm up twice, then repeat the chain; every contender gets the same treatment."""
    start = time.perf_counter()
    result = contender.run(case)[1]
    first_call = time.perf_counter() - start
    memory = extra_memory(lambda: contender.run(case))  # the second warm-up
    disturbance = Disturbance()
    times = repeat(lambda: contender.run(case)[0], repeats)
    return Measurement(
        contender=contender.name,
        first_call=first_call,
        stages=tuple(Spread.of([each[k] for each in times]) for k in range(len(ChainTimes._fields))),
        compositing=Spread.of([each.rasterize + each.rasterize_backward for each in times]),
        chain=Spread.of([sum(each) for each in times]),
        extra_memory=memory,
        others=disturbance.cores(),
        result=result,
    )


@dataclass(frozen=True)
class Difference:
    """How far a contender's output lies from the cpu body's.

    image: largest difference of a colour. image_mean: mean one. gradient: largest over the parameters and masks of
    |difference| / |reference| in the Euclidean norm.
    """

    contender: str
    image: float
    image_mean: float
    gradient: float

    def is_small(self) -> bool:
        """Whether both compute the same: single pairs at a threshold may differ, and rounding."""
        return self.image < 0.02 and self.image_mean < 2e-5 and self.gradient < 5e-3


def difference(measured: Measurement, peer: Measurement) -> Difference:
    """The distance of two contenders' outputs for one input."""
    pairs = zip(measured.result.images, peer.result.images, strict=True)
    gaps = torch.cat([(mine - theirs).abs().flatten() for mine, theirs in pairs])
    gradients = zip(measured.result.gradients, peer.result.gradients, strict=True)
    ratios = [float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30)) for mine, theirs in gradients]
    return Difference(peer.contender, float(gaps.max()), float(gaps.mean()), max(ratios))
