# SPDX-License-Identifier: Apache-2.0
"""Projection on the GPU, its gradient, and the update that is fused with it: launches of `project.cu` and others.

Letters: N Gaussians, B views. Everything is float32 and queued on the launcher's stream; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from masksplat.cpu.body import pack_cameras
from masksplat.cuda import lazy_adam
from masksplat.cuda.launcher import Argument, Launcher
from masksplat.types import (
    NUM_ROW_COLUMNS,
    AdamStep,
    GaussianGradients,
    Gaussians,
    Optimizer,
    ProjectionSettings,
    Splats,
    Statistics,
    Views,
)

CAMERA_SIZE = 28
"""Floats of `Camera` in geometry.cuh: those of masksplat.cpu.geometry, width and height, and three without meaning."""

PROJECT_BLOCK, BACKWARD_BLOCK, ADAM_BLOCK = 128, 64, 256
"""Threads of a block; the first two with one Gaussian each."""

PROJECT_BLOCKS, MOST_ROUNDS = 8192, 8
"""Beyond so many blocks each takes up to so many times PROJECT_BLOCK Gaussians, one after the other."""

ADAM_FACTORS = 7
"""Floats of `AdamFactors` in adam.cuh."""

SMALL = 14
"""Floats of a Gaussian without shN."""

ALIGNMENT = 16
"""Bytes: the kernels read the table in words of so many."""

KERNEL_SUFFIXES = {None: "colours", 0: "degree_0", 1: "degree_1", 2: "degree_2", 3: "degree_3"}


@dataclass(frozen=True)
class ProjectionState:
    """`Splats.state` of the cuda body: the views as the kernels read them, (B, CAMERA_SIZE)."""

    cameras: Tensor


def project(
    launcher: Launcher,
    gaussians: Gaussians,
    views: Views,
    settings: ProjectionSettings,
    *,
    masks: Tensor | None = None,
    ids: Tensor | None = None,
    status: Tensor | None = None,
) -> Splats:
    """Splats of every view, view b in the rows from b * N on, `Splats.counts[b]` of them; see `Body.project`.

    Args:
        status: the body's status words; when an overflow is noted there, no row is caught up and colours are undefined.

    Raises:
        ValueError: tensors of another type than float32, or too few SH coefficients for the degree.
    """
    table = _checked_table(gaussians, settings)
    _check_dtype("masks", masks, torch.float32)
    _check_dtype("ids", ids, torch.int64)
    num_gaussians, num_views, like = len(gaussians), len(views), table[0]
    capacity = num_views * num_gaussians
    cameras, counts = _cameras_and_counts(launcher, views)
    empty, device = torch.empty, like.device
    splats = Splats(
        rows=empty((capacity, NUM_ROW_COLUMNS), dtype=torch.float32, device=device),
        depths=empty(capacity, dtype=torch.float32, device=device),
        ids=empty(capacity, dtype=torch.int64, device=device),
        gaussians=empty(capacity, dtype=torch.int32, device=device),
        boxes=empty((capacity, 4), dtype=torch.int32, device=device),
        view_offsets=torch.tensor([view * num_gaussians for view in range(num_views + 1)]),
        slots=empty((num_views, num_gaussians), dtype=torch.int32, device=device),
        state=ProjectionState(cameras),
        counts=counts,
    )
    stride = 3 * gaussians.shN.shape[1]
    uses_harmonics = settings.sh_degree is not None and settings.sh_degree > 0
    lazy = gaussians.lazy if uses_harmonics else None
    kernel_degree = settings.sh_degree if lazy is None else 0  # rows that are behind are coloured afterwards
    uses_harmonics = uses_harmonics and lazy is None
    shared_floats = max(stride if uses_harmonics else 0, NUM_ROW_COLUMNS)  # of each thread: coefficients, then its row
    launcher(
        f"project.project_{KERNEL_SUFFIXES[kernel_degree]}", _project_blocks(num_gaussians), PROJECT_BLOCK,
        *table, masks, ids, cameras, np.int32(num_gaussians), np.int32(num_views),
        np.int32(stride), np.float32(settings.near_plane), np.float32(settings.far_plane), *_flags(settings),
        splats.rows, splats.depths, splats.ids, splats.gaussians, splats.boxes, splats.slots, counts,
        shared_bytes=4 * PROJECT_BLOCK * shared_floats,
    )  # fmt: skip
    if lazy is not None:
        lazy_adam.colour(launcher, lazy, gaussians, settings, cameras, splats, status)
    return splats


def project_backward(
    launcher: Launcher,
    gaussians: Gaussians,
    views: Views,
    settings: ProjectionSettings,
    splats: Splats,
    d_rows: Tensor,
) -> GaussianGradients:
    """Gradients of the parameters and masks, summed over views; see `Body.project_backward`."""
    table = _checked_table(gaussians, settings)
    gradients = GaussianGradients(*(torch.empty_like(tensor) for tensor in (*table, table[3])))
    launcher(
        f"project_backward.gradients_{KERNEL_SUFFIXES[settings.sh_degree]}", *_backward_extents(gaussians),
        *table, *gradients[:-1], *_backward_inputs(launcher, gaussians, views, settings, splats, d_rows),
        gradients.masks, shared_bytes=_backward_shared_bytes(gaussians, views),
    )  # fmt: skip
    return gradients


def project_backward_update(
    launcher: Launcher,
    gaussians: Gaussians,
    views: Views,
    settings: ProjectionSettings,
    splats: Splats,
    d_rows: Tensor,
    *,
    optimizer: Optimizer,
    statistics: Statistics,
    gradient_scale: float = 1.0,
    status: Tensor | None = None,
) -> Tensor:
    """`project_backward`, Adam and the densify statistics in one kernel; see `Body.project_backward_update`.

    Args:
        status: the body's status words; when an overflow is noted there, nothing is changed and the result undefined.

    Raises:
        ValueError: as `project`, and for parameters that could not be updated in place.
    """
    table = _checked_table(gaussians, settings, is_updated=True)
    check_in_place("a moment", *optimizer.exp_avg, *optimizer.exp_avg_sq)
    _check_dtype("grad_norm_sum", statistics.grad_norm_sum, torch.float32)
    _check_dtype("view_count", statistics.view_count, torch.float32)
    d_masks = torch.empty_like(table[3])
    update = optimizer.steps[5].update
    if gaussians.lazy is not None:
        gaussians.lazy.begin(update)
    factors = optimizer.factors
    if factors is None:
        factors = upload(launcher, adam_table(optimizer.steps, gradient_scale))
    launcher(
        f"project_backward.update_{KERNEL_SUFFIXES[settings.sh_degree]}", *_backward_extents(gaussians),
        *table, *optimizer.exp_avg, *optimizer.exp_avg_sq, factors,
        *_backward_inputs(launcher, gaussians, views, settings, splats, d_rows),
        statistics.grad_norm_sum, statistics.view_count, d_masks, status, *lazy_adam.of_update(gaussians.lazy, update),
        shared_bytes=_backward_shared_bytes(gaussians, views),
    )  # fmt: skip
    return d_masks


def adam(
    launcher: Launcher,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    *,
    status: Tensor | None = None,
) -> None:
    """One dense Adam update in place, unless an overflow is noted in `status`; see `Body.adam`.

    Raises:
        ValueError: tensors that are not float32, contiguous and aligned to 16 bytes.
    """
    tensors = (param, grad.contiguous(), exp_avg, exp_avg_sq)
    check_in_place("Adam", *tensors)
    num_words = -(-param.numel() // 4)
    factors = (np.float32(value) for value in adam_factors(step))
    launcher(
        "adam.update", -(-num_words // ADAM_BLOCK), ADAM_BLOCK, *(tensor.detach() for tensor in tensors),
        np.int64(param.numel()), *factors, np.float32(step.drift), status,
    )  # fmt: skip


def adam_factors(step: AdamStep) -> tuple[float, float, float, float, float]:
    """Return (beta1, beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps), as `AdamFactors` in adam.cuh."""
    rate = step.learning_rate / (1.0 - step.beta1**step.update)
    return step.beta1, step.beta2, rate, (1.0 - step.beta2**step.update) ** -0.5, step.eps


def adam_table(steps: Sequence[AdamStep], gradient_scale: float) -> np.ndarray:
    """What the update kernel reads of the steps: (6, ADAM_FACTORS) float32, as `AdamFactors` in adam.cuh."""
    return np.array([(*adam_factors(step), gradient_scale, step.drift) for step in steps], np.float32)


def _project_blocks(num_gaussians: int) -> int:
    blocks = -(-num_gaussians // PROJECT_BLOCK)
    return -(-blocks // min(max(blocks // PROJECT_BLOCKS, 1), MOST_ROUNDS))


def upload(launcher: Launcher, array: np.ndarray) -> Tensor:
    """Copy of a small host array on the launcher's device, without waiting for it."""
    host = torch.from_numpy(array)
    if launcher.device.type != "cuda":
        return host
    # The caching host allocator keeps pinned memory until the copy is over.
    return host.pin_memory().to(launcher.device, non_blocking=True)


def _cameras_and_counts(launcher: Launcher, views: Views) -> tuple[Tensor, Tensor]:
    """(B, CAMERA_SIZE) cameras and (B,) int32 zeros, side by side: one copy from the host, or none."""
    num_views = len(views)
    if views.viewmats.device == launcher.device and launcher.device.type == "cuda":
        buffer = torch.empty(num_views * (CAMERA_SIZE + 1), device=launcher.device)
    else:
        buffer = upload(launcher, _packed_on_host(views))
    cameras = buffer[: num_views * CAMERA_SIZE].view(num_views, CAMERA_SIZE)
    counts = buffer[num_views * CAMERA_SIZE :].view(torch.int32)
    if views.viewmats.device == launcher.device and launcher.device.type == "cuda":
        pack_on_device(launcher, views, cameras, counts)
    return cameras, counts


def _packed_on_host(views: Views) -> np.ndarray:
    """The cameras, one after the other, and B zeros."""
    host = Views(views.viewmats.cpu(), views.intrinsics.cpu(), views.sizes)
    used = np.concatenate([pack_cameras(host, np.float32), np.array(views.sizes, np.float32)], axis=1)
    cameras = np.pad(used, ((0, 0), (0, CAMERA_SIZE - used.shape[1])))
    return np.concatenate([cameras.reshape(-1), np.zeros(len(views), np.float32)])


def pack_on_device(launcher: Launcher, views: Views, cameras: Tensor, counts: Tensor) -> None:
    """Write cameras (B, CAMERA_SIZE) from views that are on the device, and zeros to `counts` (B,) int32.

    Raises:
        ValueError: views that are not float32.
    """
    if views.viewmats.dtype != torch.float32 or views.intrinsics.dtype != torch.float32:
        raise ValueError(f"views on the device must be float32; found {views.viewmats.dtype}.")
    viewmats, intrinsics, first = views.viewmats.contiguous(), views.intrinsics.contiguous(), 0
    for (width, height), group in groupby(views.sizes):
        count = len(list(group))
        launcher(
            "project.pack_cameras", -(-count // 32), 32, viewmats, intrinsics, np.int32(first), np.int32(count),
            np.int32(width), np.int32(height), cameras, counts,
        )  # fmt: skip
        first += count


def _flags(settings: ProjectionSettings) -> tuple[np.float32, np.int32, np.int32]:
    """eps2d, is_final, is_antialiased: what forward and backward both take."""
    return np.float32(settings.eps2d), np.int32(settings.activated), np.int32(settings.antialiased)


def _backward_extents(gaussians: Gaussians) -> tuple[int, int]:
    return -(-len(gaussians) // BACKWARD_BLOCK), BACKWARD_BLOCK


def _backward_shared_bytes(gaussians: Gaussians, views: Views) -> int:
    """Small gradients, coefficients and, unless they may take their place, the coefficients' gradients."""
    stride = 3 * gaussians.shN.shape[1]
    return 4 * BACKWARD_BLOCK * (SMALL + stride * (2 if len(views) > 1 else 1))


def _backward_inputs(
    launcher: Launcher,
    gaussians: Gaussians,
    views: Views,
    settings: ProjectionSettings,
    splats: Splats,
    d_rows: Tensor,
) -> Sequence[Argument]:
    """The arguments that both backward kernels share, from `cameras` to `is_antialiased`."""
    if d_rows.dtype != torch.float32 or d_rows.shape != splats.rows.shape:
        raise ValueError(
            f"d_rows must be float32 {tuple(splats.rows.shape)}; found {d_rows.dtype} {tuple(d_rows.shape)}."
        )
    state = splats.state
    cameras = state.cameras if isinstance(state, ProjectionState) else _cameras_and_counts(launcher, views)[0]
    counts = (np.int32(len(gaussians)), np.int32(len(views)), np.int32(3 * gaussians.shN.shape[1]))
    return (cameras, splats.slots, d_rows, *counts, *_flags(settings))


def _checked_table(
    gaussians: Gaussians, settings: ProjectionSettings, *, is_updated: bool = False
) -> tuple[Tensor, ...]:
    """The six tensors as the kernels take them; copies where need be, unless they are updated."""
    if settings.sh_degree not in KERNEL_SUFFIXES:
        raise ValueError(f"sh_degree is {settings.sh_degree}; expected None or 0 to 3.")
    if settings.sh_degree is not None and gaussians.shN.shape[1] < (settings.sh_degree + 1) ** 2 - 1:
        raise ValueError(
            f"shN holds {gaussians.shN.shape[1]} coefficients; degree {settings.sh_degree} needs "
            f"{(settings.sh_degree + 1) ** 2 - 1}."
        )
    named = {
        "means": gaussians.means, "quats": gaussians.quats, "scales": gaussians.scales,
        "opacities": gaussians.opacities, "sh0": gaussians.sh0, "shN": gaussians.shN,
    }  # fmt: skip
    if is_updated:
        for name, tensor in named.items():
            check_in_place(name, tensor)
        return tuple(named.values())
    return tuple(_readable(name, tensor) for name, tensor in named.items())


def _check_dtype(name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    if tensor is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; the cuda body takes {dtype}.")


def _readable(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} is {tensor.dtype}; the cuda body computes in float32.")
    tensor = (tensor.detach() if tensor.requires_grad else tensor).contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def check_in_place(name: str, *tensors: Tensor) -> None:
    """Raises: ValueError for tensors that the kernels could not update in place."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{name} is updated in place and must be float32, contiguous and begin at a multiple of {ALIGNMENT} "
                f"bytes; found {tensor.dtype}, strides {tensor.stride()}, address modulo {ALIGNMENT} = "
                f"{tensor.data_ptr() % ALIGNMENT}."
            )
