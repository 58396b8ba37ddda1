# SPDX-License-Identifier: Apache-2.0
"""Runs on several ranks: going on with another number of them (law 6), agreement (law 7), errors, torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distributed.communicator import Communicator, DisagreementError, PeerError
from distributed.pixels import PixelPartition
from launch.sharing import LocalViews
from launch.start import Start, find_start
from launch.training import build_training
from launch.world import ending_together, joined_world, parse_once
from rank_harness import run_ranks
from rank_trajectories import Case, Outcome, built, config_of, gathered, outcome, run_loop, trajectory, write_scene
from scene.errors import InputError
from scene.model_folder import ModelFolder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("sizes"))


STRAIGHT = Case("straight", ("--bsz", "2", "--checkpoint_iterations", "60", "--save_strategy_history"))


def straight(world: Communicator, source: Path, target: Path) -> Outcome:
    return trajectory(world, source, target, STRAIGHT)


def resumed(world: Communicator, source: Path, target: Path, start: Path) -> Outcome:
    """The second part of the trajectory, from a checkpoint that another number of ranks may have written."""
    target = target / f"resumed on {world.size}"
    config = config_of(source, target, replace(STRAIGHT, flags=(*STRAIGHT.flags, "--start_checkpoint", str(start))))
    folder = ModelFolder.create(target)
    begin = find_start(config, folder, world)
    training = build_training(config, world, show_progress=False, checkpoint=begin.checkpoint)
    run_loop(training, folder, begin)
    return outcome(training, folder)


@pytest.fixture(scope="module")
def on_two(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The folder of a run on two ranks with a checkpoint at image 60 of 100, and how it ended."""
    target = tmp_path_factory.mktemp("two")
    return target / "straight on 2True", run_ranks(straight, 2, scene, target, seconds=90)


def test_the_same_number_of_ranks_goes_on_to_the_same_bits(
    scene: Path, tmp_path: Path, on_two: tuple[Path, list[Outcome]]
) -> None:
    """Law 6: costs that wait for their step and the count of events are in the checkpoint, too."""
    folder, expected = on_two
    found = run_ranks(resumed, 2, scene, tmp_path, folder / "checkpoints" / "60", seconds=90)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert all(np.array_equal(one.tensors[name], other.tensors[name]) for name in other.tensors)
    histories = [
        [json.loads(line) for line in (each / "strategy_history.jsonl").read_text().splitlines()]
        for each in (tmp_path / "resumed on 2", folder)
    ]
    assert len(histories[0]) >= 20
    assert histories[0] == [record for record in histories[1] if record["iteration"] > 60]


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_goes_on_to_the_same_table(
    scene: Path, tmp_path: Path, on_two: tuple[Path, list[Outcome]], size: int
) -> None:
    folder, straight_outcomes = on_two
    found = gathered(run_ranks(resumed, size, scene, tmp_path, folder / "checkpoints" / "60", seconds=90))
    expected = gathered(straight_outcomes)
    assert np.array_equal(found["ids"], expected["ids"])
    for name, values in expected.items():
        error = np.linalg.norm((found[name] - values).astype(np.float64))
        assert error <= 1e-10 * np.linalg.norm(values.astype(np.float64)), name


def test_history_says_what_was_decided_and_what_it_cost(on_two: tuple[Path, list[Outcome]]) -> None:
    lines = (on_two[0] / "strategy_history.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert [step["iteration"] for step in steps] == list(range(2, 101, 2))
    assert all(len(step["views"]) == 2 and len(step["regions"]) == 2 for step in steps)
    assert all(min(step["expected"]) > 0 and min(step["counted"]) >= 0 for step in steps)
    # From the third step on costs are counts: far from the pixels alone, by which the first two were shared out.
    assert max(steps[0]["expected"]) <= 64 * 48 * 2 < max(steps[-1]["expected"])


def disagree(world: Communicator, source: Path, target: Path) -> str:
    """Rank 1 has seen other costs than the others; the loop ends at the first step for which that matters."""
    folder = ModelFolder.create(target)
    training = built(world, source, target, Case("disagreement", ("--bsz", "1")))
    if world.rank == 1:
        decide = training.pixels.balancer.assign

        def other(step: int, views: tuple[int, ...]) -> PixelPartition:
            found = decide(step, views)
            return PixelPartition(found.heights, found.regions[::-1]) if step == 4 else found

        training.pixels.balancer.assign = other  # type: ignore[method-assign]
    try:
        run_loop(training, folder, Start())
    except DisagreementError as error:
        return str(error)
    return "nothing"


def test_the_first_rank_that_decides_otherwise_is_named(scene: Path, tmp_path: Path) -> None:
    """Law 7, with --check_agreement."""
    for rank, message in enumerate(run_ranks(disagree, 3, scene, tmp_path / "m")):
        assert message.startswith(f"[rank {rank}/3] views and partition of step 4: rank 1 has ")
        assert "1 of 3 ranks differ" in message


def break_off(world: Communicator, source: Path, target: Path) -> tuple[str, float]:
    """On rank 1 a photo goes missing in the middle of the training; what each rank ends with, and when."""
    folder = ModelFolder.create(target)
    training = built(world, source, target, Case("error", ("--bsz", "3")))
    fetch, started = training.photos.fetch, time.monotonic()

    def missing(index: int, row_start: int = 0, row_stop: int | None = None) -> object:
        if world.rank == 1 and training.table.num_updates == 5:
            raise InputError("the photo has gone; bring it back")
        return fetch(index, row_start, row_stop)

    training.photos.fetch = missing  # type: ignore[method-assign, assignment]
    try:
        with ending_together(world):
            run_loop(training, folder, Start())
    except PeerError as error:
        return f"quiet: {error}", time.monotonic() - started
    except InputError as error:
        world.close()  # what the end of the process does
        return f"said: {error}", time.monotonic() - started
    return "nothing", 0.0


def test_an_error_in_the_loop_ends_all_ranks_and_is_said_once(scene: Path, tmp_path: Path) -> None:
    answers = run_ranks(break_off, 3, scene, tmp_path / "m")
    assert answers[1][0] == "said: the photo has gone; bring it back"
    for rank in (0, 2):
        assert answers[rank][0] == "quiet: rank 1 failed: the photo has gone; bring it back"
    assert max(seconds for _, seconds in answers) < 15


def test_only_rank_0_speaks_about_the_command_line() -> None:
    def parse(arguments: object) -> object:
        raise InputError("no such flag; give another")

    with pytest.raises(InputError, match="no such flag"):
        parse_once(parse, ["--x"], {"RANK": "0"})
    with pytest.raises(PeerError, match="no such flag"):
        parse_once(parse, ["--x"], {"RANK": "3"})


def test_a_world_that_cannot_be_joined_is_an_input_error() -> None:
    message = "WORLD_SIZE is 4 but RANK is not set"
    with pytest.raises(InputError, match=message), joined_world("cpu", {"WORLD_SIZE": "4"}):
        pass


def test_local_sampling_gives_each_rank_views_of_its_own() -> None:
    views = LocalViews(10, 6, seed=3, num_ranks=3)
    seen: list[set[int]] = [set(), set(), set()]
    for step in range(40):
        batch = views.batch(step)
        assert batch == LocalViews(10, 6, seed=3, num_ranks=3).batch(step) and len(set(batch)) == 6
        partition = views.partition([40] * 6)
        for rank in range(3):
            mine = [batch[region.view] for region in partition.regions[rank]]
            assert all(view % 3 == rank for view in mine) and len(mine) == 2
            seen[rank].update(mine)
    assert seen == [{0, 3, 6, 9}, {1, 4, 7}, {2, 5, 8}]
    with pytest.raises(InputError, match="--bsz 4"):
        LocalViews(10, 4, seed=3, num_ranks=3)
    with pytest.raises(InputError, match="2 training views"):
        LocalViews(2, 3, seed=3, num_ranks=3)


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command += [f"--nproc-per-node={processes}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)


def test_torchrun_trains_renders_and_measures(scene: Path, tmp_path: Path) -> None:
    """The command of the README, with everything that follows a training; one process gives the same views."""
    flags = ("-s", str(scene), "--eval", "--iterations", "30", "--bsz", "2", "--threads", "1", "--log_interval", "10")
    model = tmp_path / "m"
    done = torchrun("train.py", *flags, "-m", str(model), "--enable_timer", "--check_cpu_memory", "--local_sampling")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("60 Gaussians to start with on 2 processes") == 1
    assert done.stdout.count("saved ") == 1 and done.stdout.count("Report: ") == 1
    records = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    ranks = [record for record in records if record["kind"] == "ranks"]
    assert [record["iteration"] for record in ranks] == [10, 20, 30]
    assert all(len(record["rows"]) == 2 == len(record["cpu_bytes"]) for record in ranks)
    assert all(0 < record["exchange_bytes"] < record["grendel_bytes"] for record in ranks)
    kinds = [json.loads(line)["kind"] for line in (model / "ranks" / "metrics-1.jsonl").read_text().splitlines()]
    assert kinds.count("phases") == 3 == kinds.count("memory")
    assert "on 2 processes" in (model / "ranks" / "train-1.log").read_text()
    measured = json.loads((model / "results.json").read_text())["ours_30"]
    logged = [r for r in records if r["kind"] == "evaluation" and r["split"] == "test"][-1]
    assert measured["PSNR"] == pytest.approx(logged["psnr"], abs=1e-6)


def test_torchrun_says_a_mistake_once(tmp_path: Path) -> None:
    done = torchrun("train.py", "-s", str(tmp_path / "nothing"), "-m", str(tmp_path / "m"), processes=3)
    assert done.returncode != 0
    assert done.stderr.count("error: The scene folder") == 1
    assert set(re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)) <= {"2", "-15"}  # 15: torchrun ends the others
