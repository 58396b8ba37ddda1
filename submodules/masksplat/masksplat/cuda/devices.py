# SPDX-License-Identifier: Apache-2.0
"""One launcher for each device, so that all who start kernels there share what is compiled and loaded."""

from __future__ import annotations

import functools

import torch

from masksplat.cuda.launcher import DeviceLauncher


def launcher_of(device: torch.device | str) -> DeviceLauncher:
    """Return the launcher of a CUDA device; "cuda" is the current one.

    Raises:
        CudaUnavailableError: when there is no such device, or cuda.core or NVRTC is missing.
    """
    wanted = str(device)
    if wanted == "cuda" and torch.cuda.is_available():
        wanted = f"cuda:{torch.cuda.current_device()}"
    return _shared_launcher(wanted)


@functools.cache
def _shared_launcher(device: str) -> DeviceLauncher:
    return DeviceLauncher(device)
