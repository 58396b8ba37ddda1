# SPDX-License-Identifier: Apache-2.0
"""Targets with their verdicts, tables for people, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A number that was promised, and the one that was found (None: not measured)."""

    text: str
    wanted: float
    found: float | None
    unit: str
    at_least: bool = True

    @property
    def verdict(self) -> str:
        """MET, MISSED, or NOT MEASURED."""
        if self.found is None:
            return "NOT MEASURED"
        return "MET" if (self.found >= self.wanted if self.at_least else self.found <= self.wanted) else "MISSED"

    def line(self) -> str:
        """One printed line."""
        bound = f"{'>=' if self.at_least else '<='} {self.wanted:g} {self.unit}"
        found = "-" if self.found is None else f"{self.found:.3g} {self.unit}"
        return f"{self.verdict:12s} {self.text}: {found} (target {bound})"

    def record(self) -> dict[str, Any]:
        """The target as JSON holds it."""
        return {**asdict(self), "verdict": self.verdict}


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first aligned left and the others right."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the folder is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
