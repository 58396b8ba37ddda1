# SPDX-License-Identifier: Apache-2.0
"""--backend: which body it means, and how one that cannot be had is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import launch.bodies
import masksplat.gsplat.body
import train
from cuda_launchers import EMULATED, make_launcher
from distributed.communicator import PeerError
from kernel_scenes import parameters_of, random_scene, settings_for
from launch.bodies import choose_body, compile_missing
from launch.world import DEVICE_BACKENDS, device_type_of, joined_world
from masksplat.cuda.body import CudaBody
from masksplat.cuda.compiler import SOURCE_FOLDER, KernelCache, install_command
from masksplat.ops import get_body
from masksplat.types import AdamStep, GaussianGradients, Optimizer, Statistics
from scene.errors import InputError


@pytest.mark.parametrize(("backend", "name"), [("diff", "cpu"), ("default", "cpu"), ("reference", "reference")])
def test_names_of_the_predecessors_mean_the_body_of_the_device(backend: str, name: str) -> None:
    assert choose_body(backend, "cpu", threads=1, has_masks=True).name == name


@pytest.mark.parametrize("backend", sorted(DEVICE_BACKENDS))
def test_without_a_gpu_a_backend_that_needs_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, generated_scene: Path, tmp_path: Path, backend: str
) -> None:
    """Before anything is read or written; on several ranks, rank 0 says it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["-s", str(generated_scene), "-m", str(tmp_path / "m"), "--backend", backend]
    with pytest.raises(InputError, match=f"--backend {backend}.* NVIDIA GPU.*--backend diff.*--doctor"):
        train.main(arguments)
    assert not (tmp_path / "m").exists()
    places = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with pytest.raises(PeerError, match="NVIDIA GPU"), joined_world(device_type_of(backend), places):
        pass


def test_without_gsplat_its_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.bodies, "get_body", lambda *_, **__: get_body("cpu"))
    monkeypatch.setitem(sys.modules, "gsplat", None)  # an import of it fails
    with pytest.raises(InputError, match=r"--backend gsplat cannot be used: .*pip install gsplat==1\.5\.3"):
        choose_body("gsplat", "cuda", threads=1, has_masks=True)


def test_gsplats_body_updates_nothing_after_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks, masksplat's compositor draws, and its buffers can be too small: parameters and statistics wait."""
    for name in ("gsplat", "gsplat.cuda", "gsplat.cuda._backend"):  # nothing of them is called here
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    own = CudaBody(launcher=make_launcher(EMULATED))
    gaussians, views, _ = random_scene(30, (40, 30), seed=3, dtype=torch.float32)
    leaves = tuple(values.clone().requires_grad_() for values in parameters_of(gaussians))
    ones = GaussianGradients(*(torch.ones_like(values) for values in leaves), masks=torch.ones(30))
    monkeypatch.setattr(masksplat.gsplat.body, "backward_through_gsplat", lambda *_: ones)
    splats = own.project(gaussians, views, settings_for(0))
    splats = dataclasses.replace(splats, state=masksplat.gsplat.body.ProjectionState(leaves, splats.rows, splats.rows))
    d_rows = torch.full((30, 10), torch.nan)
    moments = [tuple(torch.zeros_like(values) for values in leaves) for _ in range(2)]
    statistics = Statistics(torch.zeros(30), torch.zeros(30))
    body = masksplat.gsplat.body.GsplatBody(own, masked=True)

    def update() -> None:
        body.project_backward_update(
            gaussians, views, settings_for(0), splats, d_rows, statistics=statistics,
            optimizer=Optimizer(*moments, (AdamStep(1e-2, 0.9, 0.999, 1e-8, 1),) * 6),
        )  # fmt: skip

    own.status[0] = 1
    update()
    changed = [*leaves, *moments[0], *moments[1], *statistics]
    before = [*parameters_of(gaussians), *(torch.zeros_like(values) for values in changed[6:])]
    assert all(torch.equal(one.detach(), other) for one, other in zip(changed, before, strict=True))
    own.status[0] = 0
    d_rows.fill_(2.0)
    update()
    assert not any(torch.equal(one.detach(), other) for one, other in zip(changed, before, strict=True))


def test_kernels_are_compiled_once_and_the_wait_is_announced(tmp_path: Path) -> None:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip(f"no cuda-core here: {install_command()}")
    sources = tmp_path / "source"
    sources.mkdir()
    for name in ("mask.cu", "adam.cu", "photometric.cu", *(path.name for path in SOURCE_FOLDER.glob("*.cuh"))):
        shutil.copy(SOURCE_FOLDER / name, sources)
    said: list[str] = []
    for _ in range(2):
        compile_missing(KernelCache(tmp_path / "cache", sources=sources), "sm_90a", said.append)
    assert len(said) == 1 and said[0].startswith("compiling CUDA kernels for sm_90a (once")
    assert str(tmp_path / "cache") in said[0]
    entries = sorted((tmp_path / "cache").glob("*.cubin"))
    assert [path.name.partition("-")[0] for path in entries] == ["adam", "mask", "photometric"]
    entries[1].unlink()
    compile_missing(KernelCache(tmp_path / "cache", sources=sources), "sm_90a", said.append)
    assert len(said) == 2 and entries[1].is_file()
