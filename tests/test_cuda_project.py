# SPDX-License-Identifier: Apache-2.0
"""Projection, its gradient, the fused update and the masks of the cuda body, on the emulator and on a GPU.

Errors are measured against the reference in float64 and held against those of the cpu body in float32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_agreement import assert_as_good
from cuda_launchers import launchers, make_launcher
from gaussian_renderer.views import views_of
from kernel_scenes import PARAMETERS, make_views, parameters_of, random_scene, settings_for, with_parameters
from masksplat.cuda import mask as mask_kernels
from masksplat.cuda import projection
from masksplat.cuda.launcher import Launcher
from masksplat.masks import mask_sample, mask_update
from masksplat.ops import get_body
from masksplat.types import (
    ROW_COLUMNS,
    SLOT_NO_PIXEL,
    SLOT_UNSEEN,
    AdamStep,
    Counted,
    Gaussians,
    Optimizer,
    ProjectionSettings,
    Splats,
    Statistics,
    Views,
    compact,
)
from scene.dataset import SceneOptions, load_scene

CPU, REFERENCE = get_body("cpu"), get_body("reference")
MOST_FLIPS = 1e-3
"""Share of Gaussians that float32 may put on the other side of a threshold of visibility on a GPU; none does here."""


@pytest.fixture(params=launchers())
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param)


@pytest.fixture(params=launchers(is_reversed=True))
def any_order(request: pytest.FixtureRequest) -> Launcher:
    """Also an emulator that runs the threads from the last to the first, where a missing barrier shows."""
    return make_launcher(request.param)


def moved(gaussians: Gaussians, where: torch.device | torch.dtype) -> Gaussians:
    return with_parameters(gaussians, [tensor.to(where) for tensor in parameters_of(gaussians)])


def moved_views(views: Views, where: torch.device | torch.dtype) -> Views:
    return Views(views.viewmats.to(where), views.intrinsics.to(where), views.sizes)


def scene(count: int, size: tuple[int, int], **options) -> tuple[Gaussians, Views, Tensor]:
    """A random scene in float64 whose numbers float32 holds exactly."""
    gaussians, views, masks = random_scene(count, size, dtype=torch.float32, **options)
    return moved(gaussians, torch.float64), moved_views(views, torch.float64), masks.double()


def by_gaussian(splats: Splats, column: Tensor, chosen: Tensor) -> Tensor:
    """Values of the packed rows of the (view, Gaussian) pairs `chosen` (B, N), whatever the rows' order."""
    return column[splats.slots[chosen].long()].cpu()


def gradient_rows(splats: Splats, d_table: Tensor) -> Tensor:
    """(M, 10) with the gradients d_table (B, N, 10) in the packed rows; not numbers in unused rows."""
    d_rows = torch.full_like(splats.rows, float("nan"))
    packed = splats.slots >= 0
    d_rows[splats.slots[packed].long()] = d_table.to(d_rows)[packed]
    return d_rows


def compare(
    launcher: Launcher, gaussians: Gaussians, views: Views, settings: ProjectionSettings, masks: Tensor | None, *,
    ids: Tensor | None = None, factor: float = 2.0,
) -> Splats:  # fmt: skip
    """Forward and backward against the reference, beside the cpu body; returns what the cuda body made."""
    single, single_views = moved(gaussians, torch.float32), moved_views(views, torch.float32)
    single_masks, device = None if masks is None else masks.float(), launcher.device
    exact = REFERENCE.project(gaussians, views, settings, masks=masks, ids=ids)
    beside = CPU.project(single, single_views, settings, masks=single_masks, ids=ids)
    device_masks = None if single_masks is None else single_masks.to(device)
    device_ids = None if ids is None else ids.to(device)
    found = projection.project(
        launcher, moved(single, device), single_views, settings, masks=device_masks, ids=device_ids
    )
    assert found.counts is not None and found.slots.device == device
    kinds = [splats.slots.clamp(max=0).cpu() for splats in (found, beside, exact)]
    differing = max(int((kinds[0] != other).sum()) for other in kinds[1:])
    assert differing <= (MOST_FLIPS * kinds[0].numel() if device.type == "cuda" else 0)
    assert found.counts.tolist() == (found.slots >= 0).sum(dim=1).tolist()
    chosen = (kinds[0] == 0) & (kinds[1] == 0) & (kinds[2] == 0)
    for k, what in enumerate(ROW_COLUMNS):
        columns = [by_gaussian(splats, splats.rows[:, k], chosen) for splats in (found, beside, exact)]
        assert_as_good(*columns, what, factor=factor)
    for name in ("ids", "gaussians"):
        assert torch.equal(*(by_gaussian(splats, getattr(splats, name), chosen) for splats in (found, exact))), name
    depths = [by_gaussian(splats, splats.depths, chosen) for splats in (found, beside, exact)]
    assert_as_good(*depths, "depths")
    boxes = [by_gaussian(splats, splats.boxes, chosen) for splats in (found, exact)]
    assert not chosen.any() or int((boxes[0] - boxes[1]).abs().max()) <= 1
    compare_gradients(launcher, (single, single_views, gaussians, views, settings), (found, beside, exact), factor)
    return found


def compare_gradients(launcher: Launcher, inputs: tuple, made: tuple[Splats, Splats, Splats], factor: float) -> None:
    single, single_views, gaussians, views, settings = inputs
    found, beside, exact = made
    generator = torch.Generator().manual_seed(1)
    d_table = torch.randn((*found.slots.shape, 10), generator=generator).double()
    d_table[:, ::5] = 0.0  # no gradient at all
    d_table[:, 1::5, :9] = 0.0  # the mask's only
    gradients = [
        projection.project_backward(
            launcher, moved(single, launcher.device), single_views, settings, found, gradient_rows(found, d_table)
        ),
        CPU.project_backward(single, single_views, settings, beside, gradient_rows(beside, d_table)),
        REFERENCE.project_backward(gaussians, views, settings, exact, gradient_rows(exact, d_table)),
    ]
    for name, *tensors in zip((*PARAMETERS, "masks"), *gradients, strict=True):
        assert_as_good(*tensors, f"gradient of {name}", factor=factor)


@pytest.mark.parametrize("degree", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
def test_degrees(any_order: Launcher, degree: int | None, antialiased: bool) -> None:
    gaussians, views, masks = scene(300, (97, 61), seed=30, num_views=2, log_scale=-2.5)
    settings = settings_for(degree, antialiased=antialiased)
    found = compare(any_order, gaussians, views, settings, masks, ids=torch.arange(300).flip(0) * 7 + 2**40)
    assert {SLOT_UNSEEN, 0} <= set(found.slots.clamp(max=0).flatten().tolist())


def test_coefficients_of_zero_change_no_bit(any_order: Launcher) -> None:
    """A model measured at degree 0 while it trains is drawn from its file at degree 3: the same image."""
    gaussians, views, _ = random_scene(400, (60, 40), seed=32, dtype=torch.float32)
    there = moved(dataclasses.replace(gaussians, shN=torch.zeros_like(gaussians.shN)), any_order.device)
    found = [compact(projection.project(any_order, there, views, settings_for(degree))) for degree in range(4)]
    rows = [splats.rows[splats.ids.argsort()] for splats in found]
    assert len(rows[0]) > 100 and all(torch.equal(rows[0], others) for others in rows[1:])


@pytest.mark.parametrize(("stored", "degree"), [(1, 1), (2, 2), (2, 1), (0, 0)])
def test_tables_of_lower_degree(launcher: Launcher, stored: int, degree: int) -> None:
    gaussians, views, masks = scene(150, (50, 40), seed=31, sh_degree=stored)
    compare(launcher, gaussians, views, settings_for(degree), masks)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("num_views", [1, 3])
def test_partial_blocks(launcher: Launcher, count: int, num_views: int) -> None:
    compare(launcher, *_shifted(scene(count, (33, 50), seed=32, num_views=num_views)))


def _shifted(made: tuple[Gaussians, Views, Tensor]) -> tuple[Gaussians, Views, ProjectionSettings, Tensor]:
    gaussians, views, masks = made
    return gaussians, views, settings_for(3), masks


def test_final_values(launcher: Launcher) -> None:
    gaussians, views, masks = scene(100, (33, 50), seed=33)
    final = dataclasses.replace(
        gaussians,
        scales=gaussians.scales.exp().float().double(),
        opacities=torch.sigmoid(gaussians.opacities).float().double(),
    )
    compare(launcher, final, views, settings_for(1, activated=True), masks)


@pytest.mark.parametrize("value", [0.0, 1.0, None])
def test_equal_masks(launcher: Launcher, value: float | None) -> None:
    gaussians, views, _ = scene(100, (35, 40), seed=34)
    masks = None if value is None else torch.full((100,), value, dtype=torch.float64)
    found = compare(launcher, gaussians, views, settings_for(), masks)
    used = found.rows[: int(found.counts[0]), 9]
    assert bool((used == (1.0 if value is None else value)).all())


def test_edges_of_the_image_and_of_visibility(launcher: Launcher) -> None:
    """Small Gaussians all around the image: who is seen by the 3DGS rule, and by no pixel."""
    rng, count = np.random.default_rng(35), 2000
    gaussians, _, _ = scene(count, (40, 40), seed=35, log_scale=-3.5, sh_degree=0)
    means = rng.uniform(-1, 1, (count, 3)) * (3.0, 3.0, 1.0) + (0, 0, 2.5)
    gaussians = dataclasses.replace(
        gaussians,
        means=torch.tensor(means, dtype=torch.float32).double(),
        opacities=torch.tensor(rng.normal(-4, 2.5, count), dtype=torch.float32).double(),
    )
    views = moved_views(make_views((41, 37), dtype=torch.float32), torch.float64)
    kinds = compare(launcher, gaussians, views, settings_for(0), None).slots.clamp(max=0)
    assert min(int((kinds == kind).sum()) for kind in (SLOT_UNSEEN, SLOT_NO_PIXEL, 0)) > 50


def test_nothing_to_see(launcher: Launcher) -> None:
    gaussians, views, masks = scene(20, (20, 20), seed=36, num_views=2)
    nobody = with_parameters(gaussians, [tensor[:0] for tensor in parameters_of(gaussians)])
    behind = dataclasses.replace(gaussians, means=-gaussians.means)
    faint = dataclasses.replace(gaussians, opacities=torch.full_like(gaussians.opacities, -7.0))
    for given, its_masks in ((nobody, masks[:0]), (behind, masks), (faint, masks)):
        found = compare(launcher, given, views, settings_for(), its_masks)
        assert found.counts.tolist() == [0, 0] and len(compact(found)) == 0
    assert bool((found.slots == SLOT_NO_PIXEL).any())


def test_thin_and_huge_gaussians(launcher: Launcher) -> None:
    """Needles, discs and Gaussians around the camera."""
    gaussians, views, masks = scene(200, (80, 60), seed=37)
    scales = np.random.default_rng(37).uniform(-6.0, 0.5, (200, 3))
    gaussians = dataclasses.replace(gaussians, scales=torch.tensor(scales, dtype=torch.float32).double())
    compare(launcher, gaussians, views, settings_for(), masks)


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (4001, 17)])
def test_odd_sizes(launcher: Launcher, size: tuple[int, int]) -> None:
    compare(launcher, *_shifted(scene(80, size, seed=38)))


def real_points(source: Path) -> tuple[Gaussians, Views]:
    """The points of a real scene as small Gaussians, and some of its cameras."""
    real = load_scene(source, SceneOptions(), progress=False)
    means = torch.as_tensor(real.points.xyz)
    gaussians, _, _ = random_scene(len(means), (8, 8), dtype=torch.float32, log_scale=-4.6)
    return dataclasses.replace(gaussians, means=means), views_of(real.train[::6], means)


def last_place(exact: Tensor) -> Tensor:
    """The distance of float32's neighbours at each value."""
    return torch.from_numpy(np.spacing(exact.float().numpy())).double()


@pytest.mark.parametrize("name", ["random", "far from the origin", "tiny_fox"])
def test_means_and_depths_are_rounded_once(launcher: Launcher, request: pytest.FixtureRequest, name: str) -> None:
    """A correctly rounded value is off by at most half a unit in the last place. 0.51, since sums in twice the digits
    of float may round to the other neighbour where the exact value is all but in the middle. Means nearer to 0 than a
    thousandth of a pixel are held to the unit there: what focal length and principal point leave has fewer digits."""
    if name == "tiny_fox":
        gaussians, views = real_points(request.getfixturevalue(name))
    else:
        gaussians, views, _ = random_scene(3000, (1600, 1064), num_views=3, dtype=torch.float32, log_scale=-3.0)
    if name == "far from the origin":  # the sum of the transform cancels
        away = torch.tensor([30.0, -20.0, 50.0])
        views.viewmats[:, :3, 3] -= views.viewmats[:, :3, :3] @ away
        gaussians = dataclasses.replace(gaussians, means=gaussians.means + away)
    found = projection.project(launcher, moved(gaussians, launcher.device), views, settings_for())
    shown = found.slots.cpu() >= 0
    assert int(shown.sum()) > 2000
    turns, shifts = views.viewmats[:, :3, :3].double(), views.viewmats[:, None, :3, 3].double()
    pixels = (gaussians.means.double() @ turns.mT + shifts) @ views.intrinsics.double().mT
    depths, means = pixels[shown][:, 2], pixels[shown][:, :2] / pixels[shown][:, 2:]
    off = (by_gaussian(found, found.rows[:, :2], shown).double() - means).abs()
    assert float((off / last_place(means.abs().clamp(min=2.0**-10))).max()) <= 0.51
    off = (by_gaussian(found, found.depths, shown).double() - depths).abs()
    assert float((off / last_place(depths)).max()) <= 0.51


def test_whole_image_box_of_a_splat_that_floods_it(launcher: Launcher) -> None:
    gaussians, views, _ = scene(1, (70, 50), seed=39)
    gaussians = dataclasses.replace(
        gaussians, scales=torch.tensor([[2.0, 2.5, 1.75]]).double(), opacities=torch.tensor([3.0]).double()
    )
    found = compare(launcher, gaussians, views, settings_for(), None)
    assert found.boxes[:1].tolist() == [[0, 0, 70, 50]]


@pytest.mark.parametrize("num_views", [1, 3])
def test_blocks_that_take_several_rounds(any_order: Launcher, monkeypatch: pytest.MonkeyPatch, num_views: int) -> None:
    """1000 Gaussians by one block: what a round leaves in shared memory must not reach the next."""
    gaussians, views, masks = scene(1000, (40, 30), seed=44, num_views=num_views, log_scale=-2.5)
    monkeypatch.setattr(projection, "PROJECT_BLOCKS", 1)
    compare(any_order, gaussians, views, settings_for(), masks)


def test_cameras_packed_on_the_device(launcher: Launcher) -> None:
    """Views of several sizes, from tensors on the device and from the host: the same numbers, counts of zero."""
    views = make_views((40, 30), num_views=5, dtype=torch.float32)
    views = dataclasses.replace(views, sizes=((40, 30), (40, 30), (17, 33), (17, 33), (40, 30)))
    on_host, _ = projection._cameras_and_counts(launcher, views)
    cameras = torch.full((5, projection.CAMERA_SIZE), float("nan"), device=launcher.device)
    counts = torch.full((5,), 9, dtype=torch.int32, device=launcher.device)
    projection.pack_on_device(launcher, moved_views(views, launcher.device), cameras, counts)
    torch.testing.assert_close(cameras, on_host, rtol=1e-6, atol=0)
    assert counts.tolist() == [0] * 5


def test_compact_leaves_the_used_rows(launcher: Launcher) -> None:
    gaussians, views, masks = scene(90, (40, 30), seed=40, num_views=3, log_scale=-2.5)
    single = moved(moved(gaussians, torch.float32), launcher.device)
    views = moved_views(views, torch.float32)
    loose = projection.project(launcher, single, views, settings_for(), masks=masks.float().to(launcher.device))
    tight = compact(loose)
    assert tight.counts is None and compact(tight) is tight
    assert tight.view_offsets.tolist() == [0, *np.cumsum(loose.counts.tolist())] and len(tight) == sum(loose.counts)
    shown = loose.slots >= 0
    assert torch.equal(shown, tight.slots >= 0) and torch.equal(loose.slots[~shown], tight.slots[~shown])
    for name in ("rows", "depths", "ids", "gaussians", "boxes"):
        one, two = (getattr(splats, name)[splats.slots[shown].long()] for splats in (loose, tight))
        assert torch.equal(one, two), name
    for view in range(3):
        first, last = tight.view_range(view)
        assert sorted(tight.slots[view][shown[view]].tolist()) == list(range(first, last))
    d_table = torch.randn((*shown.shape, 10), generator=torch.Generator().manual_seed(5))
    gradients = [
        projection.project_backward(launcher, single, views, settings_for(), splats, gradient_rows(splats, d_table))
        for splats in (loose, tight)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_refusals(launcher: Launcher) -> None:
    gaussians, views, masks = random_scene(20, (20, 20), dtype=torch.float32, sh_degree=1)
    with pytest.raises(ValueError, match="float32"):
        projection.project(launcher, moved(gaussians, torch.float64), views, settings_for(1))
    with pytest.raises(ValueError, match="degree 3 needs 15"):
        projection.project(launcher, moved(gaussians, launcher.device), views, settings_for(3))
    with pytest.raises(ValueError, match="masks is torch.float64"):
        projection.project(launcher, gaussians, views, settings_for(1), masks=masks.double())
    splats = projection.project(launcher, moved(gaussians, launcher.device), views, settings_for(1))
    with pytest.raises(ValueError, match="d_rows"):
        projection.project_backward(launcher, gaussians, views, settings_for(1), splats, splats.rows[:-1])


def test_tables_that_begin_anywhere(launcher: Launcher) -> None:
    """Rows from the middle of a table are read from a copy, and not updated."""
    gaussians, views, _ = random_scene(21, (20, 20), dtype=torch.float32)
    rest = moved(with_parameters(gaussians, [tensor[1:] for tensor in parameters_of(gaussians)]), launcher.device)
    part = with_parameters(gaussians, [tensor.to(launcher.device)[1:] for tensor in parameters_of(gaussians)])
    found, expected = (projection.project(launcher, table, views, settings_for()) for table in (part, rest))
    assert torch.equal(compact(found).rows, compact(expected).rows)
    with pytest.raises(ValueError, match="begin at a multiple of 16"):
        update(launcher, part, views, settings_for(), found, torch.zeros_like(found.rows))


def update(launcher: Launcher, table: Gaussians, views: Views, settings, splats: Splats, d_rows: Tensor, **options):
    """One fused update in place; returns everything that it may change."""
    moments, statistics = state_like(table)
    steps = tuple(AdamStep(0.01 * (k + 1), 0.9 - 0.01 * k, 0.99, 1e-8, 3 + k, 0.02 * (k == 3)) for k in range(6))
    d_masks = projection.project_backward_update(
        launcher, table, views, settings, splats, d_rows, optimizer=Optimizer(*moments, steps), statistics=statistics,
        gradient_scale=0.25, **options,
    )  # fmt: skip
    return [*parameters_of(table), *moments[0], *moments[1], *statistics, d_masks]


def state_like(table: Gaussians) -> tuple[list[tuple[Tensor, ...]], Statistics]:
    moments = [tuple(torch.full_like(tensor, 0.5) for tensor in parameters_of(table)) for _ in range(2)]
    return moments, Statistics(torch.ones_like(table.opacities), torch.ones_like(table.opacities))


def update_by(body, table: Gaussians, views: Views, settings, splats: Splats, d_rows: Tensor) -> list[Tensor]:
    """`update` by another body."""
    moments, statistics = state_like(table)
    steps = tuple(AdamStep(0.01 * (k + 1), 0.9 - 0.01 * k, 0.99, 1e-8, 3 + k, 0.02 * (k == 3)) for k in range(6))
    d_masks = body.project_backward_update(
        table, views, settings, splats, d_rows,
        optimizer=Optimizer(*moments, steps), statistics=statistics, gradient_scale=0.25,
    )  # fmt: skip
    return [*parameters_of(table), *moments[0], *moments[1], *statistics, d_masks]


@pytest.mark.parametrize("degree", [None, 0, 1, 3])
@pytest.mark.parametrize("num_views", [1, 2])
def test_fused_update(any_order: Launcher, degree: int | None, num_views: int) -> None:
    """Parameters, moments, statistics and mask gradients; a third of the Gaussians is out of sight and only decays."""
    gaussians, views, masks = scene(200, (60, 44), seed=41, num_views=num_views, log_scale=-2.5)
    settings, count, launcher = settings_for(degree), 64, any_order
    gaussians.means[100 : 100 + count] *= -1.0  # a whole block behind the camera
    d_table = torch.randn((num_views, 200, 10), generator=torch.Generator().manual_seed(2)).double()
    exact = REFERENCE.project(gaussians, views, settings, masks=masks)
    single, single_views = moved(gaussians, torch.float32), moved_views(views, torch.float32)
    beside = CPU.project(single, single_views, settings, masks=masks.float())
    device = moved(with_parameters(single, [tensor.clone() for tensor in parameters_of(single)]), launcher.device)
    splats = projection.project(launcher, device, single_views, settings, masks=masks.float().to(launcher.device))
    before = [tensor.clone() for tensor in parameters_of(device)]
    found = update(launcher, device, single_views, settings, splats, gradient_rows(splats, d_table))
    others = [
        update_by(CPU, single, single_views, settings, beside, gradient_rows(beside, d_table)),
        update_by(REFERENCE, gaussians, views, settings, exact, gradient_rows(exact, d_table)),
    ]
    for place, tensors in enumerate(zip(found, *others, strict=True)):
        assert_as_good(*tensors, f"tensor {place}")
    assert all(bool((new != old).all()) for new, old in zip(parameters_of(device), before, strict=True))


def test_nothing_changes_after_an_overflow(launcher: Launcher) -> None:
    gaussians, views, _ = random_scene(100, (40, 30), seed=42, dtype=torch.float32)
    table, status = moved(gaussians, launcher.device), torch.zeros(8, dtype=torch.int32, device=launcher.device)
    table = with_parameters(table, [tensor.clone() for tensor in parameters_of(table)])
    splats = projection.project(launcher, table, views, settings_for())
    status[0] = 1
    *changed, _ = update(launcher, table, views, settings_for(), splats, torch.ones_like(splats.rows), status=status)
    moments, statistics = state_like(table)
    expected = [*parameters_of(moved(gaussians, launcher.device)), *moments[0], *moments[1], *statistics]
    assert all(torch.equal(one, two) for one, two in zip(changed, expected, strict=True))
    values = [torch.ones(10, device=launcher.device) for _ in range(4)]
    projection.adam(launcher, *values, AdamStep(0.1, 0.9, 0.99, 1e-8, 1), status=status)
    assert all(bool((tensor == 1).all()) for tensor in values)
    logits, first, second, other = values
    arguments = {"d_mask": other, "keep_gradient": other, "d_all": 1.0, "adam": AdamStep(0.1, 0.9, 0.99, 1e-8, 1)}
    mask_kernels.update(launcher, logits, first, second, **arguments, status=status)
    assert all(bool((tensor == 1).all()) for tensor in values)
    status[0] = 0
    update(launcher, table, views, settings_for(), splats, torch.ones_like(splats.rows), status=status)
    assert not torch.equal(table.means, gaussians.means.to(launcher.device))


@pytest.mark.parametrize("count", [1, 3, 4, 1023, 2050])
def test_adam(launcher: Launcher, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, generator=generator)
    states = [
        [start.clone(), torch.zeros_like(start), torch.zeros_like(start)],
        [start.double(), torch.zeros(count).double(), torch.zeros(count).double()],
        [tensor.to(launcher.device) for tensor in (start.clone(), torch.zeros(count), torch.zeros(count))],
    ]
    for number in range(1, 6):
        gradient, step = torch.randn(count, generator=generator), AdamStep(0.01, 0.9, 0.999, 1e-15, number, 0.003)
        CPU.adam(states[0][0], gradient, *states[0][1:], step)
        REFERENCE.adam(states[1][0], gradient.double(), *states[1][1:], step)
        projection.adam(launcher, states[2][0], gradient.to(launcher.device), *states[2][1:], step)
    for name, single, exact, found in zip(("param", "first", "second"), *states, strict=True):
        assert_as_good(found, single, exact, name)
    assert not torch.equal(states[2][0].cpu(), start)


@pytest.mark.parametrize("count", [0, 1, 255, 5000])
def test_mask_sample(launcher: Launcher, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(count, generator=generator)
    logits[:2] = torch.tensor([-1e30, 1e30])[: min(2, count)]
    ids = torch.randint(0, 1 << 62, (count,), generator=generator)
    seed, step = (1 << 63) + 12345678901, (1 << 31) + 7
    expected = mask_sample(logits, ids, seed, step)
    mask, keep_gradient, num_drawn = mask_kernels.sample(
        launcher, logits.to(launcher.device), ids.to(launcher.device), seed, step
    )
    assert torch.equal(mask.cpu(), expected.mask)
    assert num_drawn.dtype == torch.int64 and num_drawn.item() == expected.num_drawn.item() == int(mask.sum())
    torch.testing.assert_close(keep_gradient.cpu(), expected.keep_gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("is_counted", [False, True])
def test_mask_update(launcher: Launcher, is_counted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    d_mask, keep, logits = (torch.randn(700, generator=generator) for _ in range(3))
    states = [[logits.clone().to(place), 0.1 * d_mask.to(place), 0.2 * (d_mask**2).to(place)]
              for place in ("cpu", launcher.device)]  # fmt: skip
    adam = AdamStep(0.02, 0.9, 0.999, 1e-15, 3)
    mask_update(*states[0], d_mask=d_mask, keep_gradient=keep, d_all=0.03, adam=adam)
    d_all = Counted(torch.tensor(15, device=launcher.device), 0.002) if is_counted else 0.03
    on_device = {"d_mask": d_mask.to(launcher.device), "keep_gradient": keep.to(launcher.device)}
    mask_kernels.update(launcher, *states[1], **on_device, d_all=d_all, adam=adam)
    assert not torch.equal(states[1][0].cpu(), logits)
    for one, two in zip(*states, strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=2e-6, atol=1e-7)
