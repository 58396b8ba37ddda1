# SPDX-License-Identifier: Apache-2.0
"""The two sides of the kernel benchmark, stage by stage: masksplat's cuda body, and gsplat with torch.

Each side is a dictionary stage -> function without arguments; a stage's inputs are made before it is timed. The stages:
projection (activations, EWA, harmonics, bounds), forward (tile lists and compositing), loss (L1 + SSIM with gradient),
backward (of compositing), optimizer path (backward of projection, and Adam on all parameters), step (the first four
and the backward of projection, without the optimizer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernel_scenes import KernelScene
from bench.torch_losses import LAMBDA_DSSIM, fastest_loss
from masksplat.ops import Body
from masksplat.types import TILE, AdamStep, Optimizer, ProjectionSettings, Statistics

SETTINGS = ProjectionSettings(sh_degree=3)
BETAS, EPS = (0.9, 0.999), 1e-15
RATE = 1e-9
"""Learning rate: small, so that the scene stays the same while it is timed."""

Stages = Mapping[str, Callable[[], Any]]


def masksplat_stages(body: Body, scene: KernelScene, masks: Tensor | None = None) -> Stages:
    """The ops of masksplat on the scene. Args: masks: (N,) what alphas are multiplied with."""
    gaussians, views, view_size = scene.gaussians, scene.views, scene.size
    ids = torch.arange(len(gaussians), device=scene.background.device)
    parameters = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh0, gaussians.shN)
    moments = [tuple(torch.zeros_like(values) for values in parameters) for _ in range(2)]
    optimizer = Optimizer(moments[0], moments[1], tuple(AdamStep(RATE, *BETAS, EPS, 1) for _ in parameters))
    statistics = Statistics(torch.zeros_like(gaussians.opacities), torch.zeros_like(gaussians.opacities))

    def project() -> Any:
        return body.project(gaussians, views, SETTINGS, masks=masks, ids=ids)

    splats = project()
    frame = body.rasterize(splats, 0, view_size, scene.background)
    loss = body.photometric(frame.rgb, scene.target, LAMBDA_DSSIM)
    d_rows = torch.zeros_like(splats.rows)
    body.rasterize_backward(splats, frame, loss.d_rgb, d_rows)

    def step() -> Any:
        drawn = project()
        image = body.rasterize(drawn, 0, view_size, scene.background)
        gradient = body.photometric(image.rgb, scene.target, LAMBDA_DSSIM).d_rgb
        to_rows = torch.empty_like(drawn.rows)
        body.rasterize_backward(drawn, image, gradient, to_rows, overwrite=True)
        return body.project_backward(gaussians, views, SETTINGS, drawn, to_rows)

    return {
        "projection": project,
        "forward": lambda: body.rasterize(splats, 0, view_size, scene.background),
        "loss": lambda: body.photometric(frame.rgb, scene.target, LAMBDA_DSSIM),
        "backward": lambda: body.rasterize_backward(
            splats, frame, loss.d_rgb, torch.empty_like(d_rows), overwrite=True
        ),
        "optimizer path": lambda: body.project_backward_update(
            gaussians, views, SETTINGS, splats, d_rows, optimizer=optimizer, statistics=statistics
        ),
        "step": step,
    }


def gsplat_leaves(scene: KernelScene) -> list[Tensor]:
    """What gsplat's trainer optimizes: means, quaternions, log scales, opacity logits, SH coefficients (N, K, 3)."""
    raw = scene.gaussians
    coefficients = torch.cat([raw.sh0[:, None], raw.shN], dim=1)
    leaves = (raw.means, raw.quats, raw.scales, raw.opacities, coefficients)
    return [values.clone().requires_grad_() for values in leaves]


def gsplat_project(gsplat: Any, scene: KernelScene, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Radii, depths, 2D means, conics, colours and opacities of every Gaussian in the scene's view."""
    means, quats, scales, opacities, coefficients = leaves
    alphas, viewmats = torch.sigmoid(opacities), scene.views.viewmats
    radii, means2d, depths, conics, _ = gsplat.fully_fused_projection(
        means, None, quats, scales.exp(), viewmats, scene.views.intrinsics, *scene.size, near_plane=0.2,
        opacities=alphas.detach(),
    )  # fmt: skip
    centre = torch.linalg.inv(viewmats)[:, :3, 3]
    visible = (radii > 0).all(dim=-1)
    colours = gsplat.spherical_harmonics(3, (means - centre)[None], coefficients[None], masks=visible)
    return radii, depths, means2d, conics, (colours + 0.5).clamp(min=0.0), alphas[None]


def gsplat_compose(gsplat: Any, scene: KernelScene, radii: Tensor, depths: Tensor, *inputs: Tensor) -> Tensor:
    """The image, (1, h, w, 3), of 2D means, conics, colours and opacities."""
    means2d, conics, colours, alphas = inputs
    width, height = scene.size
    columns, rows = -(-width // TILE), -(-height // TILE)
    _, keys, indices = gsplat.isect_tiles(means2d, radii, depths, TILE, columns, rows)
    offsets = gsplat.isect_offset_encode(keys, 1, columns, rows)
    image, _ = gsplat.rasterize_to_pixels(
        means2d, conics, colours, alphas, width, height, TILE, offsets, indices,
        backgrounds=scene.background[None],
    )  # fmt: skip
    return image


def gsplat_stages(gsplat: Any, scene: KernelScene) -> Stages:
    """The functions of gsplat as its own trainer calls them, torch's fused Adam, and the fastest loss of torch."""
    leaves = gsplat_leaves(scene)
    adam = torch.optim.Adam([{"params": [values]} for values in leaves], lr=RATE, eps=EPS, fused=True)
    project, compose = partial(gsplat_project, gsplat, scene, leaves), partial(gsplat_compose, gsplat, scene)
    projected = project()
    inputs = [values.detach().requires_grad_() for values in projected[2:]]
    drawn = compose(projected[0], projected[1], *inputs)
    leaf_image = drawn.detach().requires_grad_()
    target = scene.target.float() / 255.0
    name, torch_loss = fastest_loss(leaf_image[0], target)
    print(f"torch's fastest loss on {scene.name}: {name}")
    (d_image,) = torch.autograd.grad(torch_loss(leaf_image[0], target), leaf_image)
    d_inputs = torch.autograd.grad(drawn, inputs, d_image, retain_graph=True)

    def loss() -> Any:
        return torch.autograd.grad(torch_loss(leaf_image[0], target), leaf_image)

    def update() -> None:
        grads = torch.autograd.grad(projected[2:], leaves, d_inputs, retain_graph=True)
        for values, gradient in zip(leaves, grads, strict=True):
            values.grad = gradient
        adam.step()

    def step() -> Any:
        parts = project()
        image = compose(*parts)
        return torch.autograd.grad(torch_loss(image[0], target), leaves)

    with torch.no_grad():
        frozen = [values.detach() for values in projected]

    def forward() -> Any:
        with torch.no_grad():
            return compose(*frozen)

    return {
        "projection": project,
        "forward": forward,
        "loss": loss,
        "backward": lambda: torch.autograd.grad(drawn, inputs, d_image, retain_graph=True),
        "optimizer path": update,
        "step": step,
    }
