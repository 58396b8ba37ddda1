# SPDX-License-Identifier: Apache-2.0
"""The HTML fragments of report.html that stand in the file as text: cards, tables, phases, configuration.

Everything that comes from a file is escaped. The page's frame, style and scripts are in `report_assets/`.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report_charts import Chart
from launch.report_views import View

ASSETS = Path(__file__).parent / "report_assets"
SCRIPTS = ("charts.js", "views.js", "splats.js", "main.js")
PHASE_COLORS = 8


@dataclass(frozen=True)
class Card:
    """One number of the summary."""

    title: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: `id` is its anchor, `body` is HTML."""

    id: str
    title: str
    body: str
    lead: str = ""


def render_page(
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    notices: Sequence[str],
    cards: Sequence[Card],
    sections: Sequence[Section],
    footer: str,
    data: Mapping[str, Any],
    splats: str,
) -> str:
    """Return the whole file. `facts` are (emphasised, rest) texts, `data` what the scripts read, `splats` base64."""
    parts = {
        "title": html.escape(title),
        "style": _asset("style.css"),
        "navigation": "".join(f'<a href="#{each.id}">{html.escape(each.title)}</a>' for each in sections),
        "facts": "".join(f"<span><b>{html.escape(bold)}</b> {html.escape(rest)}</span>" for bold, rest in facts),
        "notices": "".join(f'<p class="notice">{html.escape(notice)}</p>' for notice in notices),
        "cards": "\n".join(_card(card) for card in cards),
        "sections": "\n".join(_section(section) for section in sections),
        "footer": html.escape(footer),
        # "<" could end the script element; in JSON it only occurs inside strings
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "splats": splats,
        "scripts": "\n".join(_asset(name) for name in SCRIPTS),
    }
    # One pass, so that nothing inserted is searched for further places.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def views_section(views: Sequence[View], split: str, lpips_name: str) -> Section:
    """Return the comparison of photo and render with the table of all views."""
    kind = "Test views" if split == "test" else "Training views"
    num_pictured = sum(bool(view.photo) for view in views)
    lead = f"{len(views)} {kind.lower()}, {'never seen in training' if split == 'test' else 'seen in training'}."
    if num_pictured < len(views):
        lead += f" Pictures of {num_pictured}: the worst, the best, and some between."
    modes = (("slide", "Compare"), ("photo", "Photo"), ("render", "Render"), ("difference", "Difference"))
    buttons = "".join(
        f'<button type="button" data-mode="{mode}" aria-pressed="{str(mode == "slide").lower()}">{name}</button>'
        for mode, name in modes
    )
    body = f"""<div class="compare">
<div class="panel viewer">
<div class="viewer-head"><span class="viewer-title" id="view-title">&nbsp;<small id="view-numbers"></small></span>
<div class="segments" id="modes" role="group" aria-label="What is shown">{buttons}</div></div>
<div class="stage" id="stage" data-mode="slide"><div class="frame" role="slider" tabindex="0" aria-valuemin="0"
 aria-valuemax="100" aria-valuenow="50" aria-label="Border between photo and render">
<img class="photo" alt="" src="data:,"><img class="render" alt="" src="data:,"><img class="difference" alt=""
src="data:,"> <div class="handle"></div><span class="tag left">photo</span><span class="tag
right">render</span></div></div> <div class="difference-scale" id="difference-scale" hidden>equal <i></i> 64 of 255
or more, mean of the channels</div> <div class="strip" id="strip"></div> </div> <div class="panel table-panel"><div
class="table-scroll">{_view_table(views, lpips_name)}</div></div>
</div>"""
    return Section("views", kind, body, lead)


def space_section(description: Mapping[str, Any]) -> Section:
    """Return the interactive 3D pane."""
    shown, total = description["num_shown"], description["num_total"]
    lead = f"All {total:,} Gaussians" if shown == total else f"The {shown:,} most visible of {total:,} Gaussians"
    lead += ", drawn in this page. Colours are means over the viewing directions."
    body = """<div class="space" id="space">
<canvas tabindex="0" aria-label="The reconstructed scene; drag to turn it"></canvas>
<div class="space-message" id="space-message">Unpacking the model …</div>
<div class="space-hint" id="space-hint"><span class="fine">drag to turn · right button or
shift to move · click, then wheel or W/S to zoom</span>
<span class="coarse">one finger turns, two move and zoom</span></div>
<div class="space-tools">
<select id="space-cameras" aria-label="Stand at a camera" title="Stand at a camera"></select>
<button type="button" id="space-tour">▶ Tour</button>
<label title="Shrinks the splats to show where they are">Splat size
<input type="range" id="space-size" min="0.04" max="1" step="0.01" value="1" aria-label="Splat size"></label>
<button type="button" id="space-full">Full screen</button>
</div></div>"""
    return Section("model", "3D model", body, lead)


def curves_section(charts: Sequence[Chart], heat_map: Mapping[str, Any] | None) -> Section:
    """Return the places of the curves, which the page's script fills."""
    figures = [
        f'<figure class="panel chart"><div class="chart-head"><h3>{html.escape(chart.title)}</h3>'
        f'<span class="chart-unit">{html.escape(chart.subtitle)}</span></div><div id="chart-{chart.id}"></div></figure>'
        for chart in charts
    ]
    if heat_map is not None:
        figures.append(
            '<figure class="panel chart wide"><div class="chart-head"><h3>Keep probability of the Gaussians</h3>'
            '<span class="chart-unit">histogram over iterations; below the dashed line a Gaussian is removed at the '
            'end</span></div><div id="chart-masks"></div></figure>'
        )
    return Section("curves", "Curves", f'<div class="chart-grid">{"".join(figures)}</div>')


def phases_section(phases: Mapping[str, float], num_images: int, clock: str = "") -> Section:
    """Return where the time went: a stacked bar and a list.

    Args: phases: name -> seconds, in the order of the step; clock: a sentence on whose time it is.
    """
    total = sum(phases.values()) or 1.0
    bars, items = [], []
    for index, (name, seconds) in enumerate(phases.items()):
        label = html.escape(name.replace("_", " "))
        share, color = seconds / total, f"--swatch: var(--series-{index % PHASE_COLORS + 1})"
        value = f"{format_seconds(seconds)} · {1000 * seconds / max(num_images, 1):.2f} ms per image"
        text = f"{100 * share:.0f} %" if share >= 0.06 else ""
        bars.append(
            f'<div style="flex: {share:.5f} 1 0; {color}" data-name="{label}" data-value="{value}">{text}</div>'
        )
        items.append(
            f'<li title="{value}"><i style="{color}"></i>{label}<b>{format_seconds(seconds)}</b>'
            f"<small>{100 * share:.1f} %</small></li>"
        )
    body = f'<div class="panel phases"><div class="stack">{"".join(bars)}</div>'
    body += f'<ul class="phase-list">{"".join(items)}</ul></div>'
    lead = f"{format_seconds(total)} in all, {1000 * total / max(num_images, 1):.1f} ms per image. {clock}".strip()
    return Section("time", "Time", body, lead)


def config_section(command: Sequence[str], groups: Mapping[str, Mapping[str, Any]], changed: Sequence[str]) -> Section:
    """Return the command line and every value of the configuration; the names in `changed` are emphasised."""
    parts = []
    if command:
        text = html.escape(shlex.join(command))
        parts.append(
            f'<pre class="panel command"><code>{text}</code><button type="button" class="copy">copy</button></pre>'
        )
    boxes = []
    for name, values in groups.items():
        rows = "".join(_config_row(key, value, key in changed) for key, value in values.items())
        boxes.append(
            f'<div class="panel config-group"><h3>{html.escape(str(name)).capitalize()}</h3><dl>{rows}</dl></div>'
        )
    parts.append(f'<div class="config">{"".join(boxes)}</div>')
    lead = "Values given on the command line are blue." if changed else ""
    return Section("configuration", "Configuration", "".join(parts), lead)


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 8.2 s, 4 min 07 s, 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _view_table(views: Sequence[View], lpips_name: str) -> str:
    """Return the table of all views; the script makes its head sort it."""
    columns = [("image", "View"), ("psnr", "PSNR"), ("ssim", "SSIM"), ("lpips", lpips_name)]
    columns = [(key, name) for key, name in columns if any(getattr(view, key) is not None for view in views)]
    head = "".join(
        f'<th data-key="{key}" scope="col"><button type="button">{html.escape(name)}</button></th>'
        for key, name in columns
    )
    psnrs = [view.psnr for view in views if view.psnr is not None]
    low, high = (min(psnrs), max(psnrs)) if psnrs else (0.0, 0.0)
    rows = "".join(_view_row(view, [key for key, _ in columns], low, high) for view in views)
    foot = "".join(f"<td>{_mean(views, key)}</td>" for key, _ in columns[1:])
    foot = f"<tfoot><tr><td>Mean</td>{foot}</tr></tfoot>"
    return f'<table id="view-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>{foot}</table>'


def _mean(views: Sequence[View], key: str) -> str:
    """Return the mean of a measure over the views that have it."""
    values = [getattr(view, key) for view in views if getattr(view, key) is not None]
    return _measure(key, sum(values) / len(values))


def _measure(key: str, value: float) -> str:
    """Return a measure with the digits that are usual for it."""
    return f"{value:.2f}" if key == "psnr" else f"{value:.4f}"


def _view_row(view: View, keys: Sequence[str], low: float, high: float) -> str:
    badge = f'<span class="badge {view.badge}">{view.badge}</span>' if view.badge else ""
    name = html.escape(view.image)
    cells = [f'<td title="{name}">{name}{badge}</td>']
    for key in keys[1:]:
        value = getattr(view, key)
        text = "" if value is None else _measure(key, value)
        if key == "psnr" and value is not None:
            share = 100 * (0.12 + 0.88 * (value - low) / (high - low)) if high > low else 100
            text = f'<span class="meter"><i style="width: {share:.0f}%"></i></span>{text}'
        cells.append(f"<td>{text}</td>")
    linked = ' class="linked"' if view.photo else ""
    return f"<tr{linked}>{''.join(cells)}</tr>"


def _config_row(key: str, value: Any, is_changed: bool) -> str:
    if isinstance(value, bool):
        text = "on" if value else "off"
    elif isinstance(value, list | tuple):
        text = " ".join(map(str, value)) or "–"
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    mark = ' class="changed"' if is_changed else ""
    return f"<dt{mark}>{html.escape(str(key))}</dt><dd{mark}>{html.escape(text) or '–'}</dd>"


def _card(card: Card) -> str:
    unit = f'<span class="unit">{html.escape(card.unit)}</span>' if card.unit else ""
    note = f'<p class="note">{html.escape(card.note)}</p>' if card.note else ""
    title, value = html.escape(card.title), html.escape(card.value)
    return f'<div class="card"><h3>{title}</h3><div class="value">{value}{unit}</div>{note}</div>'


def _section(section: Section) -> str:
    lead = f"<p>{html.escape(section.lead)}</p>" if section.lead else ""
    head = f'<div class="section-head"><h2>{html.escape(section.title)}</h2>{lead}</div>'
    return f'<section class="section" id="{section.id}">{head}\n{section.body}\n</section>'


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").rstrip("\n")
