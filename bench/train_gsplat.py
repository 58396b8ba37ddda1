# SPDX-License-Identifier: Apache-2.0
"""The peer of `bench.train`: gsplat's default strategy on the same photos, with its usual settings and no masks.

Our readers load the scene; everything else is gsplat's and torch's: rasterization, DefaultStrategy, fused Adam, and
the faster of the losses in bench.torch_losses.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.torch_losses import fastest_loss
from gaussian_renderer.image_quality import psnr, to_8bit
from scene.cameras import Camera
from scene.dataset import Scene, SceneOptions, load_scene
from scene.images import ImageStore
from scene.points import initial_gaussians
from scene.sampler import ViewSampler

POSITION_RATE, FINAL_POSITION_FACTOR = 1.6e-4, 0.01
RATES = {"scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 2.5e-3 / 20}
SH_DEGREE, SH_INTERVAL = 3, 1000


@dataclass(frozen=True)
class PeerResult:
    """seconds: of training alone. psnr: mean over the test views, rounded to 8 bits, dB."""

    seconds: float
    psnr: float
    num_gaussians: int
    peak_gib: float


class View(NamedTuple):
    """viewmat (1, 4, 4) and intrinsics (1, 3, 3) on the GPU; size: (width, height)."""

    viewmat: Tensor
    intrinsics: Tensor
    size: tuple[int, int]


def train_with_gsplat(data: Path, iterations: int, seed: int) -> PeerResult:
    """Train on the GPU and measure the test views."""
    import gsplat

    torch.manual_seed(seed)
    scene = load_scene(data, SceneOptions(eval=True), progress=False)
    photos, views = _photos(scene.train), _views(scene.train)
    params, optimizers = _parameters(scene)
    positions = torch.optim.lr_scheduler.ExponentialLR(
        optimizers["means"], gamma=FINAL_POSITION_FACTOR ** (1.0 / iterations)
    )
    strategy = gsplat.DefaultStrategy(refine_stop_iter=min(15_000, iterations))
    state = strategy.initialize_state(scene_scale=scene.extent)
    sampler = ViewSampler(len(scene.train), 1, seed)
    image, _ = _render(gsplat, params, views[0], 0)  # loads its kernels, or compiles them
    _, torch_loss = fastest_loss(image, photos[0].float() / 255.0)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(iterations):
        view = sampler.batch(step)[0]
        image, info = _render(gsplat, params, views[view], min(step // SH_INTERVAL, SH_DEGREE))
        strategy.step_pre_backward(params, optimizers, state, step, info)
        torch_loss(image, photos[view].float() / 255.0).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        positions.step()
        strategy.step_post_backward(params, optimizers, state, step, info, packed=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / (1 << 30)
    return PeerResult(seconds, _test_psnr(gsplat, params, scene), len(params["means"]), peak)


def _photos(cameras: tuple[Camera, ...]) -> list[Tensor]:
    store = ImageStore(cameras)
    return [store.fetch(index).cuda() for index in range(len(cameras))]


def _parameters(scene: Scene) -> tuple[torch.nn.ParameterDict, dict[str, torch.optim.Adam]]:
    """3DGS's initial values and learning rates, in gsplat's shapes."""
    arrays = initial_gaussians(scene.points, SH_DEGREE, progress=False)
    values = {name: torch.as_tensor(arrays[name]).float().cuda() for name in ("means", *RATES)}
    values["sh0"] = values["sh0"][:, None]
    params = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in values.items()})
    rates = {"means": POSITION_RATE * scene.extent, **RATES}
    return params, {name: torch.optim.Adam([params[name]], lr=rates[name], eps=1e-15, fused=True) for name in params}


def _views(cameras: tuple[Camera, ...]) -> list[View]:
    """On the GPU once: an upload in a step would wait for the step before."""
    return [
        View(
            torch.from_numpy(camera.viewmat).float().cuda()[None],
            torch.from_numpy(camera.intrinsics).float().cuda()[None],
            (camera.width, camera.height),
        )
        for camera in cameras
    ]


def _render(gsplat: Any, params: torch.nn.ParameterDict, view: View, degree: int) -> tuple[Tensor, dict[str, Any]]:
    """(h, w, 3) image and what the strategy needs."""
    images, _, info = gsplat.rasterization(
        params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid(),
        torch.cat([params["sh0"], params["shN"]], dim=1), view.viewmat, view.intrinsics, *view.size,
        near_plane=0.2, sh_degree=degree, packed=False,
    )  # fmt: skip
    return images[0], info


@torch.no_grad()
def _test_psnr(gsplat: Any, params: torch.nn.ParameterDict, scene: Scene) -> float:
    store = ImageStore(scene.test)
    total = 0.0
    for index, view in enumerate(_views(scene.test)):
        image, _ = _render(gsplat, params, view, SH_DEGREE)
        total += psnr(to_8bit(image.clamp(0.0, 1.0).cpu()), store.fetch(index))
    return total / len(scene.test) if scene.test else math.nan
