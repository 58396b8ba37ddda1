# SPDX-License-Identifier: Apache-2.0
"""Edits of the Gaussian table as values: the one primitive behind prune, clone, split and repartition.

A `RowEdit` says which row each row of the new table is copied from, which rows are new (zero Adam moments and zero
statistics), which values differ from the copied ones, and the ids. A `ValueEdit` rewrites one attribute in place of the
rows (opacity reset). Nothing here knows why an edit is made.

Letters: N rows before the edit, M rows after it, C appended rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class EditReport:
    """What an edit did, for the log. A pruned row counts once: under opacity, else size, else mask."""

    iteration: int
    cloned: int = 0
    split: int = 0
    pruned_opacity: int = 0
    pruned_size: int = 0
    pruned_mask: int = 0
    opacity_reset: bool = False
    num_gaussians: int = 0

    @property
    def num_pruned(self) -> int:
        """Rows removed by any of the tests (parents replaced by their children are not counted)."""
        return self.pruned_opacity + self.pruned_size + self.pruned_mask


@dataclass(frozen=True, eq=False)
class Override:
    """Values of one attribute that differ from the copied ones.

    rows: (R,) int64, distinct rows of the table after the edit. values: (R, *attribute shape).
    """

    rows: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class RowEdit:
    """A new set of rows, described by the old one.

    source: (M,) int64, the old row that each new row copies its parameters from.
    is_new: (M,) bool, rows that start with zero Adam moments and zero statistics.
    ids: (M,) int64, the identities after the edit.
    overrides: attribute name -> values that replace the copied ones.
    resets_statistics: zero the densification statistics of every row.
    """

    source: Tensor
    is_new: Tensor
    ids: Tensor
    overrides: Mapping[str, Override] = field(default_factory=dict)
    resets_statistics: bool = False
    report: EditReport | None = None

    def __post_init__(self) -> None:
        if not self.source.shape == self.is_new.shape == self.ids.shape or self.source.dim() != 1:
            shapes = [tuple(tensor.shape) for tensor in (self.source, self.is_new, self.ids)]
            raise ValueError(f"source, is_new and ids of a RowEdit must have one common shape (M,), got {shapes}")
        if self.source.dtype != torch.int64 or self.ids.dtype != torch.int64 or self.is_new.dtype != torch.bool:
            raise ValueError("a RowEdit takes source and ids as int64 and is_new as bool")

    @classmethod
    def identity(cls, ids: Tensor) -> RowEdit:
        """The edit that changes nothing in a table with these ids, (N,) int64: the start of every composition."""
        source = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        return cls(source=source, is_new=torch.zeros_like(source, dtype=torch.bool), ids=ids)

    def __len__(self) -> int:
        """The number of rows after the edit."""
        return len(self.source)

    def keep(self, is_kept: Tensor) -> RowEdit:
        """This edit followed by the removal of its rows where `is_kept`, (M,) bool, is False."""
        if is_kept.shape != self.source.shape or is_kept.dtype != torch.bool:
            raise ValueError(
                f"is_kept must be bool of shape ({len(self)},), got {is_kept.dtype} {tuple(is_kept.shape)}"
            )
        row_after = torch.cumsum(is_kept, 0) - 1
        overrides = {name: _kept_override(override, is_kept, row_after) for name, override in self.overrides.items()}
        return replace(
            self, source=self.source[is_kept], is_new=self.is_new[is_kept], ids=self.ids[is_kept], overrides=overrides
        )

    def append(self, source: Tensor, ids: Tensor, values: Mapping[str, Tensor] | None = None) -> RowEdit:
        """This edit followed by C new rows.

        Args: source: (C,) int64 rows of the table *before* the edit that are copied; ids: (C,) int64;
        values: attribute name -> (C, *shape), for attributes that are not plain copies.
        """
        rows = torch.arange(len(self), len(self) + len(source), device=source.device)
        overrides = dict(self.overrides)
        for name, new_values in (values or {}).items():
            overrides[name] = _joined_override(overrides.get(name), Override(rows, new_values))
        return replace(
            self,
            source=torch.cat([self.source, source]),
            is_new=torch.cat([self.is_new, torch.ones_like(source, dtype=torch.bool)]),
            ids=torch.cat([self.ids, ids]),
            overrides=overrides,
        )

    def beside_sources(self) -> RowEdit:
        """This edit with its rows in the order of those they are copied from: children lie where their parents do."""
        if not self.is_new.any():  # host sync
            return self
        order = torch.argsort(self.source, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        overrides = {name: Override(place[each.rows], each.values) for name, each in self.overrides.items()}
        return replace(
            self, source=self.source[order], is_new=self.is_new[order], ids=self.ids[order], overrides=overrides
        )

    def preview(self, name: str, values: Tensor) -> Tensor:
        """The attribute `name` after the edit, (M, *shape), from its `values` before it, (N, *shape)."""
        result = values.index_select(0, self.source)
        if name in self.overrides:
            override = self.overrides[name]
            result[override.rows] = override.values.to(result.dtype)
        return result

    def with_report(self, report: EditReport, *, resets_statistics: bool) -> RowEdit:
        """This edit with what the log says about it."""
        return replace(self, report=report, resets_statistics=resets_statistics)


@dataclass(frozen=True, eq=False)
class ValueEdit:
    """New values of one attribute for all rows; the attribute's Adam moments become zero, all else stays.

    name: the attribute. values: (N, *shape).
    """

    name: str
    values: Tensor
    report: EditReport | None = None


TableEdit = RowEdit | ValueEdit


def _kept_override(override: Override, is_kept: Tensor, row_after: Tensor) -> Override:
    """The part of an override whose rows survive, at the rows' new places."""
    survives = is_kept[override.rows]
    return Override(row_after[override.rows[survives]], override.values[survives])


def _joined_override(first: Override | None, second: Override) -> Override:
    """Both overrides as one; their rows are disjoint."""
    if first is None:
        return second
    return Override(torch.cat([first.rows, second.rows]), torch.cat([first.values, second.values]))
