# SPDX-License-Identifier: Apache-2.0
"""The tensors of a table by attribute, such that nobody can read rows whose Adam updates are behind.

A body may leave the updates of rows that are not drawn for later (`masksplat.lazy`). Parameters and both moments of an
attribute fall behind together, so the three mappings of a table share one `Backlog`: whoever asks a mapping for that
attribute has all its rows brought up to date first, and whoever replaces it ends the backlog. Only the training step
takes the tensors as they are (`stored`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from torch import Tensor

from masksplat.lazy import Behind, LazyRows

LAZY_ATTRIBUTE = "shN"
"""The attribute whose rows may be behind: 45 of a Gaussian's 59 numbers at degree 3."""


class Backlog:
    """Which rows of LAZY_ATTRIBUTE are behind; `rows` is None where none can be.

    held: how the rows lay when a look began that shall leave no trace, or when the checkpoint was written that they
    come from; None where they are up to date, or a look makes no difference.
    """

    def __init__(self, held: Behind | None = None) -> None:
        self.rows: LazyRows | None = None
        self.held = held

    def begin(self, rows: LazyRows | None) -> None:
        """Rows may be behind from now on, and are at once where a training goes on that had such rows."""
        held, self.held, self.rows = self.held, None, rows
        if rows is not None and held is not None and rows.leg > 1 and rows.updates.shape == held.updates.shape:
            rows.fall_back(held)

    def hold(self) -> None:
        """A look begins."""
        if self.rows is not None:
            self.held = self.rows.hold()

    def fall_back(self) -> None:
        """A look has ended."""
        if self.rows is not None:
            if self.held is not None:
                self.rows.fall_back(self.held)
            self.held = None

    def settle(self, name: str) -> None:
        """Make the updates that rows of the attribute `name` have missed."""
        if name == LAZY_ATTRIBUTE and self.rows is not None:
            self.rows.settle()

    def end(self, name: str) -> None:
        """Settle, and forget the tensors of the attribute `name`: others are about to take their place."""
        self.settle(name)
        if name == LAZY_ATTRIBUTE:
            self.rows = self.held = None

    def rewind(self, count: int) -> None:
        """Forget the last `count` updates, which changed nothing."""
        if self.rows is not None:
            self.rows.rewind(count)


class AttributeTensors(MutableMapping[str, Tensor]):
    """Attribute name -> (N, *shape), as the last update left it."""

    def __init__(self, tensors: Mapping[str, Tensor], backlog: Backlog) -> None:
        self._tensors = dict(tensors)
        self._backlog = backlog

    def __getitem__(self, name: str) -> Tensor:
        self._backlog.settle(name)
        return self._tensors[name]

    def __setitem__(self, name: str, values: Tensor) -> None:
        self._backlog.end(name)
        self._tensors[name] = values

    def __delitem__(self, name: str) -> None:
        self._backlog.end(name)
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors as they lie in memory, some rows perhaps behind: for the training step alone."""
        return self._tensors
