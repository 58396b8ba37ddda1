# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM in a training: nothing is lost, and the same command goes on to the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from scene.checkpoint import load_checkpoint
from scene.errors import InputError
from scene.ply import load_ply

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120.0


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """train.py in a process of its own, in the middle of its loop."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + SECONDS
    while "Gaussians to start with" not in (log.read_text() if log.exists() else "") and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    generated_scene: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    flags = ["-s", str(generated_scene), "--eval", "--quiet", "--no_report", "--iterations", "3000", "--threads", "1"]
    flags += ["--densify_from_iter", "20", "--densify_until_iter", "100", "--test_iterations", "-1"]
    target = tmp_path / "m"
    command = [sys.executable, str(ROOT / "train.py"), *flags, "-m", str(target)]
    process = started(command, target / "train.log")
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == status, errors.decode()
    assert "saving a checkpoint" in errors.decode() and "Traceback" not in errors.decode()
    (checkpoint,) = (target / "checkpoints").iterdir()
    done = load_checkpoint(checkpoint).state.iteration
    assert 0 < done < 3000 and f"interrupted behind image {done} of 3000" in (target / "train.log").read_text()
    assert train.main([*flags, "-m", str(target), "--auto_start_checkpoint"]) == 0
    assert train.main([*flags, "-m", str(tmp_path / "straight")]) == 0
    plys = [folder / "point_cloud" / "iteration_3000" / "point_cloud.ply" for folder in (target, tmp_path / "straight")]
    assert plys[0].read_bytes() == plys[1].read_bytes()


def test_the_folder_of_an_earlier_training_is_set_aside(generated_scene: Path, tmp_path: Path) -> None:
    """What was saved behind the new end would be taken for the newest, and measured in its place."""
    flags = ["-s", str(generated_scene), "--eval", "--quiet", "-m", str(tmp_path / "m")]
    assert train.main([*flags, "--iterations", "40"]) == 0
    assert train.main([*flags, "--iterations", "10"]) == 0
    saved = tmp_path / "m" / "point_cloud"
    assert [path.name for path in saved.iterdir()] == ["iteration_10"]
    assert [path.name for path in (tmp_path / "m" / "test").iterdir()] == ["ours_10"]
    before = tmp_path / "m" / "before-1"
    assert len(load_ply(before / "point_cloud" / "iteration_40" / "point_cloud.ply")["means"]) > 0
    assert "ours_10" in (tmp_path / "m" / "results.json").read_text()
    assert "ours_40" not in (tmp_path / "m" / "results.json").read_text()
    assert f"what it saved is in {before} now" in (tmp_path / "m" / "train.log").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("-s", "nowhere"), "nowhere does not exist"),
        (("-m", "{data}"), "is the data folder, which is never written into"),
    ],
)
def test_nothing_is_written_before_the_folders_are_right(
    generated_scene: Path, tmp_path: Path, flags: tuple[str, str], sentence: str
) -> None:
    before = sorted(generated_scene.iterdir())
    usual = {"-s": str(generated_scene), "-m": str(tmp_path / "m")}
    usual[flags[0]] = flags[1].format(data=generated_scene)
    with pytest.raises(InputError, match=sentence):
        train.main([*(word for pair in usual.items() for word in pair), "--iterations", "2"])
    assert not (tmp_path / "m").exists() and sorted(generated_scene.iterdir()) == before


def test_a_ply_is_no_checkpoint(generated_scene: Path, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(b"ply\n")
    with pytest.raises(InputError, match="give it to --start_pointcloud"):
        start = ["--start_checkpoint", str(tmp_path / "a.ply")]
        train.main(["-s", str(generated_scene), "-m", str(tmp_path / "m"), *start])


def test_little_space_and_the_saved_count_are_said(
    generated_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is split behind the last save is not what was saved."""
    monkeypatch.setattr("launch.start.LITTLE_SPACE", 1 << 62)
    flags = ["-s", str(generated_scene), "-m", str(tmp_path / "m"), "--quiet", "--no_report", "--iterations", "20"]
    flags += ["--densify_from_iter", "15", "--densification_interval", "20", "--densify_grad_threshold", "1e-9"]
    assert train.main([*flags, "--test_iterations", "-1"]) == 0
    log = (tmp_path / "m" / "train.log").read_text()
    count = len(load_ply(tmp_path / "m" / "point_cloud" / "iteration_20" / "point_cloud.ply")["means"])
    assert "MB are free where" in log
    assert count == 60 and "trained 20 images in" in log and " s, 60 Gaussians" in log
    assert '"cloned":' in (tmp_path / "m" / "metrics.jsonl").read_text()


def test_dropping_every_point_is_refused(generated_scene: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--drop_initial_3dgs_p 1 leaves none of the 60 first Gaussians"):
        train.main(["-s", str(generated_scene), "-m", str(tmp_path / "m"), "--drop_initial_3dgs_p", "1"])
