# SPDX-License-Identifier: Apache-2.0
"""--backend: which body it means, and how one that cannot be had is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import launch.bodies
import train
from distributed.communicator import PeerError
from launch.bodies import choose_body
from launch.world import DEVICE_BACKENDS, device_type_of, joined_world
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
