# SPDX-License-Identifier: Apache-2.0
"""Random words of many ids on the GPU: the launch of `random.cu`. The contract is `masksplat.random.words`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.launcher import Launcher

BLOCK = 256
"""Threads of a block, one id each."""

WORD = 0xFFFFFFFF


def words(launcher: Launcher, seed: int, step: int, ids: Tensor, stream: int) -> Tensor:
    """Return (N, 4) int64 words of 32 bits; ids: (N,) int64, contiguous; seed: 64 bits; step, stream: 32 bits."""
    found = torch.empty((len(ids), 4), dtype=torch.int64, device=ids.device)
    launcher(
        "random.fill_words", -(-len(ids) // BLOCK), BLOCK, ids, len(ids), np.uint32(step), np.uint32(stream),
        np.uint32(seed & WORD), np.uint32(seed >> 32), found,
    )  # fmt: skip
    return found
