# SPDX-License-Identifier: Apache-2.0
"""Law 2 for every pruning method, through the real training code: the same trajectory on 1, 2 and 3 ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distributed.communicator import Communicator
from rank_harness import run_ranks
from rank_trajectories import STEPS, Case, Outcome, gathered, trajectories, write_scene

SCHEDULE = ("--densify_from_iter", "10", "--densify_until_iter", "45")  # STEPS steps of two images
WINDOW = ("--prune_iterations", "46", "--train_mask_iters", "40", "--lambda_mask", "0.05")


def case(name: str, *flags: str) -> Case:
    return Case(name, ("--bsz", "2", *SCHEDULE, *flags))


CASES = (
    case("learned on RadSplat", "--prune_method", "rad_splat", "--use_importance_mask", *WINDOW),
    case("learned on Mini-Splatting", "--prune_method", "mini_splatting", "--use_importance_mask", *WINDOW),
    case("published", "--prune_method", "rad_splat", "--use_importance_mask", "--lp_compat", *WINDOW),
    case("hard on a score", "--prune_method", "rad_splat", "--use_importance_mask", "--mask_estimator", "ste", *WINDOW),
    case("window without score", "--prune_method", "compact_3dgs", "--mask_estimator", "gumbel", *WINDOW),
    case("Compact-3DGS", "--prune_method", "compact_3dgs", "--mask_lr", "0.5", "--lambda_mask", "0.05"),
    case("lowest half", "--prune_method", "rad_splat", "--prune_percent", ".5", "--prune_use_percent_iterations", "61"),
    case("random half", "--prune_method", "mini_splatting", "--prune_percent", ".5", "--prune_use_perc", "60", "81"),
    case("thirty by masks", "--target_gaussians", "30"),
    case("thirty by score", "--prune_method", "rad_splat", "--target_gaussians", "30", "--prune_use_perc", "61"),
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("sizes"))


@pytest.fixture(scope="module")
def alone(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The trajectories of one process."""
    return trajectories(Communicator(), scene, tmp_path_factory.mktemp("alone"), CASES)


def test_every_method_prunes(alone: list[Outcome]) -> None:
    for each, found in zip(CASES, alone, strict=True):
        edits = found.of_kind("edit")
        assert len(found.of_kind("step")) == STEPS, each.name
        assert sum(edit["pruned_mask"] for edit in edits) > 0, each.name
        assert len(found.ids) > 1, each.name
        if "thirty" in each.name:
            assert len(found.ids) == 30, each.name
    half = alone[6].of_kind("edit")[-1]
    assert half["pruned_mask"] == round(0.5 * (half["num_gaussians"] + half["pruned_mask"]))


@pytest.mark.parametrize("size", [2, 3])
def test_no_method_depends_on_the_number_of_ranks(
    scene: Path,
    tmp_path: Path,
    alone: list[Outcome],
    size: int,
) -> None:
    answers = run_ranks(trajectories, size, scene, tmp_path, CASES, seconds=240)
    for number, each in enumerate(CASES):
        outcomes = [answer[number] for answer in answers]
        found, expected = gathered(outcomes), gathered([alone[number]])
        assert np.array_equal(found["ids"], expected["ids"]), each.name
        for name, values in expected.items():
            if name != "ids":
                norm = max(float(np.linalg.norm(values)), 1e-300)
                assert float(np.linalg.norm(found[name] - values)) <= 1e-10 * norm, (each.name, name)
        losses = [[step["loss"] for step in run.of_kind("step")] for run in (outcomes[0], alone[number])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10), each.name
