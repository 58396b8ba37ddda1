# SPDX-License-Identifier: Apache-2.0
"""--backend: which body it means, and how one that cannot be had is refused."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

import launch.bodies
import train
from distributed.communicator import PeerError
from launch.bodies import choose_body, compile_missing
from launch.world import DEVICE_BACKENDS, device_type_of, joined_world
from masksplat.cuda.compiler import SOURCE_FOLDER, KernelCache, install_command
from masksplat.ops import get_body
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
