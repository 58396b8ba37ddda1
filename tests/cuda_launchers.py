# SPDX-License-Identifier: Apache-2.0
"""Launchers for tests of the cuda body: the emulator (everywhere g++ is) and the GPU (`-m gpu`).

    @pytest.fixture(params=launchers())
    def launcher(request): return make_launcher(request.param)

or, for a whole module, `from cuda_launchers import launcher  # noqa: F401`, which is that fixture.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from cuda_emulator.build import find_compiler
from cuda_emulator.launcher import EmulatedLauncher
from masksplat.cuda.compiler import SOURCE_FOLDER, CudaUnavailableError
from masksplat.cuda.launcher import DeviceLauncher, Launcher

EMULATED, REVERSED, DEVICE = "emulated", "reversed", "device"


def launchers(*, is_reversed: bool = False) -> list[object]:
    """Parameters for `make_launcher`: the emulator, the same with its threads in reverse order if wanted, the GPU."""
    names = [EMULATED, REVERSED] if is_reversed else [EMULATED]
    return [*names, pytest.param(DEVICE, marks=pytest.mark.gpu)]


@functools.cache
def make_launcher(name: str, folder: Path = SOURCE_FOLDER) -> Launcher:
    """The launcher of a name in `launchers`; skips with the reason when this machine cannot have it."""
    if name == DEVICE:
        try:
            return DeviceLauncher("cuda", sources=folder)
        except CudaUnavailableError as error:
            pytest.skip(str(error))
    if find_compiler() is None:
        pytest.skip("no g++ here: the kernels are emulated by it")
    return EmulatedLauncher(folder, is_reversed=name == REVERSED)


@pytest.fixture(params=launchers())
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """The emulated launcher, and the device's under `-m gpu`."""
    return make_launcher(request.param)


def to_device(launcher: Launcher, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies of CPU tensors where the launcher's kernels work."""
    return tuple(tensor.to(launcher.device) for tensor in tensors)
