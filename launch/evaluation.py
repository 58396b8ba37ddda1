# SPDX-License-Identifier: Apache-2.0
"""Measuring while training: the numbers metrics.py would give, on the Gaussians that would be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaussian_renderer.image_quality import psnr, ssim, to_8bit
from gaussian_renderer.rendering import existing, render_rgb
from launch.training import Training
from scene.cameras import Camera
from scene.images import ImageStore
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
    """Test views and a few training views, drawn from the rows that exist (p >= 1/2), rounded to 8 bits."""
    params = existing(training.table.params, training.strategy.keep(training.table))
    measured = []
    if training.test_photos is not None:
        every = range(len(training.scene.test))
        measured.append(_measure(training, window, "test", params, training.scene.test, training.test_photos, every))
    count = len(training.scene.train)
    some = sorted({k * count // NUM_TRAIN_VIEWS for k in range(NUM_TRAIN_VIEWS)})
    measured.append(_measure(training, window, "train", params, training.scene.train, training.photos, some))
    return measured


def _measure(
    training: Training,
    window: Window,
    split: str,
    params: Mapping[str, Tensor],
    cameras: Sequence[Camera],
    photos: ImageStore,
    indices: Sequence[int],
) -> Measured:
    totals = torch.zeros(3, dtype=torch.float64)
    photos.prefetch(indices)
    for index in indices:
        rgb = render_rgb(
            params,
            cameras[index],
            sh_degree=training.sh_degree(window),
            background=training.background(),
            body=training.body,
            antialiased=training.config.pipeline.antialiasing,
        )
        image, photo = to_8bit(rgb), photos.fetch(index)
        l1 = float((image.double() - photo.double()).abs().mean()) / 255.0
        totals += torch.tensor([psnr(image, photo), ssim(image, photo), l1], dtype=torch.float64)
    mean_psnr, mean_ssim, mean_l1 = (totals / len(indices)).tolist()
    return Measured(split, mean_psnr, mean_ssim, mean_l1, len(params["means"]))
