# SPDX-License-Identifier: Apache-2.0
"""Cached kernels follow every source of the package, not only their own file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from masksplat.cpu.kernel import PACKAGE, package_stamp

PROBE = """
import numpy as np
from masksplat.cpu.adam import adam_rows
values = [np.full(16, v, np.float32) for v in (1.0, 1.0, 0.0, 0.0)]
adam_rows(0, 1, *values, np.array([0.9, 0.999, 0.1, 1.0, 1e-15], np.float32))
print(sum(adam_rows.stats.cache_hits.values()))
"""


def run(copy: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "NUMBA_CACHE_DIR": str(copy / "cache")}
    command = [sys.executable, "-c", PROBE]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_change_in_another_file_compiles_a_kernel_again(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "masksplat", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(tmp_path) == "0"
    assert run(tmp_path) == "1"  # the second process finds the first one's kernel
    simd = tmp_path / "masksplat" / "cpu" / "simd.py"
    simd.write_text(simd.read_text() + "\n# changed\n")
    assert run(tmp_path) == "0"


def test_the_stamp_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    one = package_stamp(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    two = package_stamp(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({one, two, package_stamp(tmp_path)}) == 3
