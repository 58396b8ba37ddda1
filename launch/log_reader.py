# SPDX-License-Identifier: Apache-2.0
"""Reads metrics.jsonl, the measurements of a training, also while it is being written.

The writer (`launch/metrics_log.py`) appends whole lines; a crash or a full disk can cut the last one, and a resumed
run goes on behind it. Lines that are no JSON object with a "kind" are therefore left out and counted, not fatal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scene.errors import InputError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunLog:
    """The records of metrics.jsonl by kind, each in file order; numbers that were not finite are None."""

    run: Record
    """Configuration and scene of the run, as it was resumed last; empty when the line is missing."""
    steps: tuple[Record, ...]
    """iteration, loss, l1, ssim, num_gaussians, expected_gaussians, images_per_second, memory_bytes, seconds."""
    evaluations: tuple[Record, ...]
    """iteration, split, psnr, ssim, l1, num_gaussians."""
    mask_histograms: tuple[Record, ...]
    """iteration, counts: Gaussians in equal bins of the keep probability from 0 to 1."""
    edits: tuple[Record, ...]
    """iteration, cloned, split, pruned_opacity, pruned_mask, pruned_size, num_gaussians."""
    phases: tuple[Record, ...]
    """iteration, seconds: phase name -> seconds since the start of the run; clock: "host" or "gpu", whose time."""
    saved: tuple[Record, ...]
    """iteration, path, num_gaussians."""
    end: Record | None
    """seconds, images_per_second, peak_memory_bytes; None while the run is going on or after it was cut off."""
    num_damaged_lines: int
    """Lines that could not be read."""


def read_log(path: Path) -> RunLog:
    """Return the records of a metrics.jsonl.

    Raises:
        InputError: the file cannot be read, or holds no record at all.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(
            f"the training's measurements cannot be read: {path} ({error.strerror}); give the folder that "
            "train.py wrote."
        ) from error
    records = [_parse(line) for line in lines if line.strip()]
    known = _without_repeats([record for record in records if record is not None])
    if not known:
        raise InputError(f"{path} holds no measurement: it is empty or damaged; train again.")

    def of_kind(kind: str) -> tuple[Record, ...]:
        return tuple(record for record in known if record["kind"] == kind)

    return RunLog(
        run=next(reversed(of_kind("run")), {}),
        steps=of_kind("step"),
        evaluations=of_kind("evaluation"),
        mask_histograms=of_kind("mask_histogram"),
        edits=of_kind("edit"),
        phases=of_kind("phases"),
        saved=of_kind("saved"),
        end=next(reversed(of_kind("end")), None),
        num_damaged_lines=len(records) - len(known),
    )


def _without_repeats(records: list[Record]) -> list[Record]:
    """Return the records of the run that led to the newest: what was done again after a resume counts once."""
    kept: list[Record] = []
    for record in records:
        if record["kind"] == "resumed" and isinstance(record.get("iteration"), int):
            done = record["iteration"]
            kept = [each for each in kept if each["kind"] != "end" and _iteration(each) <= done]
        kept.append(record)
    return kept


def _iteration(record: Record) -> float:
    """Return the iteration of a record; those without one belong to the beginning."""
    iteration = record.get("iteration", 0)
    return iteration if isinstance(iteration, int | float) else 0


def _parse(line: str) -> Record | None:
    """Return the record of a line, or None when it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None
