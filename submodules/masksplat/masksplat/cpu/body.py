# SPDX-License-Identifier: Apache-2.0
"""The cpu body of masksplat: torch tensors in and out, numba kernels in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masksplat.cpu import photometric as loss_kernels
from masksplat.cpu.absolute import absolute_tiles, sum_pairs
from masksplat.cpu.adam import adam_rows
from masksplat.cpu.binning import TileLists, bin_splats
from masksplat.cpu.geometry import CAMERA_SIZE
from masksplat.cpu.lazy_adam import BLOCK, LEG, NUM_LEG_COLUMNS, catch_up_rows, write_legs
from masksplat.cpu.project import compact_rows, project_rows
from masksplat.cpu.project_backward import SHN, project_backward_rows
from masksplat.cpu.rasterize import rasterize_tiles
from masksplat.cpu.rasterize_backward import rasterize_backward_tiles, sum_instances
from masksplat.cpu.scores import score_tiles, sum_scores
from masksplat.cpu.threads import ThreadTeam
from masksplat.cpu.tile import tile_constants
from masksplat.cpu.update import update_rows
from masksplat.lazy import CAPACITY, LazyRows
from masksplat.types import (
    NUM_ROW_COLUMNS,
    AdamStep,
    Frame,
    GaussianGradients,
    Gaussians,
    ImageGradient,
    Optimizer,
    PhotometricLoss,
    ProjectionSettings,
    Splats,
    Statistics,
    Views,
)

Array = np.ndarray[Any, Any]

LAZY_BELOW = 0.6
"""Share of the blocks of shN up to which an update leaves those behind that no view draws. A block that
was behind is read twice in the step that draws it, so beyond some share it cannot pay; 0.6 is reasoned, not measured:
views drew a quarter of the blocks, or nearly all."""

TASKS_PER_THREAD = 16
"""Tasks of uneven cost (tiles, rows with few visible Gaussians) are handed out in pieces this small."""


@dataclass
class _FrameState:
    """What the backward needs of a forward: the lists, where each tile's list ended, and the blocks that changed."""

    lists: TileLists
    region: Array
    ends: Array
    covers: Array  # (I,) per list position: the blocks of pixels that the backward has to visit


class CpuBody:
    """numba kernels on `num_threads` threads (default: torch's). float32 and float64; see `masksplat.ops.Body`."""

    name = "cpu"

    def __init__(self, num_threads: int | None = None) -> None:
        self.team = ThreadTeam(num_threads or torch.get_num_threads())
        self.num_tasks = 1 if self.team.num_threads == 1 else TASKS_PER_THREAD * self.team.num_threads

    def project(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        *,
        masks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Splats:
        """See `Body.project`."""
        table = _table_arrays(gaussians)
        num_gaussians, dtype = len(gaussians), table[0].dtype
        mask_array = np.ones(num_gaussians, dtype) if masks is None else _array(masks)
        id_array = np.arange(num_gaussians) if ids is None else _array(ids)
        cameras, late = pack_cameras(views, dtype), _late_rows(gaussians.lazy, dtype)
        slots = np.empty((len(views), num_gaussians), np.int32)
        packed = np.empty((num_gaussians, NUM_ROW_COLUMNS + 1), dtype)
        packed_boxes = np.empty((num_gaussians, 4), np.int32)
        parts, offsets = [], [0]
        for view, size in enumerate(views.sizes):
            counts = np.zeros(self.num_tasks, np.int64)
            self.team.run(
                project_rows, self.num_tasks, table, late, mask_array, cameras[view], np.array(size),
                _flags(settings, gaussians), _limits(settings, dtype), slots[view], packed, packed_boxes, counts,
            )  # fmt: skip
            parts.append(self._compact(id_array, slots[view], packed, packed_boxes, counts, offsets[-1]))
            offsets.append(offsets[-1] + int(counts.sum()))
        merged = [np.concatenate(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True)]
        rows, boxes, depths, row_ids, rows_of = (torch.from_numpy(column) for column in merged)
        return Splats(rows, depths, row_ids, rows_of, boxes, torch.tensor(offsets), torch.from_numpy(slots))

    def _compact(
        self, ids: Array, slots: Array, packed: Array, packed_boxes: Array, counts: Array, base: int
    ) -> tuple[Array, ...]:
        total = int(counts.sum())
        outputs = (
            np.empty((total, NUM_ROW_COLUMNS), packed.dtype),
            np.empty((total, 4), np.int32),
            np.empty(total, packed.dtype),
            np.empty(total, np.int64),
            np.empty(total, np.int32),
        )
        first = np.cumsum(counts) - counts
        self.team.run(compact_rows, self.num_tasks, ids, slots, packed, packed_boxes, first, base, *outputs)
        return outputs

    def project_backward(
        self, gaussians: Gaussians, views: Views, settings: ProjectionSettings, splats: Splats, d_rows: Tensor
    ) -> GaussianGradients:
        """See `Body.project_backward`."""
        table = _table_arrays(gaussians)
        dtype = table[0].dtype
        tensors = (*_tensors_of(gaussians), gaussians.opacities)
        gradients = GaussianGradients(*(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors))
        *attributes, d_masks = map(_flat, gradients)
        self.team.run(
            project_backward_rows, self.num_tasks, table, _cameras_with_size(views, dtype), _limits(settings, dtype),
            _flags(settings, gaussians), _array(splats.slots), _flat(splats.rows), _flat(d_rows),
            tuple(attributes), d_masks,
        )  # fmt: skip
        return gradients

    def project_backward_update(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        splats: Splats,
        d_rows: Tensor,
        *,
        optimizer: Optimizer,
        statistics: Statistics,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """See `Body.project_backward_update`."""
        table = _table_arrays(gaussians)
        dtype = table[0].dtype
        d_masks = np.empty(len(gaussians), dtype)
        factors = np.array([_adam_factors(step, gradient_scale) for step in optimizer.steps], dtype)
        late = _late_rows(gaussians.lazy, dtype)
        is_due = _begin_update(gaussians.lazy, splats, optimizer.steps[SHN].update, factors[SHN])
        self.team.run(
            update_rows, self.num_tasks, table, tuple(map(_flat, optimizer.exp_avg)),
            tuple(map(_flat, optimizer.exp_avg_sq)), late, is_due, factors, _cameras_with_size(views, dtype),
            _limits(settings, dtype), _flags(settings, gaussians), _array(splats.slots), _flat(splats.rows),
            _flat(d_rows), _array(statistics.grad_norm_sum), _array(statistics.view_count), d_masks,
        )  # fmt: skip
        return torch.from_numpy(d_masks)

    def rasterize(
        self,
        splats: Splats,
        view: int,
        size: tuple[int, int],
        background: Tensor,
        *,
        rows: tuple[int, int] | None = None,
        has_backward: bool = True,
    ) -> Frame:
        """See `Body.rasterize`; what the backward needs is small and always kept."""
        width, height = size
        span = rows if rows is not None else (0, height)
        lists, region = self._lists(splats, view, width, span)
        packed, boxes = _view_arrays(splats, view)
        rgb = np.empty((span[1] - span[0], width, 3), packed.dtype)
        transmittance = np.empty(rgb.shape[:2], packed.dtype)
        ends, pairs = np.zeros(lists.num_tiles, np.int64), np.zeros(lists.num_tiles, np.int64)
        covers = np.empty(lists.num_instances, np.uint32)
        self.team.run(
            rasterize_tiles, self.num_tasks, tile_constants(packed.dtype), packed, boxes, lists.footprints,
            lists.tile_offsets, lists.splats, region, _array(background), rgb, transmittance, ends, covers, pairs,
        )  # fmt: skip
        per_row = torch.from_numpy(pairs.reshape(lists.num_rows, lists.num_columns).sum(axis=1))
        state = _FrameState(lists, region, ends, covers)
        return Frame(torch.from_numpy(rgb), torch.from_numpy(transmittance), per_row, view, span, state)

    def _lists(self, splats: Splats, view: int, width: int, span: tuple[int, int]) -> tuple[TileLists, Array]:
        first, last = splats.view_range(view)
        packed, boxes = _view_arrays(splats, view)
        depths, ids = _array(splats.depths)[first:last], _array(splats.ids)[first:last]
        lists = bin_splats(packed, boxes, depths, ids, width=width, pixel_rows=span, team=self.team)
        return lists, np.array([span[0], span[1], lists.num_columns, width], np.int64)

    def rasterize_backward(
        self,
        splats: Splats,
        frame: Frame,
        d_rgb: Tensor,
        d_rows: Tensor,
        *,
        d_transmittance: Tensor | None = None,
        overwrite: bool = False,
    ) -> None:
        """See `Body.rasterize_backward`."""
        state: _FrameState = frame.state
        lists = state.lists
        packed, _ = _view_arrays(splats, frame.view)
        first, last = splats.view_range(frame.view)
        sums = np.empty(lists.num_instances * NUM_ROW_COLUMNS, packed.dtype)
        d_light = np.zeros(frame.transmittance.shape, packed.dtype)
        if d_transmittance is not None:
            d_light = _array(d_transmittance)
        self.team.run(
            rasterize_backward_tiles, self.num_tasks, tile_constants(packed.dtype), packed, lists.tile_offsets,
            lists.splats, lists.instances, state.region, _array(frame.rgb), _array(frame.transmittance), state.ends,
            state.covers, _array(d_rgb), d_light, sums,
        )  # fmt: skip
        if overwrite:
            d_rows[first:last] = 0.0
        self.team.run(sum_instances, self.num_tasks, lists.instance_offsets, packed, sums, _array(d_rows)[first:last])

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """See `Body.absolute_gradients`."""
        state: _FrameState = frame.state
        lists = state.lists
        packed, _ = _view_arrays(splats, frame.view)
        sums = np.zeros((lists.num_instances, 2), packed.dtype)
        self.team.run(
            absolute_tiles, self.num_tasks, tile_constants(packed.dtype), packed, _array(gradient.colours),
            lists.tile_offsets, lists.splats, lists.instances, state.region, state.ends, state.covers,
            _array(gradient.d_image), _array(gradient.behind), sums,
        )  # fmt: skip
        total = np.zeros((len(packed), 2), packed.dtype)
        sum_pairs(lists.instance_offsets, sums, total)
        return torch.from_numpy(total)

    def photometric(
        self,
        rgb: Tensor,
        target: Tensor,
        lambda_dssim: float,
        *,
        own_rows: tuple[int, int] | None = None,
        image_height: int | None = None,
        row_start: int = 0,
    ) -> PhotometricLoss:
        """See `Body.photometric`."""
        height, width, _ = rgb.shape
        own = np.array(own_rows if own_rows is not None else (0, height), np.int64)
        values = 3 * width * (image_height if image_height is not None else height)
        x, y = _array(rgb).reshape(height, 3 * width), _array(target).reshape(height, 3 * width)
        dtype, length = x.dtype, loss_kernels.row_length(width)
        taps = loss_kernels.window(dtype.type)
        blurred = np.empty((loss_kernels.BLURRED, height, length), dtype)
        derivatives = np.empty((loss_kernels.DERIVATIVES, height, length), dtype)
        ssim_sums, l1_sums, d_rgb = np.zeros(height), np.zeros(height), np.empty_like(x)
        run, tasks = self.team.run, self.num_tasks
        run(loss_kernels.blur_inputs, tasks, x, y, taps, blurred)
        ssim_weight = np.array([-lambda_dssim / values], dtype)
        run(loss_kernels.ssim_map, tasks, blurred, own, 3 * width, ssim_weight, taps, derivatives, ssim_sums)
        l1_weight = np.array([(1.0 - lambda_dssim) / values], dtype)
        run(loss_kernels.loss_gradient, tasks, x, y, derivatives, own, l1_weight, taps, l1_sums, d_rgb)
        gradient = torch.from_numpy(d_rgb.reshape(height, width, 3))
        terms = torch.from_numpy(np.stack([l1_sums.sum(), ssim_sums.sum()]) / values)
        return PhotometricLoss(terms, gradient)

    def adam(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
        """See `Body.adam`."""
        arrays = [_array(tensor).reshape(-1) for tensor in (param, grad, exp_avg, exp_avg_sq)]
        self.team.run(adam_rows, self.num_tasks, *arrays, np.array(_adam_factors(step), arrays[0].dtype))

    def lazy_rows(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: int) -> LazyRows | None:
        """See `Body.lazy_rows`. Whether rows are left behind is decided in each update (`LAZY_BELOW`)."""
        if param.numel() == 0:
            return None
        return LazyRows(param, exp_avg, exp_avg_sq, self._catch_up, update, BLOCK, LEG)

    def _catch_up(self, lazy: LazyRows) -> None:
        """Bring all rows up to the last update."""
        param = _flat(lazy.param)
        late = _late_rows(lazy, param.dtype)
        self.team.run(catch_up_rows, self.num_tasks, len(lazy.param), param.size // len(lazy.param), param, late)

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Body.blend_scores`."""
        lists, region = self._lists(splats, view, size[0], rows if rows is not None else (0, size[1]))
        packed, boxes = _view_arrays(splats, view)
        scores = np.empty((lists.num_instances, 2), packed.dtype)
        self.team.run(
            score_tiles, self.num_tasks, tile_constants(packed.dtype), packed, boxes, lists.footprints,
            lists.tile_offsets, lists.splats, lists.instances, region, scores,
        )  # fmt: skip
        maximum, total = np.zeros(packed.shape[0], packed.dtype), np.zeros(packed.shape[0], packed.dtype)
        sum_scores(lists.instance_offsets, scores, maximum, total)
        return torch.from_numpy(maximum), torch.from_numpy(total)


def pack_cameras(views: Views, dtype: Any) -> Array:
    """(B, CAMERA_SIZE) floats as `masksplat.cpu.geometry` reads them."""
    packed = np.zeros((len(views), CAMERA_SIZE), np.float64)
    for view, (width, height) in enumerate(views.sizes):
        viewmat = _array(views.viewmats[view]).astype(np.float64)
        intrinsics = _array(views.intrinsics[view]).astype(np.float64)
        turn, shift = viewmat[:3, :3], viewmat[:3, 3]
        fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
        margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
        packed[view, :9], packed[view, 9:12] = turn.reshape(-1), shift
        packed[view, 12:16] = fx, fy, cx, cy
        packed[view, 16:18] = -cx / fx - margin_x, (width - cx) / fx + margin_x
        packed[view, 18:20] = -cy / fy - margin_y, (height - cy) / fy + margin_y
        packed[view, 20:23] = -turn.T @ shift
    return packed.astype(dtype)


def _cameras_with_size(views: Views, dtype: Any) -> Array:
    """(B, CAMERA_SIZE + 2): packed cameras, and half of width and height."""
    return np.concatenate([pack_cameras(views, dtype), 0.5 * np.array(views.sizes, dtype)], axis=1, dtype=dtype)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def _flat(tensor: Tensor) -> Array:
    return _array(tensor).reshape(-1)


def _tensors_of(gaussians: Gaussians) -> tuple[Tensor, ...]:
    """The attributes in the order of every tuple of the kernels."""
    g = gaussians
    return g.means, g.quats, g.scales, g.opacities, g.sh0, g.shN


def _table_arrays(gaussians: Gaussians) -> tuple[Array, ...]:
    return tuple(map(_flat, _tensors_of(gaussians)))


def _view_arrays(splats: Splats, view: int) -> tuple[Array, Array]:
    first, last = splats.view_range(view)
    return _array(splats.rows)[first:last], _array(splats.boxes)[first:last]


def _flags(settings: ProjectionSettings, gaussians: Gaussians) -> Array:
    degree = -1 if settings.sh_degree is None else settings.sh_degree
    return np.array([degree, settings.activated, settings.antialiased, 3 * gaussians.shN.shape[1]], np.int64)


def _limits(settings: ProjectionSettings, dtype: Any) -> Array:
    return np.array([settings.near_plane, settings.far_plane, settings.eps2d], dtype)


def _late_rows(lazy: LazyRows | None, dtype: Any) -> tuple[Any, ...]:
    """What `catch_up_block` takes to bring rows up to the last update; without blocks where no row can be behind."""
    if lazy is None:
        nothing = np.empty(0, dtype)
        return np.empty(0, np.int32), np.empty((0, NUM_LEG_COLUMNS), dtype), nothing, nothing, 0
    legs = np.empty((CAPACITY, NUM_LEG_COLUMNS), dtype)
    write_legs(_array(lazy.ring), lazy.latest, legs)
    return _array(lazy.updates), legs, _flat(lazy.exp_avg), _flat(lazy.exp_avg_sq), lazy.latest


def _begin_update(lazy: LazyRows | None, splats: Splats, update: int, factors: Array) -> Array:
    """(blocks,) bool, the blocks of shN that get update number `update` now; empty where all rows do without a word."""
    if lazy is None:
        return np.empty(0, np.bool_)
    lazy.begin(update)
    lazy.ring[update % CAPACITY] = torch.from_numpy(factors)
    is_due = np.zeros(len(lazy.updates), np.bool_)
    is_due[_array(splats.gaussians) // BLOCK] = True
    return is_due if is_due.mean() <= LAZY_BELOW else np.ones_like(is_due)


def _adam_factors(step: AdamStep, gradient_scale: float = 1.0) -> tuple[float, ...]:
    rate = step.learning_rate / (1.0 - step.beta1**step.update)
    root = (1.0 - step.beta2**step.update) ** -0.5
    return step.beta1, step.beta2, rate, root, step.eps, gradient_scale, step.drift
