# SPDX-License-Identifier: Apache-2.0
"""The curves of report.html as plain data: which series, in which colour, with which points.

The page draws them (`report_assets/charts.js`). A chart without data is left out. x is always the iteration, which
counts images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.log_reader import Record, RunLog

MOST_POINTS = 1200  # of one curve; beyond it, neighbours are averaged
MOST_COLUMNS = 72  # of the heat map
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve: `color` is 1 to 6; `faint` draws thin behind the others, `dots` marks the points, `step` holds
    values."""

    name: str
    color: int
    points: tuple[Point, ...]
    faint: bool = False
    dashed: bool = False
    dots: bool = False
    step: bool = False


@dataclass(frozen=True)
class Chart:
    """One diagram; `unit` follows the values, `decimals` is for exact values, `zero` starts the y axis at 0."""

    id: str
    title: str
    series: tuple[Series, ...]
    subtitle: str = ""
    unit: str = ""
    decimals: int = 0
    zero: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the chart as JSON values."""
        return asdict(self)


def build_charts(log: RunLog) -> list[Chart]:
    """Return the charts that the log has data for, in the order of the page."""
    charts = (_loss(log), _psnr(log), _gaussians(log), _events(log), _speed(log), _memory(log))
    return [chart for chart in charts if chart is not None]


def heat_map(log: RunLog) -> dict[str, Any] | None:
    """Return the mask histograms as {title, iterations, counts (columns of bins), maximum}, or None without masks."""
    usable = [record for record in log.mask_histograms if record.get("counts")]
    if not usable:
        return None
    shown = _spread(usable, MOST_COLUMNS)
    counts = [[int(count) for count in record["counts"]] for record in shown]
    return {
        "title": "Keep probability of the Gaussians",
        "iterations": [int(record["iteration"]) for record in shown],
        "counts": counts,
        "maximum": max(1, max(max(column) for column in counts)),
    }


def column(records: Sequence[Record], key: str, *, factor: float = 1.0) -> tuple[Point, ...]:
    """Return (iteration, factor * record[key]) of the records that have the number."""
    return tuple(
        (float(record["iteration"]), factor * float(record[key]))
        for record in records
        if _is_number(record.get(key)) and _is_number(record.get("iteration"))
    )


def thin(points: tuple[Point, ...], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """Return at most `most` points: the means of neighbouring ones, or the points themselves when they are few
    enough."""
    if len(points) <= most:
        return points
    bounds = [round(i * len(points) / most) for i in range(most + 1)]
    groups = (points[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False))
    return tuple((group[-1][0], sum(y for _, y in group) / len(group)) for group in groups)


def smooth(points: tuple[Point, ...], share: float = 0.04) -> tuple[Point, ...]:
    """Return the running mean of the y values over a centred window of the given share of the points, at least 3."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)  # symmetric, so that the ends are not biased
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return tuple(result)


def _loss(log: RunLog) -> Chart | None:
    loss, l1 = column(log.steps, "loss"), column(log.steps, "l1")
    if not loss:
        return None
    series = [
        Series("loss of single steps", 1, thin(loss), faint=True),
        Series("loss, running mean", 1, thin(smooth(loss))),
    ]
    if l1:
        series.append(Series("L1, running mean", 2, thin(smooth(l1))))
    return Chart("loss", "Training loss", tuple(series), decimals=4, zero=True)


def _psnr(log: RunLog) -> Chart | None:
    series = []
    for color, split, name in ((1, "test", "test views"), (2, "train", "training views")):
        points = column([record for record in log.evaluations if record.get("split") == split], "psnr")
        if points:
            series.append(Series(name, color, points, dots=True))
    return Chart("psnr", "PSNR", tuple(series), subtitle="dB", unit="dB", decimals=2) if series else None


def _gaussians(log: RunLog) -> Chart | None:
    counts, expected = column(log.steps, "num_gaussians"), column(log.steps, "expected_gaussians")
    if not counts:
        return None
    series = [Series("Gaussians", 1, thin(counts))]
    if any(abs(a[1] - b[1]) > 0.5 for a, b in zip(counts, expected, strict=False)):
        series.append(Series("expected to be kept (sum of probabilities)", 2, thin(expected), dashed=True))
    return Chart("gaussians", "Gaussians", tuple(series), zero=True)


def _events(log: RunLog) -> Chart | None:
    kinds = (
        ("cloned", "cloned", 3),
        ("split", "split", 5),
        ("pruned_mask", "pruned by mask", 2),
        ("pruned_opacity", "pruned by opacity", 4),
        ("pruned_size", "pruned by size", 6),
    )
    series = []
    for key, name, color in kinds:
        points = _running_sum(column(log.edits, key))
        if points and points[-1][1] > 0:
            series.append(Series(name, color, thin(points), step=True))
    return Chart("events", "Density control", tuple(series), subtitle="running totals", zero=True) if series else None


def _speed(log: RunLog) -> Chart | None:
    """Images per second between neighbouring step lines."""
    seconds = ((0.0, 0.0), *column(log.steps, "seconds"))
    points = tuple(
        (after[0], (after[0] - before[0]) / (after[1] - before[1]))
        for before, after in zip(seconds, seconds[1:], strict=False)
        if after[0] > before[0] and after[1] > before[1]
    )
    if not points:
        return None
    series = Series("images per second", 3, thin(points))
    return Chart("speed", "Speed", (series,), subtitle="images/s", unit="images/s", decimals=1, zero=True)


def _memory(log: RunLog) -> Chart | None:
    points = column(log.steps, "memory_bytes", factor=1 / 2**20)
    if not points:
        return None
    return Chart("memory", "Memory", (Series("MiB in use", 5, thin(points)),), subtitle="MiB", unit="MiB", zero=True)


def _running_sum(points: tuple[Point, ...]) -> tuple[Point, ...]:
    total, result = 0.0, []
    for x, y in points:
        total += y
        result.append((x, total))
    return tuple(result)


def _spread(records: Sequence[Record], most: int) -> list[Record]:
    """Return at most `most` of the records, evenly spread, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
