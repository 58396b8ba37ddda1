# SPDX-License-Identifier: Apache-2.0
"""Small numbers in the order of the ids: what ties of depth need on other ranks, in fewer bytes than an id.

Ids are unique 63-bit numbers, mostly hashes. The number of an id is how many ids of all ranks are smaller. It stays in
order, but not without gaps, while rows are removed or moved with their numbers; new rows need new numbers.

Letters: N rows of this rank, W ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distributed.communicator import Communicator

SAMPLES = 64
"""Ids of each rank that are looked at to cut all ids into W ranges of about equal length."""


class OrderNumbers(NamedTuple):
    """numbers: (N,) int64, those of this rank's ids. bound: all numbers of all ranks are below it."""

    numbers: Tensor
    bound: int


def order_numbers(ids: Tensor, communicator: Communicator) -> OrderNumbers:
    """How many ids of all ranks are smaller than each of this rank's (N,) int64 ids. All ranks; host syncs.

    Every rank sorts one range of the ids, so none holds them all.
    """
    in_order, order = torch.sort(ids)
    cuts = torch.searchsorted(in_order, _range_ends(in_order, communicator))
    send_counts = torch.cat([cuts, cuts.new_tensor([len(ids)])]).diff(prepend=cuts.new_zeros(1)).tolist()
    counts = communicator.gather_counts(send_counts)  # all ranks
    receive_counts = [row[communicator.rank] for row in counts]
    arrived = communicator.all_to_all_rows(in_order, send_counts, receive_counts)  # all ranks
    before = sum(sum(row[: communicator.rank]) for row in counts)
    places = torch.empty_like(arrived)
    places[torch.argsort(arrived)] = torch.arange(before, before + len(arrived), device=ids.device)
    returned = communicator.all_to_all_rows(places, receive_counts, send_counts)  # all ranks
    numbers = torch.empty_like(ids)
    numbers[order] = returned
    return OrderNumbers(numbers, sum(map(sum, counts)))


def _range_ends(in_order: Tensor, communicator: Communicator) -> Tensor:
    """(W - 1,) ascending ids, equal on all ranks: the first id of the second range, of the third, ..."""
    places = torch.arange(SAMPLES, device=in_order.device) * len(in_order) // SAMPLES
    highest = in_order.new_full((SAMPLES,), torch.iinfo(torch.int64).max)
    samples = communicator.gather(in_order[places] if len(in_order) else highest)  # all ranks
    pooled = samples.reshape(-1).sort().values
    chosen = torch.arange(1, communicator.size, device=in_order.device) * len(pooled) // communicator.size
    return pooled[chosen]
