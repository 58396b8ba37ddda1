# SPDX-License-Identifier: Apache-2.0
"""Which rank writes which log, and TensorBoard's curves when it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.run_logs import open_curves, open_logs
from scene.model_folder import ModelFolder


class Writer:
    """What SummaryWriter is to us."""

    def __init__(self, folder: str) -> None:
        self.folder, self.points, self.is_closed = folder, [], False

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.points.append((name, value, iteration))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    """The writers that were opened, with a tensorboard that looks installed."""
    opened: list[Writer] = []
    find, bring = importlib.util.find_spec, importlib.import_module

    def import_module(name: str) -> object:
        if name != "torch.utils.tensorboard":
            return bring(name)
        return SimpleNamespace(SummaryWriter=lambda folder: opened.append(Writer(folder)) or opened[-1])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "tensorboard" else find(name))
    monkeypatch.setattr(importlib, "import_module", import_module)
    return opened


def test_curves_go_to_tensorboard(writers: list[Writer], tmp_path: Path) -> None:
    curves = open_curves(tmp_path)
    curves.write(10, {"GPU_mem": 1.5, "num_used_gs": 300.0})
    curves.close()
    assert writers[0].folder == str(tmp_path) and writers[0].is_closed
    assert writers[0].points == [("GPU_mem", 1.5, 10), ("num_used_gs", 300.0, 10)]


def test_without_tensorboard_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    curves = open_curves(tmp_path)
    curves.write(10, {"GPU_mem": 1.5})
    curves.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_writes_its_own_logs(writers: list[Writer], tmp_path: Path, rank: int) -> None:
    config = parse_train(["-s", "data", "-m", str(tmp_path), "--enable_timer", "--save_strategy_history"])
    world = replace(Communicator(), rank=rank, size=2)
    with open_logs(ModelFolder(tmp_path), config, world, append=False) as logs:
        for log in (logs.main, logs.rank, logs.history):
            log.write("step", iteration=1)
        logs.curves.write(1, {"GPU_mem": 0.0})
    shared = {"metrics.jsonl", "strategy_history.jsonl"} if rank == 0 else set()
    assert {path.name for path in tmp_path.iterdir()} == {"ranks", *shared}
    own = tmp_path / "ranks" / f"metrics-{rank}.jsonl"
    assert json.loads(own.read_text()) == {"kind": "step", "iteration": 1}
    assert len(writers) == (1 if rank == 0 else 0)
