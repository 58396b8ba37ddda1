# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step that ranks tell each other, in one vector on the GPU: launches of `rank_numbers.cu`.

Letters: B views, Q regions of this rank, W ranks. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masksplat.cuda.launcher import Argument, Launcher

THREADS, WARP = 256, 32
REGIONS_A_LAUNCH = 4


def pack_numbers(
    launcher: Launcher,
    length: int,
    *,
    num_rows: int,
    num_drawn: Tensor | None,
    status: Tensor | None,
    losses: Sequence[Tensor],
    pairs: Sequence[Tensor],
    num_splats: Tensor,
) -> Tensor:
    """(length,) int64: the numbers one behind the other; what is behind them is unspecified.

    Args: losses: (2,) float64 of each region; pairs: int64 by row of tiles of each; num_splats: (B,) int32; num_drawn:
    () int64; status: an even number of int32.
    """
    words = torch.empty(length, dtype=torch.int64, device=launcher.device)
    row_counts = [len(each) for each in pairs]
    status_words = 0 if status is None else len(status)
    all_rows, first_row = sum(row_counts), 0
    for first in range(0, max(len(losses), 1), REGIONS_A_LAUNCH):
        parts: list[Argument] = []
        for k in range(first, first + REGIONS_A_LAUNCH):
            parts += (losses[k], pairs[k], row_counts[k]) if k < len(losses) else (None, None, 0)
        launcher(
            "rank_numbers.pack", 1, THREADS, num_rows, num_drawn, status, status_words, num_splats, len(num_splats),
            len(losses), all_rows, first, first_row, *parts, words,
        )  # fmt: skip
        first_row += sum(row_counts[first : first + REGIONS_A_LAUNCH])
    return words


def combine_numbers(launcher: Launcher, words: Tensor, *, has_drawn: bool, status: Tensor | None) -> Tensor | None:
    """() int64, all that was drawn, from the vectors of all ranks (W, length); status[0] becomes the largest of all."""
    all_drawn = torch.empty((), dtype=torch.int64, device=launcher.device) if has_drawn else None
    launcher("rank_numbers.combine", 1, WARP, words, len(words), words.shape[1], all_drawn, status)
    return all_drawn
