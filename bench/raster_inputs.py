# SPDX-License-Identifier: Apache-2.0
"""What the rasterizer is measured on: random Gaussians of realistic sizes, and a trained model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.measuring import ROOT
from gaussian_renderer.views import gaussians_of, views_of
from launch.cli import parse_render
from launch.config import pick
from masksplat.types import Gaussians, ProjectionSettings, Views
from scene.dataset import SceneOptions, load_scene
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import load_ply

TRAINING_ITERATIONS = 2000
"""Images that the model is trained on when none is given."""

MEDIAN_RADIUS = 1.0
"""Median standard deviation in pixels of a random Gaussian's axes: about 50 pixels of alpha >= 1/255 on average."""

SHARE_OF_ZERO_MASKS = 0.2


@dataclass(frozen=True)
class RasterInput:
    """N Gaussians with masks (N,), B views, background (3,), and a loss gradient (h, w, 3) for every view."""

    name: str
    gaussians: Gaussians
    masks: Tensor
    views: Views
    settings: ProjectionSettings
    background: Tensor
    d_rgb: tuple[Tensor, ...]


def _loss_gradients(views: Views) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(height, width, 3, generator=generator) for width, height in views.sizes)


def random_input(count: int, size: tuple[int, int], *, seed: int = 0) -> RasterInput:
    """`count` Gaussians all over one image: log-normal sizes, any orientation, opacities of all strengths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, height = size
    focal = 1.1 * width
    depth = 2.0 + 4.0 * torch.rand(count, generator=generator)
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    position = (pixels - torch.tensor([width / 2, height / 2])) * (depth / focal)[:, None]
    scales = torch.log(MEDIAN_RADIUS * depth / focal)[:, None] + 0.5 * normal(count, 3)
    gaussians = Gaussians(
        means=torch.cat((position, depth[:, None]), dim=1),
        quats=normal(count, 4),
        scales=scales,
        opacities=1.5 * normal(count),
        sh0=0.5 * normal(count, 3),
        shN=0.1 * normal(count, 15, 3),
    )
    masks = (torch.rand(count, generator=generator) >= SHARE_OF_ZERO_MASKS).float()
    intrinsics = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]])
    views = Views(torch.eye(4)[None], intrinsics, (size,))
    name = f"{count:,} random Gaussians, {width}x{height}"
    return RasterInput(name, gaussians, masks, views, ProjectionSettings(), torch.zeros(3), _loss_gradients(views))


def model_input(folder: Path, num_views: int, *, source: Path | None = None) -> RasterInput:
    """The newest saved model of `folder` and `num_views` of its test views (train views where there are none).

    Raises:
        InputError: the model or its data set (`source`, else the one it was trained on) cannot be read.
    """
    given = [] if source is None else ["-s", str(source)]
    config = parse_render(["-m", str(folder), *given])
    model = ModelFolder.open(folder)
    iteration = model.find_iteration()
    params = {name: torch.from_numpy(values) for name, values in load_ply(model.point_cloud(iteration)).items()}
    scene = load_scene(config.model.source_path, pick(SceneOptions, config.model), progress=False)
    cameras = scene.test or scene.train
    chosen = [cameras[k * len(cameras) // min(num_views, len(cameras))] for k in range(min(num_views, len(cameras)))]
    views = views_of(chosen, params["means"])
    degree = {0: 0, 3: 1, 8: 2, 15: 3}[params["shN"].shape[1]]
    return RasterInput(
        name=f"{Path(config.model.source_path).name} after {iteration:,} images, {len(views)} views",
        gaussians=gaussians_of(params),
        masks=torch.ones_like(params["opacities"]),
        views=views,
        settings=ProjectionSettings(sh_degree=degree, antialiased=config.pipeline.antialiasing),
        background=torch.full((3,), float(config.model.white_background)),
        d_rgb=_loss_gradients(views),
    )


def train_model(source: Path, folder: Path, iterations: int = TRAINING_ITERATIONS) -> None:
    """Train a model with the defaults into `folder`, in a process of its own; nothing when one is there already.

    Raises:
        InputError: the training failed.
    """
    if (folder / "point_cloud").is_dir() and ModelFolder.open(folder).saved_iterations():
        return
    print(f"training {folder} for {iterations} images ...", flush=True)
    flags = ["-s", str(source), "-m", str(folder), "--eval", "--iterations", str(iterations), "--quiet", "--no_report"]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise InputError(f"no model to measure: train.py {' '.join(flags)} ended with status {done.returncode}")
