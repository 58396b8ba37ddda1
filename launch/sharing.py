# SPDX-License-Identifier: Apache-2.0
"""Who draws which pixels and who owns which Gaussians, step after step: equal on all ranks, without talking.

Costs are counts of a step some steps before (`distributed.balance`); rows move after edits that leave shards uneven.

Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

from distributed.balance import COST_DELAY, LoadBalancer, RowCosts, loads_of
from distributed.communicator import Communicator
from distributed.partition import needs_recut
from distributed.pixels import PixelPartition, in_order_of_ranks
from distributed.totals import StepNumbers
from scene.cameras import Camera
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.repartition import move_rows, plan_move
from scene.sampler import ViewSampler
from strategies.schedule import Schedule, Window

KIND_OF_MODE: Mapping[str, str] = MappingProxyType(
    {"morton": "morton", "no_redistribute": "morton", "random_redistribute": "random", "round_robin": "round_robin"}
)
"""--redistribute_gaussians_mode -> a kind of `distributed.partition.PARTITION_KINDS`."""


class Batches(Protocol):
    """Which views a step draws, and whether their ranks are fixed."""

    def batch(self, step: int) -> tuple[int, ...]:
        """The views of a step."""


class LocalViews:
    """--local_sampling: every rank draws whole images of its own, the views whose number leaves its rank modulo W.

    A batch has the views of rank 0 first. What a run draws depends on W, as it does in Grendel-GS.
    """

    def __init__(self, num_views: int, batch_size: int, seed: int, num_ranks: int) -> None:
        """Raises: InputError when a rank would have no view or no share of the batch."""
        if batch_size % num_ranks or num_views < num_ranks:
            raise InputError(
                f"--local_sampling gives each of {num_ranks} processes bsz/{num_ranks} views of its own, which --bsz "
                f"{batch_size} and {num_views} training views do not allow; choose a multiple of {num_ranks} for "
                "--bsz, or leave the flag out"
            )
        self.num_ranks, self.share = num_ranks, batch_size // num_ranks
        self._samplers = [
            ViewSampler(len(range(rank, num_views, num_ranks)), self.share, seed + rank) for rank in range(num_ranks)
        ]

    def batch(self, step: int) -> tuple[int, ...]:
        """The views of a step, `share` of each rank."""
        return tuple(
            rank + self.num_ranks * view for rank, sampler in enumerate(self._samplers) for view in sampler.batch(step)
        )

    def partition(self, heights: Sequence[int]) -> PixelPartition:
        """Every view whole, drawn by its rank."""
        ranks = [position // self.share for position in range(len(heights))]
        return PixelPartition.of_whole_views(heights, ranks, self.num_ranks)


@dataclass(frozen=True)
class _Decision:
    """What a step draws. costs: of its views when that was decided; None: these never change."""

    views: tuple[int, ...]
    partition: PixelPartition
    costs: list[RowCosts] | None


@lru_cache(256)
def _all_for_one(heights: tuple[int, ...]) -> PixelPartition:
    """Whole views for the only rank."""
    return PixelPartition.of_whole_views(heights, [0] * len(heights), 1)


class PixelShares:
    """Shares out the pixels of every step. Ask for the steps in their order, one step ahead at most."""

    def __init__(
        self,
        communicator: Communicator,
        cameras: Sequence[Camera],
        batches: Batches,
        *,
        learns_costs: bool = True,
        delay: int = COST_DELAY,
        hidden_load: int = 0,
    ) -> None:
        """Args: learns_costs: False keeps every row of tiles at the cost of its pixels (--no_heuristics_update).

        delay: steps between counting a cost and using it; numbers that are read some steps late need as many more.
        hidden_load: see `distributed.balance.partition_batch`.
        """
        self.communicator, self.batches = communicator, batches
        sizes = [(camera.width, camera.height) for camera in cameras]
        self.balancer = LoadBalancer(sizes, communicator.size, delay=delay, hidden_load=hidden_load)
        self._learns_costs = learns_costs and communicator.size > 1
        self._known: dict[int, _Decision] = {}

    def views(self, step: int) -> tuple[int, ...]:
        """The training views of a step; those that the first ranks draw come first."""
        return self._decision(step).views

    def partition(self, step: int) -> PixelPartition:
        """Who draws what in a step."""
        return self._decision(step).partition

    def _decision(self, step: int) -> _Decision:
        """What was, or now is, decided for a step; forgotten when nobody can go back to it any more."""
        known = self._known.get(step)
        if known is None:
            self._known = {key: value for key, value in self._known.items() if key >= step - self.balancer.delay}
            drawn = self.batches.batch(step)
            order, partition = in_order_of_ranks(self._decide(step, drawn))
            views = tuple(drawn[place] for place in order)
            known = _Decision(views, partition, self.balancer.row_costs(views) if self._learns_costs else None)
            self._known[step] = known
        return known

    def _decide(self, step: int, views: tuple[int, ...]) -> PixelPartition:
        heights = tuple(self.balancer.heights[view] for view in views)
        if self.communicator.size == 1:  # what the balancer would say, without the search
            return _all_for_one(heights)
        if isinstance(self.batches, LocalViews):
            return self.batches.partition(heights)
        return self.balancer.assign(step, views)

    def observe(self, step: int, numbers: StepNumbers) -> None:
        """Remember what a step cost; it counts `delay` steps later. A view drawn twice counts once."""
        if self._learns_costs:
            views = self.views(step)
            pairs = dict(zip(views, numbers.pairs, strict=True))
            owned = dict(zip(views, numbers.owned, strict=True))
            self.balancer.observe(step, pairs, owned)

    def history(self, step: int, numbers: StepNumbers) -> dict[str, Any]:
        """What was decided for a step, on which estimate, and what it cost in pairs."""
        decision = self._decision(step)
        costs = decision.costs if decision.costs is not None else self.balancer.row_costs(decision.views)
        return {
            "views": list(decision.views),
            "regions": decision.partition.to_plain(),
            "expected": loads_of(decision.partition, [view.rows for view in costs]),
            "counted": loads_of(decision.partition, numbers.pairs),
        }


@dataclass(frozen=True)
class Redistribution:
    """Rows of each rank before and after they were shared out again, and how many moved in all."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    moved: int


@dataclass
class RowShares:
    """Shares out the Gaussians: at the start, and again when events have left the shards uneven.

    mode: a key of KIND_OF_MODE. frequency: events between two looks at the balance. threshold: largest over smallest
    shard that is tolerated. num_events: events of density control and pruning so far.
    """

    communicator: Communicator
    mode: str
    frequency: int
    threshold: float
    seed: int
    num_events: int = 0

    def share_out(self, table: GaussianTable) -> Redistribution:
        """Give every rank its part of all tables. All ranks."""
        ranks = self.communicator
        before = len(table)
        move = plan_move(table, ranks, KIND_OF_MODE[self.mode], seed=self.seed, event=self.num_events)
        move_rows(table, move)
        counts = ranks.gather_counts([before, len(table), move.num_leaving])  # all ranks
        return Redistribution(
            tuple(row[0] for row in counts), tuple(row[1] for row in counts), sum(row[2] for row in counts)
        )

    def after_event(self, table: GaussianTable) -> Redistribution | None:
        """Share out again when this event is one to look at the balance and the shards are uneven. All ranks."""
        self.num_events += 1
        is_due = Schedule(1, self.num_events, self.frequency).fires(Window(self.num_events, 1))
        if self.mode == "no_redistribute" or not is_due:
            return None
        counts = [row[0] for row in self.communicator.gather_counts([len(table)])]  # all ranks
        return self.share_out(table) if needs_recut(counts, self.threshold) else None


def shares_to_plain(pixels: PixelShares, rows: RowShares) -> dict[str, Any]:
    """What later decisions depend on, for a checkpoint."""
    return {"balancer": pixels.balancer.to_plain(), "num_events": rows.num_events}


def restore_shares(pixels: PixelShares, rows: RowShares, plain: Mapping[str, Any]) -> None:
    """Become the shares that `shares_to_plain` described; nothing for a checkpoint that has none."""
    rows.num_events = int(plain.get("num_events", 0))
    if plain.get("balancer"):
        pixels.balancer.restore(plain["balancer"])
