# SPDX-License-Identifier: Apache-2.0
"""The cpu body against the reference body, value and gradient, op by op, in float32 and float64.

Each op of both bodies gets the same input, so that an error shows where it is made. Errors are norm-relative; a float32
pair that falls on the other side of a threshold moves one pixel by at most 1/255 of a colour, which the tolerance of
the real scene allows for a few pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernel_scenes import PARAMETERS, make_views, parameters_of, random_scene, settings_for, with_parameters
from masksplat.ops import get_body
from masksplat.types import (
    ROW_COLUMNS,
    SLOT_NO_PIXEL,
    SLOT_UNSEEN,
    AdamStep,
    Gaussians,
    Optimizer,
    Splats,
    Statistics,
    Views,
)
from scene.dataset import SceneOptions, load_scene
from scene.points import initial_gaussians

CPU, REFERENCE = get_body("cpu"), get_body("reference")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def relative_error(found, expected) -> float:
    """Norm of the difference over the norm of `expected` (absolute when that is zero)."""
    difference = torch.linalg.vector_norm(found.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    return difference / norm if norm > 0 else difference


def assert_close(found, expected, tolerance, what=""):
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    assert bool(torch.isfinite(found).all()), what
    assert relative_error(found, expected) <= tolerance, f"{what}: {relative_error(found, expected):.2e}"


def assert_same_splats(found: Splats, expected: Splats, tolerance):
    assert torch.equal(found.slots, expected.slots)
    assert torch.equal(found.view_offsets, expected.view_offsets)
    for name in ("ids", "gaussians"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len(found) == 0 or (found.boxes - expected.boxes).abs().max() <= 1
    for k, what in enumerate(ROW_COLUMNS):
        assert_close(found.rows[:, k], expected.rows[:, k], tolerance, what)
    assert_close(found.depths, expected.depths, tolerance, "depths")


def compare_projection(gaussians, views, settings, masks, tolerance, ids=None) -> Splats:
    """Projection forward and backward of both bodies; returns the reference's splats."""
    expected = REFERENCE.project(gaussians, views, settings, masks=masks, ids=ids)
    found = CPU.project(gaussians, views, settings, masks=masks, ids=ids)
    assert_same_splats(found, expected, tolerance)
    generator = torch.Generator().manual_seed(1)
    d_rows = torch.randn(expected.rows.shape, generator=generator, dtype=torch.float64).to(expected.rows.dtype)
    found_gradients = CPU.project_backward(gaussians, views, settings, found, d_rows)
    for name, one, two in zip(
        (*PARAMETERS, "masks"),
        found_gradients,
        REFERENCE.project_backward(gaussians, views, settings, expected, d_rows),
        strict=True,
    ):
        assert_close(one, two, 20 * tolerance, f"gradient of {name}")
    return expected


def compare_rasterization(splats, view, size, tolerance, rows=None):
    """Compositing forward and backward, and scores, of both bodies on the same splats."""
    dtype = splats.rows.dtype
    background = torch.tensor([0.2, 0.5, 0.9], dtype=dtype)
    frames = [body.rasterize(splats, view, size, background, rows=rows) for body in (CPU, REFERENCE)]
    assert_close(frames[0].rgb, frames[1].rgb, tolerance, "rgb")
    assert_close(frames[0].transmittance, frames[1].transmittance, tolerance, "transmittance")
    assert frames[0].pairs_per_row.shape == frames[1].pairs_per_row.shape
    generator = torch.Generator().manual_seed(2)
    d_rgb = torch.randn(frames[1].rgb.shape, generator=generator, dtype=torch.float64).to(dtype)
    d_light = torch.randn(d_rgb.shape[:2], generator=generator, dtype=torch.float64).to(dtype)
    gradients = []
    for body, frame in zip((CPU, REFERENCE), frames, strict=True):
        d_rows = torch.ones_like(splats.rows)  # backward adds
        body.rasterize_backward(splats, frame, d_rgb, d_rows, d_transmittance=d_light)
        gradients.append(d_rows - 1)
    for k, what in enumerate(ROW_COLUMNS):
        assert_close(gradients[0][:, k], gradients[1][:, k], 20 * tolerance, f"gradient of {what}")
    scores = [body.blend_scores(splats, view, size, rows=rows) for body in (CPU, REFERENCE)]
    for one, two, what in zip(*scores, ("maximum", "sum"), strict=True):
        assert_close(one, two, 5 * tolerance, what)


@BOTH
@pytest.mark.parametrize("degree", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_projection_of_random_scenes(dtype, degree, antialiased):
    gaussians, views, masks = random_scene(300, (97, 61), seed=30, dtype=dtype, num_views=2, log_scale=-2.5)
    settings = settings_for(degree, antialiased=antialiased)
    splats = compare_projection(gaussians, views, settings, masks, TOLERANCE[dtype], ids=torch.arange(300).flip(0) * 7)
    assert {SLOT_UNSEEN, 0} <= set(splats.slots.clamp(max=0).flatten().tolist())


@BOTH
def test_projection_of_final_values(dtype):
    gaussians, views, masks = random_scene(100, (33, 50), seed=31, dtype=dtype)
    gaussians = dataclasses.replace(
        gaussians, scales=gaussians.scales.exp(), opacities=torch.sigmoid(gaussians.opacities)
    )
    compare_projection(gaussians, views, settings_for(1, activated=True), masks, TOLERANCE[dtype])


@BOTH
def test_slots_at_the_edge_of_the_image_and_of_visibility(dtype):
    """Small Gaussians all around the image: both bodies agree on who is seen by the 3DGS rule, and by no pixel."""
    rng = np.random.default_rng(32)
    count = 4000
    gaussians, _, _ = random_scene(count, (40, 40), seed=32, dtype=dtype, log_scale=-3.5, sh_degree=0)
    means = rng.uniform(-1, 1, (count, 3)) * (3.0, 3.0, 1.0) + (0, 0, 2.5)
    gaussians = dataclasses.replace(
        gaussians,
        means=torch.tensor(means, dtype=dtype),
        opacities=torch.tensor(rng.normal(-4, 2.5, count), dtype=dtype),
    )
    splats = compare_projection(gaussians, make_views((41, 37), dtype=dtype), settings_for(0), None, TOLERANCE[dtype])
    kinds = splats.slots.clamp(max=0)
    assert min(int((kinds == kind).sum()) for kind in (SLOT_UNSEEN, SLOT_NO_PIXEL, 0)) > 100


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 31), (64, 48), (3, 70)])
@pytest.mark.parametrize("opaque", [False, True])
def test_compositing_of_random_scenes(dtype, size, opaque):
    gaussians, views, masks = random_scene(150, size, seed=33, dtype=dtype, num_views=2)
    if opaque:
        gaussians = dataclasses.replace(gaussians, opacities=gaussians.opacities + 2, scales=gaussians.scales + 0.5)
    splats = REFERENCE.project(gaussians, views, settings_for(), masks=masks)
    for view in range(2):
        compare_rasterization(splats, view, size, TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize("rows", [(0, 16), (16, 40), (32, 40), (11, 29), (5, 5)])
def test_compositing_of_strips(dtype, rows):
    gaussians, views, masks = random_scene(100, (35, 40), seed=34, dtype=dtype)
    splats = REFERENCE.project(gaussians, views, settings_for(), masks=masks)
    compare_rasterization(splats, 0, (35, 40), TOLERANCE[dtype], rows=rows)


@BOTH
@pytest.mark.parametrize("value", [0.0, 1.0, 0.4])
def test_equal_masks(dtype, value):
    gaussians, views, _ = random_scene(100, (35, 40), seed=35, dtype=dtype)
    masks = torch.full((100,), value, dtype=dtype)
    splats = compare_projection(gaussians, views, settings_for(), masks, TOLERANCE[dtype])
    compare_rasterization(splats, 0, (35, 40), TOLERANCE[dtype])
    if value == 0.0:
        frame = CPU.rasterize(splats, 0, (35, 40), torch.zeros(3, dtype=dtype))
        assert bool((frame.rgb == 0).all()) and bool((frame.transmittance == 1).all())


@BOTH
def test_no_splat(dtype):
    gaussians, views, masks = random_scene(20, (20, 20), seed=36, dtype=dtype)
    nobody = with_parameters(gaussians, [tensor[:0] for tensor in parameters_of(gaussians)])
    behind = dataclasses.replace(gaussians, means=-gaussians.means)
    faint = dataclasses.replace(gaussians, opacities=torch.full_like(gaussians.opacities, -7.0))
    for scene, scene_masks in ((nobody, masks[:0]), (behind, masks), (faint, masks)):
        splats = compare_projection(scene, views, settings_for(), scene_masks, TOLERANCE[dtype])
        assert len(splats) == 0
        compare_rasterization(splats, 0, (20, 20), TOLERANCE[dtype])
    assert bool((splats.slots == SLOT_NO_PIXEL).any())


@BOTH
def test_one_splat_over_all_tiles(dtype):
    gaussians, views, _ = random_scene(1, (70, 50), seed=37, dtype=dtype)
    scales = torch.tensor([[2.0, 2.4, 1.7]], dtype=dtype)
    gaussians = dataclasses.replace(gaussians, scales=scales, opacities=torch.full_like(gaussians.opacities, 3.0))
    splats = compare_projection(gaussians, views, settings_for(), None, TOLERANCE[dtype])
    assert splats.boxes.tolist() == [[0, 0, 70, 50]]
    compare_rasterization(splats, 0, (70, 50), TOLERANCE[dtype])


@BOTH
def test_equal_depths_are_ordered_by_id(dtype):
    gaussians, views, masks = random_scene(60, (30, 30), seed=38, dtype=dtype)
    means = gaussians.means.clone()
    means[::2] = means[0]
    gaussians = dataclasses.replace(gaussians, means=means, opacities=gaussians.opacities + 1)
    for seed in range(3):
        ids = torch.randperm(60, generator=torch.Generator().manual_seed(seed)) + 2**40
        splats = compare_projection(gaussians, views, settings_for(), masks, TOLERANCE[dtype], ids=ids)
        compare_rasterization(splats, 0, (30, 30), TOLERANCE[dtype])


@BOTH
def test_thin_and_huge_splats(dtype):
    """Needles, discs and Gaussians around the camera: ill-conditioned conics and boxes far beyond the image."""
    rng = np.random.default_rng(39)
    gaussians, views, masks = random_scene(200, (80, 60), seed=39, dtype=dtype)
    scales = rng.uniform(-6.0, 0.5, (200, 3))
    gaussians = dataclasses.replace(gaussians, scales=torch.tensor(scales, dtype=dtype))
    tolerance = 10 * TOLERANCE[dtype]
    splats = compare_projection(gaussians, views, settings_for(), masks, tolerance)
    compare_rasterization(splats, 0, (80, 60), tolerance)


@BOTH
@pytest.mark.parametrize("size", [(1, 1), (4, 30), (33, 21)])
def test_photometric(dtype, size):
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand((size[1], size[0], 3), generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, 256, rgb.shape, generator=generator, dtype=torch.uint8)
    found, expected = (body.photometric(rgb, target, 0.2) for body in (CPU, REFERENCE))
    assert found.l1 == pytest.approx(float(expected.l1), rel=TOLERANCE[dtype])
    assert found.ssim == pytest.approx(float(expected.ssim), rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert_close(found.d_rgb, expected.d_rgb, 50 * TOLERANCE[dtype])


@BOTH
def test_photometric_of_a_strip(dtype):
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand((24, 18, 3), generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, 256, rgb.shape, generator=generator, dtype=torch.uint8)
    for first, last, start in ((0, 19, 0), (5, 19, 8), (5, 24, 16), (7, 7, 8)):
        arguments = {"own_rows": (first, last), "image_height": 40, "row_start": start}
        found, expected = (body.photometric(rgb, target, 0.2, **arguments) for body in (CPU, REFERENCE))
        assert found.l1 == pytest.approx(float(expected.l1), rel=TOLERANCE[dtype])
        assert found.ssim == pytest.approx(float(expected.ssim), rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])
        assert_close(found.d_rgb, expected.d_rgb, 50 * TOLERANCE[dtype])


@BOTH
def test_adam(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, 3, generator=generator, dtype=torch.float64).to(dtype)
    states = [[start.clone(), torch.zeros_like(start), torch.zeros_like(start)] for _ in range(2)]
    for update in range(1, 8):
        gradient = torch.randn(1000, 3, generator=generator, dtype=torch.float64).to(dtype)
        for body, (param, first, second) in zip((CPU, REFERENCE), states, strict=True):
            body.adam(param, gradient, first, second, AdamStep(0.01, 0.9, 0.999, 1e-15, update, 0.003))
    for one, two in zip(*states, strict=True):
        assert_close(one, two, TOLERANCE[dtype])
    assert relative_error(states[0][0], start) > 1e-3


@BOTH
def test_fused_update(dtype):
    """Projection backward, Adam, statistics: one pass of the cpu body against the reference's three."""
    size = (60, 44)
    gaussians, views, masks = random_scene(200, size, seed=40, dtype=dtype, num_views=2, log_scale=-2.5)
    settings = settings_for()
    splats = REFERENCE.project(gaussians, views, settings, masks=masks)
    generator = torch.Generator().manual_seed(3)
    d_rows = torch.randn(splats.rows.shape, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for body in (CPU, REFERENCE):
        table = with_parameters(gaussians, [tensor.clone() for tensor in parameters_of(gaussians)])
        moments = [tuple(torch.full_like(t, 0.5) for t in parameters_of(gaussians)) for _ in range(2)]
        steps = tuple(AdamStep(0.01 * (k + 1), 0.9, 0.99, 1e-8, 3, 0.02 * (k == 3)) for k in range(6))
        statistics = Statistics(torch.ones(200, dtype=dtype), torch.ones(200, dtype=dtype))
        d_masks = body.project_backward_update(
            table,
            views,
            settings,
            splats,
            d_rows,
            optimizer=Optimizer(*moments, steps),
            statistics=statistics,
            gradient_scale=0.25,
        )
        results.append([*parameters_of(table), *moments[0], *moments[1], *statistics, d_masks])
    for place, (one, two) in enumerate(zip(*results, strict=True)):
        assert_close(one, two, 20 * TOLERANCE[dtype], f"tensor {place}")
    assert relative_error(results[0][0], gaussians.means) > 1e-4


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    """Sums in a fixed order: bit-equal images and gradients (law 6 rests on it)."""
    from masksplat.cpu.body import CpuBody

    gaussians, views, masks = random_scene(150, (70, 50), seed=41, dtype=torch.float32)
    background = torch.zeros(3)
    results = []
    for threads in (1, 2, 3):
        body = CpuBody(threads)
        splats = body.project(gaussians, views, settings_for(), masks=masks)
        frame = body.rasterize(splats, 0, (70, 50), background)
        d_rows = torch.zeros_like(splats.rows)
        body.rasterize_backward(splats, frame, torch.ones_like(frame.rgb), d_rows)
        gradients = body.project_backward(gaussians, views, settings_for(), splats, d_rows)
        results.append([splats.rows, frame.rgb, frame.transmittance, d_rows, *gradients])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def real_gaussians(source, dtype):
    """The points of a real scene as Gaussians half way through training, two of its cameras, and random masks."""
    scene = load_scene(source, SceneOptions())
    arrays = initial_gaussians(scene.points, 3, progress=False)
    rng = np.random.default_rng(50)
    count = len(arrays["means"])
    arrays["opacities"] = rng.normal(1.0, 2.0, count)
    arrays["scales"] = arrays["scales"] + rng.normal(0.0, 0.4, (count, 3))
    arrays["quats"] = rng.normal(size=(count, 4))
    arrays["shN"] = rng.normal(0.0, 0.05, (count, 15, 3))
    cameras = [scene.train[0], scene.train[len(scene.train) // 2]]
    views = Views(
        torch.tensor(np.stack([camera.viewmat for camera in cameras]), dtype=dtype),
        torch.tensor(np.stack([camera.intrinsics for camera in cameras]), dtype=dtype),
        tuple((camera.width, camera.height) for camera in cameras),
    )
    masks = torch.tensor(rng.random(count) < 0.7, dtype=dtype)
    return Gaussians(*(torch.tensor(arrays[name], dtype=dtype) for name in PARAMETERS)), views, masks


def test_real_scene_in_double(any_scene):
    gaussians, views, masks = real_gaussians(any_scene, torch.float64)
    splats = compare_projection(gaussians, views, settings_for(), masks, 1e-10)
    for view, size in enumerate(views.sizes):
        compare_rasterization(splats, view, size, 1e-10)


def test_real_scene_in_single(any_scene):
    """float32 against the reference in float64: the error of the whole chain, thresholds included."""
    gaussians, views, masks = real_gaussians(any_scene, torch.float64)
    single = [tensor.float() for tensor in parameters_of(gaussians)]
    views32 = Views(views.viewmats.float(), views.intrinsics.float(), views.sizes)
    expected = REFERENCE.project(gaussians, views, settings_for(), masks=masks)
    found = CPU.project(with_parameters(gaussians, single), views32, settings_for(), masks=masks.float())
    differing = (found.slots.clamp(max=0) != expected.slots.clamp(max=0)).sum()
    assert differing <= 1e-3 * found.slots.numel()
    background = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    sums = [torch.zeros_like(found.rows), torch.zeros_like(expected.rows)]
    for view, size in enumerate(views.sizes):
        one = CPU.rasterize(found, view, size, background.float())
        two = REFERENCE.rasterize(expected, view, size, background)
        assert relative_error(one.rgb, two.rgb) < 5e-5
        d_rgb = torch.randn(two.rgb.shape, generator=torch.Generator().manual_seed(view), dtype=torch.float64)
        CPU.rasterize_backward(found, one, d_rgb.float(), sums[0])
        REFERENCE.rasterize_backward(expected, two, d_rgb, sums[1])
    gradients = (
        CPU.project_backward(with_parameters(gaussians, single), views32, settings_for(), found, sums[0]),
        REFERENCE.project_backward(gaussians, views, settings_for(), expected, sums[1]),
    )
    for name, one, two in zip((*PARAMETERS, "masks"), *gradients, strict=True):
        assert relative_error(one, two) < 2e-3, f"{name}: {relative_error(one, two):.2e}"
