# SPDX-License-Identifier: Apache-2.0
"""Times every kernel of the cuda rasterizer on one GPU: `python -m bench.cuda_rasterize [--file model.ply]`.

Needs torch, numpy and masksplat only. A scene is random Gaussians, or the file of a trained model: a .ply in a 3DGS
model folder, seen by a camera of its cameras.json, or a .pt holding packed splats {"rows", "boxes", "depths", "ids",
"size"}. Trained scenes hold many sizes and a few splats that cover everything: `--giants 20 --spread 1`. Kernel times
are CUDA events around each launch; "forward" and "backward" are whole calls, queued back to back.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from masksplat.cuda.arena import bytes_of
from masksplat.cuda.launcher import Argument, DeviceLauncher, Extent
from masksplat.cuda.rasterization import Rasterizer
from masksplat.cuda.tile_lists import TileLists
from masksplat.ops import get_body
from masksplat.types import Frame, Gaussians, ProjectionSettings, Splats, Views

ROW_BYTES = 40
FEW_TILES = 16
"""Splats of more instances are dealt out in parts (source/totals.cuh)."""


class TimedLauncher:
    """Launches through another launcher and, while `is_timing`, brackets every kernel with events."""

    def __init__(self, inner: DeviceLauncher) -> None:
        self.inner = inner
        self.device = inner.device
        self.is_timing = False
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, kernel: str, grid: Extent, block: Extent, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Launch; see `Launcher`."""
        if not self.is_timing:
            self.inner(kernel, grid, block, *arguments, shared_bytes=shared_bytes)
            return
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.inner(kernel, grid, block, *arguments, shared_bytes=shared_bytes)
        stop.record()
        self.events.append((kernel, start, stop))

    def collect(self) -> dict[str, tuple[int, float]]:
        """Launches and milliseconds of each kernel since the last call."""
        torch.cuda.synchronize()
        totals: dict[str, tuple[int, float]] = {}
        for kernel, start, stop in self.events:
            count, milliseconds = totals.get(kernel, (0, 0.0))
            totals[kernel] = (count + 1, milliseconds + start.elapsed_time(stop))
        self.events.clear()
        return totals


def random_splats(options: argparse.Namespace) -> Splats:
    """Gaussians all over the image, a fifth of them masked, as packed splats; `main` says what the options mean.

    Giants are faint, behind all others and neighbours in depth, as a sky is.
    """
    generator = torch.Generator().manual_seed(0)
    count, (width, height) = options.count, options.size
    focal = 1.1 * width
    depth = 2.0 + 4.0 * torch.rand(count, generator=generator)
    is_giant = torch.arange(count) < options.giants
    depth[is_giant] += 6.0
    radius = options.radius * torch.exp(options.spread * torch.randn(count, generator=generator))
    radius[is_giant] = 2.0 * max(width, height)
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    position = (pixels - torch.tensor([width / 2, height / 2])) * (depth / focal)[:, None]
    gaussians = Gaussians(
        means=torch.cat((position, depth[:, None]), dim=1),
        quats=torch.randn(count, 4, generator=generator),
        scales=torch.log(radius * depth / focal)[:, None] + 0.5 * torch.randn(count, 3, generator=generator),
        opacities=1.5 * torch.randn(count, generator=generator) - 3.0 * is_giant,
        sh0=0.5 * torch.randn(count, 3, generator=generator),
        shN=torch.zeros(count, 0, 3),
    )
    intrinsics = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]])
    masks = (torch.rand(count, generator=generator) >= 0.2).float()
    views = Views(torch.eye(4)[None], intrinsics, ((width, height),))
    return get_body("cpu").project(gaussians, views, ProjectionSettings(sh_degree=0), masks=masks)


def splats_of_model(path: Path, camera_index: int) -> tuple[Splats, tuple[int, int]]:
    """A trained model seen by camera `camera_index` of its folder's cameras.json, with every mask 1."""
    from scene.ply import load_ply

    params = {name: torch.from_numpy(values) for name, values in load_ply(path).items()}
    camera = json.loads((path.parents[2] / "cameras.json").read_text(encoding="utf-8"))[camera_index]
    size = (int(camera["width"]), int(camera["height"]))
    to_world = np.eye(4)
    to_world[:3, :3], to_world[:3, 3] = np.array(camera["rotation"]), np.array(camera["position"])
    intrinsics = [[camera["fx"], 0, size[0] / 2], [0, camera["fy"], size[1] / 2], [0, 0, 1]]
    views = Views(
        torch.from_numpy(np.linalg.inv(to_world)).float()[None], torch.tensor(intrinsics).float()[None], (size,)
    )
    gaussians = Gaussians(*(params[name].float() for name in ("means", "quats", "scales", "opacities", "sh0", "shN")))
    degree = {0: 0, 3: 1, 8: 2, 15: 3}[gaussians.shN.shape[1]]
    return get_body("cpu").project(gaussians, views, ProjectionSettings(sh_degree=degree)), size


def read_scene(options: argparse.Namespace) -> tuple[Splats, tuple[int, int]]:
    """Packed splats of one view on the CPU, and its size."""
    if options.file is None:
        return random_splats(options), (options.size[0], options.size[1])
    if options.file.suffix == ".ply":
        return splats_of_model(options.file, options.camera)
    stored = torch.load(options.file, weights_only=True)
    rows = stored["rows"]
    nobody = torch.zeros(0, dtype=torch.int32)
    offsets = torch.tensor([0, len(rows)])
    width, height = stored["size"]
    return Splats(rows, stored["depths"], stored["ids"], nobody, stored["boxes"], offsets, nobody), (width, height)


def median_milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time on the device of one of `repeats` calls that are queued one after the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(two) for one, two in zip(events, events[1:], strict=False))


@dataclass(frozen=True)
class Work:
    """One frame: V splats, I instances, those of splats with few, processed buckets, evaluated pairs, tiles."""

    splats: int
    instances: int
    small_instances: int
    buckets: int
    pairs: int
    tiles: int

    @classmethod
    def of(cls, frame: Frame) -> Work:
        """Read from the device."""
        lists: TileLists = frame.state
        instances, splats = lists.totals()
        firsts = bytes_of(lists.kept.memory, lists.kept.first_instances)
        counts = firsts.view(torch.int32)[: splats + 1].diff()
        small = int(counts[counts <= FEW_TILES].sum())
        pairs = int(frame.pairs_per_row.sum())
        return cls(splats, instances, small, lists.buckets_in_use(), pairs, lists.region.num_tiles)

    def bytes_of(self, kernel: str) -> float | None:
        """Bytes that one launch must move at least; None for a kernel that is measured in pairs."""
        v, i = self.splats, self.instances
        return {
            "binning.prepare": v * (ROW_BYTES + 44.0),
            "binning.emit": v * 20.0 + 12.0 * self.small_instances,
            "binning.emit_parts": 12.0 * (i - self.small_instances),
            "binning.tile_ranges": 4.0 * i,
            "binning.order_tiles": 12.0 * self.tiles,
            "radix_sort.sort_one": 16.0 * v,
            "radix_sort.sort_two": 24.0 * i,
            "radix_sort.order_ties": 4.0 * v,
            "rasterize_backward.sum_parts": ROW_BYTES * (i - self.small_instances),
            "rasterize_backward.finish_rows": ROW_BYTES * (self.small_instances + 2.0 * v),
        }.get(kernel)


class Bench:
    """One scene on one device."""

    def __init__(self, splats: Splats, size: tuple[int, int], repeats: int) -> None:
        self.launcher = TimedLauncher(DeviceLauncher())
        device = self.launcher.device
        self.rasterizer = Rasterizer(self.launcher)
        self.size, self.repeats = size, repeats
        names = ("rows", "depths", "ids", "gaussians", "boxes")
        self.splats = replace(splats, **{name: getattr(splats, name).to(device) for name in names})
        generator = torch.Generator().manual_seed(1)
        self.d_rgb = torch.randn(size[1], size[0], 3, generator=generator).to(device)
        self.d_rows = torch.empty_like(self.splats.rows)
        self.background = torch.zeros(3, device=device)
        self.frame = self.forward()  # grows the buffers
        self.rasterizer.capacity.defers = True

    def forward(self) -> Frame:
        """Tile lists and image."""
        return self.rasterizer.rasterize(self.splats, 0, self.size, self.background)

    def backward(self) -> None:
        """Gradient of the packed rows."""
        self.rasterizer.rasterize_backward(self.splats, self.frame, self.d_rgb, self.d_rows, overwrite=True)

    def kernel_times(self, call: Callable[[], object]) -> dict[str, tuple[int, float]]:
        """Launches and median milliseconds a frame of each kernel."""
        call()
        self.launcher.collect()
        self.launcher.is_timing = True
        rounds = []
        for _ in range(self.repeats):
            call()
            rounds.append(self.launcher.collect())
        self.launcher.is_timing = False
        return {
            kernel: (count, statistics.median(one[kernel][1] for one in rounds))
            for kernel, (count, _) in rounds[0].items()
        }

    def report(self) -> None:
        """Print the tables."""
        work = Work.of(self.frame)
        width, height = self.size
        print(f"{torch.cuda.get_device_name()}; {width}x{height}, {work.splats:,} splats, {work.instances:,} instances")
        print(f"{work.instances - work.small_instances:,} instances are of splats with more than {FEW_TILES}")
        print(f"{work.buckets:,} buckets of 32 processed; {work.pairs / 1e6:,.1f} M pairs evaluated in the forward")
        print_kernels(self.kernel_times(self.forward), work)
        print_kernels(self.kernel_times(self.backward), work)
        print(f"{'whole backward':34}{median_milliseconds(self.backward, self.repeats):9.4f} ms")
        print(f"{'whole forward':34}{median_milliseconds(self.forward, self.repeats):9.4f} ms")
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB\n")


def print_kernels(times: dict[str, tuple[int, float]], work: Work) -> None:
    """One line a kernel: launches, milliseconds of all of them, and their rate."""
    for kernel, (launches, milliseconds) in times.items():
        moved = work.bytes_of(kernel)
        if moved is None:
            rate = f"{work.pairs / milliseconds / 1e6:10.1f} G pairs/s"
        else:
            rate = f"{launches * moved / milliseconds / 1e6:10.1f} GB/s"
        print(f"{kernel:34}{milliseconds:9.4f} ms {launches:3d}x{rate}")


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300_000, help="random Gaussians")
    parser.add_argument("--size", type=int, nargs=2, default=(884, 1577), help="width and height in pixels")
    parser.add_argument("--radius", type=float, default=2.0, help="median standard deviation in pixels")
    parser.add_argument("--spread", type=float, default=0.0, help="standard deviation of the radii's logarithms")
    parser.add_argument("--giants", type=int, default=0, help="how many of the Gaussians cover the whole image")
    parser.add_argument("--file", type=Path, default=None, help=".ply or .pt instead of random Gaussians")
    parser.add_argument("--camera", type=int, default=0, help="camera of the model's cameras.json")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    splats, size = read_scene(options)
    Bench(splats, size, options.repeats).report()


if __name__ == "__main__":
    main()
