# SPDX-License-Identifier: Apache-2.0
"""Which rank owns which Gaussians, and how rows move when that changes.

The default is spatial: centres are ordered along a Morton curve and cut into contiguous ranges of equally many rows.
Every partition is a function of the set of (centre, id) alone, not of where the rows are now. A `RowMove` then carries
any tensor of N rows; it knows nothing of attributes, moments or statistics.

Letters: N rows of this rank before a move, R after it, W ranks, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distributed.communicator import Communicator
from masksplat.random import words

MORTON_BITS = 21
"""Bits of each axis in a Morton code; three axes fill 63 bits."""

RECUT_THRESHOLD = 1.1
"""Largest over smallest shard above which shards are cut again."""

RANDOM_OWNER_STREAM = 6
"""Stream of `masksplat.random` for the random partition."""

PARTITION_KINDS = ("morton", "random", "round_robin")


class Summing(Protocol):
    """Sums over ranks; every rank calls it in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks."""


def morton_codes(means: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N,) int64 >= 0: the place of each centre along a Morton curve through the box from `low` to `high`.

    Args: means: (N, 3), not-a-number counts as `low`; low, high: (3,), equal on all ranks. Centres outside the box
    count as on its surface. Bits are x, y, z in turn, x highest.
    """
    extent = (high - low).double().clamp_min(torch.finfo(torch.float64).tiny)
    cells = 1 << MORTON_BITS
    scaled = torch.nan_to_num((means.double() - low.double()) / extent * cells, nan=0.0)
    grid = scaled.clamp(0, cells - 1).to(torch.int64)
    spread = _spread_bits(grid)
    return (spread[:, 0] << 2) | (spread[:, 1] << 1) | spread[:, 2]


def _spread_bits(values: Tensor) -> Tensor:
    """Bit k of each 21-bit number moved to bit 3 k."""
    values = (values | (values << 32)) & 0x1F00000000FFFF
    values = (values | (values << 16)) & 0x1F0000FF0000FF
    values = (values | (values << 8)) & 0x100F00F00F00F00F
    values = (values | (values << 4)) & 0x10C30C30C30C30C3
    return (values | (values << 2)) & 0x1249249249249249


def bounding_box(means: Tensor, communicator: Communicator) -> tuple[Tensor, Tensor]:
    """Lowest and highest finite coordinates over all ranks, (3,) each; zeros when there is no row."""
    finite = torch.where(torch.isfinite(means), means, torch.nan)
    ends = torch.full((1, 6), -torch.inf, dtype=means.dtype, device=means.device)
    both = torch.nan_to_num(torch.cat([-finite, finite], dim=1), nan=-torch.inf)
    highest = communicator.max(torch.cat([both, ends]).amax(0))  # all ranks
    highest = torch.where(torch.isfinite(highest), highest, 0)
    return -highest[:3], highest[3:]


def morton_owners(codes: Tensor, ids: Tensor, num_parts: int, ranks: Summing) -> Tensor:
    """(N,) int64: the part of each row when all rows, in order of (code, id), are cut into contiguous ranges.

    Parts differ by at most one row over all ranks, also when codes are equal. Args: codes, ids: (N,) int64 >= 0.
    """
    order = _order_of(codes, ids)
    codes_sorted, ids_sorted = codes[order].contiguous(), ids[order].contiguous()
    total = int(ranks.sum(torch.tensor([len(codes)])))  # host sync, all ranks
    parts = torch.arange(1, num_parts, device=codes.device)
    targets = total * parts // num_parts  # rows before each cut
    last_codes = _smallest_reaching(lambda keys: torch.searchsorted(codes_sorted, keys, right=True), targets, ranks)
    below = torch.searchsorted(codes_sorted, last_codes)
    beyond = torch.searchsorted(codes_sorted, last_codes, right=True)
    ties = [ids_sorted[first:last] for first, last in zip(below.tolist(), beyond.tolist(), strict=True)]
    ties_wanted = targets - ranks.sum(below)  # all ranks
    last_ids = _smallest_reaching(lambda keys: _count_each(ties, keys), ties_wanted, ranks)
    owners = torch.zeros_like(codes)
    for target, code, number in zip(targets.tolist(), last_codes.tolist(), last_ids.tolist(), strict=True):
        owners += ((codes > code) | ((codes == code) & (ids > number))) if target > 0 else 1
    return owners


def _count_each(runs: Sequence[Tensor], keys: Tensor) -> Tensor:
    """(P - 1,): how many numbers of each ascending run are <= its key."""
    counts = [torch.searchsorted(run, key.reshape(1), right=True) for run, key in zip(runs, keys, strict=True)]
    return torch.cat([*counts, keys[:0]])


def _smallest_reaching(count_up_to: Callable[[Tensor], Tensor], targets: Tensor, ranks: Summing) -> Tensor:
    """For each target the smallest key in [0, 2**63) with at least that many rows, over all ranks, up to the key.

    Bisection bit by bit: 63 small sums whatever the number of rows. All ranks.
    """
    found = torch.zeros_like(targets)
    for bit in range(62, -1, -1):
        largest_below = found + ((1 << bit) - 1)
        reached = ranks.sum(count_up_to(largest_below)) >= targets  # all ranks
        found = torch.where(reached, found, largest_below + 1)
    return found


def _order_of(codes: Tensor, ids: Tensor) -> Tensor:
    """(N,) int64: the rows in order of (code, id)."""
    by_id = torch.argsort(ids, stable=True)
    return by_id[torch.argsort(codes[by_id], stable=True)]


def random_owners(ids: Tensor, num_parts: int, seed: int, event: int) -> Tensor:
    """(N,) int64: a random part for each id, another one at each event."""
    return words(seed, event, ids, RANDOM_OWNER_STREAM)[:, 0] * num_parts >> 32


def round_robin_owners(ids: Tensor, num_parts: int) -> Tensor:
    """(N,) int64: id modulo parts. The first cloud has ids 0, 1, 2 ...; later ids are hashes."""
    return ids % num_parts


def needs_recut(counts: Sequence[int], threshold: float = RECUT_THRESHOLD) -> bool:
    """Whether shards of these numbers of rows differ by more than `threshold` (max / min) and cutting would help."""
    fair = -(-sum(counts) // len(counts))
    return max(counts) > threshold * min(counts) and max(counts) > fair


@dataclass(frozen=True, eq=False)
class RowMove:
    """Where each row of this rank goes, and in which order the rows that arrive are kept.

    send_order: (N,) int64, rows by destination. receive_order: (R,) int64, arrived rows in order of (code, id).
    """

    communicator: Communicator
    send_order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    receive_order: Tensor

    @classmethod
    def to_owners(cls, communicator: Communicator, owners: Tensor, codes: Tensor, ids: Tensor) -> RowMove:
        """The move of each row to its owner, (N,) int64 ranks. Rows are kept in order of (code, id). All ranks.

        The order depends on the rows alone, so a rank that owns the same rows keeps them in the same order.
        Raises: ValueError for an owner that is no rank.
        """
        if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < communicator.size:  # host sync
            raise ValueError(f"owners {int(owners.min())}..{int(owners.max())} are not ranks below {communicator.size}")
        send_counts = torch.bincount(owners, minlength=communicator.size).tolist()
        one_each = [1] * communicator.size
        receive_counts = communicator.all_to_all_rows(torch.tensor(send_counts), one_each, one_each).tolist()
        order = torch.argsort(owners, stable=True)
        keys = torch.stack([codes, ids], dim=1)[order]
        arrived = communicator.all_to_all_rows(keys, send_counts, receive_counts)
        kept = _order_of(arrived[:, 0], arrived[:, 1])
        return cls(communicator, order, tuple(send_counts), tuple(receive_counts), kept)

    def __len__(self) -> int:
        """R, the number of rows after the move."""
        return len(self.receive_order)

    @property
    def num_leaving(self) -> int:
        """Rows that this rank gives to others."""
        return sum(self.send_counts) - self.send_counts[self.communicator.rank]

    def carry(self, values: Tensor) -> Tensor:
        """(R, *shape): the tensor after the move, from (N, *shape) before it; any dtype but bool. All ranks."""
        if len(values) != len(self.send_order):
            raise ValueError(f"{len(values)} rows do not fit a move of {len(self.send_order)}")
        arrived = self.communicator.all_to_all_rows(values[self.send_order], self.send_counts, self.receive_counts)
        return arrived[self.receive_order]
