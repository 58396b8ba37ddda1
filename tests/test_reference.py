# SPDX-License-Identifier: Apache-2.0
"""The reference body against a scalar oracle and finite differences, with masks of 0, 1 and fractions along a ray."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernel_scenes import (
    PARAMETERS,
    composite_ray,
    make_views,
    parameters_of,
    random_scene,
    scalar_image,
    settings_for,
    with_parameters,
)
from masksplat.ops import get_body
from masksplat.reference import compositing, harmonics, projection
from masksplat.types import SLOT_NO_PIXEL, SLOT_UNSEEN, AdamStep, Gaussians, Splats

BODY = get_body("reference")
BACKGROUND = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
SIZE = (11, 7)
# A scene per case of compositing, chosen by `Margins`: no pair within 1e-4 (relative) of a threshold.
DIFFERENCE_STEP = 1e-6
MARGIN = 1e-4


def opaque_scene(count, size, seed):
    """Mixed masks; every second Gaussian large and sampled, some capped at 0.99, so that rays end."""
    gaussians, views, masks = random_scene(count, size, seed=seed)
    opacities, scales = gaussians.opacities.clone(), gaussians.scales.clone()
    opacities[::6], opacities[2::6], opacities[4::6] = 6.0, 3.5, 3.0
    scales[::2] += 1.5
    masks[::2] = 1.0
    return dataclasses.replace(gaussians, opacities=opacities, scales=scales), views, masks


def translucent_scene(count, size, seed):
    return random_scene(count, size, seed=seed)


def assert_far_from_thresholds(splats: Splats, size=SIZE):
    margins = scalar_image(splats, 0, size, BACKGROUND.numpy()).margins
    assert margins.smallest() > MARGIN
    return margins


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [opaque_scene, translucent_scene])
def test_every_pixel_equals_the_scalar_oracle(seed, make):
    gaussians, views, masks = make(60, (19, 35), seed)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks)
    frame = BODY.rasterize(splats, 0, (19, 35), BACKGROUND)
    oracle = scalar_image(splats, 0, (19, 35), BACKGROUND.numpy())
    np.testing.assert_allclose(frame.rgb.numpy(), oracle.rgb, atol=1e-12)
    np.testing.assert_allclose(frame.transmittance.numpy(), oracle.transmittance, atol=1e-12)
    largest, total = BODY.blend_scores(splats, 0, (19, 35))
    np.testing.assert_allclose(largest.numpy(), oracle.scores_max, atol=1e-12)
    np.testing.assert_allclose(total.numpy(), oracle.scores_sum, atol=1e-10)
    np.testing.assert_allclose(total.sum().item(), (1.0 - oracle.transmittance).sum(), rtol=1e-9)
    assert oracle.margins.num_skipped > 0
    assert make is translucent_scene or (oracle.margins.num_capped > 0 and oracle.margins.num_ended > 0)


@pytest.mark.parametrize(("batch_pairs", "chunk"), [(1, 1), (1, 7), (1 << 14, 16), (1 << 22, 4096)])
def test_batching_does_not_change_the_image(monkeypatch, batch_pairs, chunk):
    gaussians, views, masks = opaque_scene(80, (40, 21), 3)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks)
    expected = BODY.rasterize(splats, 0, (40, 21), BACKGROUND)
    monkeypatch.setattr(compositing, "BATCH_PAIRS", batch_pairs)
    monkeypatch.setattr(compositing, "CHUNK", chunk)
    frame = BODY.rasterize(splats, 0, (40, 21), BACKGROUND)
    torch.testing.assert_close(frame.rgb, expected.rgb, atol=1e-13, rtol=0)
    torch.testing.assert_close(frame.transmittance, expected.transmittance, atol=1e-13, rtol=0)


@pytest.mark.parametrize("cuts", [(0, 5, 32, 45), (0, 16, 16, 45), (0, 1, 2, 45)])
def test_strips_of_rows_tile_the_image(cuts):
    size = (30, 45)
    gaussians, views, masks = random_scene(60, size, seed=5)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks)
    whole = BODY.rasterize(splats, 0, size, BACKGROUND)
    strips = [BODY.rasterize(splats, 0, size, BACKGROUND, rows=rows) for rows in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(torch.cat([strip.rgb for strip in strips]), whole.rgb, atol=1e-13, rtol=0)
    d_rgb = torch.randn_like(whole.rgb)
    expected, summed = torch.zeros_like(splats.rows), torch.zeros_like(splats.rows)
    BODY.rasterize_backward(splats, whole, d_rgb, expected)
    for strip in strips:
        BODY.rasterize_backward(splats, strip, d_rgb[slice(*strip.rows)], summed)
    torch.testing.assert_close(summed, expected, atol=1e-11, rtol=1e-11)


def test_order_of_the_table_does_not_matter_and_ids_break_ties_of_depth():
    size = (24, 18)
    gaussians, views, masks = random_scene(40, size, seed=6)
    means = gaussians.means.clone()
    means[10:30] = means[5]  # equal depths in every view
    gaussians = dataclasses.replace(gaussians, means=means)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(1)) * 3
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled = with_parameters(gaussians, [tensor[shuffle] for tensor in parameters_of(gaussians)])
    first = BODY.project(gaussians, views, settings_for(), masks=masks, ids=ids)
    second = BODY.project(shuffled, views, settings_for(), masks=masks[shuffle], ids=ids[shuffle])
    other = BODY.project(gaussians, views, settings_for(), masks=masks, ids=ids.flip(0))
    images = [BODY.rasterize(splats, 0, size, BACKGROUND).rgb for splats in (first, second, other)]
    assert torch.equal(images[0], images[1])
    assert (images[0] - images[2]).abs().max() > 1e-3


def test_no_splat_and_no_row_are_legal():
    gaussians, views, _ = random_scene(5, SIZE)
    behind = dataclasses.replace(gaussians, means=gaussians.means * torch.tensor([1.0, 1.0, -1.0]))
    splats = BODY.project(behind, views, settings_for())
    assert len(splats) == 0 and bool((splats.slots == SLOT_UNSEEN).all())
    frame = BODY.rasterize(splats, 0, SIZE, BACKGROUND)
    assert torch.equal(frame.rgb, BACKGROUND.expand(7, 11, 3)) and torch.equal(
        frame.transmittance, torch.ones(7, 11).double()
    )
    BODY.rasterize_backward(splats, frame, torch.ones_like(frame.rgb), torch.zeros_like(splats.rows))
    gradients = BODY.project_backward(behind, views, settings_for(), splats, torch.zeros_like(splats.rows))
    assert all(bool((gradient == 0).all()) for gradient in gradients)
    assert BODY.rasterize(splats, 0, SIZE, BACKGROUND, rows=(3, 3)).rgb.shape == (0, 11, 3)
    with pytest.raises(ValueError, match="do not lie in an image of 7 rows"):
        BODY.rasterize(splats, 0, SIZE, BACKGROUND, rows=(3, 9))


# --- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", range(4))
def test_gradcheck_of_spherical_harmonics(degree):
    generator = torch.Generator().manual_seed(degree)
    directions = torch.nn.functional.normalize(torch.randn(5, 3, generator=generator, dtype=torch.float64), dim=-1)
    sh0, shN = (torch.randn(5, k, 3, generator=generator, dtype=torch.float64) for k in (1, 15))
    sh0 = 3.0 * sh0
    inputs = [tensor.requires_grad_() for tensor in (directions, sh0[:, 0].clone(), shN)]
    colors = harmonics.sh_colors(*inputs, degree)
    assert colors.abs().min() == 0.0 and bool((colors > 0).any())  # some clamped, some not
    unclamped = torch.einsum(
        "nk,nkc->nc", harmonics.sh_bases(directions, degree), torch.cat((sh0, shN), 1)[:, : (degree + 1) ** 2]
    )
    assert (unclamped + 0.5).abs().min() > MARGIN
    assert torch.autograd.gradcheck(lambda *tensors: harmonics.sh_colors(*tensors, degree), inputs)


def test_gradcheck_of_rotations():
    quats = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(projection.rotation_matrices, (quats,))


@pytest.mark.parametrize("degree", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_gradcheck_of_packed_rows(degree, antialiased, activated):
    gaussians, views, masks = random_scene(6, SIZE, seed=7)
    if activated:
        gaussians = dataclasses.replace(
            gaussians, scales=gaussians.scales.exp(), opacities=torch.sigmoid(gaussians.opacities)
        )
    means = gaussians.means.clone()
    means[0] = torch.tensor([4.0, 0.2, 2.0])  # beyond the frustum: x/z is clamped in the Jacobian
    means[1] = torch.tensor([0.2, -4.0, 2.0])
    gaussians = dataclasses.replace(gaussians, means=means)
    settings = settings_for(degree, antialiased=antialiased, activated=activated)
    camera = projection.pinhole(views, 0)
    ratio = (means @ camera.rotation.T + camera.translation)[:, :2] / (means @ camera.rotation.T + camera.translation)[
        :, 2:
    ]
    assert ratio[0, 0] > (camera.width - camera.cx) / camera.fx + 0.16 and ratio[1, 1] < -camera.cy / camera.fy - 0.16
    inputs = [tensor.clone().requires_grad_() for tensor in (*parameters_of(gaussians), masks)]

    def rows(*tensors):
        return projection.splat_rows(Gaussians(*tensors[:6]), tensors[6], camera, settings)

    assert torch.autograd.gradcheck(rows, inputs, eps=DIFFERENCE_STEP, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("make", "seed"), [(opaque_scene, 4), (opaque_scene, 15), (translucent_scene, 22)])
def test_gradcheck_of_compositing_with_mixed_masks(make, seed):
    gaussians, views, masks = make(12, SIZE, seed)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks)
    margins = assert_far_from_thresholds(splats)
    assert {0.0, 1.0} <= set(splats.rows[:, 9].tolist())
    assert make is translucent_scene or (margins.num_capped > 0 and margins.num_ended > 0)

    def image(rows, background):
        frame = BODY.rasterize(dataclasses.replace(splats, rows=rows), 0, SIZE, background)
        return frame.rgb, frame.transmittance

    inputs = (splats.rows.clone().requires_grad_(), BACKGROUND.clone().requires_grad_())
    assert torch.autograd.gradcheck(image, inputs, eps=DIFFERENCE_STEP, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("degree", range(4))
def test_whole_chain_equals_finite_differences(degree):
    """Project, rasterize and loss: directional derivatives of every parameter against central differences."""
    gaussians, views, masks = opaque_scene(12, SIZE, 4)
    target = torch.randint(0, 256, (7, 11, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = settings_for(degree)

    def loss(tensors, masks):
        splats = BODY.project(with_parameters(gaussians, tensors), views, settings, masks=masks)
        frame = BODY.rasterize(splats, 0, SIZE, BACKGROUND)
        terms = BODY.photometric(frame.rgb, target, 0.2)
        return float(0.8 * terms.l1 + 0.2 * (1 - terms.ssim)), splats, frame, terms

    _, splats, frame, terms = loss(parameters_of(gaussians), masks)
    assert_far_from_thresholds(splats)
    assert (frame.rgb - target / 255.0).abs().min() > 1e-5  # no corner of the L1 within a step
    d_rows = torch.zeros_like(splats.rows)
    BODY.rasterize_backward(splats, frame, terms.d_rgb, d_rows)
    gradients = BODY.project_backward(gaussians, views, settings, splats, d_rows)
    generator = torch.Generator().manual_seed(4)
    for place, name in enumerate((*PARAMETERS, "masks")):
        tensors = [*parameters_of(gaussians), masks]
        direction = torch.randn(tensors[place].shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = list(tensors)
            moved[place] = tensors[place] + sign * DIFFERENCE_STEP * direction
            ends.append(loss(moved[:6], moved[6])[0])
        expected = (ends[0] - ends[1]) / (2 * DIFFERENCE_STEP)
        found = (getattr(gradients, name) * direction).sum().item()
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-9), name


def test_explicit_backward_equals_autograd_over_several_views():
    size = (26, 19)
    gaussians, views, masks = random_scene(50, size, seed=8, num_views=3)
    leaves = [tensor.clone().requires_grad_() for tensor in (*parameters_of(gaussians), masks)]
    splats = BODY.project(with_parameters(gaussians, leaves[:6]), views, settings_for(), masks=leaves[6])
    frames = [BODY.rasterize(splats, view, size, BACKGROUND) for view in range(3)]
    weights = [(torch.randn_like(frame.rgb), torch.randn_like(frame.transmittance)) for frame in frames]
    loss = sum((f.rgb * d).sum() + (f.transmittance * t).sum() for f, (d, t) in zip(frames, weights, strict=True))
    expected = torch.autograd.grad(loss, leaves)
    plain = BODY.project(gaussians, views, settings_for(), masks=masks)
    d_rows = torch.zeros_like(plain.rows)
    for view, (d_rgb, d_light) in enumerate(weights):
        BODY.rasterize_backward(
            plain, BODY.rasterize(plain, view, size, BACKGROUND), d_rgb, d_rows, d_transmittance=d_light
        )
    found = BODY.project_backward(gaussians, views, settings_for(), plain, d_rows)
    for name, one, two in zip((*PARAMETERS, "masks"), found, expected, strict=True):
        assert (two != 0).any(), name
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9, msg=name)


def one_pixel_splats(alphas, masks, colors) -> Splats:
    """Splats whose alphas at the only pixel are given: means on its centre, ids in depth order."""
    count = len(alphas)
    rows = np.zeros((count, 10))
    rows[:, 0:2], rows[:, 2], rows[:, 4] = 0.5, 1.0, 1.0
    rows[:, 5], rows[:, 6:9], rows[:, 9] = alphas, colors, masks
    return Splats(
        torch.tensor(rows),
        torch.arange(count, dtype=torch.float64),
        torch.arange(count),
        torch.arange(count, dtype=torch.int32),
        torch.tensor([[0, 0, 1, 1]] * count, dtype=torch.int32),
        torch.tensor([0, count]),
        torch.arange(count, dtype=torch.int32)[None],
    )


def test_the_cap_stops_opacity_and_geometry_but_not_the_mask():
    splats = one_pixel_splats([0.995, 0.5], [0.5, 1.0], [[0.9, 0.1, 0.2], [0.3, 0.8, 0.4]])
    splats.rows[0, 0] = 0.52  # off centre: alpha still above the cap
    frame = BODY.rasterize(splats, 0, (1, 1), BACKGROUND)
    d_rows = torch.zeros_like(splats.rows)
    BODY.rasterize_backward(splats, frame, torch.ones(1, 1, 3).double(), d_rows)
    assert bool((d_rows[0, :6] == 0).all())
    behind = 0.5 * splats.rows[1, 6:9] + 0.5 * BACKGROUND
    expected = 0.99 * (splats.rows[0, 6:9] - behind).sum()
    assert d_rows[0, 9].item() == pytest.approx(expected.item(), rel=1e-12)
    assert d_rows[1, 5] != 0


def test_a_splat_without_mask_has_the_mask_gradient_alone():
    gaussians, views, masks = random_scene(30, (20, 20), seed=9)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks)
    frame = BODY.rasterize(splats, 0, (20, 20), BACKGROUND)
    d_rows = torch.zeros_like(splats.rows)
    BODY.rasterize_backward(splats, frame, torch.ones_like(frame.rgb), d_rows)
    off = splats.rows[:, 9] == 0
    assert bool((d_rows[off, :9] == 0).all()) and bool((d_rows[off, 9] != 0).any())
    on = splats.rows[:, 9] == 1
    product = d_rows[on, 5] * splats.rows[on, 5]  # m = 1 and no cap: d mask = o d o
    torch.testing.assert_close(product, d_rows[on, 9], atol=1e-11, rtol=1e-9)


def test_wild_culled_gaussians_leave_no_trace_in_the_gradient():
    gaussians, views, masks = random_scene(20, SIZE, seed=10)
    wild = [tensor.clone() for tensor in parameters_of(gaussians)]
    wild[0][0] = torch.nan
    wild[0][1] = torch.tensor([0.0, 0.0, -1.0])
    wild[0][2] = torch.tensor([1e30, 0.0, 1.0])
    wild[2][3] = 1e4
    wild[1][4] = 0.0
    wild[3][5] = -50.0
    leaves = [tensor.requires_grad_() for tensor in wild]
    splats = BODY.project(with_parameters(gaussians, leaves), views, settings_for(), masks=masks)
    assert splats.slots[0, [0, 1, 2, 3]].tolist() == [SLOT_UNSEEN] * 4 and splats.slots[0, 5] == SLOT_NO_PIXEL
    assert bool(torch.isfinite(splats.rows).all())
    frame = BODY.rasterize(splats, 0, SIZE, BACKGROUND)
    gradients = torch.autograd.grad(frame.rgb.square().sum(), leaves)
    for gradient in gradients:
        assert bool(torch.isfinite(gradient).all())
        assert bool((gradient[[0, 1, 2, 3, 5]] == 0).all())


# --- the published kernels' mistake (docs/masks.md) ------------------------------------------------------------


def ray_gradients(alphas, masks, colors, background, d_color, *, published: bool):
    """dL/dalpha and dL/dmask of one ray, back to front.

    `published` walks as the kernels of MaskGaussian and mask-Grendel do: the colour behind is updated with the alpha
    and colour of the splat behind but with the mask of the present one. Exact is the mask that belongs to them.
    """
    count = len(alphas)
    _, light, _ = composite_ray(alphas, masks, colors, background)
    after, d_alpha, d_mask = light, np.zeros(count), np.zeros(count)
    behind, last_alpha, last_color, last_mask = np.zeros(3), 0.0, np.zeros(3), 0.0
    for i in reversed(range(count)):
        before = after / (1.0 - masks[i] * alphas[i])
        pairing = masks[i] if published else last_mask
        behind = pairing * last_alpha * last_color + (1.0 - pairing * last_alpha) * behind
        d_masked = before * (colors[i] - behind) @ d_color - light / (1.0 - masks[i] * alphas[i]) * background @ d_color
        d_alpha[i], d_mask[i] = masks[i] * d_masked, alphas[i] * d_masked
        last_alpha, last_color, last_mask, after = alphas[i], colors[i], masks[i], before
    return d_alpha, d_mask


def difference_gradients(alphas, masks, colors, background, d_color, step=1e-6):
    """Central differences of the forward rule in every alpha and mask."""
    found = []
    for place in range(2):
        gradient = np.zeros(len(alphas))
        for i in range(len(alphas)):
            ends = []
            for sign in (1, -1):
                moved = [alphas.copy(), masks.copy()]
                moved[place][i] += sign * step
                ends.append(composite_ray(*moved, colors, background)[0] @ d_color)
            gradient[i] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


def random_ray(rng, *, share_off):
    alphas = rng.uniform(0.02, 0.4, 12)  # 12 splats leave T > 0.6**12 = 2e-3: no ray ends
    masks = (rng.random(12) >= share_off).astype(float)
    return alphas, masks, rng.random((12, 3)), rng.random(3), rng.normal(size=3)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_published_recursion_is_wrong_with_mixed_masks_and_ours_is_exact():
    """Law 1. docs/masks.md quotes these figures."""
    rng = np.random.default_rng(0)
    published, exact, reference, flipped = [], [], [], []
    for _ in range(200):
        ray = random_ray(rng, share_off=0.4)
        d_alpha, d_mask = difference_gradients(*ray)
        wrong, right = (ray_gradients(*ray, published=flag) for flag in (True, False))
        published.append((relative(wrong[0], d_alpha), relative(wrong[1], d_mask)))
        flipped.append(((wrong[0] * d_alpha < 0).mean(), (wrong[1] * d_mask < 0).mean()))
        exact.append((relative(right[0], d_alpha), relative(right[1], d_mask)))
        splats = one_pixel_splats(*ray[:3])
        frame = BODY.rasterize(splats, 0, (1, 1), torch.tensor(ray[3]))
        d_rows = torch.zeros_like(splats.rows)
        BODY.rasterize_backward(splats, frame, torch.tensor(ray[4])[None, None], d_rows)
        reference.append((relative(d_rows[:, 5].numpy(), right[0]), relative(d_rows[:, 9].numpy(), right[1])))
    assert np.max(exact) < 1e-7 and np.max(reference) < 1e-12
    mean_error, flips = np.mean(published, axis=0), np.mean(flipped, axis=0)
    print(f"published: mean relative error {mean_error}, largest {np.max(published, axis=0)}, signs flipped {flips}")
    print(f"exact: largest relative error {np.max(exact, axis=0)}")
    assert np.all((mean_error > 0.25) & (mean_error < 0.55))
    assert np.all(flips > 0.02)


def test_published_recursion_is_right_when_every_mask_is_one():
    rng = np.random.default_rng(1)
    for _ in range(20):
        ray = random_ray(rng, share_off=0.0)
        expected = difference_gradients(*ray)
        for found, wanted in zip(ray_gradients(*ray, published=True), expected, strict=True):
            assert relative(found, wanted) < 1e-7


# --- Adam ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_equals_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(7, 3, generator=generator, dtype=dtype)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-15)
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    for update in range(1, 20):
        gradient = torch.randn(7, 3, generator=generator, dtype=dtype) * (update % 3)
        BODY.adam(ours, gradient, first, second, AdamStep(0.01, 0.8, 0.95, 1e-15, update))
        theirs.grad = gradient
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-7)


def test_a_drift_moves_every_value_and_no_moment():
    states = [[torch.full((5,), 2.0), torch.zeros(5), torch.zeros(5)] for _ in range(2)]
    for state, drift in zip(states, (0.0, 0.25), strict=True):
        BODY.adam(state[0], torch.ones(5), *state[1:], AdamStep(0.01, 0.9, 0.999, 1e-15, 1, drift))
    assert torch.equal(states[0][0] - 0.25, states[1][0])
    assert torch.equal(states[0][1], states[1][1]) and torch.equal(states[0][2], states[1][2])


# --- what is selected -----------------------------------------------------------------------------------------


def test_boxes_hold_every_pixel_that_reaches_the_alpha_threshold():
    size = (50, 40)
    gaussians, views, _ = random_scene(200, size, seed=12, log_scale=-2.5)
    splats = BODY.project(gaussians, views, settings_for())
    xs, ys, slack = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, []
    for row, box in zip(splats.rows.numpy(), splats.boxes.numpy(), strict=True):
        dx, dy = xs[None, :] - row[0], ys[:, None] - row[1]
        alpha = row[5] * np.exp(-0.5 * (row[2] * dx**2 + row[4] * dy**2) - row[3] * dx * dy)
        reached = np.argwhere(alpha >= 1 / 255)
        if len(reached):
            (top, left), (bottom, right) = reached.min(0), reached.max(0)
            assert box[0] <= left <= right < box[2] and box[1] <= top <= bottom < box[3]
            slack += [left - box[0], box[2] - 1 - right, top - box[1], box[3] - 1 - bottom]
    assert np.mean(slack) < 0.5  # tight up to the discreteness of pixels
    assert len(splats) < (splats.slots >= SLOT_NO_PIXEL).sum() + 1


def test_slots_name_each_gaussians_row():
    gaussians, views, masks = random_scene(60, SIZE, seed=13, num_views=2, log_scale=-4)
    splats = BODY.project(gaussians, views, settings_for(), masks=masks, ids=torch.arange(60) * 10)
    for view in range(2):
        first, last = splats.view_range(view)
        shown = torch.nonzero(splats.slots[view] >= 0)[:, 0]
        assert splats.slots[view, shown].tolist() == list(range(first, last))
        assert splats.gaussians[first:last].tolist() == shown.tolist()
        assert splats.ids[first:last].tolist() == (shown * 10).tolist()
        assert torch.equal(splats.rows[first:last, 9], masks[shown])
    assert bool((splats.slots == SLOT_UNSEEN).any())


def test_near_and_far_planes_are_exclusive():
    views = make_views(SIZE)
    views.viewmats[0] = torch.eye(4)
    means = torch.tensor([[0, 0, 0.2], [0, 0, 0.2000001], [0, 0, 4.9999], [0, 0, 5.0]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    gaussians = Gaussians(
        means, torch.ones(4, 4).double(), torch.full((4, 3), -3.0).double(), ones, means, means[:, None]
    )
    splats = BODY.project(gaussians, views, settings_for(0, far_plane=5.0))
    assert (splats.slots[0] >= 0).tolist() == [False, True, True, False]


def test_wrong_sh_degree_is_refused():
    gaussians, views, _ = random_scene(3, SIZE, sh_degree=1)
    with pytest.raises(ValueError, match="SH degree 2 needs 8 higher coefficients, found 3"):
        BODY.project(gaussians, views, settings_for(2))
    with pytest.raises(ValueError, match="SH degree is 4"):
        harmonics.sh_bases(torch.zeros(1, 3), 4)
