# SPDX-License-Identifier: Apache-2.0
"""The probabilistic mask on the GPU: launches of `mask.cu`. The contract is that of `masksplat.masks`.

Letters: N Gaussians.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.launcher import Launcher
from masksplat.cuda.projection import adam_factors
from masksplat.random import MASK_SAMPLE
from masksplat.types import AdamStep, Counted

BLOCK = 256
"""Threads of a block, one Gaussian each."""

WORD = 0xFFFFFFFF


def sample(
    launcher: Launcher, logits: Tensor, ids: Tensor, seed: int, step: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hard sample (N,), the derivative of the soft one (N,) and the number of ones, () int64.

    Args:
        logits: (N,) float32, contiguous; ids: (N,) int64; seed: 64 bits; step: 32 bits, or (1,) int32 on the device.
    """
    count, device = logits.shape[0], logits.device
    mask = torch.empty(count, dtype=torch.float32, device=device)
    keep_gradient = torch.empty(count, dtype=torch.float32, device=device)
    num_drawn = torch.zeros((), dtype=torch.int64, device=device)
    by_value, there = (0, step) if isinstance(step, Tensor) else (step, None)
    launcher(
        "mask.sample", -(-count // BLOCK), BLOCK, logits, ids, count, np.uint32(by_value), there,
        np.uint32(MASK_SAMPLE), np.uint32(seed & WORD), np.uint32(seed >> 32), mask, keep_gradient, num_drawn,
    )  # fmt: skip
    return mask, keep_gradient, num_drawn


def update(
    launcher: Launcher,
    logits: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    d_mask: Tensor,
    keep_gradient: Tensor,
    d_all: float | Counted,
    adam: AdamStep,
    numbers: Tensor | None = None,
    status: Tensor | None = None,
) -> None:
    """One Adam update in place, unless an overflow is noted in `status`; arguments as `masksplat.masks.mask_update`."""
    num_drawn, factor = d_all if isinstance(d_all, Counted) else (None, d_all)
    count = logits.shape[0]
    launcher(
        "mask.update", -(-count // BLOCK), BLOCK, logits, d_mask, keep_gradient, exp_avg, exp_avg_sq,
        count, float(factor), num_drawn, *adam_factors(adam), numbers, status,
    )  # fmt: skip


def update_numbers(factor: float, adam: AdamStep) -> tuple[float, ...]:
    """What `update` takes from memory as `numbers`, (6,) float32: the factor of `d_all`, then those of Adam."""
    return (factor, *adam_factors(adam))
