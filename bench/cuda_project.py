# SPDX-License-Identifier: Apache-2.0
"""Times of projection, its fused update, the masks and the loss on a GPU, beside the bytes that they must move.

    python bench/cuda_project.py                                  # 200 000 and 3 million Gaussians, 1600 x 1064 pixels
    python bench/cuda_project.py --gaussians 10000000 --degree 3 --json times.json

The scene is a box of Gaussians in Morton order, of which the camera sees about half. Times are medians of CUDA events
around single calls after a warm-up. A copy of 1 GiB runs before each: the host has queued the call when it ends, and
nothing of the call's data is left in the cache. Needs torch, numpy and masksplat (PYTHONPATH=submodules/masksplat).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda import mask as mask_kernels
from masksplat.cuda import photometric, projection
from masksplat.cuda.devices import launcher_of
from masksplat.cuda.launcher import Launcher
from masksplat.types import (
    AdamStep,
    Gaussians,
    Optimizer,
    ProjectionSettings,
    Splats,
    Statistics,
    Views,
)

SIZE = (1600, 1064)
LOSS_SIZES = (SIZE, (884, 1577))
GIGABYTES_PER_SECOND = 4300.0
"""What an H200's memory gives to a plain copy."""

WARM_UP, REPEATS = 5, 30
VALUES = 59
"""Floats of a Gaussian of degree 3."""


class Case(NamedTuple):
    """A table on the device, a view of it, and what one step gives and needs."""

    gaussians: Gaussians
    views: Views
    settings: ProjectionSettings
    masks: Tensor
    ids: Tensor
    splats: Splats
    d_rows: Tensor
    num_seen: int


class Timing(NamedTuple):
    """Median and least milliseconds of a call that must move `num_bytes`."""

    name: str
    median: float
    least: float
    num_bytes: float

    def line(self) -> str:
        """A row of the table."""
        rate = self.num_bytes / self.median / 1e6
        floor = self.num_bytes / GIGABYTES_PER_SECOND / 1e6
        share = 100 * rate / GIGABYTES_PER_SECOND
        return f"{self.name:<34}{self.median:10.4f}{self.least:10.4f}{floor:10.4f}{rate:10.0f}{share:8.0f} %"


def morton_order(points: Tensor) -> Tensor:
    """Order of points along a space-filling curve, 10 bits an axis."""
    low, high = points.amin(0), points.amax(0)
    cells = ((points - low) / (high - low) * 1023).to(torch.int64)
    key = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for bit in range(10):
        for axis in range(3):
            key |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return torch.argsort(key)


def make_case(launcher: Launcher, count: int, degree: int) -> Case:
    """A box around the camera, small Gaussians, 1 % of the masks 0; gradients for two thirds of the splats."""
    generator = torch.Generator(device=launcher.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=launcher.device)

    means = (torch.rand(count, 3, generator=generator, device=launcher.device) - 0.5) * torch.tensor(
        [6.0, 4.0, 6.0], device=launcher.device
    ) + torch.tensor([0.0, 0.0, 2.0], device=launcher.device)
    means = means[morton_order(means)].contiguous()
    spacing = (144.0 / count) ** (1 / 3)
    gaussians = Gaussians(
        means, normal(count, 4), normal(count, 3) * 0.4 + float(np.log(0.4 * spacing)), normal(count),
        normal(count, 3) * 0.4, normal(count, (degree + 1) ** 2 - 1, 3) * 0.1,
    )  # fmt: skip
    width, height = SIZE
    intrinsics = torch.tensor([[[0.75 * width, 0, width / 2], [0, 0.75 * width, height / 2], [0, 0, 1]]])
    views = Views(torch.eye(4)[None], intrinsics, (SIZE,))
    settings = ProjectionSettings(degree)
    masks = (torch.rand(count, generator=generator, device=launcher.device) > 0.01).float()
    ids = torch.arange(count, device=launcher.device)
    splats = projection.project(launcher, gaussians, views, settings, masks=masks, ids=ids)
    d_rows = normal(*splats.rows.shape) * (torch.arange(len(splats), device=launcher.device) % 3 > 0)[:, None]
    return Case(gaussians, views, settings, masks, ids, splats, d_rows, int(splats.counts[0]))


class Stopwatch:
    """Times calls on the current stream."""

    def __init__(self, device: torch.device, num_floats: int = 1 << 28) -> None:
        self.source = torch.zeros(num_floats, device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self, name: str, num_bytes: float, call: Callable[[], object]) -> Timing:
        """Median and least time of a call between two events."""
        times = []
        for repeat in range(WARM_UP + REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.copy()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if repeat >= WARM_UP:
                times.append(start.elapsed_time(stop))
        return Timing(name, statistics.median(times), min(times), num_bytes)

    def copy(self) -> None:
        """Move 1 GiB."""
        self.target.copy_(self.source)

    def copy_timing(self) -> Timing:
        """What this machine's memory gives."""
        return self("copy of 1 GiB (torch)", 2.0 * self.source.numel() * 4, self.copy)


def table_timings(launcher: Launcher, case: Case, timed: Stopwatch) -> Iterator[Timing]:
    """Projection and what goes back to the table."""
    count, seen = len(case.gaussians), case.num_seen
    values = 14 + 3 * case.gaussians.shN.shape[1]
    arguments = (launcher, case.gaussians, case.views, case.settings)
    # Means, slots; for what is seen the rest of the table, mask, id, and a splat's 72 bytes.
    yield timed("project", 16.0 * count + (4 * values + 72.0) * seen,
                lambda: projection.project(*arguments, masks=case.masks, ids=case.ids))  # fmt: skip
    yield timed("project_backward", 4.0 * (values + 2) * count + (4 * values + 40.0) * seen,
                lambda: projection.project_backward(*arguments, case.splats, case.d_rows))  # fmt: skip
    table = [getattr(case.gaussians, name) for name in ("means", "quats", "scales", "opacities", "sh0", "shN")]
    moments = [tuple(torch.zeros_like(tensor) for tensor in table) for _ in range(2)]
    optimizer = Optimizer(*moments, (AdamStep(1e-7, 0.9, 0.999, 1e-15, 1000),) * 6)
    sums = Statistics(*(torch.zeros_like(table[3]) for _ in range(2)))
    # 24 bytes a value; slot and mask gradient; statistics read and written and a gradient row for what is seen.
    yield timed("project_backward_update", (24.0 * values + 8) * count + 56.0 * seen,
                lambda: projection.project_backward_update(*arguments, case.splats, case.d_rows, optimizer=optimizer,
                                                           statistics=sums))  # fmt: skip
    yield timed("adam (shN alone)", 28.0 * table[5].numel(),
                lambda: projection.adam(launcher, table[5], moments[0][5], moments[0][5], moments[1][5],
                                        optimizer.steps[0]))  # fmt: skip


def mask_timings(launcher: Launcher, case: Case, timed: Stopwatch) -> Iterator[Timing]:
    """Sampling and update of the mask logits."""
    count = len(case.gaussians)
    logits, first, second = (torch.full((count,), value, device=launcher.device) for value in (9.0, 0.0, 0.0))
    yield timed("mask sample", 20.0 * count, lambda: mask_kernels.sample(launcher, logits, case.ids, 0, 1))
    given = {"d_mask": case.masks, "keep_gradient": case.masks, "adam": AdamStep(1e-7, 0.9, 0.999, 1e-15, 1000)}
    state = (logits, first, second)
    yield timed("mask update", 32.0 * count, lambda: mask_kernels.update(launcher, *state, d_all=1e-9, **given))


def loss_timings(launcher: Launcher, timed: Stopwatch, size: tuple[int, int]) -> Iterator[Timing]:
    """Both kernels of the loss together: 15 bytes a pixel twice, derivatives written and read, the gradient."""
    width, height = size
    rgb = torch.rand(height, width, 3, device=launcher.device)
    target = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=launcher.device)
    yield timed(f"photometric, {width}x{height}", 114.0 * width * height,
                lambda: photometric.photometric(launcher, rgb, target, 0.2))  # fmt: skip


def main() -> None:
    """Print a table, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, nargs="+", default=[200_000, 3_000_000])
    parser.add_argument("--degree", type=int, choices=range(4), default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    launcher = launcher_of("cuda")
    print(f"{torch.cuda.get_device_name(launcher.device)}, medians of {REPEATS} calls")
    timed = Stopwatch(launcher.device)
    results: dict[str, list[Timing]] = {"machine": [timed.copy_timing()]}
    for size in LOSS_SIZES:
        results["machine"] += loss_timings(launcher, timed, size)
    for count in options.gaussians:
        case = make_case(launcher, count, options.degree)
        title = f"{count:,} Gaussians, {case.num_seen:,} splats, degree {options.degree}"
        results[title] = [*table_timings(launcher, case, timed), *mask_timings(launcher, case, timed)]
    header = f"{'':<34}{'ms':>10}{'least':>10}{'floor':>10}{'GB/s':>10}{'of 4300':>10}"
    for title, timings in results.items():
        print(f"\n{title}\n{header}")
        for timing in timings:
            print(timing.line())
    if options.json is not None:
        table = {title: [timing._asdict() for timing in timings] for title, timings in results.items()}
        options.json.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
