# SPDX-License-Identifier: Apache-2.0
"""Several ranks whose steps are read late: when a buffer of one is too small, all of them change nothing and go back.

Ranks of one machine exchange copies in windows and are read as late as one rank alone; ranks that might be on several
machines read how many rows travel. Emulated ranks over gloo and, under `-m gpu`, two GPUs over nccl. What ranks decide
is compared in every step (law 7).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import launch.training
import train
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import Communicator
from launch.bodies import STEPS_AHEAD, STEPS_AHEAD_OF_RANKS
from launch.cli import parse_train
from launch.start import find_start
from launch.training import Training, build_training
from masksplat.cuda.body import CudaBody
from masksplat.cuda.capacity import Windows
from rank_harness import run_ranks
from scene.model_folder import ModelFolder
from test_cuda_exchange import exchanged_by, kernels_of
from test_step_graphs import maker_for, record_with

FLAGS = (
    *("--iterations", "40", "--bsz", "2", "--densify_from_iter", "4", "--densification_interval", "12"),
    *("--densify_until_iter", "24", "--densify_grad_threshold", "1e-5", "--opacity_reset_interval", "26"),
    *("--mask_lr", "0.2", "--log_interval", "16", "--mask_prune_iter", "20", "--test_iterations", "-1"),
    *("--quiet", "--no-report", "--eval", "--check_agreement", "--save_strategy_history"),
)
SOURCES = ("project", "project_backward", "adam", "mask", "photometric", "binning", "radix_sort", "rasterize", "random")
SECONDS = 150.0  # a training takes five on an idle machine


@dataclass(frozen=True)
class Setting:
    """same_machine: copies travel in windows. buffers: rank -> steps before which its buffers become too small.

    windows: steps before which the windows of all ranks do. snug: steps before which regions of all ranks get room for
    no more than they needed so far. is_recorded: steps are recorded, and replayed until the table changes; what becomes
    too small is noticed in those that are recorded anew. flags: besides FLAGS. balances: views are cut by what they
    cost, on GPUs, too, where so small a scene would be shared out without a look at costs.
    """

    method: str = "mask"
    same_machine: bool = True
    buffers: Mapping[int, Collection[int]] = field(default_factory=dict)
    windows: Collection[int] = ()
    snug: Collection[int] = ()
    flags: tuple[str, ...] = ()
    is_recorded: bool = False
    balances: bool = True

    @property
    def ahead(self) -> int:
        return STEPS_AHEAD if self.same_machine else STEPS_AHEAD_OF_RANKS


@dataclass(frozen=True)
class Outcome:
    """tables: a hash of each tensor. returns: (step, the step that came next). history: who drew what, by rank 0.

    exchanges: bytes that travelled at each log line, and that had to, by rank 0.
    """

    tables: Mapping[str, str]
    returns: list[tuple[int, int]]
    history: list[dict]
    exchanges: list[tuple[int, int]]


def trained(world: Communicator, source: Path, target: Path, setting: Setting) -> Outcome:
    """Train; what becomes too small before a step becomes so once."""
    if not setting.same_machine:
        world = replace(world, local_size=1)
    launcher, returns = kernels_of(world), []
    waiting, narrow = set(setting.buffers.get(world.rank, ())), set(setting.windows)
    flags = (*FLAGS, "--prune_method", setting.method, *setting.flags)
    config, folder = parse_train(["-s", str(source), "-m", str(target), *flags]), ModelFolder.create(target)
    start = find_start(config, folder, world)
    one_step = train.train_step

    def watched_step(training: Training, recorder: object, late: object, step: int) -> int:
        capacity = training.body.capacity
        if step in waiting:
            waiting.remove(step)
            capacity.expect(0)  # the guess for the first view is no longer due
            capacity.instances, capacity.buckets = 40, 2
        if step in narrow:
            narrow.remove(step)
            capacity.windows = Windows(256, 512, 40)
            if training.graphs is not None:
                training.graphs.forget()
        if step in setting.snug:
            capacity.windows = capacity.windows._replace(region_rows=int(capacity.status[5]))
        following = one_step(training, recorder, late, step)
        returns.append((step, following))
        return following

    with pytest.MonkeyPatch.context() as patch, exchanged_by(launcher):
        patch.setattr(launch.training, "choose_body", lambda *_, **__: CudaBody(launcher=launcher))
        patch.setattr(train, "train_step", watched_step)
        if setting.balances:
            patch.setattr(launch.training, "hidden_load", lambda _: 0)
        maker = maker_for(launcher) if setting.is_recorded else None
        record_with(patch, maker)
        training = build_training(config, world, show_progress=False, checkpoint=start.checkpoint)
        training.body.capacity.instances = 1 << 12  # the emulator touches all of it in every sort
        train.train(training, folder, start)
    assert not waiting and not narrow and not bool(training.body.capacity.status[:3].any())
    assert (training.body.capacity.windows is not None) == setting.same_machine
    assert maker is None or sum(graph.num_replays for graph in maker.graphs) > len(maker.graphs) >= 2
    if setting.same_machine:
        needed = training.body.capacity.status[3:6].tolist()
        assert all(0 < need <= 0.8 * have for need, have in zip(needed, training.body.capacity.windows, strict=True))
    if not world.is_main:
        return Outcome(hashes(training), returns, [], [])
    return Outcome(hashes(training), returns, history_of(folder), exchanges_of(folder))


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


def exchanges_of(folder: ModelFolder) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [(line["exchange_bytes"], line["exchange_needed_bytes"]) for line in lines if line["kind"] == "ranks"]


def check(smooth: list[Outcome], rough: list[Outcome], setting: Setting) -> None:
    """Nothing is left of the overflows, and all ranks went back to the same steps."""
    places = {*setting.windows, *(step for steps in setting.buffers.values() for step in steps)}
    for quiet, found in zip(smooth, rough, strict=True):
        assert quiet.returns == [(step, step + 1) for step in range(20)]
        assert found.returns == rough[0].returns
        assert {back for step, back in found.returns if back <= step} >= places
        assert found.tables == quiet.tables
    assert rough[0].history == smooth[0].history and len(smooth[0].history) >= 20
    expected = [line["expected"] for line in smooth[0].history if line["kind"] == "step"]
    known = 2 + setting.ahead  # the first step for which costs are known
    assert [loads == [64 * 48] * 2 for loads in expected[: known + 1]] == [*[True] * known, False]
    assert any(back == step - setting.ahead for step, back in rough[0].returns)  # read when others have been queued

    assert len(rough[0].exchanges) == 2 and rough[0].exchanges[0][1] == smooth[0].exchanges[0][1]
    assert all((sent > needed) == setting.same_machine and needed > 0 for sent, needed in rough[0].exchanges)


ROUGH = (
    Setting("mask", True, {0: (0, 13), 1: (6, 13, 19)}, windows=(8,)),
    Setting("3dgs", True, {1: (13,)}, windows=(0, 6, 13, 19)),
    Setting("mask", False, {0: (0, 13), 1: (2, 5, 7, 13, 19)}),
)
"""At the first step, amid quiet ones, before an edit, at a log line, at the last; on either rank, and on both."""


@pytest.mark.parametrize("setting", ROUGH)
def test_ranks_go_back_together(generated_scene: Path, tmp_path: Path, setting: Setting) -> None:
    for source in (*SOURCES, "rasterize_backward", "exchange", "rank_numbers"):
        make_launcher(EMULATED).kernels(source)
    quiet = replace(setting, buffers={}, windows=(), snug=())
    smooth = run_ranks(trained, 2, generated_scene, tmp_path / "smooth", quiet, seconds=SECONDS)
    check(smooth, run_ranks(trained, 2, generated_scene, tmp_path / "rough", setting, seconds=SECONDS), setting)


def test_ranks_that_are_read_late_go_on_from_a_checkpoint(generated_scene: Path, tmp_path: Path) -> None:
    """Law 6: the costs that wait six steps are in it. The size of windows is not, and changes nothing.

    Regions that have no room to spare get some before it is needed: nobody goes back.
    """
    straight = run_ranks(trained, 2, generated_scene, tmp_path / "straight", Setting(), seconds=SECONDS)
    first = Setting(flags=("--stop_after", "18"))
    run_ranks(trained, 2, generated_scene, tmp_path / "parts", first, seconds=SECONDS)
    second = Setting(flags=("--auto_start_checkpoint",), windows=(9,), snug=(17,))
    resumed = run_ranks(trained, 2, generated_scene, tmp_path / "parts", second, seconds=SECONDS)
    first_step, last_steps = resumed[0].returns[0][0], resumed[0].returns[-3:]
    assert first_step == 9 and last_steps == [(step, step + 1) for step in (17, 18, 19)]
    assert [each.tables for each in resumed] == [each.tables for each in straight]
    assert resumed[0].history == straight[0].history


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ROUGH)
def test_gpus_go_back_together(generated_scene: Path, tmp_path: Path, setting: Setting) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    smooth, rough = [
        run_ranks(trained, 2, generated_scene, tmp_path / name, where, device_type="cuda", seconds=240.0)
        for name, where in (("smooth", replace(setting, buffers={}, windows=(), snug=())), ("rough", setting))
    ]
    check(smooth, rough, setting)


RECORDED = Setting("mask", True, {0: (0, 7, 8), 1: (13, 14)}, windows=(4, 16), is_recorded=True)
"""Windows of all ranks; buffers of one rank in steps that follow an edit, where recordings are made."""


def check_recorded(queued: list[Outcome], recorded: list[Outcome]) -> None:
    """The same tables and decisions, whether or not steps went back on the way; all ranks went back together."""
    for quiet, found in zip(queued, recorded, strict=True):
        assert found.returns == recorded[0].returns
        assert found.tables == quiet.tables
    assert recorded[0].history == queued[0].history


def test_recorded_steps_of_ranks_leave_the_same_bits(generated_scene: Path, tmp_path: Path) -> None:
    """Without masks, which have another body on the CPU."""
    for source in (*SOURCES, "rasterize_backward", "exchange", "rank_numbers"):
        make_launcher(EMULATED).kernels(source)
    plain = Setting("3dgs")
    queued = run_ranks(trained, 2, generated_scene, tmp_path / "queued", plain)
    for name, setting in (("smooth", replace(plain, is_recorded=True)), ("rough", replace(RECORDED, method="3dgs"))):
        check_recorded(queued, run_ranks(trained, 2, generated_scene, tmp_path / name, setting))


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--bsz", "1")])
def test_recorded_steps_of_gpus_leave_the_same_bits(
    generated_scene: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Whole views, and one view in equal rows: every step between two edits is of one kind."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    plain = Setting(flags=flags, balances=False)
    settings = {
        "queued": plain,
        "smooth": replace(plain, is_recorded=True),
        "rough": replace(RECORDED, flags=flags, balances=False),
    }
    queued, smooth, rough = [
        run_ranks(trained, 2, generated_scene, tmp_path / name, setting, device_type="cuda", seconds=240.0)
        for name, setting in settings.items()
    ]
    check_recorded(queued, smooth)
    check_recorded(queued, rough)
    assert any(back <= step for step, back in rough[0].returns)
