# SPDX-License-Identifier: Apache-2.0
"""Training on the cuda body: beside the cpu body, and on a GPU (`-m gpu`) from end to end without waiting for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import launch.training
import train
from cuda_agreement import relative_error
from cuda_launchers import DEVICE, launchers, make_launcher
from distributed.communicator import Communicator
from gaussian_renderer.rendering import render_rgb, render_view
from launch.cli import parse_train
from launch.late_steps import LateSteps
from launch.progress import TrainingProgress
from launch.recorder import Recorder
from launch.run_logs import open_logs
from launch.start import Start
from launch.training import Training, build_training
from masksplat.cuda.body import CudaBody
from masksplat.cuda.launcher import Launcher
from masksplat.ops import Body, get_body
from masksplat.types import Frame
from scene.model_folder import ModelFolder
from scene.ply import load_ply

FLAGS = ("--quiet", "--no-report", "--eval", "--threads", "1", "--test_iterations", "-1")
"""Densification begins after 500 images: none of the tests below gets there unless it says so."""


@pytest.fixture(params=launchers())
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param)


def built(monkeypatch: pytest.MonkeyPatch, body: Body, device: torch.device, source: Path, *flags: str) -> Training:
    """A training that draws with `body`."""
    config = parse_train(["-s", str(source), "-m", str(source / "nowhere"), *FLAGS, *flags])
    with monkeypatch.context() as patch:
        patch.setattr(launch.training, "choose_body", lambda *_, **__: body)
        return build_training(config, Communicator(device=device), show_progress=False)


def records_of(folder: ModelFolder, kind: str) -> list[dict]:
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def test_the_first_steps_are_those_of_the_cpu_body(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """30 steps of two images with masks, from the same start: the losses agree to 1e-4 of themselves."""
    bodies: dict[str, tuple[Body, torch.device]] = {
        "cpu": (get_body("cpu", num_threads=1), torch.device("cpu")),
        "cuda": (CudaBody(launcher=launcher), launcher.device),
    }
    flags, losses, means = ("--iterations", "60", "--bsz", "2", "--log_interval", "2"), {}, {}
    for name, (body, device) in bodies.items():
        training = built(monkeypatch, body, device, generated_scene, *flags)
        folder = ModelFolder.create(tmp_path / name)
        train.train(training, folder, Start())
        losses[name] = [record["loss"] for record in records_of(folder, "step")]
        means[name] = training.table.params["means"]
    assert len(losses["cpu"]) == 30
    assert losses["cpu"][-1] < 0.97 * losses["cpu"][0]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert relative_error(means["cuda"], means["cpu"]) < 1e-4


def test_views_for_people_keep_nothing_for_a_backward(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path
) -> None:
    body, cpu = CudaBody(launcher=launcher), get_body("cpu", num_threads=1)
    rasterize, frames = body.rasterize, []

    def watched(*values: object, **named: object) -> Frame:
        frames.append(rasterize(*values, **named))  # type: ignore[arg-type]
        return frames[-1]

    monkeypatch.setattr(body, "rasterize", watched)
    training = built(monkeypatch, body, launcher.device, generated_scene)
    params, camera = training.table.params, training.scene.test[0]
    there = {name: values.cpu() for name, values in params.items()}
    view = render_view(params, camera, sh_degree=0, background=training.background(), body=body)
    rgb = render_rgb(params, camera, sh_degree=0, background=training.background(), body=body)
    expected = render_view(there, camera, sh_degree=0, background=torch.zeros(3), body=cpu)
    assert torch.equal(rgb, view.rgb)
    for name in ("rgb", "alpha", "depth"):
        assert relative_error(getattr(view, name), getattr(expected, name)) < 1e-5, name
    assert [frame.state.num_buckets for frame in frames] == [0, 0, 0]
    assert sum(frame.state.kept.checkpoints.size for frame in frames) <= 3 * 256  # one aligned piece each


@contextmanager
def no_waiting() -> Iterator[None]:
    """A block in which torch raises for every call that makes the host wait for the GPU, reading numbers for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says once that the mode is young
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--prune_method", "3dgs"), ("--bsz", "3"), ("--random_background",)])
def test_the_host_never_waits_in_a_step(
    monkeypatch: pytest.MonkeyPatch, generated_scene: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Issue 4, item 5, in steps between events. Numbers arrive through events, in the order of the queue."""
    device = make_launcher(DEVICE).device
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()
    flags = ("--iterations", "300", "--log_interval", "1000", *flags)
    training, folder = built(monkeypatch, get_body("cuda"), device, generated_scene, *flags), tmp_path / "m"
    config, model = training.config, ModelFolder.create(folder)
    with open_logs(model, config, training.communicator, append=False) as logs:
        recorder = Recorder(training, model, logs, TrainingProgress(300, enabled=False))
        late, step = LateSteps(training, recorder), 0
        while step < 25:  # kernels are loaded, buffers have their sizes, photos are on the device
            step = train.train_step(training, recorder, late, step)
        with no_waiting():
            while step < 60:
                step = train.train_step(training, recorder, late, step)
        assert late.settle() is None
    assert training.table.num_updates == 60


METHODS = {
    "masks": (),
    "a size by masks": ("--target_gaussians", "80"),
    "a size by a score": ("--prune_method", "rad_splat", "--target_gaussians", "80"),
    "a share by chance": ("--prune_method", "mini_splatting", "--prune_percent", ".5"),
    "learned": ("--prune_method", "rad_splat", "--use_importance_mask"),
    "published": ("--prune_method", "mini_splatting", "--use_importance_mask", "--lp_compat"),
    "hard": ("--prune_method", "mini_splatting", "--use_importance_mask", "--mask_estimator", "ste"),
    "Compact-3DGS": ("--prune_method", "compact_3dgs", "--mask_lr", ".3", "--lambda_mask", ".05"),
    "on opacity and scale": ("--prune_method", "compact_3dgs", "--mask_estimator", "gumbel"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_on_a_gpu_as_on_a_cpu(generated_scene: Path, tmp_path: Path, method: str) -> None:
    make_launcher(DEVICE)  # skips where there is none
    flags = ("-s", str(generated_scene), "--eval", "--iterations", "300", "--quiet", "--no_report")
    flags = (*flags, "--densify_from_iter", "60", "--densify_until_iter", "140", "--log_interval", "50")
    flags = (*flags, "--prune_iterations", "180", "--train_mask_iters", "60", "--prune_use_percent_iterations", "200")
    counts, psnr = {}, {}
    for backend in ("cuda", "cpu"):
        target = tmp_path / backend
        assert train.main([*flags, *METHODS[method], "-m", str(target), "--backend", backend]) == 0
        logged = [each for each in records_of(ModelFolder.open(target), "evaluation") if each["split"] == "test"][-1]
        counts[backend], psnr[backend] = logged["num_gaussians"], logged["psnr"]
    assert counts["cuda"] == pytest.approx(counts["cpu"], rel=0.0 if "size" in method else 0.15)
    assert psnr["cuda"] == pytest.approx(psnr["cpu"], abs=1.5)  # another summation order, amplified by 300 steps


@pytest.mark.gpu
def test_a_training_on_a_gpu_from_end_to_end(generated_scene: Path, tmp_path: Path) -> None:
    """train.py --backend cuda with everything that follows; a model as good as the CPU's."""
    make_launcher(DEVICE)  # skips where there is none
    flags = ("-s", str(generated_scene), "--eval", "--iterations", "400", "--quiet", "--enable_timer")
    flags = (*flags, "--densify_from_iter", "60", "--densify_until_iter", "350", "--log_interval", "50")
    psnr = {}
    for backend in ("cuda", "cpu"):
        target = tmp_path / backend
        assert train.main([*flags, "-m", str(target), "--backend", backend]) == 0
        folder = ModelFolder.open(target)
        assert (target / "report.html").is_file()
        measured = json.loads((target / "results.json").read_text())["ours_400"]
        logged = [record for record in records_of(folder, "evaluation") if record["split"] == "test"][-1]
        assert measured["PSNR"] == pytest.approx(logged["psnr"], abs=1e-6)
        assert len(load_ply(folder.point_cloud(400))["means"]) == logged["num_gaussians"]
        psnr[backend] = logged["psnr"]
    assert psnr["cuda"] == pytest.approx(psnr["cpu"], abs=1.5)  # another summation order, amplified by 400 steps
    on_gpu = ModelFolder.open(tmp_path / "cuda")
    end, phases = records_of(on_gpu, "end")[-1], records_of(on_gpu, "phases")[-1]
    assert 0 < end["gpu_peak_bytes"] <= end["gpu_peak_reserved_bytes"]
    assert phases["clock"] == "gpu" and sum(phases["seconds"].values()) <= end["seconds"]
    assert {"project", "rasterize", "rasterize backward", "project backward and Adam"} <= phases["seconds"].keys()
