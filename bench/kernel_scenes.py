# SPDX-License-Identifier: Apache-2.0
"""The scenes that kernels are timed on: a trained model, and copies of it on a grid for millions of Gaussians.

Letters: N Gaussians.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from masksplat.types import Gaussians, Views
from scene.ply import load_ply

LARGE_SIZE = (1600, 1064)
"""Width and height of the view that large scenes are drawn in."""

LARGE_FIELD_OF_VIEW = math.radians(60.0)


@dataclass(frozen=True)
class KernelScene:
    """Gaussians (raw, float32), one view and a background, on one device; `target` is (h, w, 3) uint8."""

    name: str
    gaussians: Gaussians
    views: Views
    background: Tensor
    target: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the view."""
        return self.views.sizes[0]


def model_scene(model: Path, view: int, device: torch.device) -> KernelScene:
    """The newest point cloud of a model folder, seen by camera number `view` of its cameras.json."""
    clouds = sorted(model.glob("point_cloud/iteration_*/point_cloud.ply"), key=lambda path: int(path.parent.name[10:]))
    arrays = load_ply(clouds[-1])
    names = ("means", "quats", "scales", "opacities", "sh0", "shN")
    gaussians = Gaussians(**{name: torch.as_tensor(arrays[name]).to(device) for name in names})
    camera = json.loads((model / "cameras.json").read_text())[view]
    turn = torch.tensor(camera["rotation"], dtype=torch.float64).T
    size = (int(camera["width"]), int(camera["height"]))
    views = _view(turn, torch.tensor(camera["position"], dtype=torch.float64), camera["fx"], camera["fy"], size, device)
    return _scene(f"{model.name} {len(gaussians) / 1e3:.0f} k", gaussians, views)


def grid_scene(base: KernelScene, count: int) -> KernelScene:
    """At least `count` Gaussians: small copies of a scene's Gaussians on a grid that fills the volume of the scene."""
    side = math.ceil((count / len(base.gaussians)) ** (1 / 3))
    means = base.gaussians.means
    low, high = (torch.quantile(means[:: max(1, len(means) // 100_000)], q, dim=0) for q in (0.05, 0.95))
    inside = ((means >= low) & (means <= high)).all(dim=1)
    per_copy = base.gaussians.means[inside]
    copies = math.ceil(count / len(per_copy))
    side = math.ceil(copies ** (1 / 3))
    steps = torch.arange(copies, device=means.device)
    cells = torch.stack([steps % side, steps // side % side, steps // side**2], dim=1).to(means)
    centres = low + (cells + 0.5) / side * (high - low)
    moved = centres[:, None] + (per_copy - (low + high) / 2) / side
    repeated = Gaussians(
        moved.reshape(-1, 3).contiguous(),
        _repeated(base.gaussians.quats[inside], copies),
        _repeated(base.gaussians.scales[inside], copies) - math.log(side),
        _repeated(base.gaussians.opacities[inside], copies),
        _repeated(base.gaussians.sh0[inside], copies),
        _repeated(base.gaussians.shN[inside], copies),
    )
    focal = 0.5 * LARGE_SIZE[0] / math.tan(0.5 * LARGE_FIELD_OF_VIEW)
    viewmat = base.views.viewmats[0].double().cpu()
    turn, position = viewmat[:3, :3], -viewmat[:3, :3].T @ viewmat[:3, 3]
    views = _view(turn, position, focal, focal, LARGE_SIZE, means.device)
    return _scene(f"grid {len(repeated) / 1e6:.1f} M", repeated, views)


def _repeated(values: Tensor, copies: int) -> Tensor:
    return values.repeat(copies, *[1] * (values.ndim - 1)).contiguous()


def _view(turn: Tensor, position: Tensor, fx: float, fy: float, size: tuple[int, int], device: torch.device) -> Views:
    """One camera that looks from `position` with the world-to-camera rotation `turn`, its centre in the middle."""
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3, :3], viewmat[:3, 3] = turn, -turn @ position
    intrinsics = torch.tensor([[fx, 0.0, size[0] / 2], [0.0, fy, size[1] / 2], [0.0, 0.0, 1.0]])
    return Views(viewmat.float()[None].to(device), intrinsics[None].to(device), (size,))


def _scene(name: str, gaussians: Gaussians, views: Views) -> KernelScene:
    """The scene with a black background and a photo of noise."""
    device, (width, height) = gaussians.means.device, views.sizes[0]
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return KernelScene(name, gaussians, views, torch.zeros(3, device=device), target.to(device))
