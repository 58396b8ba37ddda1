# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one JSON object per line, written as things happen and never rewritten.

Each line has a "kind" (run, step, evaluation, mask_histogram, edit, phases, saved, end) and that kind's numbers; the
report and other programs read it while the training is running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from scene.errors import InputError


class MetricsLog:
    """A writer of metrics.jsonl; a context manager. Every line reaches the operating system before `write` returns."""

    def __init__(self, path: Path | None, *, append: bool = False) -> None:
        """Opens the log.

        Args:
            path: file to write; None writes nowhere (ranks other than 0).
            append: continue an existing file, as a resumed run does; otherwise it starts empty.

        Raises:
            InputError: the file cannot be opened.
        """
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            if append:
                _end_last_line(path)
            self._file = path.open("a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error.strerror}. Choose another model folder with -m."
            ) from error

    def write(self, kind: str, entries: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Appends {"kind": kind, **entries, **more}.

        Numbers may be NumPy or torch scalars; non-finite ones are written as null, because JSON has no NaN.

        Raises:
            TypeError: a value is neither a number, text, Boolean, None, nor a list or mapping of them.
            InputError: the disk is full, or the file cannot be written for another reason.
        """
        if self._file is None:
            return
        line = {"kind": kind, **_plain({**(entries or {}), **more})}
        text = json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._file.name} cannot be written any more: {error.strerror}. Free some space, and go on from the "
                "newest checkpoint with --auto_start_checkpoint, if there is one (--checkpoint_iterations)"
            ) from error

    def close(self) -> None:
        """Closes the file; writing afterwards is an error."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end_last_line(path: Path) -> None:
    """Ends a line that a crash has cut, so that the next one stands alone."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return _plain(value.tolist())
    raise TypeError(f"metrics.jsonl cannot hold a {type(value).__name__}: {value!r}")
