# SPDX-License-Identifier: Apache-2.0
"""`masksplat.rasterization` takes every argument of gsplat 1.5.3's: does what it means, or refuses it by name."""

from __future__ import annotations

import enum
import inspect
import math
from pathlib import Path

import pytest
import torch

from masksplat.rasterization import rasterization
from test_rasterization_api import BODIES, api_scene, one_gaussian

OPTIONS_OF_GSPLAT = {
    "near_plane": 0.01,
    "far_plane": 1e10,
    "radius_clip": 0.0,
    "eps2d": 0.3,
    "sh_degree": None,
    "packed": True,
    "tile_size": 16,
    "backgrounds": None,
    "render_mode": "RGB",
    "sparse_grad": False,
    "absgrad": False,
    "rasterize_mode": "classic",
    "channel_chunk": 32,
    "distributed": False,
    "camera_model": "pinhole",
    "segmented": False,
    "covars": None,
    "with_ut": False,
    "with_eval3d": False,
    "radial_coeffs": None,
    "tangential_coeffs": None,
    "thin_prism_coeffs": None,
    "ftheta_coeffs": None,
    "rolling_shutter": "GLOBAL",
    "viewmats_rs": None,
}
"""The optional arguments of gsplat 1.5.3's `rasterization`, in their order; rolling_shutter's is an enumeration's."""


class ShutterOfGsplat(enum.Enum):
    """What gsplat's rolling_shutter looks like; gsplat itself is not needed to accept its members."""

    ROLLING_TOP_TO_BOTTOM = 0
    GLOBAL = 4


def test_the_signature_is_gsplats():
    """Names, order and defaults, so that calls by position mean the same; ours come after, by name only."""
    parameters = inspect.signature(rasterization).parameters
    required = ["means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "width", "height"]
    own = ["masks", "backend"]
    assert list(parameters) == [*required, *OPTIONS_OF_GSPLAT, *own]
    assert {name: parameters[name].default for name in OPTIONS_OF_GSPLAT} == OPTIONS_OF_GSPLAT
    assert all(parameters[name].default is inspect.Parameter.empty for name in required)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)


@BODIES
@pytest.mark.parametrize(
    "options",
    [OPTIONS_OF_GSPLAT, {"rolling_shutter": ShutterOfGsplat.GLOBAL}, {"segmented": True}, {"channel_chunk": 1}],
    ids=["defaults", "shutter", "segmented", "chunk"],
)
def test_options_that_change_no_image(backend, options):
    arguments, masks = api_scene()
    plain = rasterization(**arguments, masks=masks, backend=backend)[0]
    assert torch.equal(rasterization(**(options | arguments), masks=masks, backend=backend)[0], plain)


@BODIES
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("radius", [4.0, 5.5, 1e6])
def test_radius_clip_is_absence_of_small_splats(backend, packed, radius):
    """Images, meta and gradients are those of the scene without them; a splat as large as the limit is one of them."""
    arguments, masks = api_scene(30, num_views=1)
    arguments |= {"masks": masks, "packed": packed, "backend": backend, "absgrad": True}
    everything = rasterization(**(arguments | {"packed": True}))[2]
    small = everything["gaussian_ids"][(everything["radii"] <= radius).all(dim=-1)]
    assert len(small) > 0 and (everything["radii"].amax(dim=-1) == 4).any()
    stays = torch.ones(30, dtype=torch.bool)
    stays[small] = False
    names = ("means", "quats", "scales", "opacities", "colors", "masks")

    def drawn(rows, **options):
        leaves = {name: arguments[name][rows].clone().requires_grad_() for name in names}
        image, _, meta = rasterization(**(arguments | leaves | options))
        image.square().sum().backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        return image, meta, gradients | {"absgrad": meta["means2d"].absgrad}

    clipped, clipped_meta, gradients = drawn(slice(None), radius_clip=radius)
    without, without_meta, expected = drawn(stays)
    assert torch.equal(clipped, without)
    for name in ("means2d", "conics", "opacities", "depths", "radii"):
        found = clipped_meta[name] if packed else clipped_meta[name][:, stays]
        assert torch.equal(found, without_meta[name]), name
    if packed:
        assert not stays.logical_not()[clipped_meta["gaussian_ids"]].any()
    for name in names:
        torch.testing.assert_close(gradients[name][stays], expected[name])
        assert not gradients[name][~stays].any(), name
    found = gradients["absgrad"] if packed else gradients["absgrad"][:, stays]
    torch.testing.assert_close(found, expected["absgrad"])


@BODIES
def test_radius_clip_looks_at_each_view(backend):
    """Small from afar, large from near: drawn in one of two views, which share one Gaussian."""
    arguments = one_gaussian((0.0, 0.0, 2.0), scale=0.2)
    far = torch.eye(4, dtype=torch.float64)
    far[2, 3] = 20.0
    arguments |= {"viewmats": torch.stack((far, arguments["viewmats"][0])), "Ks": arguments["Ks"].expand(2, 3, 3)}
    radii = rasterization(**arguments, backend=backend)[2]["radii"].amax(dim=-1).tolist()
    assert radii[0] < radii[1]
    _, alphas, meta = rasterization(**arguments, radius_clip=radii[0], backend=backend)
    assert meta["camera_ids"].tolist() == [1] and alphas[0].max() == 0 and alphas[1].max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_radius_clip_on_a_gpu(packed):
    """The same splats as on the CPU, in value and gradient."""
    arguments, masks = api_scene(40, dtype=torch.float32)
    found = {}
    for device in ("cpu", "cuda"):
        leaves = {name: each.to(device) for name, each in arguments.items() if isinstance(each, torch.Tensor)}
        leaves["means"].requires_grad_()
        options = {"masks": masks.to(device), "packed": packed, "radius_clip": 5.5, "absgrad": True}
        image, _, meta = rasterization(**(arguments | leaves | options))
        image.square().sum().backward()
        found[device] = (image, leaves["means"].grad, meta["means2d"].absgrad, meta["radii"])
    everything = rasterization(**arguments, masks=masks)[2]["radii"]
    assert 0 < int((found["cuda"][3] > 5.5).any(dim=-1).sum()) < len(everything)
    for there, here in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": 8}, "tile_size is 8; masksplat supports 16 only. Leave it out"),
        ({"sparse_grad": True}, "sparse_grad is True; masksplat supports False only. .*to_sparse"),
        ({"distributed": True}, "distributed is True; masksplat supports False only. .*torchrun"),
        ({"camera_model": "fisheye"}, "camera_model is 'fisheye'; masksplat supports 'pinhole' only. Undistort"),
        ({"camera_model": "ortho"}, "camera_model is 'ortho'.*no counterpart"),
        ({"covars": torch.zeros(40, 3, 3)}, "covars is a Tensor; masksplat supports None only. Pass quats and scales"),
        ({"covars": torch.zeros(40, 3, 3), "quats": None, "scales": None}, "covars is a Tensor"),
        ({"with_ut": True}, "with_ut is True; masksplat supports False only"),
        ({"with_eval3d": True}, "with_eval3d is True; masksplat supports False only"),
        ({"radial_coeffs": torch.zeros(2, 6)}, "radial_coeffs is a Tensor; masksplat supports None only. Undistort"),
        ({"tangential_coeffs": torch.zeros(2, 2)}, "tangential_coeffs is a Tensor"),
        ({"thin_prism_coeffs": torch.zeros(2, 4)}, "thin_prism_coeffs is a Tensor"),
        ({"ftheta_coeffs": object()}, "ftheta_coeffs is a object; masksplat supports None only"),
        (
            {"rolling_shutter": ShutterOfGsplat.ROLLING_TOP_TO_BOTTOM},
            "rolling_shutter is 'ROLLING_TOP_TO_BOTTOM'; masksplat supports 'GLOBAL' only",
        ),
        ({"viewmats_rs": torch.zeros(2, 4, 4)}, "viewmats_rs is a Tensor; masksplat supports None only"),
        ({"rasterize_mode": "fast"}, "rasterize_mode is 'fast'; expected one of classic, antialiased"),
        ({"radius_clip": -1.0}, "radius_clip is -1.0; expected a number of pixels, 0 or more"),
        ({"radius_clip": math.nan}, "radius_clip is nan; expected a number"),
        ({"radius_clip": None}, "radius_clip is None; expected a number"),
        ({"channel_chunk": 0}, "channel_chunk is 0; expected an integer, 1 or more"),
    ],
)
def test_what_gsplat_alone_can_do_is_refused_by_name(changes, message):
    arguments, _ = api_scene()
    with pytest.raises(ValueError, match=message):
        rasterization(**(arguments | changes))


def test_the_readme_has_every_argument_of_gsplat():
    """One row of its table for each, in any grouping."""
    readme = (Path(__file__).parent.parent / "submodules/masksplat/README.md").read_text(encoding="utf-8")
    first_cells = " ".join(line.split("|")[1] for line in readme.splitlines() if line.startswith("| `"))
    assert {name for name in OPTIONS_OF_GSPLAT if f"`{name}`" not in first_cells} == set()
