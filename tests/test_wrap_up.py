# SPDX-License-Identifier: Apache-2.0
"""After a training: which views are rendered and measured, and that the report shows them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

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


def test_the_closing_table_says_which_views_it_is_about(
    generated_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for num_test, flags in ((0, ()), (2, ("--eval",))):
        write_model(generated_scene, tmp_path / f"m{num_test}", *flags)
        loud = [flag for flag in REFERENCE if flag != "--quiet"]
        config = parse_train(["-s", str(generated_scene), "-m", str(tmp_path / f"m{num_test}"), *flags, *loud])
        config = dataclasses.replace(
            config, logging=dataclasses.replace(config.logging, report=False, render_and_evaluate=True)
        )
        wrap_up(config, Communicator(), num_train=16 - num_test, num_test=num_test)
        shown = capsys.readouterr().out
        assert ("Training views" in shown) == (num_test == 0) and "PSNR" in shown
