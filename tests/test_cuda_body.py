# SPDX-License-Identifier: Apache-2.0
"""The cuda body as a whole, on the emulator and on a GPU: training steps, overflow and recovery, `rasterization`."""

from __future__ import annotations

import dataclasses
import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cuda_agreement import assert_as_good, relative_error
from cuda_launchers import launchers, make_launcher
from kernel_scenes import make_views, parameters_of, random_scene, settings_for, with_parameters
from masksplat.cuda.body import CudaBody
from masksplat.cuda.capacity import Capacity
from masksplat.masks import mask_update
from masksplat.ops import Body, get_body
from masksplat.types import AdamStep, Gaussians, Optimizer, Statistics, Views

SIZE = (70, 45)
COUNT = 150
SETTINGS = settings_for(3)
api = importlib.import_module("masksplat.rasterization")  # the package's own name of it is the function


@pytest.fixture(params=launchers())
def body(request: pytest.FixtureRequest) -> CudaBody:
    """A new one, whose capacity no other test has seen."""
    return CudaBody(launcher=make_launcher(request.param))


class State(NamedTuple):
    """Everything that a step changes."""

    table: Gaussians
    optimizer: Optimizer
    statistics: Statistics

    def tensors(self) -> list[Tensor]:
        return [*parameters_of(self.table), *self.optimizer.exp_avg, *self.optimizer.exp_avg_sq, *self.statistics]


def new_state(gaussians: Gaussians, dtype: torch.dtype, device: torch.device | str) -> State:
    table = with_parameters(gaussians, [tensor.to(device, dtype, copy=True) for tensor in parameters_of(gaussians)])
    zeros = [tuple(torch.zeros_like(tensor) for tensor in parameters_of(table)) for _ in range(2)]
    nothing = torch.zeros_like(table.opacities)
    return State(table, Optimizer(*zeros, steps(1)), Statistics(nothing, nothing.clone()))


def steps(number: int) -> tuple[AdamStep, ...]:
    return tuple(AdamStep(rate, 0.9, 0.999, 1e-8, number) for rate in (1e-3, 1e-3, 5e-3, 2e-2, 3e-3, 2e-4))


def make_scene() -> tuple[Gaussians, Views, Tensor, list[Tensor]]:
    """Float32 Gaussians, two views, masks of 0 and 1, two photos."""
    gaussians, views, masks = random_scene(COUNT, SIZE, seed=60, dtype=torch.float32, num_views=2, log_scale=-2.0)
    generator = torch.Generator().manual_seed(6)
    photos = [torch.randint(0, 256, (SIZE[1], SIZE[0], 3), generator=generator, dtype=torch.uint8) for _ in range(2)]
    return gaussians, views, (masks > 0.5).float(), photos


def step(body: Body, state: State, number: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """One training step on both views; returns images, terms of the loss and the masks' gradient."""
    _, views, masks, photos = make_scene()
    dtype = state.table.means.dtype
    views = Views(views.viewmats.to(dtype), views.intrinsics.to(dtype), views.sizes)
    background = torch.tensor([0.2, 0.5, 0.9], dtype=dtype, device=device)
    splats = body.project(state.table, views, SETTINGS, masks=masks.to(device, dtype))
    d_rows, results = torch.zeros_like(splats.rows), []
    for view, photo in enumerate(photos):
        frame = body.rasterize(splats, view, SIZE, background)
        loss = body.photometric(frame.rgb, photo.to(device), 0.2)
        body.rasterize_backward(splats, frame, loss.d_rgb, d_rows)
        results += [frame.rgb, frame.transmittance, loss.l1, loss.ssim]
    d_masks = body.project_backward_update(
        state.table, views, SETTINGS, splats, d_rows,
        optimizer=state.optimizer._replace(steps=steps(number)), statistics=state.statistics, gradient_scale=0.5,
    )  # fmt: skip
    return [*results, d_masks]


def test_training_steps(body: CudaBody) -> None:
    """Three steps from the same start on three bodies: the cuda body strays from float64 as the cpu body does."""
    gaussians = make_scene()[0]
    cpu, reference = get_body("cpu"), get_body("reference")
    found = new_state(gaussians, torch.float32, body.device)
    beside, exact = (new_state(gaussians, dtype, "cpu") for dtype in (torch.float32, torch.float64))
    for number in (1, 2, 3):
        results = [
            step(body, found, number, body.device),
            step(cpu, beside, number),
            step(reference, exact, number),
        ]
        # Adam's first steps are signs of gradients: rounding grows, for both bodies alike.
        for place, tensors in enumerate(zip(*results, strict=True)):
            assert_as_good(*tensors, f"step {number}, result {place}", factor=3.0)
        for place, tensors in enumerate(zip(found.tensors(), beside.tensors(), exact.tensors(), strict=True)):
            assert_as_good(*tensors, f"step {number}, tensor {place}", factor=3.0)
    assert relative_error(found.table.opacities, gaussians.opacities) > 1e-3


def test_same_bits_twice(body: CudaBody) -> None:
    gaussians = make_scene()[0]
    states = [new_state(gaussians, torch.float32, body.device) for _ in range(2)]
    results = [step(body, state, 1, body.device) for state in states]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(*(state.tensors() for state in states), strict=True))


def test_overflow_changes_nothing_and_recovery_gives_the_same(body: CudaBody) -> None:
    """Buffers for 40 instances: deferred steps leave everything as it was, until `recover` makes room."""
    gaussians = make_scene()[0]
    roomy, state = new_state(gaussians, torch.float32, body.device), new_state(gaussians, torch.float32, body.device)
    expected = step(body, roomy, 1, body.device)
    small = CudaBody(launcher=body.launcher, capacity=Capacity(body.device, instances=40, buckets=2))
    small.capacity.expect(0)
    logits = torch.ones(COUNT, device=body.device)
    with small.deferred():
        assert small.defers
        d_masks = step(small, state, 1, body.device)[-1]
        moments = torch.zeros_like(logits), torch.zeros_like(logits)
        if body.device.type == "cuda":
            mask_update(
                logits, *moments, d_mask=d_masks, keep_gradient=torch.ones_like(logits), d_all=1.0,
                adam=steps(1)[0], status=small.status,
            )  # fmt: skip
        untouched = new_state(gaussians, torch.float32, body.device).tensors()
        assert all(torch.equal(one, two) for one, two in zip(state.tensors(), untouched, strict=True))
        assert bool((logits == 1).all()) and not bool(moments[0].any())
        repeats = 0
        while small.recover():
            repeats += 1
            found = step(small, state, 1, body.device)
    assert not small.defers and 1 <= repeats <= 3 and small.capacity.instances > 40
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(state.tensors(), roomy.tensors(), strict=True))


def test_immediate_mode_makes_room_by_itself(body: CudaBody) -> None:
    gaussians, views, masks, _ = make_scene()
    table = new_state(gaussians, torch.float32, body.device).table
    background = torch.zeros(3, device=body.device)
    small = CudaBody(launcher=body.launcher, capacity=Capacity(body.device, instances=40, buckets=2))
    small.capacity.expect(0)
    images = []
    for one in (body, small):
        splats = one.project(table, views, SETTINGS, masks=masks.to(body.device))
        frame = one.rasterize(splats, 0, SIZE, background, has_backward=False)
        images.append([frame.rgb, frame.transmittance, *one.blend_scores(splats, 1, SIZE)])
    assert all(torch.equal(one, two) for one, two in zip(*images, strict=True))
    assert small.capacity.instances > 40 and not bool(small.status.any())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("degree", [None, 2])
def test_rasterization(body: CudaBody, monkeypatch: pytest.MonkeyPatch, masked: bool, degree: int | None) -> None:
    """gsplat's call with autograd, colours and depth, and absgrad, against the reference and beside the cpu body."""
    monkeypatch.setattr(api, "_body", lambda backend, device: body if backend == "cuda" else get_body(backend))
    outcomes = []
    for backend, dtype, device in (
        ("cuda", torch.float32, body.device), ("cpu", torch.float32, "cpu"), ("reference", torch.float64, "cpu"),
    ):  # fmt: skip
        inputs = api_inputs(degree, dtype, device)
        masks = inputs.pop("masks")
        images, alphas, meta = api.rasterization(
            **inputs, width=SIZE[0], height=SIZE[1], backend=backend,
            masks=masks if masked else None, sh_degree=degree, render_mode="RGB+D", absgrad=True,
        )  # fmt: skip
        assert images.shape == (2, SIZE[1], SIZE[0], 4) and len(meta["camera_ids"]) == len(meta["means2d"])
        weights = torch.linspace(0.1, 1.0, images.numel(), dtype=torch.float64).reshape(images.shape)
        ((images * weights.to(images)).sum() + (alphas**2).sum()).backward()
        leaves = [tensor for tensor in (*inputs.values(), masks if masked else None) if tensor is not None]
        place = (meta["camera_ids"], meta["gaussian_ids"])
        absgrad = images.new_zeros(2, 100, 2).index_put(place, meta["means2d"].absgrad)
        outcomes.append([images, alphas, absgrad, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for place, tensors in enumerate(zip(*outcomes, strict=True)):
        assert_as_good(*tensors, f"output {place}")


def api_inputs(degree: int | None, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Leaves with final scales and opacities; their float32 numbers in every dtype."""
    gaussians, _, masks = random_scene(100, SIZE, seed=61, dtype=torch.float32, log_scale=-2.0)
    views = make_views(SIZE, num_views=2, dtype=torch.float32)
    colors = gaussians.sh0.abs() if degree is None else torch.cat((gaussians.sh0[:, None], gaussians.shN), dim=1)
    tensors = {
        "means": gaussians.means, "quats": gaussians.quats, "scales": gaussians.scales.exp(),
        "opacities": torch.sigmoid(gaussians.opacities), "colors": colors, "masks": masks,
    }  # fmt: skip
    leaves = {name: tensor.to(device, dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    cameras = {"viewmats": views.viewmats, "Ks": views.intrinsics}
    return leaves | {name: tensor.to(device, dtype) for name, tensor in cameras.items()}


def test_get_body_picks_by_name_and_device() -> None:
    assert get_body("auto").name == get_body("auto", device="cpu").name == "cpu"
    with pytest.raises(ValueError, match="auto, cuda, cpu, reference"):
        get_body("vulkan")
    if torch.cuda.is_available():
        assert get_body("auto", device="cuda").name == get_body("cuda").name == "cuda"
    else:
        for arguments in ({"name": "cuda"}, {"name": "auto", "device": "cuda:1"}):
            with pytest.raises(RuntimeError, match="the cuda body has no device"):
                get_body(**arguments)


def test_views_may_be_on_either_side(body: CudaBody) -> None:
    gaussians, views, masks, _ = make_scene()
    table = new_state(gaussians, torch.float32, body.device).table
    there = dataclasses.replace(
        views, viewmats=views.viewmats.to(body.device), intrinsics=views.intrinsics.to(body.device)
    )
    one, two = (body.project(table, given, SETTINGS, masks=masks.to(body.device)) for given in (views, there))
    chosen = one.slots >= 0
    assert torch.equal(chosen, two.slots >= 0)
    pairs = [splats.rows[splats.slots[chosen].long()] for splats in (one, two)]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-6)
