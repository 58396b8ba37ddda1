# SPDX-License-Identifier: Apache-2.0
"""After a training: which views are rendered and measured, and that the report shows them."""

from __future__ import annotations

import json
from pathlib import Path

from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.wrap_up import wrap_up
from test_render_script import write_model
from test_report import make_records, write_log

REFERENCE = ("--backend", "reference", "--threads", "1", "--quiet")


def _wrap_up(source: Path, path: Path, num_train: int, num_test: int, *flags: str) -> Path | None:
    write_model(source, path, *flags)
    write_log(path / "metrics.jsonl", make_records(30))
    config = parse_train(["-s", str(source), "-m", str(path), *flags, *REFERENCE])
    return wrap_up(config, Communicator(), num_train=num_train, num_test=num_test)


def test_the_report_gets_the_test_views(generated_scene: Path, tmp_path: Path) -> None:
    report = _wrap_up(generated_scene, tmp_path / "m", 14, 2, "--eval")
    results = json.loads((tmp_path / "m" / "results.json").read_text())["ours_30"]
    assert report == tmp_path / "m" / "report.html"
    assert set(results) == {"SSIM", "PSNR", "protocol"}
    assert f"{results['PSNR']:.2f}" in report.read_text()
    assert not (tmp_path / "m" / "train").exists()


def test_without_test_views_some_training_views_are_shown(generated_scene: Path, tmp_path: Path) -> None:
    report = _wrap_up(generated_scene, tmp_path / "m", 16, 0)
    assert len(list((tmp_path / "m/train/ours_30/renders").iterdir())) == 8
    assert "Training views" in report.read_text()
    assert not (tmp_path / "m" / "results.json").exists()


def test_render_and_evaluate_renders_both_sets(generated_scene: Path, tmp_path: Path) -> None:
    report = _wrap_up(generated_scene, tmp_path / "m", 14, 2, "--eval", "--render_and_evaluate", "--no_report")
    assert report is None
    assert len(list((tmp_path / "m/train/ours_30/renders").iterdir())) == 14
    assert (tmp_path / "m" / "results.json").exists()
    assert not (tmp_path / "m" / "report.html").exists()


def test_nothing_asked_for_nothing_done(generated_scene: Path, tmp_path: Path) -> None:
    assert _wrap_up(generated_scene, tmp_path / "m", 14, 2, "--eval", "--no_report") is None
    assert not (tmp_path / "m" / "test").exists()
