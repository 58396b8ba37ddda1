# SPDX-License-Identifier: Apache-2.0
"""Frames per second of a trained model: what is drawn how often, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch.frame_rate
import train
from launch.drawing import Drawer
from launch.frame_rate import LEAST_SECONDS, main, measure_frame_rate
from scene.cameras import Camera
from scene.errors import InputError


@pytest.fixture(scope="module")
def model(any_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    flags = ["--iterations", "5", "--quiet", "--no_report", "--test_iterations"]
    assert train.main(["-s", str(any_scene), "-m", str(folder), "--eval", *flags]) == 0
    return folder


def test_the_best_round_counts_and_the_first_does_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock in place of the machine's: a warm-up of 9 s, then rounds of 0.8, 0.5 and 1 s."""
    seconds, rounds = iter([9.0, 0.8, 0.5, 1.0, 0.1]), []

    def one_round(drawer: Drawer, views: list[Camera]) -> float:
        rounds.append([view.name for view in views])
        return next(seconds)

    monkeypatch.setattr(launch.frame_rate, "_round_seconds", one_round)
    found = measure_frame_rate(model)
    names = json.loads((model / "metrics.jsonl").read_text().splitlines()[0])["scene"]["test_names"]
    assert rounds == [names] * 4 and sum((0.8, 0.5, 1.0)) >= LEAST_SECONDS
    assert found.frames_per_second == len(names) / 0.5 and found.num_views == len(names)
    assert found.iteration == 5


def test_the_number_is_written_and_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model)]) == 0
    written = json.loads((model / "frame_rate.json").read_text())
    assert written["frames_per_second"] > 1 and written["device"]
    assert f"{written['frames_per_second']:.1f} frames/s, {written['num_gaussians']:,}" in capsys.readouterr().out


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        main([str(tmp_path)])
