# SPDX-License-Identifier: Apache-2.0
"""The cuda body on trained models of real photos, beside the reference in float64: values, gradients, flipped pairs.

Needs a GPU and the scenes (conftest.py): `pytest -m gpu tests/test_cuda_trained.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from cuda_agreement import relative_error
from gaussian_renderer.views import KERNEL_ATTRIBUTES, views_of
from masksplat.ops import Body, get_body
from masksplat.types import Gaussians, ProjectionSettings
from scene.dataset import Scene, SceneOptions, load_scene
from scene.images import ImageStore
from scene.ply import load_ply

SETTINGS = ProjectionSettings(sh_degree=3)
ITERATIONS = 3000
SHARE_MASKED = 0.2
FEW_ROUNDINGS = 1e-6
LARGE_ERROR = 1e-3
"""Of the largest value of a group: an element that is further off is a pair on the other side of a threshold."""

MOST_FLIPPED = 1e-5
"""Share of a group's elements, unless the float32 reference has more: rounding of its inputs flips as many pairs, and
where a pixel is right to the last bit, the sign of its L1 gradient."""


@dataclass(frozen=True)
class Model:
    """A trained model, one test view with its photo, and masks, a fifth of them 0."""

    arrays: dict[str, Tensor]
    masks: Tensor
    scene: Scene
    photo: Tensor


@pytest.fixture(scope="module", params=["tiny-fox", "fox"])
def model(request: pytest.FixtureRequest, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    source = data_root / request.param
    if not (source / "sparse").is_dir():
        pytest.skip(f"no real scene {source}: set MASK_GRENDEL_DATA to the folder that holds it")
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["-s", str(source), "-m", str(folder), "--eval", "--iterations", str(ITERATIONS), "--quiet"]
    assert train.main(flags) == 0
    arrays = load_ply(folder / "point_cloud" / f"iteration_{ITERATIONS}" / "point_cloud.ply")
    scene = load_scene(source, SceneOptions(eval=True), progress=False)
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(len(arrays["means"]), generator=generator) >= SHARE_MASKED).float()
    with ImageStore(scene.test) as store:
        photo = store.fetch(0).clone()
    return Model({name: torch.as_tensor(arrays[name]) for name in KERNEL_ATTRIBUTES}, masks, scene, photo)


def outcome(body: Body, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that a training step computes of one view."""
    arrays = {name: values.to("cuda", dtype) for name, values in model.arrays.items()}
    gaussians, camera = Gaussians(**arrays), model.scene.test[0]
    views = views_of([camera], gaussians.means)
    background = torch.zeros(3, dtype=dtype, device="cuda")
    splats = body.project(gaussians, views, SETTINGS, masks=model.masks.to("cuda", dtype))
    frame = body.rasterize(splats, 0, views.sizes[0], background)
    loss = body.photometric(frame.rgb, model.photo.cuda(), 0.2)
    d_rows = torch.zeros_like(splats.rows)
    body.rasterize_backward(splats, frame, loss.d_rgb, d_rows)
    gradients = body.project_backward(gaussians, views, SETTINGS, splats, d_rows)
    values = {"rgb": frame.rgb, "transmittance": frame.transmittance, "d_rgb": loss.d_rgb}
    values.update({f"d_{name}": gradient for name, gradient in gradients._asdict().items()})
    return {name: value.detach().cpu().double() for name, value in values.items()}


@pytest.mark.gpu
def test_values_and_gradients_are_as_good_as_float32_can_be(model: Model) -> None:
    exact = outcome(get_body("reference"), model, torch.float64)
    single = outcome(get_body("reference"), model, torch.float32)
    found = outcome(get_body("cuda"), model, torch.float32)
    report = []
    for name, values in exact.items():
        error, allowed = relative_error(found[name], values), 2 * relative_error(single[name], values)
        bound = LARGE_ERROR * values.abs().max()
        flipped, usual = (share_beyond(bound, side[name] - values) for side in (found, single))
        report.append(f"{name}: {error:.2e} and {flipped:.1e}, float32 reference {allowed / 2:.2e} and {usual:.1e}")
        print(report[-1])
        assert error <= max(allowed, FEW_ROUNDINGS), report
        assert flipped <= max(MOST_FLIPPED, 2 * usual), report


def share_beyond(bound: Tensor, differences: Tensor) -> float:
    """Share of the elements that are further off than `bound`."""
    return float((differences.abs() > bound).double().mean())


@pytest.mark.gpu
def test_two_runs_of_the_forward_give_the_same_bits(model: Model) -> None:
    first, second = (outcome(get_body("cuda"), model, torch.float32) for _ in range(2))
    for name in ("rgb", "transmittance", "d_rgb", "d_means", "d_shN", "d_masks"):
        assert torch.equal(first[name], second[name]), name
