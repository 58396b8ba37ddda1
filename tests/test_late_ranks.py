# SPDX-License-Identifier: Apache-2.0
"""Several ranks whose steps are read late: when a buffer of one is too small, all of them change nothing and go back.

Emulated ranks over gloo and, under `-m gpu`, two GPUs over nccl. What ranks decide is compared in every step (law 7).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import launch.training
import train
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.start import Start
from launch.training import Training, build_training
from masksplat.cuda.body import CudaBody
from rank_harness import run_ranks
from scene.model_folder import ModelFolder
from test_cuda_exchange import exchanged_by, kernels_of

FLAGS = (
    *("--iterations", "40", "--bsz", "2", "--densify_from_iter", "4", "--densification_interval", "12"),
    *("--densify_until_iter", "24", "--densify_grad_threshold", "1e-5", "--opacity_reset_interval", "26"),
    *("--mask_lr", "0.2", "--log_interval", "8", "--mask_prune_iter", "10", "--test_iterations", "-1"),
    *("--quiet", "--no-report", "--eval", "--check_agreement", "--save_strategy_history"),
)
SOURCES = ("project", "project_backward", "adam", "mask", "photometric", "binning", "radix_sort", "rasterize")


@dataclass(frozen=True)
class Outcome:
    """tables: a hash of each tensor. returns: (step, the step that came next). history: who drew what, by rank 0."""

    tables: Mapping[str, str]
    returns: list[tuple[int, int]]
    history: list[dict]


def trained(
    world: Communicator, source: Path, target: Path, method: str, too_small_at: Mapping[int, Collection[int]]
) -> Outcome:
    """Train; before some steps (rank -> steps) the rank's buffers become too small, each time once."""
    launcher, waiting, returns = kernels_of(world), set(too_small_at.get(world.rank, ())), []
    config = parse_train(["-s", str(source), "-m", str(target), *FLAGS, "--prune_method", method])
    one_step = train.train_step

    def watched_step(training: Training, recorder: object, late: object, step: int) -> int:
        capacity = training.body.capacity
        if step in waiting:
            waiting.remove(step)
            capacity.expect(0)  # the guess for the first view is no longer due
            capacity.instances, capacity.buckets = 40, 2
        following = one_step(training, recorder, late, step)
        returns.append((step, following))
        return following

    with pytest.MonkeyPatch.context() as patch, exchanged_by(launcher):
        patch.setattr(launch.training, "choose_body", lambda *_, **__: CudaBody(launcher=launcher))
        patch.setattr(train, "train_step", watched_step)
        training = build_training(config, world, show_progress=False)
        training.body.capacity.instances = 1 << 12  # the emulator touches all of it in every sort
        folder = ModelFolder.create(target)
        train.train(training, folder, Start())
    assert not waiting and not bool(training.body.capacity.status.any())
    return Outcome(hashes(training), returns, history_of(folder) if world.is_main else [])


def hashes(training: Training) -> dict[str, str]:
    table = training.table
    groups = {"value": table.params, "m": table.exp_avg, "v": table.exp_avg_sq, "statistic": table.statistics}
    named = {f"{group} {name}": values for group, found in groups.items() for name, values in found.items()}
    named["ids"] = table.ids
    return {name: hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest() for name, values in named.items()}


def history_of(folder: ModelFolder) -> list[dict]:
    """What was decided and what it cost, without times."""
    lines = [json.loads(line) for line in folder.strategy_history.read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def check(smooth: list[Outcome], rough: list[Outcome], places: Collection[int]) -> None:
    """Nothing is left of the overflows, and all ranks went back to the same steps."""
    for quiet, found in zip(smooth, rough, strict=True):
        assert quiet.returns == [(step, step + 1) for step in range(20)]
        assert found.returns == rough[0].returns
        assert {back for step, back in found.returns if back <= step} >= set(places)
        assert found.tables == quiet.tables
    assert rough[0].history == smooth[0].history and len(smooth[0].history) >= 20
    expected = [line["expected"] for line in smooth[0].history if line["kind"] == "step"]
    assert [loads == [64 * 48] * 2 for loads in expected[:4]] == [True, True, True, False]  # nothing is known before 3


@pytest.mark.parametrize("method", ["mask", "3dgs"])
def test_ranks_go_back_together(generated_scene: Path, tmp_path: Path, method: str) -> None:
    """At the first step, amid quiet ones, before an edit, at a log line, at the last; on either rank, and on both."""
    for source in (*SOURCES, "rasterize_backward", "exchange"):
        make_launcher(EMULATED).kernels(source)
    places = {0: (0, 13), 1: (2, 5, 7, 13, 19)}
    smooth = run_ranks(trained, 2, generated_scene, tmp_path / "smooth", method, {})
    rough = run_ranks(trained, 2, generated_scene, tmp_path / "rough", method, places)
    check(smooth, rough, {0, 2, 5, 7, 13, 19})
    assert any(back == step - 1 for step, back in rough[0].returns)  # a step is read when the next one is queued


@pytest.mark.gpu
def test_gpus_go_back_together(generated_scene: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    places = {0: (0, 13), 1: (2, 5, 7, 13, 19)}
    run = [
        run_ranks(trained, 2, generated_scene, tmp_path / name, "mask", where, device_type="cuda", seconds=240.0)
        for name, where in (("smooth", {}), ("rough", places))
    ]
    check(*run, {0, 2, 5, 7, 13, 19})
