# SPDX-License-Identifier: Apache-2.0
"""Steps that are queued ahead of a GPU: whole trainings whose buffers turn out too small leave nothing behind of it.

On the emulator and, under `-m gpu`, on a GPU: the loop, the strategies and the logs are train.py's own.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import launch.training
import train
from cuda_launchers import launchers, make_launcher
from distributed.communicator import Communicator
from launch.bodies import STEPS_AHEAD, drawn_at_once, overflow_watch
from launch.cli import parse_train
from launch.start import Start
from launch.training import Training, build_training
from masksplat.cuda.body import CudaBody
from masksplat.cuda.launcher import Launcher
from masksplat.ops import get_body
from scene.gaussians import GaussianTable
from scene.model_folder import ModelFolder

FLAGS = (
    *("--iterations", "44", "--densify_from_iter", "4", "--densification_interval", "12", "--densify_until_iter", "30"),
    *("--densify_grad_threshold", "1e-5", "--opacity_reset_interval", "26", "--mask_lr", "0.2", "--log_interval", "6"),
    *("--mask_prune_iter", "8", "--test_iterations", "21", "44", "--quiet", "--no-report", "--eval"),
    "--no_cuda_graphs",  # recorded steps: test_step_graphs.py
)
TIMES = {"seconds", "total_seconds", "images_per_second"}


@pytest.fixture(params=launchers())
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param)


@dataclass(frozen=True)
class Outcome:
    """table: after the last step. records: metrics.jsonl without times. returns: (step, the step that came next)."""

    table: GaussianTable
    records: list[dict]
    returns: list[tuple[int, int]]


def trained(
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
    source: Path,
    target: Path,
    *flags: str,
    too_small_at: Collection[int] = (),
    room: tuple[int, int] = (40, 2),
) -> Outcome:
    """Train with `room` for that many instances and buckets just before some steps, each time once."""
    training = built(monkeypatch, launcher, source, target, *flags)
    capacity, waiting, returns = training.body.capacity, set(too_small_at), []
    one_step = train.train_step

    def watched_step(training: Training, recorder: object, late: object, step: int) -> int:
        if step in waiting:
            waiting.remove(step)
            capacity.expect(0)  # the guess for the first view is no longer due
            capacity.instances, capacity.buckets = room
        following = one_step(training, recorder, late, step)
        returns.append((step, following))
        return following

    folder = ModelFolder.create(target)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", watched_step)
        train.train(training, folder, Start())
    assert not waiting
    assert not bool(capacity.status.any())
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    records = [record for record in lines if record["kind"] in ("step", "edit", "evaluation", "mask_histogram")]
    for record in records:
        for name in [name for name in record if name in TIMES or "memory" in name or "peak" in name]:
            del record[name]
    return Outcome(training.table, records, returns)


def built(monkeypatch: pytest.MonkeyPatch, launcher: Launcher, source: Path, target: Path, *flags: str) -> Training:
    """A training whose kernels go through `launcher`."""
    config = parse_train(["-s", str(source), "-m", str(target), *FLAGS, *flags])
    monkeypatch.setattr(launch.training, "choose_body", lambda *_, **__: CudaBody(launcher=launcher))
    training = build_training(config, Communicator(device=launcher.device), show_progress=False)
    training.body.capacity.instances = 1 << 12  # the emulator touches all of it in every sort
    return training


def tensors_of(table: GaussianTable) -> dict[str, Tensor]:
    groups = {"value": table.params, "m": table.exp_avg, "v": table.exp_avg_sq, "statistic": table.statistics}
    named = {f"{group} {name}": values for group, found in groups.items() for name, values in found.items()}
    return {"ids": table.ids, **named}


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.table.num_updates == expected.table.num_updates
    there = tensors_of(expected.table)
    assert [name for name, values in tensors_of(found.table).items() if not torch.equal(values, there[name])] == []
    assert found.records == expected.records


LEARNED_ON_SCORES = ("rad_splat", "--use_importance_mask", "--prune_iterations", "32", "--train_mask_iters", "8")
PERCENT = ("rad_splat", "--prune_percent", "0.3", "--prune_use_percent_iterations", "36")


@pytest.mark.parametrize(
    ("method", "at_once"), [(("mask",), set()), (("3dgs",), set()), (LEARNED_ON_SCORES, {35}), (PERCENT, {35})]
)
def test_an_overflow_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
    launcher: Launcher,
    generated_scene: Path,
    tmp_path: Path,
    method: tuple[str, ...],
    at_once: set[int],
) -> None:
    """Bit for bit: at the first step, amid quiet ones, before and at an edit, at a log line, at the last step.

    Steps that look at the table (`at_once`: scores, a prune by them) are complete when they return: nothing goes back.
    """
    flags = ("--prune_method", *method)
    smooth = trained(monkeypatch, launcher, generated_scene, tmp_path / "smooth", *flags)
    places = {0, 6, 11, 15, 20, 35, 43}
    rough = trained(monkeypatch, launcher, generated_scene, tmp_path / "rough", *flags, too_small_at=places)
    assert [edit["num_gaussians"] for edit in smooth.records if edit["kind"] == "edit"]
    assert smooth.returns == [(step, step + 1) for step in range(44)]
    backward = [pair for pair in rough.returns if pair[1] <= pair[0]]
    assert {back for _, back in backward} >= places - at_once  # growing tables may overflow once more
    assert not {back for _, back in backward} & at_once
    assert_same(rough, smooth)


def test_the_host_runs_ahead_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """Between two looks at the table, an overflow is noticed when its step is read, so many steps later."""
    quiet = ("--log_interval", "100", "--test_iterations", "-1", "--disable_auto_densification")
    flags, target = (*quiet, "--mask_prune_iter", "1000"), tmp_path / "m"
    found = trained(monkeypatch, launcher, generated_scene, target, *flags, too_small_at=[8], room=(40, 4096))
    assert (8 + STEPS_AHEAD, 8) in found.returns
    steps = [step for step, _ in found.returns]
    assert steps == [*range(8 + STEPS_AHEAD + 1), *range(8, 44)]


class NobodyLooks:
    """In place of `LateSteps`: the loop is told to repeat the first step, and the status stays."""

    def make_way(self, _: object) -> None:
        pass

    def add(self, *_: object) -> None:
        pass

    def keep_up(self) -> int:
        return 0


class NobodyIsDue:
    """In place of the recorder."""

    def is_due(self, _: object) -> bool:
        return False


def test_an_overflowed_step_updates_nothing(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """What makes going back possible: parameters, moments, statistics and logits wait until somebody has looked."""
    training = built(monkeypatch, launcher, generated_scene, tmp_path / "m")
    training.body.capacity.expect(0)
    training.body.capacity.instances, training.body.capacity.buckets = 40, 2
    before = {name: values.clone() for name, values in tensors_of(training.table).items()}
    train.train_step(training, NobodyIsDue(), NobodyLooks(), 0)
    assert int(training.body.status[0]) != 0
    after = tensors_of(training.table)
    assert [name for name, values in before.items() if not torch.equal(values, after[name])] == []


def test_frames_for_people_are_complete(launcher: Launcher) -> None:
    """Evaluation between deferred steps waits for the device, and steps are deferred again afterwards."""
    body = CudaBody(launcher=launcher)
    assert overflow_watch(body) is body
    body.defers = True
    with drawn_at_once(body):
        assert not body.defers
    assert body.defers
    assert overflow_watch(get_body("cpu")) is None
