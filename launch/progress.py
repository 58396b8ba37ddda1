# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a training: one line on stderr of rank 0.

14%|#    | 4200/30000 [01:10<07:02, 61.1 img/s, loss 0.0412 · test 29.31 dB · 81.2k Gaussians, 24.4k to prune · 1.4 GB]
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

import psutil
from tqdm import tqdm

REFRESH_SECONDS = 0.5
FALLBACK_COLUMNS, FALLBACK_ROWS = 140, 40
BAR_FORMAT = "{percentage:3.0f}%|{bar:5}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class TrainingProgress:
    """A bar that counts images and shows loss, last PSNR, Gaussians, memory and the time left. A context manager."""

    def __init__(self, total: int, *, initial: int = 0, enabled: bool = True) -> None:
        """Opens the bar.

        Args:
            total: images of the whole training.
            initial: images done before (a resumed run).
            enabled: False shows nothing (other ranks, --quiet).
        """
        self._enabled, self._shown = enabled, 0.0
        self._psnr = ""
        self._process = psutil.Process()
        columns = FALLBACK_COLUMNS if _has_no_width(sys.stderr) else None
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=" img",
            disable=not enabled,
            dynamic_ncols=columns is None,
            ncols=columns,
            nrows=None if columns is None else FALLBACK_ROWS,
            bar_format=BAR_FORMAT,
            mininterval=REFRESH_SECONDS,
            file=sys.stderr,
        )

    def is_due(self) -> bool:
        """True when `update` would refresh the text; spares the caller the cost of reading the loss from a device."""
        return self._enabled and time.monotonic() - self._shown >= REFRESH_SECONDS

    def advance(self, images: int) -> None:
        """Counts images that are done; the text stays."""
        self._bar.update(images)

    def update(self, *, loss: float, num_gaussians: int, expected_gaussians: float) -> None:
        """Shows new numbers, at most twice a second.

        Args:
            loss: of the last step (or a mean over some).
            num_gaussians: Gaussians alive.
            expected_gaussians: sum of their keep probabilities; the rest is expected to be pruned.
        """
        if not self.is_due():
            return
        self._shown = time.monotonic()
        gone = max(0.0, num_gaussians - expected_gaussians)
        count = f"{short_count(num_gaussians)} Gaussians" + (f", {short_count(gone)} to prune" if gone >= 0.5 else "")
        parts = [f"loss {loss:.4f}", self._psnr, count]
        parts.append(memory_text(self._process.memory_info().rss, gpu_memory_bytes()))
        self._bar.set_postfix_str(" · ".join(filter(None, parts)), refresh=False)

    def show_psnr(self, psnr: float, split: str = "test") -> None:
        """Keeps the PSNR (dB) of the last evaluation in the bar."""
        self._psnr = f"{split} {psnr:.2f} dB"

    def message(self, text: str) -> None:
        """Prints a line above the bar, on stdout."""
        if self._enabled:
            self._bar.clear()
        print(text, flush=True)
        if self._enabled:
            self._bar.refresh()

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._bar.close()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def short_count(number: float) -> str:
    """A count with three or four digits: 950, 81.2k, 1.25M."""
    if number < 1000:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f}k" if number < 999_950 else f"{number / 1e6:.2f}M"


def _has_no_width(stream: TextIO) -> bool:
    """True for a terminal of unknown width (0 columns), as containers have it; tqdm would show nothing there."""
    try:
        return os.get_terminal_size(stream.fileno()).columns == 0
    except (OSError, ValueError):
        return False


def memory_text(host_bytes: int, gpu_bytes: int) -> str:
    """Resident host memory and, when there is any, GPU memory in GB."""
    return f"{host_bytes / 1e9:.1f} GB" + (f" + {gpu_bytes / 1e9:.1f} GB GPU" if gpu_bytes else "")


def gpu_memory_bytes() -> int:
    """Bytes that torch has reserved on the current CUDA device; 0 when CUDA is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_reserved())
