# SPDX-License-Identifier: Apache-2.0
"""gsplat's kernels behind the ops, beside the reference: needs a GPU and `pip install gsplat==1.5.3`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cuda_agreement import relative_error
from kernel_scenes import parameters_of, random_scene, settings_for
from masksplat.gsplat.body import GsplatBody
from masksplat.ops import Body, get_body
from masksplat.types import Gaussians, Views

SIZE = (70, 45)
SETTINGS = settings_for(3)
BACKGROUND = (0.2, 0.5, 0.9)


def outcome(
    body: Body, gaussians: Gaussians, views: Views, masks: Tensor | None, rows: tuple[int, int], device: str
) -> dict[str, Tensor]:
    """Pixels of a strip of the second view, and the gradients of a loss on them."""
    there = Gaussians(*(tensor.to(device) for tensor in parameters_of(gaussians)))
    cameras = Views(views.viewmats.to(device), views.intrinsics.to(device), views.sizes)
    background = torch.tensor(BACKGROUND, device=device)
    splats = body.project(there, cameras, SETTINGS, masks=None if masks is None else masks.to(device))
    frame = body.rasterize(splats, 1, SIZE, background, rows=rows)
    generator = torch.Generator().manual_seed(1)
    d_rgb = torch.randn((rows[1] - rows[0], SIZE[0], 3), generator=generator).to(device)
    d_rows = torch.zeros_like(splats.rows)
    body.rasterize_backward(splats, frame, d_rgb, d_rows)
    gradients = body.project_backward(there, cameras, SETTINGS, splats, d_rows)
    found = {"rgb": frame.rgb, "transmittance": frame.transmittance, **gradients._asdict()}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(0, 45), (16, 40)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_agrees_with_the_reference(is_masked: bool, rows: tuple[int, int]) -> None:
    """Below the caps of alpha, where both mean the same; without masks their gradient is not computed."""
    pytest.importorskip("gsplat")
    gaussians, views, masks = random_scene(150, SIZE, seed=70, dtype=torch.float32, num_views=2, log_scale=-2.0)
    gaussians = dataclasses.replace(gaussians, opacities=gaussians.opacities.clamp(max=3.0))
    chosen = (masks > 0.5).float() if is_masked else None
    body = GsplatBody(get_body("cuda"), masked=is_masked)
    found = outcome(body, gaussians, views, chosen, rows, "cuda")
    expected = outcome(get_body("reference"), gaussians, views, chosen, rows, "cpu")
    for name, value in expected.items():
        if name == "masks" and not is_masked:
            continue
        assert relative_error(found[name], value) < 2e-4, name


def test_masks_are_refused_by_a_body_without() -> None:
    """gsplat's rasterizer would ignore them."""
    body = object.__new__(GsplatBody)
    body.masked = False
    gaussians, views, masks = random_scene(5, SIZE, seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="knows no masks"):
        body.project(gaussians, views, SETTINGS, masks=masks)
