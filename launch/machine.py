# SPDX-License-Identifier: Apache-2.0
"""What this process may use of the machine: cores, memory, disk. Containers' limits count."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on at once: its affinity, bounded by a container's quota; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _words(cgroup / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def prefer_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch ask Linux for huge pages for large CPU tensors, unless the environment says something else.

    Adam goes through the whole table in every step of a training, and finding small pages takes a tenth of that. torch
    looks at the variable when it makes its first tensor, so this has to come before.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of memory that can still be used without swapping, bounded by a container's limit."""
    try:
        import psutil  # imported here: the doctor must also work without it

        free = psutil.virtual_memory().available
    except ModuleNotFoundError:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _words(cgroup / "memory.max"), _words(cgroup / "memory.current")
    if limit and limit[0] != "max" and used:
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return int(free)


def free_disk(path: Path) -> int:
    """Free bytes on the file system where `path` lies or would lie."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def _words(path: Path) -> list[str]:
    """The words of a one-line control file; none when it cannot be read."""
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
