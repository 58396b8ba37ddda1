# SPDX-License-Identifier: Apache-2.0
"""The cuda body on trained models of real photos, beside the reference in float64: values, gradients, flipped pairs.

Needs a GPU and the scenes (conftest.py): `pytest -m gpu tests/test_cuda_trained.py`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from gaussian_renderer.views import KERNEL_ATTRIBUTES, views_of
from masksplat.ops import Body, get_body
from masksplat.types import Gaussians, ProjectionSettings, Views
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
    """A trained model, its scene, the photos of the test views, and masks, a fifth of them 0."""

    arrays: dict[str, Tensor]
    masks: Tensor
    scene: Scene
    photos: list[Tensor]


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
        photos = [store.fetch(number).clone() for number in range(len(scene.test))]
    return Model({name: torch.as_tensor(arrays[name]) for name in KERNEL_ATTRIBUTES}, masks, scene, photos)


def outcome(body: Body, model: Model, dtype: torch.dtype, number: int = 0) -> dict[str, Tensor]:
    """Everything that a training step computes of one test view, from the same float32 numbers, cameras included."""
    arrays = {name: values.to("cuda", dtype) for name, values in model.arrays.items()}
    gaussians, camera = Gaussians(**arrays), model.scene.test[number]
    given = views_of([camera], gaussians.means.float())
    views = Views(given.viewmats.to(dtype), given.intrinsics.to(dtype), given.sizes)
    background = torch.zeros(3, dtype=dtype, device="cuda")
    splats = body.project(gaussians, views, SETTINGS, masks=model.masks.to("cuda", dtype))
    frame = body.rasterize(splats, 0, views.sizes[0], background)
    loss = body.photometric(frame.rgb, model.photos[number].cuda(), 0.2)
    d_rows = torch.zeros_like(splats.rows)
    body.rasterize_backward(splats, frame, loss.d_rgb, d_rows)
    gradients = body.project_backward(gaussians, views, SETTINGS, splats, d_rows)
    values = {"rgb": frame.rgb, "transmittance": frame.transmittance, "d_rgb": loss.d_rgb}
    values.update({f"d_{name}": gradient for name, gradient in gradients._asdict().items()})
    return {name: value.detach().cpu().double() for name, value in values.items()}


@dataclass
class Deviation:
    """Of one group of values from the exact ones, over all views: sums of squares, and how many are far off."""

    squares: float = 0.0
    exact_squares: float = 0.0
    far_off: int = 0
    count: int = 0

    def add(self, found: Tensor, exact: Tensor) -> None:
        """One more view."""
        difference = found - exact
        self.squares += float(difference.square().sum())
        self.exact_squares += float(exact.square().sum())
        self.far_off += int((difference.abs() > LARGE_ERROR * exact.abs().max()).sum())
        self.count += exact.numel()

    @property
    def relative(self) -> float:
        """The error in the Euclidean norm."""
        return (self.squares / self.exact_squares) ** 0.5

    @property
    def share_far_off(self) -> float:
        """Share of the values that are further off than `LARGE_ERROR` of the largest."""
        return self.far_off / self.count


@pytest.mark.gpu
def test_values_and_gradients_are_as_good_as_float32_can_be(model: Model) -> None:
    """Over all test views: which pair of a view lies on the other side of a threshold is chance, in every float32
    program another one, and one sign of L1 can be most of a view's error in a group."""
    ours: dict[str, Deviation] = defaultdict(Deviation)
    usual: dict[str, Deviation] = defaultdict(Deviation)
    for number in range(len(model.photos)):
        exact = outcome(get_body("reference"), model, torch.float64, number)
        single = outcome(get_body("reference"), model, torch.float32, number)
        found = outcome(get_body("cuda"), model, torch.float32, number)
        for name, values in exact.items():
            ours[name].add(found[name], values)
            usual[name].add(single[name], values)
    report = [
        f"{name}: {own.relative:.2e} and {own.share_far_off:.1e}, float32 reference {usual[name].relative:.2e} and "
        f"{usual[name].share_far_off:.1e}"
        for name, own in ours.items()
    ]
    print("\n".join(report))
    for name, own in ours.items():
        assert own.relative <= max(2 * usual[name].relative, FEW_ROUNDINGS), (name, report)
        assert own.share_far_off <= max(MOST_FLIPPED, 2 * usual[name].share_far_off), (name, report)


@pytest.mark.gpu
def test_two_runs_of_the_forward_give_the_same_bits(model: Model) -> None:
    first, second = (outcome(get_body("cuda"), model, torch.float32) for _ in range(2))
    for name in ("rgb", "transmittance", "d_rgb", "d_means", "d_shN", "d_masks"):
        assert torch.equal(first[name], second[name]), name
