# SPDX-License-Identifier: Apache-2.0
"""Boxes worked out from rows hold those of the projection, and are hardly larger; drawing with them changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_scenes import make_views
from masksplat.boxes import boxes_of_rows, torch_boxes_of_rows
from masksplat.ops import Body, get_body
from masksplat.types import ALPHA_MIN, Gaussians, ProjectionSettings, Splats

SIZE = (300, 200)
LIMITS = torch.tensor([SIZE])


def splats_of(body: Body, dtype: torch.dtype, *, thinness: float, antialiased: bool = False) -> Splats:
    """3000 Gaussians of all sizes and opacities, stretched by up to exp(thinness), at and beyond the image's edges."""
    rng = np.random.default_rng(int(thinness))
    means = rng.normal(size=(3000, 3)) * (2.0, 1.5, 0.6) + (0, 0, 4)
    scales = rng.uniform(-6, 0, (3000, 1)) + rng.uniform(0, thinness, (3000, 3))
    arrays = (
        means, rng.normal(size=(3000, 4)), scales, rng.normal(size=3000) * 4, rng.normal(size=(3000, 3)),
        np.zeros((3000, 0, 3)),
    )  # fmt: skip
    gaussians = Gaussians(*(torch.tensor(array, dtype=dtype) for array in arrays))
    settings = ProjectionSettings(sh_degree=0, antialiased=antialiased)
    return body.project(gaussians, make_views(SIZE, dtype=dtype), settings)


def areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]).double() * (boxes[:, 3] - boxes[:, 1])


@pytest.mark.parametrize("body", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("antialiased", [False, True])
def test_no_pixel_of_the_projection_is_lost(body: str, dtype: torch.dtype, antialiased: bool) -> None:
    splats = splats_of(get_body(body), dtype, thinness=2.0, antialiased=antialiased)
    boxes = boxes_of_rows(splats.rows, LIMITS)
    assert (boxes[:, :2] <= splats.boxes[:, :2]).all() and (boxes[:, 2:] >= splats.boxes[:, 2:]).all()
    grown = areas(boxes).sum() / areas(splats.boxes).sum()
    assert len(splats) > 500 and grown < 1.02


@pytest.mark.parametrize(("thinness", "cancellation"), [(4.0, 1e2), (8.0, 1e5), (14.0, 1e8)])
def test_thin_splats_lose_nothing_either(thinness: float, cancellation: float) -> None:
    """The determinant of a float32 conic has few digits left, or none: the box grows, to the whole image at last."""
    splats = splats_of(get_body("cpu"), torch.float32, thinness=thinness)
    a, b, c = splats.rows[:, 2:5].double().unbind(1)
    assert (a * c / (a * c - b * b).abs()).max() > cancellation
    boxes = boxes_of_rows(splats.rows, LIMITS)
    assert (boxes[:, :2] <= splats.boxes[:, :2]).all() and (boxes[:, 2:] >= splats.boxes[:, 2:]).all()


def test_boxes_are_tight_around_what_can_be_seen() -> None:
    """Against alpha at every pixel, in float64."""
    splats = splats_of(get_body("cpu"), torch.float64, thinness=2.0)
    boxes = boxes_of_rows(splats.rows, LIMITS)
    x, y = torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5
    slack = num_inside = 0
    for row, box in zip(splats.rows[:300], boxes[:300].tolist(), strict=True):
        dx, dy = (x - row[0])[None, :], (y - row[1])[:, None]
        power = 0.5 * (row[2] * dx * dx + row[4] * dy * dy) + row[3] * dx * dy
        seen = torch.nonzero(row[5] * torch.exp(-power) >= ALPHA_MIN)
        if len(seen):
            low, high = seen.amin(0).tolist(), (seen.amax(0) + 1).tolist()
            assert box[0] <= low[1] and box[1] <= low[0] and box[2] >= high[1] and box[3] >= high[0]
            is_inside = min(box) > 0 and box[2] < SIZE[0] and box[3] < SIZE[1]
            slack += is_inside and max(low[1] - box[0], low[0] - box[1], box[2] - high[1], box[3] - high[0]) > 1
            num_inside += is_inside
    assert num_inside > 50 and slack < 3  # only where no pixel centre comes near the tip of the ellipse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_implementations_agree(dtype: torch.dtype) -> None:
    for thinness in (2.0, 14.0):
        rows = splats_of(get_body("cpu"), dtype, thinness=thinness).rows
        limits = torch.tensor([[300, 200], [100, 50]])[torch.arange(len(rows)) % 2]
        first, second = boxes_of_rows(rows, limits), torch_boxes_of_rows(rows, limits)
        assert first.dtype == second.dtype == torch.int32
        assert (first != second).any(dim=1).float().mean() < 1e-3  # logarithms may differ in the last digit
        assert (first - second).abs().max() <= 1
        assert (first[:, 2:] <= limits).all() and (first >= 0).all()
    assert boxes_of_rows(rows[:0], LIMITS).shape == torch_boxes_of_rows(rows[:0], LIMITS).shape == (0, 4)


@pytest.mark.parametrize("body_name", ["cpu", "reference"])
def test_drawing_is_the_same_with_either_boxes(body_name: str) -> None:
    body = get_body(body_name)
    splats = splats_of(body, torch.float32, thinness=2.0)
    images, gradients = [], []
    for boxes in (splats.boxes, boxes_of_rows(splats.rows, LIMITS)):
        drawn = replace(splats, boxes=boxes)
        frame = body.rasterize(drawn, 0, SIZE, torch.zeros(3))
        d_rows = torch.zeros_like(splats.rows)
        body.rasterize_backward(drawn, frame, torch.ones_like(frame.rgb), d_rows)
        images.append(frame.rgb)
        gradients.append(d_rows)
    difference = torch.linalg.vector_norm(gradients[0] - gradients[1]) / torch.linalg.vector_norm(gradients[0])
    if body_name == "cpu":
        assert torch.equal(*images) and difference == 0
    else:
        torch.testing.assert_close(*images, rtol=1e-5, atol=1e-6)
        assert difference < 1e-5
