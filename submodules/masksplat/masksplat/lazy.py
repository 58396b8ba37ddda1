# SPDX-License-Identifier: Apache-2.0
"""Adam updates that rows without a gradient have not had yet, and that they are given when somebody looks at them.

Dense Adam moves rows without a gradient, too, and streams all of them through memory in every step to do so. A lazy
update leaves them alone until they are seen, and then makes up for what they missed: on a GPU update by update in the
roundings of the dense kernel, with the same bits; on a CPU several updates at once, rounded once (`cpu/lazy_adam.py`).

Letters: N Gaussians, F updates that can be made up for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

CAPACITY = 128
"""F: after so many updates all rows are caught up. A pass over all rows costs as much as a dense update."""

FACTORS = 7
"""Numbers of an update in `LazyRows.ring`, in the order of the body's Adam kernels."""


class Behind(NamedTuple):
    """Rows of one attribute as they lie in memory, some behind: from here updates go on to the same bits.

    The tensors of `LazyRows` by their names there.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor
    ring: Tensor

    @classmethod
    def of_nothing(cls, no_rows: Tensor) -> Behind:
        """No row is behind. no_rows: (0, ...), of the rows' shape and kind."""
        updates = torch.empty(0, dtype=torch.int32, device=no_rows.device)
        return cls(no_rows, no_rows.clone(), no_rows.clone(), updates, no_rows.new_zeros(CAPACITY, FACTORS))


@dataclass(eq=False)
class LazyRows:
    """The rows of one attribute with their moments, and which updates each of them has had.

    param, exp_avg, exp_avg_sq: (N, ...), contiguous. catch_up: the body's pass that brings all rows up to `latest`;
    while the body's status words note an overflow it changes nothing. latest: the last update that was begun.
    block: so many rows, one after the other, are behind together. leg: what is made up for at once ends at multiples of
    so many updates; whoever looks at rows in between cuts it in two, which leaves other last bits (`hold`).
    updates: (ceil(N / block),) int32, the last update that each block has had. ring: (F, FACTORS), numbers of update u
    in row u % F.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    catch_up: Callable[[LazyRows], None]
    latest: int
    block: int = 1
    leg: int = 1
    updates: Tensor = field(init=False)
    ring: Tensor = field(init=False)
    _settled: list[int] = field(init=False)  # updates after which all rows were caught up, oldest first

    def __post_init__(self) -> None:
        """All rows have had the updates up to `latest`."""
        device = self.param.device
        self.updates = torch.full((-(-len(self.param) // self.block),), self.latest, dtype=torch.int32, device=device)
        self.ring = torch.zeros((CAPACITY, FACTORS), dtype=self.param.dtype, device=device)
        self._settled = [self.latest]

    def begin(self, update: int) -> None:
        """Update number `update` is about to be made: of the rows that are seen now, of the others later.

        Raises: ValueError when it does not follow the last one.
        """
        if update != self.latest + 1:
            raise ValueError(f"update {update} cannot follow update {self.latest}: rows that are behind would miss one")
        is_late = update - self._settled[-1] > CAPACITY - (self.leg - 1)
        if is_late and self.latest % self.leg == 0:
            self.settle()  # the ring is about to lose the oldest update
        self.latest = update

    def settle(self) -> None:
        """Bring all rows up to the last update."""
        if self._settled[-1] == self.latest:
            return
        self.catch_up(self)
        while len(self._settled) > 1 and self._settled[1] < self.latest - CAPACITY // 2:
            del self._settled[0]
        self._settled.append(self.latest)

    def hold(self) -> Behind | None:
        """A copy of the rows as they lie, if some are behind and a look at them would leave a trace in later bits."""
        is_trace_left = self.latest % self.leg != 0 and bool((self.updates < self.latest).any())
        return Behind(*(tensor.clone() for tensor in self._tensors())) if is_trace_left else None

    def fall_back(self, behind: Behind) -> None:
        """Let the rows lie as they did, after the same last update."""
        for tensor, before in zip(self._tensors(), behind, strict=True):
            tensor.copy_(before)
        self._settled = [int(self.updates.min())]

    def _tensors(self) -> Behind:
        return Behind(self.param, self.exp_avg, self.exp_avg_sq, self.updates, self.ring)

    def rewind(self, count: int) -> None:
        """Forget the last `count` updates, which changed nothing because a buffer had been too small.

        What was caught up since may have changed nothing, either, and is caught up again.
        """
        self.latest -= count
        while len(self._settled) > 1 and self._settled[-1] >= self.latest:
            del self._settled[-1]
