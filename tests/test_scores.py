# SPDX-License-Identifier: Apache-2.0
"""Importance scores over all views against loops over every pixel and splat, on one rank and on several."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from gaussian_renderer.scores import ScoreViews
from gaussian_renderer.views import gaussians_of, views_of
from kernel_scenes import PARAMETERS, random_scene, scalar_image
from masksplat.cuda.body import CudaBody
from masksplat.ops import get_body
from masksplat.types import ProjectionSettings
from rank_harness import run_ranks
from scene.cameras import Camera
from scene.errors import InputError
from scene.gaussians import GaussianTable
from test_cuda_exchange import exchanged_by, kernels_of

NUM_GAUSSIANS = 24
SIZES = [(30, 22), (19, 34), (30, 22), (40, 17), (16, 16)]


def cameras() -> list[Camera]:
    """Five cameras of different sizes."""
    found = []
    for number, (width, height) in enumerate(SIZES):
        angle = 0.15 * (number - 2)
        turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
        shift = np.array([-0.1 * number, 0.05, 0.1])
        pinhole = (1.1 * width, 1.0 * width, 0.5 * width, 0.45 * height)
        found.append(Camera(f"{number}", Path(f"{number}.png"), width, height, *pinhole, turn, shift))
    return found


def make_table(dtype: torch.dtype = torch.float64) -> GaussianTable:
    gaussians, _, _ = random_scene(NUM_GAUSSIANS, (30, 22), seed=3, sh_degree=0, dtype=dtype)
    arrays = {name: getattr(gaussians, name) for name in PARAMETERS}
    arrays["means"][-1] = torch.tensor([0.0, 0.0, -9.0])  # behind every camera
    return GaussianTable.from_arrays(arrays, dtype=dtype, ids=torch.arange(NUM_GAUSSIANS) * 5 + 2)


def brute_force(table: GaussianTable, factor: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Maximum and sum of alpha T of each Gaussian by loops over all pixels of all views."""
    params = dict(table.params)
    if factor is not None:
        params["opacities"] = torch.logit(torch.sigmoid(params["opacities"]) * factor)
    largest, total = np.zeros(len(table)), np.zeros(len(table))
    for camera in cameras():
        views = views_of([camera], params["means"])
        splats = get_body("reference").project(
            gaussians_of(params), views, ProjectionSettings(sh_degree=0), ids=table.ids
        )
        image = scalar_image(splats, 0, views.sizes[0], np.zeros(3))
        rows = splats.gaussians.numpy()
        np.maximum.at(largest, rows, image.scores_max)
        np.add.at(total, rows, image.scores_sum)
    return largest, total


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("with_factor", [False, True])
def test_scores_are_those_of_all_pixels_of_all_views(name: str, with_factor: bool) -> None:
    table = make_table()
    factor = torch.linspace(0.1, 1.0, NUM_GAUSSIANS, dtype=torch.float64) if with_factor else None
    largest, total = ScoreViews(get_body(name, num_threads=1), cameras())(table, factor)
    expected_largest, expected_total = brute_force(table, factor)
    np.testing.assert_allclose(largest.numpy(), expected_largest, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.numpy(), expected_total, rtol=1e-9, atol=1e-12)
    assert largest[-1] == total[-1] == 0
    assert int((largest > 0).sum()) > NUM_GAUSSIANS // 2
    assert bool((total >= largest).all())


def rank_scores(world: Communicator, name: str, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    table = make_table(dtype)
    mine = (table.ids * 7 % (world.size + 1)).clamp(max=world.size - 1) == world.rank  # uneven shards
    part = GaussianTable.from_arrays({n: v[mine] for n, v in table.params.items()}, dtype=dtype, ids=table.ids[mine])
    largest, total = ScoreViews(get_body(name, num_threads=1), cameras(), world)(part)
    return part.ids.numpy(), largest.numpy(), total.numpy()


def compare_ranks(size: int, name: str, dtype: torch.dtype, tolerance: float) -> None:
    table = make_table(dtype)
    largest, total = ScoreViews(get_body(name, num_threads=1), cameras())(table)
    row_of = {int(number): row for row, number in enumerate(table.ids)}
    seen = []
    for ids, part_largest, part_total in run_ranks(rank_scores, size, name, dtype, seconds=180.0):
        rows = [row_of[int(number)] for number in ids]
        np.testing.assert_allclose(part_largest, largest.numpy()[rows], rtol=tolerance, atol=0)
        np.testing.assert_allclose(part_total, total.numpy()[rows], rtol=tolerance, atol=0)
        seen += rows
    assert sorted(seen) == list(range(NUM_GAUSSIANS))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_any_number_of_ranks_gives_the_same_scores(size: int) -> None:
    """Also with more ranks than views."""
    compare_ranks(size, "reference", torch.float64, 1e-12)


def kernel_scores(world: Communicator) -> tuple[np.ndarray, ...]:
    """`rank_scores` by the kernels."""
    launcher = kernels_of(world)
    with pytest.MonkeyPatch.context() as patch, exchanged_by(launcher):
        patch.setattr("test_scores.get_body", lambda *_, **__: CudaBody(launcher=launcher))
        return rank_scores(world, "cuda", torch.float32)


@pytest.mark.parametrize("size", [1, 2])
def test_kernels_score_alike(size: int) -> None:
    """On the emulator; projection leaves rows unused there."""
    for source in ("project", "binning", "radix_sort", "scores", "exchange"):
        make_launcher(EMULATED).kernels(source)
    table = make_table(torch.float32)
    largest, total = ScoreViews(get_body("cpu", num_threads=1), cameras())(table)
    for ids, part_largest, part_total in run_ranks(kernel_scores, size):
        rows = [table.ids.tolist().index(number) for number in ids]
        np.testing.assert_allclose(part_largest, largest.numpy()[rows], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(part_total, total.numpy()[rows], rtol=1e-4, atol=1e-7)


def test_any_number_of_ranks_gives_the_same_bits() -> None:
    """The cpu body computes each row by itself, so that shards do not show even in float32."""
    compare_ranks(3, "cpu", torch.float32, 0.0)


def test_a_pass_over_no_view_is_refused() -> None:
    with pytest.raises(InputError, match="there are none; check the data set"):
        ScoreViews(get_body("cpu", num_threads=1), [])
