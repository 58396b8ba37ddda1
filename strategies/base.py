# SPDX-License-Identifier: Apache-2.0
"""What every strategy offers to the training step, and how a decision sees all ranks.

A strategy gets tensors of the Gaussian table; it knows nothing about rendering. Edits are values (`scene.row_edit`):
the training step applies each to the table before it asks for the next, so a later edit sees the earlier one's result.

Letters: N rows of this rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from scene.gaussians import GaussianTable
from scene.row_edit import TableEdit
from strategies.optimizer_scaling import OptimizerScaling
from strategies.schedule import Window


@dataclass(frozen=True, eq=False)
class Gate:
    """What a strategy puts between the table and the renderer for one step: a mask, or factors, not both.

    mask: (N,) in {0, 1}, what the renderer multiplies each alpha with; None: every Gaussian is drawn.
    opacity_factor, scale_factor: (N,) in [0, 1], what multiplies opacities and scales after their activation; with
    both, they are the same values, and the step returns the sum of the gradients by the two.
    num_drawn: () int64 on the mask's device, how many are 1. num_drawn_of_all: those of all ranks, which are known
    when the step was drawn; None before.
    keep_gradient: (N,) derivative of the mask or of the factors by the learned number behind it, for the strategy's
    own backward.
    """

    mask: Tensor | None = None
    keep_gradient: Tensor | None = None
    opacity_factor: Tensor | None = None
    scale_factor: Tensor | None = None
    num_drawn: Tensor | None = None
    num_drawn_of_all: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LateNumber:
    """A number for the log, made from a () tensor that the host has not read yet."""

    source: Tensor
    formula: Callable[[float], float]


Numbers = Mapping[str, float | LateNumber]
"""What a strategy says of a step."""

MASK_NUMBERS = 6
"""Numbers that an update of masks reads (`masksplat.cuda.mask.update_numbers`)."""


class RankReducer(Protocol):
    """Reductions over all ranks; every rank calls them in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks."""

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum over ranks."""


class OneRank:
    """The reductions of a world of one."""

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


class Strategy(Protocol):
    """Something that changes the set of Gaussians while they are trained."""

    def sample(self, table: GaussianTable, window: Window, seed: int) -> Gate | None:
        """The gate of this step, or None when everything is drawn as it is."""

    def after_backward(
        self, table: GaussianTable, window: Window, gate: Gate | None, d_gate: Tensor | None, hyper: OptimizerScaling
    ) -> Numbers:
        """Update what the strategy itself learns; return numbers for the log.

        It need not wait for a device (`LateNumber`). Call it while `table.num_updates` still counts the finished
        updates, that is before it is increased. d_gate: (N,) gradient of the step's loss (views weighted by
        `hyper.view_weight`) by the gate's mask, or the sum
        of those by its factors.
        """

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """The edits that are due after the optimizer's update; apply each before asking for the next."""

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, the rows that exist for evaluation and in saved models. Deterministic."""


@runtime_checkable
class LooksAtRows(Protocol):
    """A strategy with steps that cannot be queued before the ones in front of them are over."""

    def looks_at_rows(self, window: Window) -> bool:
        """Whether it measures, or decides on the host, by what the table holds in a step; a function of the step."""


@dataclass(frozen=True, eq=False)
class MaskMemory:
    """Where recorded launches of the masks read what changes from step to step, on the masks' device.

    step: (1,) int32, what the noise is keyed with. update: (MASK_NUMBERS,) float32, `Recordable.recorded_numbers`.
    """

    step: Tensor
    update: Tensor


@runtime_checkable
class Recordable(Protocol):
    """A strategy whose launches are the same in many steps, so that they can be recorded in one and replayed."""

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> Sequence[float] | None:
        """What must lie in `MaskMemory.update` in a step; nothing without masks. None: do not replay this step."""


@runtime_checkable
class RecordableMasks(Recordable, Protocol):
    """Masks whose launches read `MaskMemory`."""

    def sample(self, table: GaussianTable, window: Window, seed: int, memory: MaskMemory | None = None) -> Gate:
        """See `Strategy`; with `memory`, the step of the noise is what lies there."""

    def after_backward(
        self,
        table: GaussianTable,
        window: Window,
        gate: Gate | None,
        d_gate: Tensor | None,
        hyper: OptimizerScaling,
        memory: MaskMemory | None = None,
    ) -> Numbers:
        """See `Strategy`; with `memory`, the numbers of the update are what lies there."""

    def numbers_of(self, table: GaussianTable, window: Window, hyper: OptimizerScaling, num_drawn: Tensor) -> Numbers:
        """What `after_backward` returns, in a step that was replayed. num_drawn: () int64 of all ranks."""


@runtime_checkable
class Settling(Protocol):
    """A strategy whose factors are part of what is evaluated and saved while it learns them."""

    def settled(self, table: GaussianTable) -> Mapping[str, Tensor]:
        """The parameters, by name, that stand in for the table's; none where nothing is learned."""


class CombinedStrategy:
    """Several strategies as one, in their order; at most one of them gates."""

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self.strategies = tuple(strategies)

    def sample(self, table: GaussianTable, window: Window, seed: int, memory: MaskMemory | None = None) -> Gate | None:
        """The gate of the strategy that has one. Raises: RuntimeError when several have one."""
        drawn = [
            strategy.sample(table, window, seed, memory)
            if memory is not None and isinstance(strategy, RecordableMasks)
            else strategy.sample(table, window, seed)
            for strategy in self.strategies
        ]
        gates = [gate for gate in drawn if gate is not None]
        if len(gates) > 1:
            raise RuntimeError("two strategies gate the same Gaussians; exactly one pruning method can be active")
        return gates[0] if gates else None

    def after_backward(
        self,
        table: GaussianTable,
        window: Window,
        gate: Gate | None,
        d_gate: Tensor | None,
        hyper: OptimizerScaling,
        memory: MaskMemory | None = None,
    ) -> Numbers:
        """Every strategy's own update; the numbers of all."""
        numbers: dict[str, float | LateNumber] = {}
        for strategy in self.strategies:
            if memory is not None and isinstance(strategy, RecordableMasks):
                numbers.update(strategy.after_backward(table, window, gate, d_gate, hyper, memory))
            else:
                numbers.update(strategy.after_backward(table, window, gate, d_gate, hyper))
        return numbers

    def recorded_numbers(self, table: GaussianTable, window: Window, hyper: OptimizerScaling) -> Sequence[float] | None:
        """See `Recordable`; None as soon as one of the strategies does not replay the step."""
        numbers: list[float] = []
        for strategy in self.strategies:
            own = strategy.recorded_numbers(table, window, hyper) if isinstance(strategy, Recordable) else None
            if own is None:
                return None
            numbers += own
        return numbers

    def numbers_of(
        self, table: GaussianTable, window: Window, hyper: OptimizerScaling, num_drawn: Tensor | None
    ) -> Numbers:
        """What `after_backward` returns, in a step that was replayed."""
        masks = [strategy for strategy in self.strategies if isinstance(strategy, RecordableMasks)]
        if num_drawn is None or not masks:
            return {}
        return masks[0].numbers_of(table, window, hyper, num_drawn)

    def after_step(self, table: GaussianTable, window: Window, seed: int) -> Iterator[TableEdit]:
        """The edits of the first strategy, then those of the next, which sees the edited table."""
        for strategy in self.strategies:
            yield from strategy.after_step(table, window, seed)

    def looks_at_rows(self, window: Window) -> bool:
        """Whether one of the strategies does in this step; see `LooksAtRows`."""
        return any(isinstance(each, LooksAtRows) and each.looks_at_rows(window) for each in self.strategies)

    def final_params(self, table: GaussianTable) -> dict[str, Tensor]:
        """The parameters of all rows that are evaluated and saved, by name."""
        params = dict(table.params)
        for strategy in self.strategies:
            if isinstance(strategy, Settling):
                params.update(strategy.settled(table))
        return params

    def keep(self, table: GaussianTable) -> Tensor:
        """(N,) bool, the rows that every strategy keeps."""
        kept = torch.ones_like(table.ids, dtype=torch.bool)
        for strategy in self.strategies:
            kept &= strategy.keep(table)
        return kept


def spare_best(remove: Tensor, score: Tensor, ids: Tensor, ranks: RankReducer) -> Tensor:
    """`remove`, (N,) bool, but for the row of the highest score when it would empty the table of all ranks.

    Of several rows with that score, the one with the lowest id stays. Warns when it spares a row.
    """
    counts = ranks.sum(torch.tensor([int(remove.sum()), len(remove)]))  # host sync, all ranks
    if int(counts[0]) < int(counts[1]) or int(counts[1]) == 0:
        return remove
    score = torch.nan_to_num(score.double(), nan=-torch.inf)
    lowest = torch.full((1,), -torch.inf, dtype=torch.float64, device=score.device)
    best = ranks.max(torch.cat([score, lowest]).max())  # all ranks
    no_id = torch.full((1,), torch.iinfo(torch.int64).min, device=ids.device)
    best_id = -ranks.max(torch.cat([-ids[score == best], no_id]).max())  # all ranks
    warnings.warn(
        f"pruning would remove all {int(counts[1])} Gaussians; the best one (id {int(best_id)}) is kept. "
        "Lower --lambda_mask, --prune_percent or --min_opacity, or check the training images.",
        RuntimeWarning,
        stacklevel=2,
    )
    return remove & (ids != best_id)
