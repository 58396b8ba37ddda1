# SPDX-License-Identifier: Apache-2.0
"""`masksplat.rasterization`: gsplat's shapes and maths, masks, gradients through both bodies, refusals.

The conventions of docs/conventions.md are tested one by one here. The projection is compared with an independent
derivation: the Jacobian of the pinhole projection by complex steps, spherical harmonics from scipy.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernel_scenes import make_views, random_scene
from masksplat.gsplat_arguments import RENDER_MODES
from masksplat.rasterization import rasterization
from masksplat.reference.harmonics import sh_bases
from masksplat.types import ProjectionSettings

SIZE = (26, 19)
BODIES = pytest.mark.parametrize("backend", ["reference", "cpu"])


def api_scene(count=40, *, size=SIZE, seed=0, num_views=2, dtype=torch.float64):
    """Arguments of `rasterization` with activated parameters, and masks."""
    gaussians, views, masks = random_scene(count, size, seed=seed, num_views=num_views, dtype=dtype)
    return {
        "means": gaussians.means,
        "quats": gaussians.quats,
        "scales": gaussians.scales.exp(),
        "opacities": torch.sigmoid(gaussians.opacities),
        "colors": torch.cat((gaussians.sh0[:, None], gaussians.shN), dim=1),
        "viewmats": views.viewmats,
        "Ks": views.intrinsics,
        "width": size[0],
        "height": size[1],
        "sh_degree": 3,
    }, masks


def doubles(*values):
    return torch.tensor(*values, dtype=torch.float64)


def one_gaussian(
    mean=(0.0, 0.0, 2.0), *, color=(1.0, 0.5, 0.25), scale=0.02, opacity=0.8, width=16, height=16, **changes
):
    """One small Gaussian before a camera at the origin whose focal length is the width, principal point the middle."""
    arguments = {
        "means": doubles([mean]),
        "quats": doubles([[1.0, 0.0, 0.0, 0.0]]),
        "scales": doubles([[scale] * 3]),
        "opacities": doubles([opacity]),
        "colors": doubles([color]),
        "viewmats": torch.eye(4, dtype=torch.float64)[None],
        "Ks": doubles([[[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]]),
        "width": width,
        "height": height,
    }
    return arguments | changes


# --- gsplat's interface ----------------------------------------------------------------------------------------


@BODIES
@pytest.mark.parametrize("render_mode", RENDER_MODES)
def test_shapes_and_meta(backend, render_mode):
    arguments, masks = api_scene()
    images, alphas, meta = rasterization(**arguments, masks=masks, render_mode=render_mode, backend=backend)
    channels = {"RGB": 3, "D": 1, "ED": 1, "RGB+D": 4, "RGB+ED": 4}[render_mode]
    assert images.shape == (2, 19, 26, channels) and alphas.shape == (2, 19, 26, 1)
    rows = len(meta["gaussian_ids"])
    shapes = {"means2d": (rows, 2), "conics": (rows, 3), "opacities": (rows,), "depths": (rows,), "radii": (rows, 2)}
    assert {name: tuple(meta[name].shape) for name in shapes} == shapes
    assert (meta["width"], meta["height"], meta["n_cameras"]) == (26, 19, 2)
    assert meta["camera_ids"].bincount().sum() == rows and bool((meta["radii"] > 0).all())


@BODIES
def test_dense_meta_holds_the_packed_one(backend):
    arguments, masks = api_scene()
    packed = rasterization(**arguments, masks=masks, backend=backend)
    dense = rasterization(**arguments, masks=masks, backend=backend, packed=False)
    assert torch.equal(packed[0], dense[0])
    place = (packed[2]["camera_ids"], packed[2]["gaussian_ids"])
    for name in ("means2d", "conics", "opacities", "depths", "radii"):
        assert dense[2][name].shape[:2] == (2, 40)
        assert torch.equal(dense[2][name][place], packed[2][name])
    assert int((dense[2]["radii"] > 0).all(-1).sum()) == len(place[0])


@BODIES
@pytest.mark.parametrize("packed", [True, False])
def test_means2d_retains_its_gradient(backend, packed):
    """What gsplat's densification reads: the pixel gradient, here against shifting the principal point."""
    arguments, masks = api_scene(num_views=1)
    arguments["means"] = arguments["means"].clone().requires_grad_()
    weights = torch.randn(1, 19, 26, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, _, meta = rasterization(**arguments, masks=masks, backend=backend, packed=packed)
    meta["means2d"].retain_grad()
    (images * weights).sum().backward()
    total = meta["means2d"].grad.reshape(-1, 2).sum(0)

    def shifted(step):
        moved = arguments | {"Ks": arguments["Ks"].clone(), "means": arguments["means"].detach()}
        moved["Ks"][0, 0, 2] += step
        return (rasterization(**moved, masks=masks, backend=backend)[0] * weights).sum()

    assert total[0].item() == pytest.approx(((shifted(1e-6) - shifted(-1e-6)) / 2e-6).item(), rel=1e-5)
    assert bool((arguments["means"].grad != 0).any())


@BODIES
@pytest.mark.parametrize("render_mode", RENDER_MODES)
def test_gradients_of_every_input_equal_finite_differences(backend, render_mode):
    arguments, masks = api_scene(12, seed=4, num_views=2, size=(9, 7))
    arguments |= {"backgrounds": torch.rand(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    # Expected depth has no derivative where nothing is composited: 0 / 0 jumps to the depth of what appears.
    arguments["masks"] = masks.clamp(min=0.2) if "ED" in render_mode else masks
    generator = torch.Generator().manual_seed(2)
    shape = (2, 7, 9, {"RGB": 3, "D": 1, "ED": 1}.get(render_mode, 4))
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)

    def loss(inputs):
        images, alphas, _ = rasterization(**inputs, render_mode=render_mode, backend=backend)
        return (images * weights).sum() + (alphas * weights[..., :1]).sum()

    names = ("means", "quats", "scales", "opacities", "colors", "masks", "backgrounds")
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    gradients = torch.autograd.grad(
        loss(arguments | leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for name, gradient in zip(names, gradients, strict=True):
        direction = torch.randn(arguments[name].shape, generator=generator, dtype=torch.float64)
        ends = [loss(arguments | {name: arguments[name] + sign * 1e-6 * direction}).item() for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=2e-5, abs=1e-7), name


@BODIES
@pytest.mark.parametrize("num_channels", [1, 3, 5])
@pytest.mark.parametrize("per_camera", [False, True])
def test_any_number_of_channels(backend, num_channels, per_camera):
    """Each channel is what it would be alone; colours may differ between cameras."""
    arguments, masks = api_scene()
    generator = torch.Generator().manual_seed(0)
    shape = (2, 40, num_channels) if per_camera else (40, num_channels)
    colors = torch.rand(shape, generator=generator, dtype=torch.float64)
    arguments |= {"colors": colors, "sh_degree": None, "masks": masks, "backend": backend}
    backgrounds = torch.rand(2, num_channels, generator=generator, dtype=torch.float64)
    images, _, _ = rasterization(**arguments, backgrounds=backgrounds)
    for view in range(2):
        for channel in range(num_channels):
            one = colors[view, :, [channel]] if per_camera else colors[:, [channel]]
            alone = arguments | {
                "colors": one,
                "viewmats": arguments["viewmats"][[view]],
                "Ks": arguments["Ks"][[view]],
            }
            expected = rasterization(**alone, backgrounds=backgrounds[[view], channel : channel + 1])[0]
            torch.testing.assert_close(images[view, ..., channel], expected[0, ..., 0], atol=1e-14, rtol=0)


@BODIES
def test_depth_modes(backend):
    arguments, masks = api_scene()
    arguments |= {"masks": masks, "backend": backend, "backgrounds": torch.ones(2, 3, dtype=torch.float64)}
    images, alphas, _ = rasterization(**arguments, render_mode="RGB+D")
    expected, _, _ = rasterization(**arguments, render_mode="RGB+ED")
    torch.testing.assert_close(images[..., :3], rasterization(**arguments)[0], atol=1e-14, rtol=0)
    torch.testing.assert_close(expected[..., 3:], images[..., 3:] / alphas.clamp(min=1e-10))
    near, far = arguments["means"][:, 2].min() - 1, arguments["means"][:, 2].max() + 1
    inside = expected[..., 3][alphas[..., 0] > 0.5]
    assert len(inside) > 0 and bool(((inside > near) & (inside < far)).all())
    assert torch.equal(rasterization(**arguments, render_mode="D")[0], images[..., 3:])


@BODIES
def test_permutation_invariance(backend):
    arguments, masks = api_scene(60, seed=3)
    shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    names = ("means", "quats", "scales", "opacities", "colors")
    shuffled = arguments | {name: arguments[name][shuffle] for name in names}
    one = rasterization(**arguments, masks=masks, backend=backend)
    two = rasterization(**shuffled, masks=masks[shuffle], backend=backend)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@BODIES
def test_masks_scale_alpha(backend):
    """m = 0 is absence; a fraction composites with m alpha, which below the cap is an opacity of m o."""
    arguments, _ = api_scene(30, seed=5)
    zeros = torch.ones(30, dtype=torch.float64)
    zeros[::2] = 0
    names = ("means", "quats", "scales", "opacities", "colors")
    without = arguments | {name: arguments[name][1::2] for name in names}
    masked = rasterization(**arguments, masks=zeros, backend=backend)[0]
    torch.testing.assert_close(masked, rasterization(**without, backend=backend)[0], atol=1e-14, rtol=0)
    image = rasterization(**one_gaussian(masks=doubles([0.5])), backend=backend)[0]
    halved = rasterization(**one_gaussian(opacity=0.4), backend=backend)[0]
    centre = (0, slice(6, 10), slice(6, 10))  # elsewhere the skip at 1/255 looks at alpha, not at m alpha
    torch.testing.assert_close(image[centre], halved[centre], atol=1e-14, rtol=0)


# --- the maths, derived once more --------------------------------------------------------------------------------


def rotation_by_axis_angle(quat):
    """Rotation matrix of w, x, y, z through Rodrigues' formula."""
    w, *axis = quat / np.linalg.norm(quat)
    sine = np.linalg.norm(axis)
    angle, axis = 2 * math.atan2(sine, w), np.asarray(axis) / sine
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def project_point(point, viewmat, K):
    camera = viewmat[:3, :3] @ point + viewmat[:3, 3]
    return (K @ camera)[:2] / camera[2]


def complex_step_jacobian(point, viewmat, K):
    """(2, 3) derivative of the pixel position by complex steps: exact to rounding, no formula of EWA in it."""
    columns = []
    for axis in range(3):
        moved = point.astype(complex)
        moved[axis] += 1e-30j
        columns.append(project_point(moved, viewmat, K).imag / 1e-30)
    return np.stack(columns, axis=1)


def real_harmonics(direction, degree):
    """Real spherical harmonics from scipy's complex ones, with 3DGS's signs (Condon-Shortley phase kept)."""
    from scipy.special import sph_harm_y

    x, y, z = direction
    polar, azimuth = math.acos(z), math.atan2(y, x)
    values = []
    for level in range(degree + 1):
        for order in range(-level, level + 1):
            value = sph_harm_y(level, abs(order), polar, azimuth)
            part = value.real if order >= 0 else value.imag
            values.append(part * (math.sqrt(2) if order else 1))
    return np.array(values)


def test_spherical_harmonics_equal_scipy():
    directions = np.random.default_rng(0).normal(size=(20, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = np.stack([real_harmonics(direction, 3) for direction in directions])
    np.testing.assert_allclose(sh_bases(torch.tensor(directions), 3).numpy(), expected, atol=1e-12)


@BODIES
@pytest.mark.parametrize("antialiased", [False, True])
def test_projection_equals_an_independent_derivation(backend, antialiased):
    arguments, _ = api_scene(50, seed=6)
    mode = "antialiased" if antialiased else "classic"
    _, _, meta = rasterization(**arguments, backend=backend, rasterize_mode=mode)
    arrays = {name: value.numpy() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    checked = 0
    for row in range(len(meta["gaussian_ids"])):
        i, view = int(meta["gaussian_ids"][row]), int(meta["camera_ids"][row])
        viewmat, K, mean = arrays["viewmats"][view], arrays["Ks"][view], arrays["means"][i]
        pixel = project_point(mean, viewmat, K)
        np.testing.assert_allclose(meta["means2d"][row], pixel, atol=1e-11)
        assert meta["depths"][row].item() == pytest.approx(viewmat[2, :3] @ mean + viewmat[2, 3], abs=1e-12)
        if not (0 <= pixel[0] <= SIZE[0] and 0 <= pixel[1] <= SIZE[1]):
            continue  # outside the image the Jacobian is clamped: tests/test_reference.py
        turn = rotation_by_axis_angle(arrays["quats"][i])
        world = turn @ np.diag(arrays["scales"][i] ** 2) @ turn.T
        J = complex_step_jacobian(mean, viewmat, K)
        covariance = J @ world @ J.T
        blurred = covariance + 0.3 * np.eye(2)
        a, b, c = np.linalg.inv(blurred)[[0, 0, 1], [0, 1, 1]]
        np.testing.assert_allclose(meta["conics"][row], (a, b, c), rtol=1e-9)
        factor = math.sqrt(np.linalg.det(covariance) / np.linalg.det(blurred)) if antialiased else 1.0
        assert meta["opacities"][row].item() == pytest.approx(arrays["opacities"][i] * factor, rel=1e-9)
        checked += 1
    assert checked > 40


@BODIES
def test_colour_of_the_centre_pixel(backend):
    """max(0, SH + 1/2) in the direction from the camera to the Gaussian, weighted with its alpha."""
    rng = np.random.default_rng(7)
    coefficients = rng.normal(size=(1, 16, 3)) * 0.3
    arguments = one_gaussian((0.0, 0.0, 2.0), width=17, height=17)
    arguments |= {"colors": torch.tensor(coefficients), "sh_degree": 3}
    turn = rotation_by_axis_angle(np.array([0.9, 0.1, -0.3, 0.2]))
    shift = np.array([0.3, -0.2, 0.1])
    arguments["viewmats"] = torch.eye(4, dtype=torch.float64)[None].clone()
    arguments["viewmats"][0, :3, :3], arguments["viewmats"][0, :3, 3] = torch.tensor(turn), torch.tensor(shift)
    mean = turn.T @ (np.array([0.0, 0.0, 2.0]) - shift)
    arguments["means"] = torch.tensor(mean[None])
    image, alpha, _ = rasterization(**arguments, backend=backend)
    direction = mean + turn.T @ shift
    color = np.maximum(real_harmonics(direction / np.linalg.norm(direction), 3) @ coefficients[0] + 0.5, 0)
    np.testing.assert_allclose(image[0, 8, 8], 0.8 * color, atol=1e-12)
    assert alpha[0, 8, 8, 0].item() == pytest.approx(0.8, abs=1e-12)


# --- docs/conventions.md -----------------------------------------------------------------------------------------


@BODIES
def test_pixel_centres_are_at_one_half(backend):
    """A Gaussian on the axis falls on the corner of four pixels; half a pixel to the right and down, on one centre."""
    image = rasterization(**one_gaussian(), backend=backend)[0][0, ..., 0]
    four = image[7:9, 7:9]
    torch.testing.assert_close(four, four[0, 0].expand(2, 2))
    half_pixel = 0.5 * 2.0 / 16
    shifted = rasterization(**one_gaussian((half_pixel, half_pixel, 2.0)), backend=backend)[0][0, ..., 0]
    assert shifted[8, 8].item() == pytest.approx(0.8, abs=1e-12) and int(shifted.argmax()) == 8 * 16 + 8


@BODIES
def test_the_camera_looks_along_z_with_y_down(backend):
    image = rasterization(**one_gaussian((0.5, 0.0, 2.0)), backend=backend)[0][0, ..., 0]
    assert int(image.sum(0).argmax()) in (11, 12)  # x to the right
    image = rasterization(**one_gaussian((0.0, 0.5, 2.0)), backend=backend)[0][0, ..., 0]
    assert int(image.sum(1).argmax()) in (11, 12)  # y down
    assert rasterization(**one_gaussian((0.0, 0.0, -2.0)), backend=backend)[1].max() == 0


@BODIES
def test_quaternions_are_w_x_y_z(backend):
    """A quarter turn about z lays a rod along x upright; the length of the quaternion does not matter."""
    rod = one_gaussian(quats=doubles([[3.0, 0.0, 0.0, 0.0]]), scales=doubles([[0.3, 0.01, 0.01]]))
    image = rasterization(**rod, backend=backend)[1][0, ..., 0]
    assert (image > 0.1).any(0).sum() > 3 * (image > 0.1).any(1).sum()
    turned = rod | {"quats": doubles([[1.0, 0.0, 0.0, 1.0]])}
    torch.testing.assert_close(rasterization(**turned, backend=backend)[1][0, ..., 0], image.T, atol=1e-12, rtol=0)


@BODIES
def test_alpha_is_capped_and_skipped(backend):
    centre = one_gaussian((1 / 16, 1 / 16, 2.0), opacity=1.0)
    assert rasterization(**centre, backend=backend)[1][0, 8, 8, 0].item() == pytest.approx(0.99, abs=1e-12)
    for opacity, shown in ((0.99 / 255, False), (1.01 / 255, True)):
        faint = one_gaussian((1 / 16, 1 / 16, 2.0), opacity=opacity)
        assert bool((rasterization(**faint, backend=backend)[1] > 0).any()) == shown


@BODIES
def test_a_pixel_ends_before_the_splat_that_takes_the_light_below_1e_4(backend):
    """T falls 1, 0.05, 0.0025, 1.25e-4; the fourth would leave 6.25e-6 and is not composited, nor is what follows."""
    count = 6
    stack = one_gaussian(
        means=doubles([[z / 32, z / 32, z] for z in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5)]),
        quats=doubles([[1.0, 0.0, 0.0, 0.0]]).expand(count, 4),
        scales=torch.full((count, 3), 0.02, dtype=torch.float64),
        opacities=doubles([0.95, 0.95, 0.95, 0.95, 0.1, 0.5]),
        colors=torch.ones(count, 3, dtype=torch.float64),
    )
    alpha = rasterization(**stack, backend=backend)[1][0, 8, 8, 0].item()
    assert 1 - alpha == pytest.approx(0.05**3, rel=1e-9)


@BODIES
def test_low_pass_is_three_tenths_of_a_pixel_squared(backend):
    _, _, meta = rasterization(**one_gaussian(scale=1e-9), backend=backend)
    np.testing.assert_allclose(meta["conics"][0], (1 / 0.3, 0, 1 / 0.3), rtol=1e-9)
    _, _, meta = rasterization(**one_gaussian(scale=1e-9), eps2d=0.1, backend=backend)
    np.testing.assert_allclose(meta["conics"][0], (10, 0, 10), rtol=1e-9)


@BODIES
def test_near_planes(backend):
    """Gsplat's 0.01 here, the predecessors' 0.2 in training."""
    for z, near_plane, shown in ((0.009, {}, False), (0.011, {}, True), (0.199, {"near_plane": 0.2}, False)):
        arguments = one_gaussian((0.0, 0.0, z), scale=1e-4, **near_plane)
        assert (len(rasterization(**arguments, backend=backend)[2]["gaussian_ids"]) == 1) == shown
    assert ProjectionSettings().near_plane == 0.2
    beyond = rasterization(**one_gaussian((0.0, 0.0, 5.0)), far_plane=4.0, backend=backend)
    assert len(beyond[2]["gaussian_ids"]) == 0 and beyond[1].max() == 0


@BODIES
def test_background_shows_through(backend):
    arguments = one_gaussian((1 / 16, 1 / 16, 2.0))
    image = rasterization(**arguments, backgrounds=doubles([[0.2, 0.4, 0.6]]), backend=backend)[0][0]
    np.testing.assert_allclose(image[0, 0], (0.2, 0.4, 0.6), atol=1e-15)
    np.testing.assert_allclose(
        image[8, 8], 0.8 * np.array((1, 0.5, 0.25)) + 0.2 * np.array((0.2, 0.4, 0.6)), atol=1e-12
    )


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": torch.zeros(40, 4).double()}, r"means has shape \[40, 4\]; expected \[N, 3\]"),
        ({"quats": torch.zeros(39, 4).double()}, r"quats has shape \[39, 4\]; expected \[40, 4\]"),
        ({"scales": torch.zeros(40).double()}, r"scales has shape \[40\]; expected \[40, 3\]"),
        ({"opacities": torch.zeros(40, 1).double()}, r"opacities has shape \[40, 1\]; expected \[40\]"),
        ({"colors": torch.zeros(40, 3).double()}, r"colors has shape \[40, 3\]; expected \[40, K, 3\]"),
        ({"colors": torch.zeros(40, 9, 3).double()}, "colors holds 9 SH coefficients; sh_degree 3 needs 16"),
        ({"sh_degree": None}, r"colors has shape \[40, 16, 3\]; expected \[40, D\] or \[2, 40, D\]"),
        ({"sh_degree": 4}, "sh_degree is 4"),
        ({"viewmats": torch.eye(4).double()}, r"viewmats has shape \[4, 4\]; expected \[C, 4, 4\]"),
        ({"Ks": torch.eye(3).double()[None]}, r"Ks has shape \[1, 3, 3\]; expected \[2, 3, 3\]"),
        ({"masks": torch.ones(40)}, "masks is torch.float32 on cpu; expected torch.float64"),
        ({"masks": torch.ones(41).double()}, r"masks has shape \[41\]; expected \[40\]"),
        ({"masks": torch.ones(40, dtype=torch.bool)}, "masks is torch.bool"),
        ({"backgrounds": torch.zeros(3).double()}, r"backgrounds has shape \[3\]; expected \[2, 3\]"),
        ({"means": torch.zeros(40, 3).half()}, "means is torch.float16; expected torch.float32 or torch.float64"),
        ({"quats": np.zeros((40, 4))}, "quats is a ndarray; expected a torch.Tensor"),
        ({"viewmats": torch.zeros(2, 4, 4).double().requires_grad_()}, "viewmats requires a gradient"),
        ({"render_mode": "depth"}, "render_mode is 'depth'; expected one of RGB, D, ED"),
        ({"width": 0}, "the image is 0 x 19 pixels"),
        ({"backend": "metal"}, "metal"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments, _ = api_scene()
    with pytest.raises(ValueError, match=message):
        rasterization(**(arguments | changes))


@BODIES
def test_no_gaussian_gives_the_background(backend):
    arguments, masks = api_scene()
    names = ("means", "quats", "scales", "opacities", "colors")
    empty = arguments | {name: arguments[name][:0] for name in names}
    backgrounds = torch.rand(2, 3, dtype=torch.float64)
    images, alphas, _ = rasterization(**empty, masks=masks[:0], backgrounds=backgrounds, backend=backend)
    assert torch.equal(images, backgrounds[:, None, None].expand_as(images)) and alphas.max() == 0


def test_make_views_has_an_off_centre_principal_point():
    """The scenes above would not notice a swapped or ignored principal point otherwise."""
    K = make_views(SIZE).intrinsics[0]
    assert abs(K[0, 2] - SIZE[0] / 2) > 0.5 and abs(K[1, 2] - SIZE[1] / 2) > 0.5 and K[0, 0] != K[1, 1]


def test_the_package_offers_the_call_as_gsplat_does():
    import masksplat

    assert masksplat.rasterization is rasterization
