# SPDX-License-Identifier: Apache-2.0
"""`rasterization`: gsplat's call with differentiable per-Gaussian `masks`, on any body of `masksplat.ops`.

Names, order, defaults, shapes, layouts and quaternion order are those of gsplat 1.5.3. What masksplat has in one form
only is refused by name (`masksplat.gsplat_arguments`). What differs in the images: alpha is capped at 0.99.

Legend: N Gaussians, C cameras, M packed splats (visible (camera, Gaussian) pairs), D colour channels, K SH bases.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from masksplat.gsplat_arguments import check_gsplat_arguments
from masksplat.ops import Body, get_body
from masksplat.types import (
    ALPHA_MIN,
    SLOT_NO_PIXEL,
    TILE,
    Frame,
    Gaussians,
    ImageGradient,
    ProjectionSettings,
    Splats,
    Views,
    compact,
)

SMALLEST_ALPHA = 1e-10
"""Expected depth divides by at least this (gsplat)."""

_CHANNELS = 3
"""Channels of one compositing pass; more channels take more passes."""


class _Inputs(NamedTuple):
    """Checked inputs of `rasterization`."""

    tensors: dict[str, Tensor]
    views: Views
    sh_degree: int | None
    render_mode: str


class _Drawn(NamedTuple):
    """What the images were composited of: the splats, what each gives to the channels (M, D), a frame of each view."""

    splats: Splats
    colours: Tensor
    frames: list[Frame]


class _Project(torch.autograd.Function):
    """The body's `project` / `project_backward` pair. Gives rows (M, 10) and the splats (not differentiable)."""

    @staticmethod
    def forward(
        ctx: Any, body: Body, views: Views, settings: ProjectionSettings, masks: Tensor, *parameters: Tensor
    ) -> Any:
        gaussians = Gaussians(*(parameter.detach() for parameter in parameters))
        splats = compact(body.project(gaussians, views, settings, masks=masks.detach()))
        splats.rows = splats.rows.detach()
        ctx.call = (body, views, settings, gaussians, splats)
        return splats.rows.clone(), splats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_rows: Tensor, _: None) -> Any:
        body, views, settings, gaussians, splats = ctx.call
        *d_parameters, d_masks = body.project_backward(gaussians, views, settings, splats, d_rows.contiguous())
        return None, None, None, d_masks, *d_parameters


class _Rasterize(torch.autograd.Function):
    """The body's `rasterize` / `rasterize_backward` pair for one view: rows (M, 10) to rgb, transmittance, frame."""

    @staticmethod
    def forward(ctx: Any, body: Body, splats: Splats, view: int, rows: Tensor, background: Tensor, size: Any) -> Any:
        splats = dataclasses.replace(splats, rows=rows.detach().contiguous())
        frame = body.rasterize(splats, view, size, background.detach())
        ctx.call = (body, splats, frame)
        return frame.rgb.clone(), frame.transmittance.clone(), frame

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_rgb: Tensor, d_transmittance: Tensor, _: None) -> Any:
        body, splats, frame = ctx.call
        d_rows = torch.zeros_like(splats.rows)
        body.rasterize_backward(splats, frame, d_rgb.contiguous(), d_rows, d_transmittance=d_transmittance.contiguous())
        d_background = torch.einsum("hwc,hw->c", d_rgb, frame.transmittance)
        return None, None, None, d_rows, d_background, None


class _NoteAbsoluteGradients(torch.autograd.Function):
    """Images (C, h, w, D) and alphas as they are; their backward leaves `absgrad` on meta["means2d"] (AbsGS).

    All channels together: the passes of `_Rasterize` see three each, and sizes of sums are no sums of sizes.
    """

    @staticmethod
    def forward(ctx: Any, body: Body, drawn: _Drawn, meta: dict[str, Any], images: Tensor, alphas: Tensor) -> Any:
        ctx.call = (body, drawn, meta["means2d"], images.detach())
        return images.view_as(images), alphas.view_as(alphas)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_images: Tensor, d_alphas: Tensor) -> Any:
        body, drawn, means2d, images = ctx.call
        parts = []
        for frame, image, d_image, d_alpha in zip(drawn.frames, images, d_images, d_alphas, strict=True):
            behind = (d_image * image).sum(-1) - d_alpha[..., 0] * frame.transmittance
            colours = drawn.colours[slice(*drawn.splats.view_range(frame.view))]
            gradient = ImageGradient(colours.contiguous(), d_image.contiguous(), behind)
            parts.append(body.absolute_gradients(drawn.splats, frame, gradient))
        sums = torch.cat(parts)
        if means2d.ndim == 3:
            place = (_camera_ids(drawn.splats), drawn.splats.gaussians.long())
            sums = sums.new_zeros(means2d.shape).index_put(place, sums)
        means2d.absgrad = sums
        return None, None, None, d_images, d_alphas


def rasterization(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int,
    near_plane: float = 0.01, far_plane: float = 1e10, radius_clip: float = 0.0, eps2d: float = 0.3,
    sh_degree: int | None = None, packed: bool = True, tile_size: int = TILE, backgrounds: Tensor | None = None,
    render_mode: str = "RGB", sparse_grad: bool = False, absgrad: bool = False, rasterize_mode: str = "classic",
    channel_chunk: int = 32, distributed: bool = False, camera_model: str = "pinhole", segmented: bool = False,
    covars: None = None, with_ut: bool = False, with_eval3d: bool = False,
    radial_coeffs: None = None, tangential_coeffs: None = None, thin_prism_coeffs: None = None,
    ftheta_coeffs: None = None, rolling_shutter: Any = "GLOBAL", viewmats_rs: None = None,
    *, masks: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """Images, alphas and meta of N masked Gaussians seen by C pinhole cameras; differentiable by autograd.

    Args:
        means, quats, scales, opacities: (N, 3) world; (N, 4) w, x, y, z; (N, 3) world, not log; (N,) in [0, 1].
        colors: (N, D) or (C, N, D); with `sh_degree`, 0 to 3, the coefficients (N, K, 3), K >= (sh_degree + 1)^2.
        viewmats, Ks: (C, 4, 4) world to camera (x right, y down, z forward); (C, 3, 3) in pixels. No gradient.
        width, height: pixels.
        near_plane, far_plane: world units; a Gaussian is drawn when the camera z of its mean is between them.
        radius_clip: pixels; a splat whose radii, as meta has them, are both at most this is not drawn. 0: off.
        eps2d: pixels^2, added to both variances of a splat.
        packed: whether meta holds (M, ...) rows with camera_ids and gaussian_ids, or (C, N, ...) with zeros.
        backgrounds: (C, D), default black.
        render_mode: "RGB", accumulated depth "D", expected depth "ED", or "RGB+D", "RGB+ED" (depth comes last).
        absgrad: whether a backward leaves meta["means2d"].absgrad (AbsGS): in the layout of its gradient, the sums over
            pixels of each pixel's |dL/d mean2d|, of the last backward.
        rasterize_mode: "classic", or "antialiased": opacities times sqrt(det cov2d / det(cov2d + eps2d I)).
        channel_chunk, segmented: without effect: how gsplat chunks and sorts, which changes no image.
        masks: (N,) in [0, 1], default 1; a masked Gaussian composites with alpha m alpha. Not gsplat's.
        backend: "auto" (by the device of `means`), "cuda", "cpu" or "reference". Not gsplat's.
        The others, tile_size to viewmats_rs: gsplat's default only; rolling_shutter also gsplat's own GLOBAL.

    Returns:
        images (C, height, width, channels), alphas (C, height, width, 1) = 1 - transmittance, and meta as gsplat's:
        means2d (pixels; call retain_grad on it), radii, depths, conics, opacities, width, height, n_cameras, ...

    Raises:
        ValueError: the argument, what was given, what is supported, and what to do for what is not.
    """
    check_gsplat_arguments(locals())
    tensors = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    optional = {"masks": masks, "backgrounds": backgrounds}
    tensors |= {"viewmats": viewmats, "Ks": Ks, **{name: each for name, each in optional.items() if each is not None}}
    inputs = _check_inputs(tensors, int(width), int(height), sh_degree, render_mode)
    is_antialiased = rasterize_mode == "antialiased"
    settings = ProjectionSettings(sh_degree, near_plane, far_plane, eps2d, is_antialiased, activated=True)
    return _draw(_body(backend, means.device), inputs, settings, radius_clip, packed=packed, absgrad=absgrad)


def _draw(
    body: Body, inputs: _Inputs, settings: ProjectionSettings, radius_clip: float, *, packed: bool, absgrad: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What `rasterization` returns, of checked inputs."""
    rows, splats = _project(body, inputs, settings)
    if radius_clip > 0.0:
        rows, splats = _larger_than(radius_clip, rows, splats)
    meta, rows = _describe(rows, splats, inputs, packed)
    channels = _splat_channels(rows, splats, inputs)
    images, alphas, frames = _render(body, splats, rows, channels, inputs)
    if absgrad:
        drawn = _Drawn(splats, channels.detach(), frames)
        images, alphas = _NoteAbsoluteGradients.apply(body, drawn, meta, images, alphas)
    return _with_expected_depth(images, alphas, inputs.render_mode), alphas, meta


def _body(backend: str, device: torch.device) -> Body:
    """The body for tensors of `device`; that of a GPU is kept, for it remembers how large its buffers must be."""
    is_cuda = backend in ("auto", "cuda") and device.type == "cuda"
    return _cuda_body(str(device)) if is_cuda else get_body(backend)


@functools.cache
def _cuda_body(device: str) -> Body:
    return get_body("cuda", device=device)


def _expect(name: str, tensor: Tensor, *shapes: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the tensor has one of the shapes; a string stands for any size."""
    for shape in shapes:
        if tensor.ndim == len(shape) and all(
            isinstance(want, str) or size == want for size, want in zip(tensor.shape, shape, strict=True)
        ):
            return
    wanted = " or ".join("[" + ", ".join(map(str, shape)) + "]" for shape in shapes)
    raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {wanted}.")


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    means = tensors["means"]
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means is {means.dtype}; expected torch.float32 or torch.float64.")
    for name, tensor in tensors.items():
        if tensor.dtype != means.dtype or tensor.device != means.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected {means.dtype} on {means.device}, as means."
            )
    for name in ("viewmats", "Ks"):
        if tensors[name].requires_grad:
            raise ValueError(f"{name} requires a gradient, which masksplat does not compute; pass {name}.detach().")


def _check_inputs(
    tensors: dict[str, Tensor], width: int, height: int, sh_degree: int | None, render_mode: str
) -> _Inputs:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor.")
    if width < 1 or height < 1:
        raise ValueError(f"the image is {width} x {height} pixels; expected at least 1 x 1.")
    _expect("means", tensors["means"], ("N", 3))
    _expect("viewmats", tensors["viewmats"], ("C", 4, 4))
    count, cameras = tensors["means"].shape[0], tensors["viewmats"].shape[0]
    _expect("quats", tensors["quats"], (count, 4))
    _expect("scales", tensors["scales"], (count, 3))
    _expect("opacities", tensors["opacities"], (count,))
    _expect("Ks", tensors["Ks"], (cameras, 3, 3))
    if cameras < 1:
        raise ValueError("viewmats holds no camera; expected at least one.")
    if sh_degree is None:
        _expect("colors", tensors["colors"], (count, "D"), (cameras, count, "D"))
        num_channels = tensors["colors"].shape[-1]
    else:
        _check_harmonics(tensors["colors"], count, sh_degree)
        num_channels = 3
    if "masks" in tensors:
        _expect("masks", tensors["masks"], (count,))
    if "backgrounds" in tensors:
        _expect("backgrounds", tensors["backgrounds"], (cameras, num_channels))
    _check_kinds(tensors)
    views = Views(tensors["viewmats"], tensors["Ks"], ((width, height),) * cameras)
    return _Inputs(tensors, views, sh_degree, render_mode)


def _check_harmonics(colors: Tensor, count: int, sh_degree: int) -> None:
    if not 0 <= sh_degree <= 3:
        raise ValueError(f"sh_degree is {sh_degree}; expected None or 0 to 3.")
    _expect("colors", colors, (count, "K", 3))
    if colors.shape[1] < (sh_degree + 1) ** 2:
        raise ValueError(
            f"colors holds {colors.shape[1]} SH coefficients; sh_degree {sh_degree} needs {(sh_degree + 1) ** 2}."
        )


def _project(body: Body, inputs: _Inputs, settings: ProjectionSettings) -> tuple[Tensor, Splats]:
    tensors = inputs.tensors
    means, opacities = tensors["means"], tensors["opacities"]
    masks = tensors.get("masks", torch.ones_like(opacities))
    if inputs.sh_degree is None:
        sh0, shN = torch.zeros_like(means), means.new_zeros(len(means), 0, 3)
    else:
        used = (inputs.sh_degree + 1) ** 2
        sh0, shN = tensors["colors"][:, 0], tensors["colors"][:, 1:used]
    parameters = [means, tensors["quats"], tensors["scales"], opacities, sh0, shN]
    return _Project.apply(body, inputs.views, settings, masks, *(parameter.contiguous() for parameter in parameters))


def _camera_ids(splats: Splats) -> Tensor:
    """(M,) int64 view of each packed row."""
    counts = (splats.view_offsets[1:] - splats.view_offsets[:-1]).to(splats.rows.device)
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _radii(rows: Tensor) -> Tensor:
    """(M, 2) int32 half extents in pixels of the ellipse where alpha can reach 1/255, rounded up."""
    a, b, c, opacity = rows[:, 2:6].detach().unbind(-1)
    t = 2.0 * torch.log(opacity / ALPHA_MIN).clamp(min=0.0)
    variances = torch.stack((c, a), dim=-1) / (a * c - b * b)[:, None]
    return torch.ceil(torch.sqrt(t[:, None] * variances)).to(torch.int32)


def _larger_than(radius: float, rows: Tensor, splats: Splats) -> tuple[Tensor, Splats]:
    """The rows and splats that reach further than `radius` pixels along x or y; the others get zero gradients."""
    keep = (_radii(rows) > radius).any(dim=-1)
    places = torch.cat((keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)))  # (M + 1,) how many before each are kept
    used = splats.slots.long().clamp(min=0)
    is_drawn = (splats.slots >= 0) & keep[used] if len(keep) else torch.zeros_like(splats.slots, dtype=torch.bool)
    dropped = torch.where(splats.slots >= 0, SLOT_NO_PIXEL, splats.slots)
    kept = Splats(
        rows=splats.rows[keep],
        depths=splats.depths[keep],
        ids=splats.ids[keep],
        gaussians=splats.gaussians[keep],
        boxes=splats.boxes[keep],
        view_offsets=places.cpu()[splats.view_offsets],  # host sync: counts
        slots=torch.where(is_drawn, places[used].to(splats.slots.dtype), dropped),
    )
    return rows[keep], kept


def _describe(rows: Tensor, splats: Splats, inputs: _Inputs, packed: bool) -> tuple[dict[str, Any], Tensor]:
    """Gsplat's meta, and the rows again with their means taken through meta["means2d"]."""
    camera_ids, gaussian_ids = _camera_ids(splats), splats.gaussians.long()
    width, height = inputs.views.sizes[0]
    per_splat = {
        "means2d": rows[:, 0:2],
        "conics": rows[:, 2:5],
        "opacities": rows[:, 5],
        "depths": splats.depths.detach(),
        "radii": _radii(rows),
    }
    if not packed:
        shape = (len(inputs.views), inputs.tensors["means"].shape[0])
        place = (camera_ids, gaussian_ids)
        per_splat = {
            name: values.new_zeros(*shape, *values.shape[1:]).index_put(place, values)
            for name, values in per_splat.items()
        }
    means2d = per_splat["means2d"] if packed else per_splat["means2d"][camera_ids, gaussian_ids]
    meta: dict[str, Any] = dict(per_splat)
    if packed:
        meta |= {"camera_ids": camera_ids, "gaussian_ids": gaussian_ids}
    meta |= {"width": width, "height": height, "n_cameras": len(inputs.views), "tile_size": TILE}
    meta |= {"tile_width": -(-width // TILE), "tile_height": -(-height // TILE)}
    return meta, torch.cat((means2d, rows[:, 2:]), dim=1)


def _depths(splats: Splats, camera_ids: Tensor, inputs: _Inputs) -> Tensor:
    """(M, 1) camera z, differentiable in the means."""
    axes = inputs.views.viewmats[camera_ids, 2]
    points = inputs.tensors["means"].index_select(0, splats.gaussians.long())
    return (axes[:, :3] * points).sum(-1, keepdim=True) + axes[:, 3:]


def _splat_channels(rows: Tensor, splats: Splats, inputs: _Inputs) -> Tensor:
    """(M, channels) what each splat contributes to the image's channels."""
    parts, camera_ids = [], _camera_ids(splats)
    if "RGB" in inputs.render_mode:
        colors = inputs.tensors["colors"]
        if inputs.sh_degree is not None:
            parts.append(rows[:, 6:9])
        elif colors.ndim == 3:
            parts.append(colors[camera_ids, splats.gaussians.long()])
        else:
            parts.append(colors.index_select(0, splats.gaussians.long()))
    if "D" in inputs.render_mode:
        parts.append(_depths(splats, camera_ids, inputs))
    return torch.cat(parts, dim=1)


def _backgrounds(inputs: _Inputs, num_channels: int) -> Tensor:
    """(C, channels) backgrounds; black where none was given, and zero for depth."""
    means = inputs.tensors["means"]
    given = inputs.tensors.get("backgrounds")
    if given is None or "RGB" not in inputs.render_mode:
        return means.new_zeros(len(inputs.views), num_channels)
    return F.pad(given, (0, num_channels - given.shape[1]))


def _render(
    body: Body, splats: Splats, rows: Tensor, channels: Tensor, inputs: _Inputs
) -> tuple[Tensor, Tensor, list[Frame]]:
    """Images (C, h, w, channels), alphas (C, h, w, 1) and a frame of each view, three channels a pass."""
    num_channels = channels.shape[1]
    padding = (0, -num_channels % _CHANNELS)
    padded, backgrounds = F.pad(channels, padding), F.pad(_backgrounds(inputs, num_channels), padding)
    images, alphas, frames = [], [], []
    for view, size in enumerate(inputs.views.sizes):
        passes = []
        for first in range(0, padded.shape[1], _CHANNELS):
            part = slice(first, first + _CHANNELS)
            painted = torch.cat((rows[:, :6], padded[:, part], rows[:, 9:]), dim=1)
            passes.append(_Rasterize.apply(body, splats, view, painted, backgrounds[view, part], size))
        images.append(torch.cat([rgb for rgb, _, _ in passes], dim=-1)[..., :num_channels])
        alphas.append(1.0 - passes[0][1][..., None])
        frames.append(passes[0][2])
    return torch.stack(images), torch.stack(alphas), frames


def _with_expected_depth(images: Tensor, alphas: Tensor, render_mode: str) -> Tensor:
    """The images, with accumulated depth divided by alpha where the mode asks for expected depth."""
    if not render_mode.endswith("ED"):
        return images
    return torch.cat((images[..., :-1], images[..., -1:] / alphas.clamp(min=SMALLEST_ALPHA)), dim=-1)
