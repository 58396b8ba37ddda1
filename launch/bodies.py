# SPDX-License-Identifier: Apache-2.0
"""Which body of masksplat draws: --backend, the device and the pruning method decide."""

from __future__ import annotations

import torch

from masksplat.ops import Body, get_body
from scene.errors import InputError


def choose_body(backend: str, device: torch.device | str, *, threads: int, has_masks: bool) -> Body:
    """The body that --backend means on `device`; diff and default are masksplat's own on the device at hand.

    Args: threads: of the cpu body; has_masks: whether the run's Gaussians are masked, which gsplat cannot composite.
    Raises: InputError when the body lacks a library; the message says how to get it.
    """
    device = torch.device(device)
    name = {"diff": "auto", "default": "auto", "gsplat": "cuda"}.get(backend, backend)
    try:
        own = get_body(name, num_threads=threads, device=device if device.type == "cuda" else None)
        if backend != "gsplat":
            return own
        from masksplat.gsplat.body import GsplatBody  # only a run that asks for gsplat may need it

        return GsplatBody(own, masked=has_masks)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"--backend {backend} cannot be used: {error}") from error
