# SPDX-License-Identifier: Apache-2.0
"""Threads that stand for ranks: reductions without processes, for strategies, which know of nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from scene.gaussians import GaussianTable
from strategies.base import RankReducer


class ThreadRanks:
    """Reductions over threads; sums in the order of ranks, as those of the Communicator."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=60)
        self.values: dict[int, torch.Tensor] = {}

    def of(self, rank: int) -> RankReducer:
        return _OneOfThem(self, rank)

    def gather(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        self.values[rank] = values
        self.barrier.wait()
        gathered = torch.stack([self.values[key] for key in sorted(self.values)])
        self.barrier.wait()
        return gathered


class _OneOfThem:
    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(self.rank, values).sum(0)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return self.ranks.gather(self.rank, values).amax(0)


def run_on_threads(parts: Sequence[Any], work: Callable[[Any, RankReducer], Any]) -> list[Any]:
    """What `work(part, reducer)` returns for each part, all at the same time; the first error is raised again."""
    ranks = ThreadRanks(len(parts))

    def one_rank(rank: int) -> Any:
        is_done = False
        try:
            result = work(parts[rank], ranks.of(rank))
            is_done = True
        finally:
            if not is_done:
                ranks.barrier.abort()  # nobody waits for a rank that failed
        return result

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(one_rank, rank) for rank in range(len(parts))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return [future.result() for future in futures]


def shards(table: GaussianTable, num_ranks: int) -> list[GaussianTable]:
    """The table's rows spread over ranks by id, unevenly; with three or more, one rank owns nothing."""
    owner = (table.ids % (num_ranks + 1)).clamp(max=num_ranks - 1)
    if num_ranks > 2:
        owner[owner == 1] = 0
    found = []
    for rank in range(num_ranks):
        rows = torch.nonzero(owner == rank).flatten().flip(0)
        part = GaussianTable.from_arrays(
            {name: values[rows] for name, values in table.params.items()},
            dtype=table.params["means"].dtype,
            ids=table.ids[rows],
        )
        found.append(part)
    return found


def by_id(tables: Sequence[GaussianTable], name: str) -> dict[int, Any]:
    """id -> value of a parameter, over all shards."""
    return {
        int(number): value.tolist()
        for table in tables
        for number, value in zip(table.ids, table.params[name], strict=True)
    }
