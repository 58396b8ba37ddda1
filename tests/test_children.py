# SPDX-License-Identifier: Apache-2.0
"""Programs that are started and waited for: what ends them, and that nothing starts behind the end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.children import Children

SLEEPER = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"


def sleep_in(children: Children, marker: Path, ends: list[int | None]) -> None:
    """A task that runs a program which goes on for a minute, and then tries another."""
    ends.append(children.run([sys.executable, "-c", SLEEPER, str(marker)]))
    ends.append(children.run([sys.executable, "-c", SLEEPER, str(marker.with_name("second"))]))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_statuses_come_back(tmp_path: Path) -> None:
    children, statuses = Children(), list[int | None]()
    children.work(
        lambda: statuses.append(children.run([sys.executable, "-c", "raise SystemExit(3)"])),
        lambda: statuses.append(children.run(["true"], cwd=tmp_path)),
    )
    assert sorted(status for status in statuses if status is not None) == [0, 3]
    assert children.is_stopped and children.run(["true"]) is None


def test_sigterm_ends_what_is_running_and_nothing_starts_any_more(tmp_path: Path) -> None:
    children, ends, before = Children(), list[int | None](), signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        wait_for(tmp_path / "started")
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        children.work(lambda: sleep_in(children, tmp_path / "started", ends), terminate)
    assert caught.value.code == 143 and ends == [-signal.SIGTERM, None]
    assert signal.getsignal(signal.SIGTERM) == before and not (tmp_path / "second").exists()


def test_a_failing_task_ends_the_others(tmp_path: Path) -> None:
    children, ends = Children(), list[int | None]()

    def fail() -> None:
        wait_for(tmp_path / "started")
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        children.work(fail, lambda: sleep_in(children, tmp_path / "started", ends))
    assert ends == [-signal.SIGTERM, None] and not [
        thread for thread in threading.enumerate() if thread.name.startswith("work")
    ]
