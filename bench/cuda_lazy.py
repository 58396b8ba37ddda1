# SPDX-License-Identifier: Apache-2.0
"""Dense against lazy Adam of shN on the GPU at hand: `python -m bench.cuda_lazy`.

Aerial views over a flat scene, of which each sees a given share. A step is the projection of one view, in which lazy
rows are caught up, and the update; rows that a pass over all of them brings up to date every so many steps are part of
the mean. `equal` says whether parameters and moments of both have the same bits in the end, from the same gradients.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.cuda_project import morton_order
from masksplat.cuda.body import CudaBody
from masksplat.types import AdamStep, Gaussians, Optimizer, ProjectionSettings, Splats, Statistics, Views

SIZE = (1600, 1064)
FOCAL = 0.75
"""Focal length in image widths."""
WARM_UP, STEPS = 40, 128
"""Steps before the clock starts, and on it: as many as can be replayed, so that a pass over all rows is among them."""
SETTINGS = ProjectionSettings(3, near_plane=0.01)


@dataclass
class Table:
    """Gaussians with what an update changes."""

    gaussians: Gaussians
    moments: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    statistics: Statistics

    @classmethod
    def of_scene(cls, count: int, device: torch.device) -> Table:
        """A slab of 1 x 1 x 0.02 in the order of a space-filling curve; the same numbers each time."""
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        means = torch.rand(count, 3, generator=generator, device=device) * torch.tensor([1.0, 1.0, 0.02], device=device)
        scales = normal(count, 3) * 0.4 - 0.5 * float(torch.log(torch.tensor(2.0 * count)))
        gaussians = Gaussians(
            means[morton_order(means)].contiguous(), normal(count, 4), scales, normal(count), normal(count, 3) * 0.4,
            normal(count, 15, 3) * 0.1,
        )  # fmt: skip
        first, second = (tuple(torch.zeros_like(tensor) for tensor in parameters(gaussians)) for _ in range(2))
        zeros = torch.zeros(count, device=device)
        return cls(gaussians, (first, second), Statistics(zeros, zeros.clone()))

    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        return [*parameters(self.gaussians), *self.moments[0], *self.moments[1]]


def parameters(gaussians: Gaussians) -> list[Tensor]:
    """The six attributes."""
    return [getattr(gaussians, name) for name in ("means", "quats", "scales", "opacities", "sh0", "shN")]


def aerial_views(share: float, count: int, device: torch.device) -> list[Views]:
    """Cameras that look straight down, each on `share` of the unit square, at random places within it."""
    width, height = SIZE
    extent_x = (share * width / height) ** 0.5
    extent_y = share / extent_x
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(count, 2, generator=generator) * torch.tensor([1 - extent_x, 1 - extent_y])
    intrinsics = torch.tensor([[[FOCAL * width, 0, width / 2], [0, FOCAL * width, height / 2], [0, 0, 1]]])
    views = []
    for x, y in (places + torch.tensor([extent_x, extent_y]) / 2).tolist():
        matrix = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
        matrix[:3, 3] = torch.tensor([-x, y, FOCAL * extent_x + 0.02])
        views.append(Views(matrix[None].to(device), intrinsics.to(device), (SIZE,)))
    return views


def update(body: CudaBody, table: Table, views: Views, splats: Splats, d_rows: Tensor, number: int) -> None:
    """Update number `number` with rates as in training."""
    rates = (1e-6, 1e-3, 5e-3, 5e-2, 2.5e-3, 1.25e-4)
    steps = tuple(AdamStep(rate, 0.9, 0.999, 1e-15, number) for rate in rates)
    body.project_backward_update(
        table.gaussians, views, SETTINGS, splats, d_rows,
        optimizer=Optimizer(*table.moments, steps), statistics=table.statistics,
    )  # fmt: skip


def time_steps(body: CudaBody, table: Table, views: list[Views]) -> tuple[float, float, float]:
    """Mean milliseconds of projection and of update, and the mean share of Gaussians that are drawn."""
    count = len(table.gaussians)
    d_rows = torch.randn(count, 10, device=body.device) * 1e-6
    d_rows[::3] = 0.0
    marks, drawn = [], []
    for number in range(1, WARM_UP + STEPS + 1):
        view = views[number % len(views)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        splats = body.project(table.gaussians, view, SETTINGS)
        events[1].record()
        update(body, table, view, splats, d_rows, number)
        events[2].record()
        if number > WARM_UP:
            marks.append(events)
            drawn.append(splats.counts)
    torch.cuda.synchronize()
    project, back = (sum(m[k].elapsed_time(m[k + 1]) for m in marks) / len(marks) for k in range(2))
    return project, back, float(torch.cat(drawn).double().mean()) / count  # type: ignore[arg-type]


def ends_equal(body: CudaBody, count: int, views: list[Views], num_steps: int) -> bool:
    """Whether dense and lazy updates by the same gradients end at the same bits."""
    tables = [Table.of_scene(count, body.device) for _ in range(2)]
    make_lazy(body, tables[1])
    for number in range(1, num_steps + 1):
        view = views[number % len(views)]
        generator = torch.Generator(device=body.device).manual_seed(number)
        gradient = torch.randn(count, 10, generator=generator, device=body.device) * 1e-6
        gradient[number % 3 :: 3] = 0.0
        for table in tables:
            splats = body.project(table.gaussians, view, SETTINGS)
            used = splats.slots[0] >= 0
            d_rows = torch.zeros_like(splats.rows)
            d_rows[splats.slots[0][used].long()] = gradient[used]
            update(body, table, view, splats, d_rows, number)
    tables[1].gaussians.lazy.settle()  # type: ignore[union-attr]
    pairs = zip(tables[0].tensors(), tables[1].tensors(), strict=True)
    return all(torch.equal(one.view(torch.int32), two.view(torch.int32)) for one, two in pairs)


def make_lazy(body: CudaBody, table: Table) -> None:
    """Let rows of shN be behind from now on."""
    lazy = body.lazy_rows(table.gaussians.shN, table.moments[0][5], table.moments[1][5], 0)
    table.gaussians = replace(table.gaussians, lazy=lazy)


def main() -> None:
    """Print a line for each number of Gaussians and share of them, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, nargs="+", default=[300_000, 3_000_000, 10_000_000])
    parser.add_argument("--share", type=float, nargs="+", default=[0.05, 0.15, 0.4, 0.8])
    parser.add_argument("--equal", type=int, default=1_000_000, help="Gaussians of the comparison of bits")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    body, records = CudaBody(), []
    body.lazy_from = 0
    print(f"{torch.cuda.get_device_name(body.device)}, milliseconds a step, means of {STEPS}")
    views = aerial_views(0.1, 17, body.device)
    print(f"equal after 150 steps of {options.equal:,} Gaussians: {ends_equal(body, options.equal, views, 150)}")
    print("   Gaussians   drawn  dense: project   update  lazy: project   update    gain")
    for count in options.gaussians:
        for share in options.share:
            views = aerial_views(share, 61, body.device)
            found = []
            for is_lazy in (False, True):
                table = Table.of_scene(count, body.device)
                if is_lazy:
                    make_lazy(body, table)
                found.append(time_steps(body, table, views))
            (dense_project, dense_update, drawn), (project, back, _) = found
            gain = dense_project + dense_update - project - back
            print(f"{count:12,}{100 * drawn:6.1f} %{dense_project:16.3f}{dense_update:9.3f}{project:15.3f}{back:9.3f}"
                  f"{gain:8.3f}", flush=True)  # fmt: skip
            records.append({"gaussians": count, "drawn": drawn, "dense": found[0][:2], "lazy": found[1][:2]})
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
