# SPDX-License-Identifier: Apache-2.0
"""How many processes a launcher has started, before any of them waits for another."""

from __future__ import annotations

import os
from collections.abc import Mapping


def refuse_several_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: ValueError when torchrun started several processes: the training step draws in one only."""
    size = environment.get("WORLD_SIZE", "1")
    if size != "1":
        raise ValueError(
            f"training on several processes is not built in yet (WORLD_SIZE is {size}); run python train.py "
            "without torchrun, or with --nproc-per-node=1"
        )
