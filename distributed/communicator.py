# SPDX-License-Identifier: Apache-2.0
"""Who this process is among the processes of a run. One process is a world of size 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Communicator:
    """Rank and size of the world, and the reductions that strategies need."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Communicator:
        """The world that torchrun describes, or a world of one.

        Raises: ValueError for several processes, which this version cannot train in.
        """
        size = environment.get("WORLD_SIZE", "1")
        if size != "1":
            raise ValueError(
                f"training on several processes is not built in yet (WORLD_SIZE is {size}); run python train.py "
                "without torchrun, or with --nproc-per-node=1"
            )
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the files that exist once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum over ranks."""
        return values
