# SPDX-License-Identifier: Apache-2.0
"""train.py from end to end on a small scene: laws 3 (one path) and 8 (deterministic result), repeatability, folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from colmap_builder import build_model, write_binary, write_photos
from distributed.communicator import Communicator
from gaussian_renderer.image_quality import psnr, to_8bit
from gaussian_renderer.rendering import render_rgb
from launch.cli import parse_train
from launch.evaluation import evaluate
from launch.start import Start
from launch.training import SHORTEST_PASS, Training, build_training
from masksplat.ops import get_body
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import load_ply
from scene.points import FEW_POINTS
from strategies.schedule import Window

SHORT = (
    *("--iterations", "60", "--densify_from_iter", "10", "--densification_interval", "20", "--quiet", "--no-report"),
    *("--densify_grad_threshold", "1e-5", "--densify_until_iter", "50", "--opacity_reset_interval", "40"),
    *("--mask_lr", "0.4", "--lambda_mask", "0.5", "--mask_prune_iter", "10", "--log_interval", "10"),
)


def run(source: Path, target: Path, *flags: str) -> list[dict]:
    """Train for a moment with everything happening in it; the records of metrics.jsonl."""
    assert train.main(["-s", str(source), "-m", str(target), "--eval", *SHORT, *flags]) == 0
    return [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]


def built(source: Path, target: Path, *flags: str) -> Training:
    """The parts of a training, none of its steps done."""
    config = parse_train(["-s", str(source), "-m", str(target), "--eval", *SHORT, *flags])
    return build_training(config, Communicator(), show_progress=False)


def ply_bytes(target: Path, iteration: int = 60) -> bytes:
    return ModelFolder.open(target).point_cloud(iteration).read_bytes()


def test_every_kind_of_event_happens_in_the_short_run(any_scene: Path, tmp_path: Path) -> None:
    records = run(any_scene, tmp_path / "m")
    edits = [record for record in records if record["kind"] == "edit"]
    assert sum(edit["cloned"] for edit in edits) > 0
    assert sum(edit["split"] for edit in edits) > 0
    assert sum(edit["pruned_mask"] for edit in edits) > 0
    assert any(edit["opacity_reset"] for edit in edits)
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses) == 6
    assert losses[3] < losses[0]  # before the opacity reset at 40


def test_a_run_repeats_bit_for_bit_on_any_number_of_threads(any_scene: Path, tmp_path: Path) -> None:
    run(any_scene, tmp_path / "one", "--threads", "1")
    run(any_scene, tmp_path / "three", "--threads", "3")
    run(any_scene, tmp_path / "other_seed", "--threads", "1", "--seed", "1")
    assert ply_bytes(tmp_path / "one") == ply_bytes(tmp_path / "three")
    assert ply_bytes(tmp_path / "one") != ply_bytes(tmp_path / "other_seed")


def test_a_world_of_one_takes_the_same_path(any_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: what torchrun with one process describes, and no torchrun at all, give the same bits."""
    run(any_scene, tmp_path / "alone")
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    run(any_scene, tmp_path / "torchrun")
    assert ply_bytes(tmp_path / "alone") == ply_bytes(tmp_path / "torchrun")


def test_a_start_from_few_points_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (FEW_POINTS - 1, FEW_POINTS):
        model = build_model(num_points=number)
        write_binary(tmp_path / str(number) / "sparse" / "0", model)
        write_photos(tmp_path / str(number) / "images", model)
        built(tmp_path / str(number), tmp_path / "out")
        assert ("points to start from, fewer than" in capsys.readouterr().out) == (number < FEW_POINTS)


def test_half_a_launcher_is_an_error(any_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="WORLD_SIZE is 4"):
        train.main(["-s", str(any_scene), "-m", str(tmp_path / "m"), *SHORT])


def test_what_is_saved_is_what_was_evaluated(any_scene: Path, tmp_path: Path) -> None:
    """Law 8: the ply holds the rows with p >= 1/2, and drawing it gives the PSNR that the log claims."""
    records = run(any_scene, tmp_path / "m")
    logged = next(r for r in records if r["kind"] == "evaluation" and r["split"] == "test" and r["iteration"] == 60)
    saved = next(r for r in records if r["kind"] == "saved" and r["iteration"] == 60)
    step = [record for record in records if record["kind"] == "step"][-1]
    params = {name: torch.from_numpy(v) for name, v in load_ply(tmp_path / "m" / saved["path"]).items()}
    assert logged["num_gaussians"] == saved["num_gaussians"] == len(params["means"])
    assert saved["num_gaussians"] < step["num_gaussians"]  # some rows are alive with p < 1/2
    training = built(any_scene, tmp_path / "other")
    assert training.test_photos is not None
    found = [
        psnr(
            to_8bit(render_rgb(params, camera, sh_degree=0, background=torch.zeros(3), body=get_body("cpu"))),
            training.test_photos.fetch(k),
        )
        for k, camera in enumerate(training.scene.test)
    ]
    assert np.mean(found) == pytest.approx(logged["psnr"], abs=1e-12)


def test_evaluation_is_deterministic_and_sees_only_probable_gaussians(any_scene: Path, tmp_path: Path) -> None:
    training = built(any_scene, tmp_path / "m")
    logits = training.table.params["mask_logits"]
    logits[::3] = -1e-3
    first, second = evaluate(training, training.window(0)), evaluate(training, training.window(0))
    assert first == second
    assert first[0].num_gaussians == int((logits >= 0).sum()) < len(logits)


@pytest.mark.parametrize("mode", ["sqrt", "linear", "accumu"])
def test_batches_cover_the_iterations_and_folders_carry_what_was_asked(
    any_scene: Path, tmp_path: Path, mode: str
) -> None:
    flags = ("--bsz", "4", "--lr_scale_mode", mode, "--save_iterations", "7", "--test_iterations", "30")
    records = run(any_scene, tmp_path / "m", *flags)
    assert ModelFolder.open(tmp_path / "m").saved_iterations() == (7, 60)
    assert {r["iteration"] for r in records if r["kind"] == "evaluation"} == {30}
    assert [r["iteration"] for r in records if r["kind"] == "step"][-1] == 60


def test_stopped_parameters_stay(any_scene: Path, tmp_path: Path) -> None:
    flags = ("--stop_update_param", "--disable_auto_densification", "--mask_prune_iter", "1000")
    run(any_scene, tmp_path / "m", *flags)
    before = built(any_scene, tmp_path / "m2").table.params
    after = load_ply(ModelFolder.open(tmp_path / "m").point_cloud(60))
    assert all(np.array_equal(before[name].numpy(), values) for name, values in after.items())


def test_masks_off_sample_nothing(any_scene: Path, tmp_path: Path) -> None:
    records = run(any_scene, tmp_path / "m", "--prune_method", "3dgs")
    assert not [record for record in records if record["kind"] == "mask_histogram"]
    last = [record for record in records if record["kind"] == "step"][-1]
    assert last["expected_gaussians"] == last["num_gaussians"]
    assert "mask_mean" not in last


def test_both_bodies_train_alike(any_scene: Path, tmp_path: Path) -> None:
    """The cpu body and the reference body walk the same way for a few steps, masks included."""
    losses = {}
    for backend in ("cpu", "reference"):
        flags = ("--iterations", "5", "--log_interval", "1", "--backend", backend)
        records = run(any_scene, tmp_path / backend, *flags)
        losses[backend] = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=2e-4)


def test_a_loss_that_is_no_number_stops_the_run(any_scene: Path, tmp_path: Path) -> None:
    training = built(any_scene, tmp_path / "m")
    training.table.params["sh0"][:] = float("nan")
    with pytest.raises(InputError, match="diverged: the loss of iteration 1 is nan"):
        train.train(training, ModelFolder.create(tmp_path / "m"), Start())


def test_the_report_follows_a_training(any_scene: Path, tmp_path: Path) -> None:
    run(any_scene, tmp_path / "m", "--report")
    assert (tmp_path / "m" / "report.html").is_file()
    results = json.loads((tmp_path / "m" / "results.json").read_text())["ours_60"]
    records = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    logged = next(r for r in records if r["kind"] == "evaluation" and r["split"] == "test")
    assert results["PSNR"] == pytest.approx(logged["psnr"], abs=1e-6)
    assert results["SSIM"] == pytest.approx(logged["ssim"], abs=1e-6)


def test_opacities_decay_by_the_flag_in_a_pass_and_rates_fall_at_the_end(
    generated_scene: Path, tmp_path: Path
) -> None:
    plain = built(generated_scene, tmp_path / "a", "--opacity_decay", "0", "--anneal_share", "0")
    flags = ("--opacity_decay", "0.5", "--anneal_share", "0.5", "--anneal_to", "0.01")
    training = built(generated_scene, tmp_path / "b", *flags)
    opacities, num_images = 3, max(len(training.scene.train), SHORTEST_PASS)
    first, last = training.adam_steps(training.window(0)), training.adam_steps(training.window(59))
    assert first[opacities].drift * num_images == pytest.approx(0.5, rel=1e-12)
    assert last[opacities].drift == pytest.approx(first[opacities].drift / 100, rel=1e-12)
    assert [step.drift for number, step in enumerate(first) if number != opacities] == [0.0] * 5
    constant = plain.adam_steps(plain.window(59))
    assert all(step.drift == 0 for step in constant)
    fallen = [step.learning_rate / 100 for step in constant]
    assert [step.learning_rate for step in last] == pytest.approx(fallen, rel=1e-12)


def test_the_decay_follows_the_rate_of_a_batch(any_scene: Path, tmp_path: Path) -> None:
    drifts = [
        built(any_scene, tmp_path / str(size), "--bsz", str(size)).adam_steps(Window(1, size))[3].drift
        for size in (1, 4)
    ]
    assert drifts[1] == pytest.approx(2 * drifts[0], rel=1e-12) and drifts[0] > 0


def test_a_pass_over_many_views_is_longer(any_scene: Path, tmp_path: Path) -> None:
    training = built(any_scene, tmp_path / "m")
    few = training.adam_steps(training.window(0))[3].drift
    views = training.scene.train * (1 + 2 * SHORTEST_PASS // len(training.scene.train))
    many = replace(training, scene=replace(training.scene, train=views))
    ratio = max(len(training.scene.train), SHORTEST_PASS) / len(views)
    assert many.adam_steps(many.window(0))[3].drift == pytest.approx(ratio * few, rel=1e-12)
