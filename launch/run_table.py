# SPDX-License-Identifier: Apache-2.0
"""The table of a suite of runs, as Markdown, JSON and a page of HTML. Needs no torch.

One row for a scene and a method, with the mean over seeds and, from two seeds on, the sample standard deviation; then
one row for each benchmark and method with the mean over its scenes, where every scene is there.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.protocols import METHODS, PROTOCOLS
from launch.run_results import Result
from scene.model_folder import write_json_atomically, write_text_atomically

BASELINE = "3dgs"
MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """A measure: its heading, its value in a result (None where it was not measured), digits, unit."""

    title: str
    value: Callable[[Result], float | None]
    digits: int


COLUMNS = (
    Column("PSNR (dB)", lambda result: result.psnr, 2),
    Column("SSIM", lambda result: result.ssim, 4),
    Column("LPIPS", lambda result: result.lpips, 4),
    Column("Gaussians", lambda result: result.num_gaussians, 0),
    Column("MB", lambda result: result.num_bytes / 1e6, 1),
    Column("train (s)", lambda result: result.seconds, 0),
    Column("peak (GB)", lambda result: result.peak_bytes / 1e9, 2),
    Column("FPS", lambda result: result.frames_per_second, 1),
)
SIZE = next(place for place, column in enumerate(COLUMNS) if column.title == "Gaussians")


@dataclass(frozen=True)
class Cell:
    """Mean over seeds (or scenes), and spread over seeds if there are several."""

    mean: float
    spread: float | None = None

    def text(self, digits: int) -> str:
        """For people; the spread behind a plus-minus sign."""
        spread = "" if self.spread is None else f" ± {self.spread:,.{digits}f}"
        return f"{self.mean:,.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """A line of the table: its group, scene (or "mean"), method, a cell for each column, and how many seeds."""

    protocol: str
    scene: str
    method: str
    cells: tuple[Cell | None, ...]
    num_seeds: int


def rows_of(results: Sequence[Result]) -> list[Row]:
    """The rows of the table, whatever finished first; behind the scenes the means of each group."""
    ordered = sorted(results, key=lambda each: each.seed)
    keys = {(each.protocol, each.scene, each.method) for each in results}
    rows = [
        _row(*key, [each for each in ordered if (each.protocol, each.scene, each.method) == key])
        for key in sorted(keys, key=_place)
    ]
    return rows + _means(rows)


def _place(key: tuple[str, str, str]) -> tuple[int, str, int, str]:
    """Benchmarks and methods in the order of `launch.protocols`, then others, by name; scenes by name."""
    protocol, scene, method = key
    return _index(PROTOCOLS, protocol), scene, _index(METHODS, method), method


def _index(names: Iterable[str], name: str) -> int:
    known = list(names)
    return known.index(name) if name in known else len(known)


def _row(protocol: str, scene: str, method: str, results: Sequence[Result]) -> Row:
    return Row(protocol, scene, method, tuple(_cell(column, results) for column in COLUMNS), len(results))


def _cell(column: Column, results: Sequence[Result]) -> Cell | None:
    values = [value for result in results if (value := column.value(result)) is not None]
    if len(values) < len(results):
        return None
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _means(rows: Sequence[Row]) -> list[Row]:
    """For each group of at least two scenes, the mean of every method that has a row for each of them."""
    means = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        group = [row for row in rows if row.protocol == protocol]
        num_scenes = len({row.scene for row in group})
        for method in dict.fromkeys(row.method for row in group):
            members = [row for row in group if row.method == method]
            if len(members) == num_scenes > 1:
                cells = tuple(_mean_cell([row.cells[place] for row in members]) for place in range(len(COLUMNS)))
                means.append(Row(protocol, MEAN, method, cells, min(row.num_seeds for row in members)))
    return means


def _mean_cell(cells: Sequence[Cell | None]) -> Cell | None:
    known = [cell.mean for cell in cells if cell is not None]
    return Cell(statistics.fmean(known)) if len(known) == len(cells) else None


def pruned_and_lost(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """Against the row of the same scene without pruning: the share of Gaussians that is gone, the change of PSNR."""
    base = [each for each in rows if (each.protocol, each.scene, each.method) == (row.protocol, row.scene, BASELINE)]
    if not base or base[0] is row:
        return "", ""
    size, base_size, psnr, base_psnr = row.cells[SIZE], base[0].cells[SIZE], row.cells[0], base[0].cells[0]
    if size is None or base_size is None or psnr is None or base_psnr is None:
        return "", ""
    return f"{100 * (1 - size.mean / base_size.mean):.1f} %", f"{psnr.mean - base_psnr.mean:+.2f}"


HEADINGS = (
    "scene",
    "method",
    *(column.title for column in COLUMNS),
    f"fewer than {BASELINE}",
    "dB against it",
    "seeds",
)


def _texts(row: Row, rows: Sequence[Row]) -> list[str]:
    """The fields of a row under HEADINGS."""
    scene = f"{row.protocol}: {row.scene}" if row.protocol else row.scene
    cells = ["" if cell is None else cell.text(column.digits) for cell, column in zip(row.cells, COLUMNS, strict=True)]
    return [scene, row.method, *cells, *pruned_and_lost(row, rows), str(row.num_seeds)]


def notes_of(results: Sequence[Result]) -> list[str]:
    """What the rows do not say: where speed was measured, and which runs do not compare with others."""
    notes = []
    devices = sorted({result.device for result in results})
    if devices:
        notes.append(f"FPS: test views one after another on {', '.join(devices)}.")
    runs: dict[str, list[str]] = {}
    for each in results:
        if each.common_flags is not None:
            runs.setdefault(each.common_flags or "nothing", []).append(f"{each.scene}/{each.method}-{each.seed}")
    if len(runs) > 1:
        told = "; ".join(f"{flags}: {', '.join(sorted(names))}" for flags, names in sorted(runs.items()))
        notes.append(f"Not all runs were given the same flags for all: {told}.")
    return notes


def markdown_of(results: Sequence[Result], failures: Mapping[str, str]) -> str:
    """The table, and below it the runs that failed with the reason."""
    rows = rows_of(results)
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += [f"| {' | '.join(_texts(row, rows))} |" for row in rows]
    if failures:
        lines += ["", "Failed:", "", *(f"- {folder}: {why}" for folder, why in sorted(failures.items()))]
    for note in notes_of(results):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def html_of(results: Sequence[Result], failures: Mapping[str, str]) -> str:
    """A page of its own with the table, that needs nothing else."""
    rows = rows_of(results)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in HEADINGS)
    body = ""
    for row in rows:
        fields = "".join(f"<td>{html.escape(text)}</td>" for text in _texts(row, rows))
        body += f"<tr{' class=mean' if row.scene == MEAN else ''}>{fields}</tr>\n"
    failed = "".join(
        f"<li><code>{html.escape(folder)}</code>: {html.escape(why)}</li>" for folder, why in sorted(failures.items())
    )
    parts = {
        "rows": body,
        "head": head,
        "failed": f"<h2>Failed</h2><ul>{failed}</ul>" if failed else "",
        "notes": "\n".join(f"<p>{html.escape(note)}</p>" for note in notes_of(results)),
    }
    return PAGE.format(**parts)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mask-grendel: runs</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; font-variant-numeric: tabular-nums; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; white-space: nowrap; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
tr:hover {{ background: #8882; }} tr.mean {{ font-weight: 600; }}
</style></head><body>
<h1>Runs</h1>
<div><table><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table></div>
{failed}
{notes}
</body></html>
"""


def write_tables(folder: Path, results: Sequence[Result], failures: Mapping[str, str]) -> None:
    """table.md, table.json and table.html in a folder, each replaced as a whole."""
    write_text_atomically(folder / "table.md", markdown_of(results, failures))
    write_text_atomically(folder / "table.html", html_of(results, failures))
    rows = [
        {
            "protocol": row.protocol,
            "scene": row.scene,
            "method": row.method,
            "num_seeds": row.num_seeds,
            "measures": {
                column.title: None if cell is None else asdict(cell)
                for column, cell in zip(COLUMNS, row.cells, strict=True)
            },
        }
        for row in rows_of(results)
    ]
    runs = [asdict(result) for result in results]
    write_json_atomically(folder / "table.json", {"rows": rows, "runs": runs, "failures": dict(failures)})
