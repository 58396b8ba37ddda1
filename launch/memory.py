# SPDX-License-Identifier: Apache-2.0
"""Memory of a training: how much it takes, and what there is to say when it does not suffice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

import torch

from launch.shortage import gigabytes, is_of_gpu, shortage_text
from launch.training import Training, device_budget
from scene.gaussians import GaussianTable

MANY_PHOTOS = 0.05
"""Share of a GPU's memory from which on photos are worth moving."""


@dataclass(frozen=True)
class GpuPeak:
    """The most bytes of the current GPU that tensors took at once, and that torch held for them. 0: no GPU in use."""

    allocated: int = 0
    reserved: int = 0

    @classmethod
    def now(cls) -> GpuPeak:
        """Since the process began."""
        if not torch.cuda.is_initialized():
            return cls()
        return cls(int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved()))

    def or_more(self, other: GpuPeak) -> GpuPeak:
        """The larger of each."""
        return GpuPeak(max(self.allocated, other.allocated), max(self.reserved, other.reserved))

    def sentence(self) -> str:
        """Words for the end of a line, "" without a GPU."""
        if not self.reserved:
            return ""
        return f", at most {self.allocated / 1e9:.2f} GB of GPU memory at once ({self.reserved / 1e9:.2f} GB held)"


def bytes_per_gaussian(table: GaussianTable) -> int:
    """Bytes of a row in everything that a table holds: parameters, both moments, statistics, id, its last update."""
    groups = (table.params, table.exp_avg, table.exp_avg_sq, table.statistics, {"ids": table.ids})
    return table.lazy_bytes + sum(
        math.prod(values.shape[1:]) * values.element_size() for values in chain(*(group.values() for group in groups))
    )


def sizes_text(training: Training) -> str:
    """A sentence on what takes memory: Gaussians, photos, pairs."""
    table, capacity = training.table, getattr(getattr(training.body, "own", training.body), "capacity", None)
    each = bytes_per_gaussian(table)
    width = max(camera.width for camera in training.scene.train)
    height = max(camera.height for camera in training.scene.train)
    text = f"{len(table):,} Gaussians of {each} bytes take {gigabytes(each * len(table))}"
    text += f" on this process, one of {training.communicator.size}" if training.communicator.size > 1 else ""
    text += f"; views have up to {width} x {height} pixels, {training.config.optimization.bsz} in a step"
    if capacity is not None:
        text += f"; lists have room for {capacity.instances:,} pairs of splat and tile"
    return text


def ways_out(training: Training, error: BaseException) -> list[str]:
    """Three things to try, the most helpful first."""
    config, ranks = training.config, training.communicator
    threshold, width = config.density.densify_grad_threshold, max(camera.width for camera in training.scene.train)
    ways = [
        f"smaller photos: --resolution {width // 2} (pixels of width)",
        f"fewer Gaussians: --densify_grad_threshold {2 * threshold:g} (it is {threshold:g})",
    ]
    if not is_of_gpu(error):
        return [*ways, f"fewer photos in memory: --image_cache_gb {config.pipeline.image_cache_gb / 2:g}"]
    photos = device_budget(config, [*training.scene.train, *training.scene.test], ranks.device)
    if torch.cuda.is_initialized() and photos > MANY_PHOTOS * torch.cuda.mem_get_info()[1]:
        ways.insert(0, f"photos ({gigabytes(photos)}) in host memory: --preload_dataset_to_gpu_threshold 0")
    processes = f"torchrun --standalone --nproc-per-node={2 * ranks.size} train.py ..."
    return [*ways, f"more GPUs, which share the Gaussians: {processes}"]


def out_of_memory_text(training: Training, error: BaseException, what: str) -> str:
    """The paragraph for an error that `is_out_of_memory`; what: the phase that it came from."""
    ways = ways_out(training, error)
    listed = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, 1))
    return f"In the phase '{what}', {shortage_text(error)}. {sizes_text(training)}. Ways out: {listed}."
