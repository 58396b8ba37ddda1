# SPDX-License-Identifier: Apache-2.0
"""The sweep over ratios: where it forks, what it trains, and what it makes of the results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch.children
from launch.sweep import LEARNED, RATIOS, UNPRUNED, Point, Sweep, draw, fork_iteration, main, parse, run_sweep, table_of
from scene.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def sweep_of(output: Path, *flags: str, ratios: tuple[float, ...] = (0.0, 0.9)) -> Sweep:
    return Sweep(Path("data"), output, "rad_splat", ratios, ("--eval", *flags))


def test_command_line() -> None:
    found = parse(["-s", "data", "-o", "out", "--score", "mini_splatting", "--", "--iterations", "70", "-w"])
    assert found == Sweep(Path("data"), Path("out"), "mini_splatting", RATIOS, ("--eval", "--iterations", "70", "-w"))
    assert len(RATIOS) == 12
    with pytest.raises(InputError, match="a share of Gaussians lies between 0 and 1"):
        parse(["-s", "data", "-o", "out", "--ratios", "1.2"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 19_500),
        (("--bsz", "4"), 19_500),
        (("--bsz", "7"), 19_495),
        (("--iterations", "7000", "--scale_schedules"), 4550),
        (("--prune_use_percent_iterations", "18000"), 17_999),
    ],
)
def test_all_ends_fork_before_the_first_prune(tmp_path: Path, flags: tuple[str, ...], expected: int) -> None:
    config = sweep_of(tmp_path, *flags).config("--prune_method", "rad_splat", "--use_importance_mask")
    assert fork_iteration(config) == expected


class Ended:
    """What subprocess.Popen returns, of a program that has ended with a status."""

    def __init__(self, status: int) -> None:
        self.wait = lambda: status


def pretend(commands: list[list[str]], counts: dict[str, int]):
    """A train.py that writes what the sweep reads."""

    def start(command: list[str]) -> object:
        commands.append(command)
        model = Path(command[command.index("-m") + 1])
        (model / "checkpoints" / "4550").mkdir(parents=True, exist_ok=True)
        if model.name != "base":
            measures = {"PSNR": 30.0 + counts[model.name] / 1000, "SSIM": 0.9, "LPIPS": 0.1}
            (model / "results.json").write_text(json.dumps({"ours_7000": measures}))
            saved = {"kind": "saved", "iteration": 7000, "num_gaussians": counts[model.name]}
            (model / "metrics.jsonl").write_text(json.dumps(saved) + "\n")
        return Ended(0)

    return start


def test_one_training_and_an_end_for_each_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    counts = {UNPRUNED: 1000, LEARNED: 400, "0": 1000, "0.9": 100}
    monkeypatch.setattr(launch.children, "subprocess", SimpleNamespace(Popen=pretend(commands, counts)))
    arguments = ["-s", "data", "-o", str(tmp_path), "--ratios", "0.9", "0"]
    assert main([*arguments, "--", "--iterations", "7000", "--scale_schedules"]) == 0
    names = [Path(command[command.index("-m") + 1]).name for command in commands]
    assert names == ["base", UNPRUNED, LEARNED, "0.9", "0"]
    assert commands[0][-4:] == ["--prune_method", "3dgs", "--stop_after", "4550"]
    assert "--use_importance_mask" in commands[2] and commands[3][commands[3].index("--prune_percent") + 1] == "0.9"
    start = str(tmp_path / "base" / "checkpoints" / "4550")
    assert all(command[command.index("--start_checkpoint") + 1] == start for command in commands[1:])
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [(point["name"], round(point["ratio"], 9)) for point in points] == [("0", 0), ("0.9", 0.9), (LEARNED, 0.6)]
    assert "| learned | 60.0 % | 400 | 30.4000 | 0.9000 | 0.1000 |" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    run_sweep(sweep_of(tmp_path, "--iterations", "7000", "--scale_schedules"))
    assert len(commands) == 5  # nothing is trained twice


def test_a_failed_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = SimpleNamespace(Popen=lambda *_, **__: Ended(2))
    monkeypatch.setattr(launch.children, "subprocess", failing)
    sweep = sweep_of(tmp_path, "--iterations", "7000", "--scale_schedules")
    with pytest.raises(InputError, match=r"base ended with status 2; what it said stands above"):
        run_sweep(sweep)
    (tmp_path / "base" / "train.log").touch()
    with pytest.raises(InputError, match=r"base ended with status 2; its log is .*base/train\.log"):
        run_sweep(sweep)


@pytest.mark.parametrize(
    ("own", "flags", "sentence"),
    [
        (["--score", "mini_splatting"], [], "learned .*--prune_method was rad_splat and is mini_splatting"),
        ([], ["--lambda_mask", "0.5"], "base .*--lambda_mask was 0.0005 and is 0.5"),
        ([], ["--iterations", "9000"], "base .*--iterations was 7000 and is 9000"),
        ([], ["--prune_use_percent_iterations", "5000"], "base .*--prune_use_percent_iterations was 4667 and is 5000"),
        (["-s", "other"], [], "base .*--source_path was .*data and is .*other"),
    ],
)
def test_ends_of_another_sweep_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str], flags: list[str], sentence: str
) -> None:
    commands: list[list[str]] = []
    counts = {UNPRUNED: 1000, LEARNED: 400, "0": 1000, "0.9": 100, "0.5": 500}
    monkeypatch.setattr(launch.children, "subprocess", SimpleNamespace(Popen=pretend(commands, counts)))
    arguments, usual = ["-s", "data", "-o", str(tmp_path)], ["--", "--iterations", "7000", "--scale_schedules"]
    assert main([*arguments, "--ratios", "0.9", *usual]) == 0 and len(commands) == 4
    table = (tmp_path / "sweep.md").read_text()
    with pytest.raises(InputError, match=f"{tmp_path}/{sentence}.*Choose another output folder with -o, or remove"):
        main([*arguments, *own, "--ratios", "0.9", "0.5", *usual, *flags])
    assert len(commands) == 4 and (tmp_path / "sweep.md").read_text() == table
    assert main([*arguments, "--ratios", "0.9", "0.5", "0", *usual, "--no_report"]) == 0
    assert [Path(command[command.index("-m") + 1]).name for command in commands[4:]] == ["0.5", "0"]


SLOW_TRAINING = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[sys.argv.index("-m") + 1], "pid").write_text(str(os.getpid()) + "\\n")
time.sleep(60)
"""
SWEEP_OF_A_SLOW_TRAINING = """
import pathlib, sys
import launch.sweep
launch.sweep.ROOT = pathlib.Path(sys.argv[1])
launch.sweep.main(["-s", "data", "-o", sys.argv[1]])
"""


def test_sigterm_ends_the_training_that_is_running(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SLOW_TRAINING)
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP_OF_A_SLOW_TRAINING, str(tmp_path)], cwd=ROOT)
    note, deadline = tmp_path / "base" / "pid", time.monotonic() + 30
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.02)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_what_not_all_points_have_is_left_out(tmp_path: Path) -> None:
    points = [Point("0", 0.0, 10, {"PSNR": 30.0, "SSIM": 0.9}), Point(LEARNED, 0.5, 5, {"PSNR": 29.0})]
    assert "SSIM" not in table_of(points)
    draw(points, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
