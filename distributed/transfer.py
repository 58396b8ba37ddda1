# SPDX-License-Identifier: Apache-2.0
"""Small host values on their way to a device, without waiting for the work that is queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """`values`, a host tensor, on a device.

    For a GPU they go through pinned memory: a copy from ordinary memory would wait until the GPU has done all else.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
