# SPDX-License-Identifier: Apache-2.0
"""`absgrad`: the sums over pixels of each pixel's |dL/d mean2d| (AbsGS), against one backward for every pixel."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from cuda_agreement import assert_as_good
from cuda_launchers import launchers, make_launcher
from kernel_scenes import random_scene, settings_for
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.rasterization import Rasterizer
from masksplat.ops import get_body
from masksplat.rasterization import rasterization
from masksplat.types import Frame, ImageGradient, Splats

CPU, REFERENCE = get_body("cpu"), get_body("reference")
BODIES = pytest.mark.parametrize("backend", ["reference", "cpu"])
SIZE = (17, 4)
"""Pixels, of two tiles; one backward is made for each of them."""


def call(backend: str, *, num_channels: int = 0, count: int = 30, **changes) -> tuple[Tensor, Tensor, dict]:
    """A rasterization of a scene with mixed masks and opaque splats, so that alphas are capped and pixels end."""
    gaussians, views, masks = random_scene(count, SIZE, seed=5, num_views=2)
    opacities = torch.sigmoid(gaussians.opacities)
    opacities[::3] = 0.999
    generator = torch.Generator().manual_seed(1)
    colors = torch.cat((gaussians.sh0[:, None], gaussians.shN), dim=1)
    if num_channels:
        colors = torch.rand(count, num_channels, generator=generator, dtype=torch.float64)
    backgrounds = torch.rand(2, num_channels or 3, generator=generator, dtype=torch.float64)
    return rasterization(
        gaussians.means.requires_grad_(), gaussians.quats, gaussians.scales.exp(), opacities, colors,
        views.viewmats, views.intrinsics, *SIZE, masks=masks, sh_degree=None if num_channels else 3,
        backgrounds=backgrounds, backend=backend, **changes,
    )  # fmt: skip


def weights_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """dL/d(images, alphas) of a loss that is linear in both."""
    generator = torch.Generator().manual_seed(2)
    of_images = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return of_images, torch.randn((*images.shape[:3], 1), generator=generator, dtype=images.dtype)


@functools.cache
def by_pixel(**changes) -> Tensor:
    """Sum of the sizes of every pixel's own gradient of means2d, by one backward for each through the reference."""
    images, alphas, meta = call("reference", **changes)
    means2d, (of_images, of_alphas) = meta["means2d"], weights_of(images)
    total = torch.zeros_like(means2d)
    for view in range(images.shape[0]):
        for y in range(images.shape[1]):
            for x in range(images.shape[2]):
                at = (view, y, x)
                loss = (images[at] * of_images[at]).sum() + (alphas[at] * of_alphas[at]).sum()
                total += torch.autograd.grad(loss, means2d, retain_graph=True)[0].abs()
    return total


@BODIES
@pytest.mark.parametrize("changes", [{}, {"render_mode": "RGB+ED"}, {"render_mode": "D"}, {"num_channels": 7}])
def test_absgrad_equals_one_backward_for_every_pixel(backend: str, changes: dict) -> None:
    """In float64 both differ by roundings only; 7 channels are three passes, whose sizes must not be added up."""
    expected = by_pixel(**changes)
    images, alphas, meta = call(backend, absgrad=True, **changes)
    meta["means2d"].retain_grad()
    torch.autograd.backward((images, alphas), weights_of(images))
    found = meta["means2d"].absgrad
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert found.shape == meta["means2d"].shape and not found.requires_grad
    assert bool((found >= meta["means2d"].grad.abs() - 1e-11).all())
    assert float(found.sum()) > 1.5 * float(meta["means2d"].grad.abs().sum())  # most pixels do pull apart


@BODIES
def test_absgrad_lies_as_means2d_does(backend: str) -> None:
    found = []
    for packed in (True, False):
        images, alphas, meta = call(backend, absgrad=True, packed=packed)
        torch.autograd.backward((images, alphas), weights_of(images))
        found.append((meta["means2d"], meta))
    (packed_means, meta), (dense_means, _) = found
    place = (meta["camera_ids"], meta["gaussian_ids"])
    assert torch.equal(dense_means.absgrad[place], packed_means.absgrad)
    assert dense_means.absgrad.shape == (2, 30, 2)
    assert int((dense_means.absgrad != 0).sum()) == int((packed_means.absgrad != 0).sum())


@BODIES
def test_absgrad_changes_nothing_else(backend: str) -> None:
    made = [call(backend, absgrad=absgrad) for absgrad in (False, True)]
    assert all(torch.equal(one, two) for one, two in zip(made[0][:2], made[1][:2], strict=True))
    gradients = []
    for images, alphas, meta in made:
        meta["means2d"].retain_grad()
        torch.autograd.backward((images, alphas), weights_of(images))
        gradients.append(meta["means2d"].grad)
    assert torch.equal(*gradients)
    assert not hasattr(made[0][2]["means2d"], "absgrad")


@BODIES
def test_absgrad_is_of_the_last_backward(backend: str) -> None:
    """As gsplat's, which overwrites it; a view without a gradient leaves zeros, and so does a mask of 0."""
    images, _, meta = call(backend, absgrad=True)
    images.sum().backward(retain_graph=True)
    first = meta["means2d"].absgrad
    (2.0 * images[1]).sum().backward()
    is_second = meta["camera_ids"] == 1
    assert bool((meta["means2d"].absgrad[~is_second] == 0).all())
    torch.testing.assert_close(meta["means2d"].absgrad[is_second], 2.0 * first[is_second], rtol=1e-12, atol=0)
    _, _, masks = random_scene(30, SIZE, seed=5)
    unsampled = masks[meta["gaussian_ids"]] == 0
    assert bool(unsampled.any()) and bool((first[unsampled] == 0).all())


def test_no_gaussian_has_no_absgrad() -> None:
    images, _, meta = call("cpu", count=0, absgrad=True)
    images.sum().backward()
    assert meta["means2d"].absgrad.shape == (0, 2)


def moved(splats: Splats, dtype: torch.dtype, device: torch.device | str = "cpu") -> Splats:
    """The splats elsewhere, or in another precision."""
    return dataclasses.replace(
        splats, rows=splats.rows.to(device, dtype), depths=splats.depths.to(device, dtype), ids=splats.ids.to(device),
        boxes=splats.boxes.to(device),
    )  # fmt: skip


def gradient_of(frame: Frame, num_channels: int, num_splats: int) -> ImageGradient:
    """A random one, in the dtype and on the device of the frame."""
    generator, like = torch.Generator().manual_seed(3), frame.transmittance
    shapes = ((num_splats, num_channels), (*like.shape, num_channels), tuple(like.shape))
    return ImageGradient(*(torch.randn(shape, generator=generator).to(like) for shape in shapes))


def absolute(body, splats: Splats, size: tuple[int, int], rows: tuple[int, int], num_channels: int) -> Tensor:
    background = torch.zeros(3).to(splats.rows)
    frame = body.rasterize(splats, 1, size, background, rows=rows)
    first, last = splats.view_range(1)
    return body.absolute_gradients(splats, frame, gradient_of(frame, num_channels, last - first)).cpu()


@pytest.fixture(params=launchers(is_reversed=True))
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param)


@pytest.mark.parametrize(
    ("size", "rows", "num_channels"),
    [
        ((35, 40), (0, 40), 3),
        ((35, 40), (11, 29), 1),
        ((35, 40), (5, 5), 3),
        ((1, 1), (0, 1), 4),
        ((80, 60), (0, 60), 7),
    ],
)
@pytest.mark.parametrize("is_opaque", [False, True])
def test_bodies_agree(
    launcher: Launcher, size: tuple[int, int], rows: tuple[int, int], num_channels: int, is_opaque: bool
) -> None:
    """The cuda body is at most twice as far from the reference in float64 as the cpu body in float32; that one in
    float64 is the reference. How far one pixel is off is chance, in both bodies: it is measured in many scenes."""
    exact, beside, found = [], [], []
    for seed in range(6, 6 + (40 if size == (1, 1) else 1)):
        gaussians, views, masks = random_scene(300, size, seed=seed, num_views=2, dtype=torch.float32)
        if is_opaque:
            gaussians = dataclasses.replace(gaussians, opacities=gaussians.opacities + 3, scales=gaussians.scales + 0.5)
        single = CPU.project(gaussians, views, settings_for(), masks=masks)
        double, there = moved(single, torch.float64), moved(single, torch.float32, launcher.device)
        exact.append(absolute(REFERENCE, double, size, rows, num_channels))
        torch.testing.assert_close(absolute(CPU, double, size, rows, num_channels), exact[-1], rtol=1e-9, atol=1e-11)
        beside.append(absolute(CPU, single, size, rows, num_channels))
        found.append(absolute(Rasterizer(launcher), there, size, rows, num_channels))
    assert_as_good(torch.cat(found), torch.cat(beside), torch.cat(exact), "absgrad")
    assert rows[0] == rows[1] or bool((torch.cat(exact) > 0).any())


def test_wrong_shapes_and_types_are_refused(launcher: Launcher) -> None:
    gaussians, views, masks = random_scene(50, (20, 20), seed=7, num_views=2, dtype=torch.float32)
    splats = moved(CPU.project(gaussians, views, settings_for(), masks=masks), torch.float32, launcher.device)
    body = Rasterizer(launcher)
    frame = body.rasterize(splats, 0, (20, 20), torch.zeros(3, device=launcher.device))
    gradient = gradient_of(frame, 3, splats.view_range(0)[1])
    with pytest.raises(ValueError, match="expected"):
        body.absolute_gradients(splats, frame, gradient._replace(d_image=gradient.d_image[:-1]))
    with pytest.raises(ValueError, match="behind is torch.float64"):
        body.absolute_gradients(splats, frame, gradient._replace(behind=gradient.behind.double()))
