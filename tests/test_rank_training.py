# SPDX-License-Identifier: Apache-2.0
"""Laws 2 and 3 through the real training code: the same trajectory on 1, 2, 3 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distributed.communicator import Communicator
from rank_harness import run_ranks
from rank_trajectories import CASES, STEPS, Outcome, gathered, trajectories, write_scene

SIZES = [1, 2, 3, 4]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("sizes"))


@pytest.fixture(scope="module")
def alone(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The trajectories of one process without a process group."""
    return trajectories(Communicator(), scene, tmp_path_factory.mktemp("alone"), CASES)


def test_everything_happens_in_the_trajectories(alone: list[Outcome]) -> None:
    """Clones, splits, prunes and a reset, so that what follows compares them, too."""
    edits = [edit for outcome in alone for edit in outcome.of_kind("edit")]
    for event in ("cloned", "split", "pruned_mask", "opacity_reset"):
        assert any(edit[event] for edit in edits), event
    for case, found in zip(CASES, alone, strict=True):
        losses = [step["loss"] for step in found.of_kind("step")]
        assert len(losses) == case.num_steps, case.name
        assert min(losses) < (0.98 if case.num_steps == STEPS else 1) * losses[0], case.name


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm-relative."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300))


@pytest.mark.parametrize("size", SIZES)
def test_trajectories_do_not_depend_on_the_number_of_ranks(
    scene: Path, tmp_path: Path, alone: list[Outcome], size: int
) -> None:
    """Law 2: loss of every step, the table at the end, measures and models; law 3: a group of one, to the bit."""
    answers = run_ranks(trajectories, size, scene, tmp_path, CASES, seconds=150)
    for number, case in enumerate(CASES):
        outcomes, tolerance = [answer[number] for answer in answers], 0.0 if size == 1 else TOLERANCE[case.dtype]
        found, expected = gathered(outcomes), gathered([alone[number]])
        assert np.array_equal(found["ids"], expected["ids"]), case.name
        for name, values in expected.items():
            if name != "ids":
                assert distance(found[name], values) <= tolerance, (case.name, name)
        assert len(outcomes) == size
        compare_records(outcomes[0], alone[number], tolerance or 1e-15)


def compare_records(found: Outcome, expected: Outcome, tolerance: float) -> None:
    """What rank 0 has logged, and the ply files it has written."""
    for kind, names in {
        "step": ("loss", "l1", "ssim", "num_gaussians", "num_splats"),
        "edit": ("cloned", "split", "pruned_opacity", "pruned_mask", "num_gaussians"),
        "evaluation": ("psnr", "ssim", "l1", "num_gaussians"),
        "saved": ("num_gaussians",),
    }.items():
        one, other = found.of_kind(kind), expected.of_kind(kind)
        assert len(one) == len(other)
        for name in names:
            wanted = [record[name] for record in other]
            assert [record[name] for record in one] == pytest.approx(wanted, rel=tolerance), (kind, name)
    for name, values in expected.saved.items():
        assert distance(found.saved[name], values) <= max(tolerance, 1e-7), name  # float32 in the file
