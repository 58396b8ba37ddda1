# SPDX-License-Identifier: Apache-2.0
"""Which views are drawn in which step: a pure function of (seed, step), the same on every rank without talking."""

from __future__ import annotations

from masksplat import random


class ViewSampler:
    """Batches of view indices that walk through epochs; every epoch is a permutation of all views.

    A batch may begin in one epoch and end in the next. Such a batch could hold a view twice; so the new epoch's
    permutation is reordered: the views that the batch already has are moved, in their order, behind those that complete
    it. Epochs stay permutations, no batch of at most `num_views` views holds one twice, and since every
    (batch_size / gcd(batch_size, num_views))-th epoch begins with a batch, each order follows from the few epochs since
    such a one: the memory in here only saves time.
    """

    def __init__(self, num_views: int, batch_size: int, seed: int) -> None:
        """Raises ValueError unless both counts are at least 1. Batches of more than `num_views` repeat views."""
        if num_views < 1 or batch_size < 1:
            raise ValueError(f"num_views {num_views} and batch_size {batch_size} must both be at least 1")
        self._num_views = num_views
        self._batch_size = batch_size
        self._seed = seed
        self._orders: dict[int, list[int]] = {}  # of the two epochs used last

    def batch(self, step: int) -> tuple[int, ...]:
        """Returns the `batch_size` view indices of batch number `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step} must not be negative")
        first = step * self._batch_size
        return tuple(self._view(position) for position in range(first, first + self._batch_size))

    def _view(self, position: int) -> int:
        epoch, place = divmod(position, self._num_views)
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[int]:
        """Returns the views of an epoch in their order; walks there from the last known or aligned epoch."""
        if epoch in self._orders:
            return self._orders[epoch]
        start = epoch
        while self._num_carried(start) and start - 1 not in self._orders:
            start -= 1
        order = self._orders.get(start - 1, [])
        for current in range(start, epoch + 1):
            order = self._next_order(current, order)
        self._orders[epoch] = order
        if len(self._orders) > 2:
            del self._orders[next(iter(self._orders))]
        return order

    def _num_carried(self, epoch: int) -> int:
        """Returns how many views of the batch in which `epoch` begins belong to the epoch before."""
        if self._batch_size > self._num_views:
            return 0
        return epoch * self._num_views % self._batch_size

    def _next_order(self, epoch: int, previous: list[int]) -> list[int]:
        order = random.permutation(self._seed, epoch, self._num_views)
        num_carried = self._num_carried(epoch)
        if num_carried == 0:
            return order
        carried = set(previous[-num_carried:])
        num_missing = self._batch_size - num_carried
        head = [view for view in order if view not in carried][:num_missing]
        chosen = set(head)
        return head + [view for view in order if view not in chosen]
