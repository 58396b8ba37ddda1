# SPDX-License-Identifier: Apache-2.0
"""Moving Gaussians between ranks: the table's side of `distributed.partition`.

A repartition changes on which rank a row is and nothing else: parameters, Adam moments, statistics and ids travel.

Letters: N rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.partition import (
    PARTITION_KINDS,
    RowMove,
    bounding_box,
    morton_codes,
    morton_owners,
    random_owners,
    round_robin_owners,
)
from scene.gaussians import GaussianTable
from scene.row_edit import RowEdit


def plan_move(table: GaussianTable, communicator: Communicator, kind: str, *, seed: int = 0, event: int = 0) -> RowMove:
    """The move that gives every rank its part of all tables. All ranks.

    Args: kind: "morton" (contiguous in space, equal numbers of rows), "random" (by seed and event) or "round_robin".
    Raises: ValueError for another kind.
    """
    if kind not in PARTITION_KINDS:
        raise ValueError(f"unknown partition {kind!r}; choose one of {', '.join(PARTITION_KINDS)}")
    means = table.params["means"]
    codes = morton_codes(means, *bounding_box(means, communicator))
    if kind == "morton":
        owners = morton_owners(codes, table.ids, communicator.size, communicator)
    elif kind == "random":
        owners = random_owners(table.ids, communicator.size, seed, event)
    else:
        owners = round_robin_owners(table.ids, communicator.size)
    return RowMove.to_owners(communicator, owners, codes, table.ids)


def move_rows(table: GaussianTable, move: RowMove) -> None:
    """Carry out a move by replacing tensor after tensor. All ranks.

    In a world of one it is a `RowEdit` that sorts the rows, so nothing travels and nothing is copied twice.
    """
    if not move.communicator.has_group:
        table.apply(_sorting_edit(table.ids, move))
        return
    for tensors in (table.params, table.exp_avg, table.exp_avg_sq, table.statistics):
        for name in tensors:
            tensors[name] = move.carry(tensors[name])
    table.ids = move.carry(table.ids)


def _sorting_edit(ids: Tensor, move: RowMove) -> RowEdit:
    """The edit that a move within one rank is."""
    source = move.send_order[move.receive_order]
    return RowEdit(source=source, is_new=torch.zeros_like(source, dtype=torch.bool), ids=ids[source])
