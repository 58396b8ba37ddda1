# SPDX-License-Identifier: Apache-2.0
"""The demo's verdict, its command, its errors, and (slow) the recorded outcome with masks off."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import demo
from launch.cli import parse_train
from launch.demo import BASELINE_FILE, TRAINING, WITHOUT_MASKS, Baseline, Outcome
from launch.demo_scene import DemoOptions, write_demo_scene
from scene.errors import InputError
from scene.model_folder import ModelFolder

BASELINE = Baseline(10_000, 31.0, 0.95, TRAINING)
SEEDS = (0, 1)  # of the slow tests; the first is the demo's own
GOOD = Outcome(kept=6_000, pruned_by_masks=5_000, psnr=30.0, ssim=0.93, seconds=100.0)


@pytest.mark.parametrize(
    ("outcome", "sentences"),
    [
        (GOOD, []),
        (replace(GOOD, psnr=28.0, kept=7_000), []),
        (replace(GOOD, psnr=27.99), ["PSNR is 27.99 dB"]),
        (replace(GOOD, psnr=float("nan")), ["PSNR is nan"]),
        (replace(GOOD, kept=7_001), ["30%"]),
        (replace(GOOD, psnr=10.0, kept=12_000), ["10.00", "-20%"]),
    ],
)
def test_verdict(outcome: Outcome, sentences: list[str]) -> None:
    found = demo.shortfalls(outcome, BASELINE)
    assert len(found) == len(sentences) and all(part in text for part, text in zip(sentences, found, strict=True))


def test_the_command_is_one_that_train_understands(tmp_path: Path) -> None:
    command = demo.train_command(tmp_path / "scene", tmp_path / "model", WITHOUT_MASKS)
    assert command[1].endswith("train.py") and command[0] == sys.executable
    config = parse_train(command[2:])
    assert config.optimization.iterations == demo.ITERATIONS and config.model.eval
    assert config.mask.prune_method == "3dgs" and config.logging.render_and_evaluate and config.logging.report
    assert config.density.densify_until_iter < 0.75 * demo.ITERATIONS, "masks need time after the last split"


def write_model(folder: Path, records: list[dict[str, object]]) -> ModelFolder:
    model = ModelFolder.create(folder)
    model.point_cloud(30).parent.mkdir(parents=True)
    model.point_cloud(30).write_bytes(b"ply")
    model.metrics.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    results = {"ours_20": {"PSNR": 1.0, "SSIM": 0.1}, "ours_30": {"PSNR": 29.5, "SSIM": 0.9, "protocol": "3dgs"}}
    model.results("test").write_text(json.dumps(results), encoding="utf-8")
    return model


def edit(iteration: int, masked: int, alive: int) -> dict[str, object]:
    return {"kind": "edit", "iteration": iteration, "pruned_mask": masked, "num_gaussians": alive}


SAVED = {"kind": "saved", "iteration": 30, "num_gaussians": 50}


@pytest.mark.parametrize(
    ("records", "pruned"),
    [
        ([{"kind": "step", "iteration": 30, "num_gaussians": 60}, SAVED], 10),
        ([edit(10, 7, 90), edit(20, 5, 60), {"kind": "step", "iteration": 25, "num_gaussians": 60}, SAVED], 22),
        ([{"kind": "step", "iteration": 30, "num_gaussians": 60}, edit(30, 10, 50), SAVED], 10),
        ([edit(10, 7, 50), SAVED], 7),
        ([SAVED], 0),
    ],
)
def test_pruned_gaussians_are_counted_once(tmp_path: Path, records: list[dict[str, object]], pruned: int) -> None:
    outcome = demo.read_outcome(write_model(tmp_path, records), 12.0)
    assert outcome == Outcome(kept=50, pruned_by_masks=pruned, psnr=29.5, ssim=0.9, seconds=12.0)


def test_an_incomplete_training_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, [edit(10, 7, 50)])
    with pytest.raises(InputError, match="not complete"):
        demo.read_outcome(model, 1.0)
    model.results("test").unlink()
    with pytest.raises(InputError, match="not complete"):
        demo.read_outcome(model, 1.0)


def test_summary_says_what_and_where(tmp_path: Path) -> None:
    model = write_model(tmp_path, [SAVED])
    text = demo.summary(GOOD, model, BASELINE)
    for part in ("30.00 dB", "0.9300", "6,000 kept", "5,000 pruned", "40% fewer", "10,000", "100 s", "report.html"):
        assert part in text
    assert "fewer" not in demo.summary(GOOD, model, None)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.demo", *arguments]
    return subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, check=False)


def test_photos_without_poses_get_the_command(tmp_path: Path) -> None:
    tiny = DemoOptions(num_views=2, width=16, height=12, focal=16.0)
    write_demo_scene(tmp_path / "scene", tiny)
    for file in (tmp_path / "scene" / "sparse" / "0").iterdir():
        file.unlink()
    answer = call("--data", str(tmp_path / "scene"), "--output", str(tmp_path / "out"))
    assert answer.returncode == 2 and "colmap" in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "out").exists()


def test_recorded_baseline_belongs_to_these_settings() -> None:
    baseline = Baseline.load(BASELINE_FILE)
    assert baseline.flags == TRAINING, "the demo's flags changed: run `make demo-baseline` and commit its result"
    assert baseline.psnr > demo.LOWEST_PSNR and baseline.num_gaussians > 1000


def test_baseline_survives_the_file(tmp_path: Path) -> None:
    BASELINE.save(tmp_path / "baseline.json")
    assert Baseline.load(tmp_path / "baseline.json") == BASELINE


def readme_rows() -> dict[str, tuple[int, float]]:
    """Gaussians and PSNR of the demo's rows in the README's table of results, by "on" and "off"."""
    lines = (demo.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| the demo's still life"))
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[first : first + 2]]
    return {row[3]: (int(row[4].replace(" ", "")), float(row[5].removesuffix(" dB"))) for row in cells}


def test_the_readme_shows_what_is_recorded_and_what_is_promised() -> None:
    rows, recorded = readme_rows(), Baseline.load(BASELINE_FILE)
    assert rows["off"] == (recorded.num_gaussians, round(recorded.psnr, 2))
    kept, psnr = rows["on"]
    assert kept <= (1 - demo.SMALLEST_SAVING) * recorded.num_gaussians
    assert psnr >= recorded.psnr - demo.WIDEST_GAP and psnr >= demo.LOWEST_PSNR


@pytest.fixture(scope="module")
def masks_off(tmp_path_factory: pytest.TempPathFactory) -> list[Baseline]:
    """The demo without masks on this machine, for each of SEEDS."""
    folder = tmp_path_factory.mktemp("masks-off")
    return [demo.measure_baseline(folder / str(seed), ("--seed", str(seed))) for seed in SEEDS]


@pytest.mark.slow
def test_masks_off_keeps_what_is_recorded(masks_off: list[Baseline]) -> None:
    recorded, measured = Baseline.load(BASELINE_FILE), masks_off[0]
    assert abs(measured.psnr - recorded.psnr) <= 0.1
    assert abs(measured.num_gaussians / recorded.num_gaussians - 1) <= 0.05


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path, masks_off: list[Baseline]) -> None:
    gaps = []
    for seed, off in zip(SEEDS, masks_off, strict=True):
        assert demo.run_demo(tmp_path / str(seed), ("--seed", str(seed))) == 0
        model = ModelFolder.open(tmp_path / str(seed) / "model")
        masked = demo.read_outcome(model, 0.0)
        assert masked.kept <= (1 - demo.SMALLEST_SAVING) * off.num_gaussians
        assert model.report.stat().st_size > 10_000
        gaps.append(off.psnr - masked.psnr)
    assert statistics.mean(gaps) <= demo.WIDEST_GAP, gaps
