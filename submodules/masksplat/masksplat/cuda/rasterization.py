# SPDX-License-Identifier: Apache-2.0
"""Compositing, its backward and blend scores on the GPU: the host side of the kernels.

Nothing here waits for the device, except `Capacity.recover` in the immediate mode. The kernels are described in
source/rasterize.cu, rasterize_backward.cu and scores.cu; tile_lists.py makes the lists that they go through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.cuda.capacity import Capacity
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.tile_lists import (
    THREADS,
    Region,
    TileLists,
    ViewRows,
    blocks_of,
    check_float32,
    make_tile_lists,
    part_blocks,
    region_of,
    view_rows,
)
from masksplat.types import NUM_ROW_COLUMNS, Frame, ImageGradient, Splats

BACKWARD_WARPS = 4
FINISH_SPLATS, FINISH_THREADS = 96, 256


class Rasterizer:
    """rasterize, rasterize_backward and blend_scores of `masksplat.ops.Body` for float32 tensors of one device."""

    def __init__(self, launcher: Launcher, capacity: Capacity | None = None) -> None:
        """Work through `launcher`, with the buffer sizes and the status of `capacity`."""
        self.launcher = launcher
        self.capacity = Capacity(launcher.device) if capacity is None else capacity

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
        """See `Body.rasterize`. Without `has_backward` nothing is kept for `rasterize_backward`.

        Raises:
            ValueError: for tensors that are not float32.
        """
        check_float32(background=background)
        region = _region(size, rows)
        packed = view_rows(splats, view, self.launcher.device)
        self.capacity.expect(packed.most)
        while True:
            frame = self._composite(packed, region, background, view, self.capacity.buckets if has_backward else 0)
            if self.capacity.defers or not self.capacity.recover():
                return frame

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
        """See `Body.rasterize_backward`.

        Raises:
            ValueError: for a frame that was made without a backward, or tensors that are not float32.
        """
        lists: TileLists = frame.state
        if lists.num_buckets == 0:
            raise ValueError("this frame was made with has_backward=False; rasterize it with the default")
        check_float32(d_rgb=d_rgb, d_rows=d_rows, d_transmittance=d_transmittance)
        packed = lists.view
        first, last = packed.first, packed.first + packed.most
        if lists.region.num_tiles == 0 or packed.most == 0:
            if overwrite:
                d_rows[first:last] = 0.0
            return
        kept, zeros = lists.kept, lists.zeros
        sums = torch.empty((lists.num_instances, NUM_ROW_COLUMNS), dtype=torch.float32, device=self.launcher.device)
        self.launcher(
            "rasterize_backward.backward_pixels", blocks_of(lists.num_buckets, BACKWARD_WARPS), BACKWARD_WARPS * 32,
            packed.rows, zeros.ranges, kept.rows, kept.instances, kept.reached, kept.ends, kept.buckets,
            kept.alive, kept.checkpoints, zeros.bucket_counter, lists.num_buckets,
            *lists.region.arguments, lists.region.width, frame.rgb, frame.transmittance,
            d_rgb.contiguous(), None if d_transmittance is None else d_transmittance.contiguous(), sums,
        )  # fmt: skip
        self.launcher(
            "rasterize_backward.sum_parts", part_blocks(lists.num_instances), THREADS, kept.parts, zeros.totals, sums
        )
        self.launcher(
            "rasterize_backward.finish_rows", blocks_of(packed.most, FINISH_SPLATS), FINISH_THREADS,
            packed.rows, kept.first_instances, zeros.totals, sums, int(overwrite),
            d_rows if len(d_rows) == packed.most else d_rows[first:last],
        )  # fmt: skip

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """See `Body.absolute_gradients`; rows that are not in use get zeros.

        Raises:
            ValueError: for tensors that are not float32, or not of the frame's size.
        """
        check_float32(**gradient._asdict())
        lists: TileLists = frame.state
        packed, region, device = lists.view, lists.region, self.launcher.device
        num_channels = gradient.colours.shape[1]
        expected = ((packed.most, num_channels), (*frame.transmittance.shape, num_channels), frame.transmittance.shape)
        if tuple(tuple(tensor.shape) for tensor in gradient) != tuple(tuple(shape) for shape in expected):
            raise ValueError(f"the gradient has shapes {[list(each.shape) for each in gradient]}; expected {expected}.")
        total = torch.zeros((packed.most, 2), dtype=torch.float32, device=device)
        if region.num_tiles == 0 or packed.most == 0:
            return total
        kept, zeros = lists.kept, lists.zeros
        sums = torch.empty((lists.num_instances, 2), dtype=torch.float32, device=device)
        colours, d_image, behind = (tensor.contiguous() for tensor in gradient)
        self.launcher(
            "absolute.sum_tiles", region.num_tiles, THREADS, packed.rows, colours, num_channels, zeros.ranges,
            kept.rows, kept.instances, *region.arguments, region.width, d_image, behind, sums,
        )  # fmt: skip
        self.launcher(
            "absolute.sum_splats", blocks_of(packed.most), THREADS, kept.first_instances, zeros.totals, packed.most,
            sums, total,
        )  # fmt: skip
        return total

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Body.blend_scores`; rows that are not in use score 0.

        Raises:
            ValueError: for splats that are not float32.
        """
        region = _region(size, rows)
        packed = view_rows(splats, view, self.launcher.device)
        self.capacity.expect(packed.most)
        while True:
            scores = self._score(packed, region)
            if self.capacity.defers or not self.capacity.recover():
                return scores

    def _lists(self, packed: ViewRows, region: Region, num_buckets: int) -> TileLists:
        return make_tile_lists(
            self.launcher, packed, region, num_instances=self.capacity.instances, num_buckets=num_buckets,
            status=self.capacity.status,
        )  # fmt: skip

    def _composite(self, packed: ViewRows, region: Region, background: Tensor, view: int, num_buckets: int) -> Frame:
        lists = self._lists(packed, region, num_buckets)
        kept, zeros = lists.kept, lists.zeros
        height, width = region.last - region.first, region.width
        rgb = torch.empty((height, width, 3), dtype=torch.float32, device=self.launcher.device)
        transmittance = torch.empty((height, width), dtype=torch.float32, device=self.launcher.device)
        self.launcher(
            "rasterize.forward_tiles", region.num_tiles, THREADS, packed.rows, zeros.ranges, kept.tile_order, kept.rows,
            *region.arguments, width, background, rgb, transmittance, zeros.pairs, kept.reached,
            kept.ends, kept.buckets, kept.alive, kept.checkpoints,
            zeros.bucket_counter if num_buckets > 0 else None, num_buckets, self.capacity.status,
        )  # fmt: skip
        return Frame(rgb, transmittance, lists.pairs, view, (region.first, region.last), lists)

    def _score(self, packed: ViewRows, region: Region) -> tuple[Tensor, Tensor]:
        lists = self._lists(packed, region, 0)
        kept, zeros, device = lists.kept, lists.zeros, self.launcher.device
        scores = torch.empty((lists.num_instances, 2), dtype=torch.float32, device=device)
        maximum, total = torch.empty((2, packed.most), dtype=torch.float32, device=device).unbind()
        self.launcher(
            "scores.score_tiles", region.num_tiles, THREADS, packed.rows, zeros.ranges, kept.rows, kept.instances,
            *region.arguments, region.width, scores,
        )  # fmt: skip
        self.launcher(
            "scores.sum_scores", blocks_of(packed.most), THREADS, kept.first_instances, zeros.totals,
            packed.most, scores, maximum, total,
        )  # fmt: skip
        return maximum, total


def _region(size: tuple[int, int], rows: tuple[int, int] | None) -> Region:
    width, height = size
    first, last = rows if rows is not None else (0, height)
    return region_of(first, last, width)
