# SPDX-License-Identifier: Apache-2.0
"""The files that a training writes numbers into, and which rank writes which.

    MODEL/metrics.jsonl             rank 0: what all ranks did together
    MODEL/ranks/metrics-1.jsonl     rank 1, with --enable_timer or --check_*_memory: its own phases and memory
    MODEL/ranks/train-1.log         rank 1: what it would have shown on a terminal
    MODEL/strategy_history.jsonl    rank 0, with --save_strategy_history
    MODEL/events.out.tfevents.*     rank 0, when tensorboard is installed

Nothing here knows what is measured.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.communicator import Communicator
from launch.config import TrainConfig
from launch.metrics_log import MetricsLog
from scene.model_folder import ModelFolder


class Curves:
    """Scalars for TensorBoard; without a writer they go nowhere."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of the named curves."""
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Put everything on disk."""
        if self._writer is not None:
            self._writer.close()


def open_curves(folder: Path) -> Curves:
    """TensorBoard's event file in a folder, or none when tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return Curves()
    # Imported here: it takes seconds and is an extra.
    return Curves(importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder)))


@dataclass(frozen=True)
class RunLogs:
    """main: of all ranks together; rank: of this one; history: what the balancer decided. Some write nowhere."""

    main: MetricsLog
    rank: MetricsLog
    history: MetricsLog
    curves: Curves


@contextmanager
def open_logs(
    folder: ModelFolder, config: TrainConfig, communicator: Communicator, *, append: bool
) -> Iterator[RunLogs]:
    """The logs of this rank, until the block ends. Raises: InputError when one cannot be written."""
    main, flags = communicator.is_main, config.benchmark
    is_detailed = flags.enable_timer or flags.check_cpu_memory or flags.check_gpu_memory
    with ExitStack() as stack:

        def log(path: Path, *, wanted: bool) -> MetricsLog:
            return stack.enter_context(MetricsLog(path if wanted else None, append=append))

        logs = RunLogs(
            main=log(folder.metrics, wanted=main),
            rank=log(folder.rank_metrics(communicator.rank), wanted=True)
            if is_detailed and communicator.size > 1
            else MetricsLog(None),
            history=log(folder.strategy_history, wanted=main and config.distribution.save_strategy_history),
            curves=open_curves(folder.path) if main else Curves(),
        )
        stack.callback(logs.curves.close)
        yield logs
