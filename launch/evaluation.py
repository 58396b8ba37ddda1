# SPDX-License-Identifier: Apache-2.0
"""Measuring while training: the numbers metrics.py would give, on the Gaussians that would be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaussian_renderer.image_quality import psnr, ssim, to_8bit
from gaussian_renderer.rendering import Shard, render_on_ranks
from launch.training import Training
from masksplat.types import ProjectionSettings
from scene.cameras import Camera
from scene.device_images import DeviceImages
from scene.images import on_background
from strategies.schedule import Window

NUM_TRAIN_VIEWS = 5
"""Training views measured beside the test views, spread evenly (3DGS measures five, too)."""


@dataclass(frozen=True)
class Measured:
    """Means over the views of a split."""

    split: str
    psnr: float
    ssim: float
    l1: float
    num_gaussians: int


def evaluate(training: Training, window: Window) -> list[Measured]:
    """Test views and a few training views, drawn from the rows that exist (p >= 1/2), rounded to 8 bits.

    All ranks call it and get the same numbers: a view is drawn and measured by one of them.
    """
    table = training.table
    shard = Shard.existing(training.strategy.final_params(table), table.ids, training.strategy.keep(table))
    measured = []
    if training.test_photos is not None:
        every = range(len(training.scene.test))
        measured.append(_measure(training, window, "test", shard, training.scene.test, training.test_photos, every))
    count = len(training.scene.train)
    some = sorted({k * count // NUM_TRAIN_VIEWS for k in range(NUM_TRAIN_VIEWS)})
    measured.append(_measure(training, window, "train", shard, training.scene.train, training.photos, some))
    return measured


def _measure(
    training: Training,
    window: Window,
    split: str,
    shard: Shard,
    cameras: Sequence[Camera],
    photos: DeviceImages,
    indices: Sequence[int],
) -> Measured:
    """Rounds of W views: each rank draws one of them, and the numbers of all are added in the order of the views."""
    ranks = training.communicator
    antialiased = training.config.pipeline.antialiasing
    settings = ProjectionSettings(sh_degree=training.sh_degree(window), antialiased=antialiased)
    photos.prefetch(indices[ranks.rank :: ranks.size])
    numbers = torch.zeros(len(indices), 3, dtype=torch.float64)
    for first in range(0, len(indices), ranks.size):
        chosen = [cameras[index] for index in indices[first : first + ranks.size]]
        rgb = render_on_ranks(
            shard, chosen, settings, background=training.background(), body=training.body, communicator=ranks
        )
        if rgb is not None:
            mine = first + ranks.rank
            photo = on_background(photos.fetch(indices[mine]), training.background())
            numbers[mine] = _compare(to_8bit(rgb), photo)
    mean_psnr, mean_ssim, mean_l1 = ranks.sum(numbers).mean(0).tolist()  # all ranks
    return Measured(split, mean_psnr, mean_ssim, mean_l1, int(training.total(len(shard.ids))[0]))


def _compare(image: Tensor, photo: Tensor) -> Tensor:
    """(3,) float64: PSNR, SSIM and L1 of two (H, W, 3) uint8 images."""
    l1 = float((image.double() - photo.double()).abs().mean()) / 255.0
    return torch.tensor([psnr(image, photo), ssim(image, photo), l1], dtype=torch.float64)
