# SPDX-License-Identifier: Apache-2.0
"""Writes report.html: one offline file that shows what a training did and what came out of it.

    python -m launch.report MODEL [-o FILE]

It reads what is in the model folder (metrics.jsonl, config.json, cameras.json, the newest ply, rendered views and their
measures) and leaves out what is not there. It can be written again at any time, also while the training is running.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli import train_flags
from launch.log_reader import Record, RunLog, read_log
from launch.report_charts import build_charts, heat_map
from launch.report_page import (
    Card,
    Section,
    config_section,
    curves_section,
    format_seconds,
    phases_section,
    render_page,
    space_section,
    views_section,
)
from launch.report_splats import PackedModel, ViewerCamera, pack_model, read_cameras
from launch.report_views import View, collect_views, read_measures
from launch.run import run_main
from scene.errors import InputError
from scene.model_folder import ModelFolder, write_text_atomically
from scene.ply import load_ply

GPU_PEAKS = ("gpu_peak_bytes", "gpu_peak_reserved_bytes")


@dataclass(frozen=True, eq=False)
class Material:
    """Everything the report is made of; what the model folder does not have is empty or None."""

    folder: ModelFolder
    log: RunLog
    command: tuple[str, ...]
    config: dict[str, Any]
    iteration: int | None
    cameras: list[ViewerCamera]
    model: PackedModel | None
    split: str
    views: list[View]
    means: dict[str, Any]


def write_report(model_path: Path, output: Path | None = None) -> Path:
    """Write the report of a model folder and return its path.

    Args:
        model_path: folder that train.py wrote.
        output: the file to write; None: MODEL/report.html.

    Raises:
        InputError: there is no such folder or no metrics.jsonl in it, a file in it is damaged, or the report cannot
            be written.
    """
    folder = ModelFolder.open(model_path)
    target = output or folder.report
    write_text_atomically(target, build_report(collect(folder)))
    return target


def collect(folder: ModelFolder) -> Material:
    """Read the model folder.

    Raises:
        InputError: metrics.jsonl is missing, or a file that is there is damaged.
    """
    log = read_log(folder.metrics)
    stored = folder.read_config() if folder.config.is_file() else {}
    config = stored.get("config", {})
    saved = folder.saved_iterations()
    iteration = saved[-1] if saved else None
    cameras = read_cameras(folder.cameras) if folder.cameras.is_file() else []
    split, views, means = _rendered(folder, iteration, _image_names(log, cameras))
    return Material(
        folder=folder,
        log=log,
        command=_command(stored),
        config=config,
        iteration=iteration,
        cameras=cameras,
        model=_model(folder, iteration, cameras, config),
        split=split,
        views=views,
        means=means,
    )


def build_report(material: Material) -> str:
    """Return the report as HTML text."""
    charts, heat = build_charts(material.log), heat_map(material.log)
    sections: list[Section] = []
    if material.views:
        name = "LPIPS (alex)" if "LPIPS_alex" in material.means else "LPIPS"
        sections.append(views_section(material.views, material.split, name))
    if material.model is not None:
        sections.append(space_section(material.model.description))
    if charts or heat:
        sections.append(curves_section(charts, heat))
    phases = time_per_phase(material.log)
    if phases:
        sections.append(phases_section(phases, int(material.log.phases[-1]["iteration"]), _clock(material.log)))
    given = [str(name) for name in material.config.get("given", ())]
    sections.append(config_section(material.command, _shown_groups(material.config, given), given))
    return render_page(
        title=_title(material),
        facts=_facts(material),
        notices=_notices(material),
        cards=summary_cards(material),
        sections=sections,
        footer=f"Written by mask-grendel on {time.strftime('%Y-%m-%d %H:%M')} from {material.folder.path.absolute()}. "
        "PSNR, SSIM and LPIPS follow the protocol of 3DGS.",
        data={
            "last_iteration": last_iteration(material.log),
            "charts": [chart.plain() for chart in charts],
            "heat_map": heat,
            "views": [view.plain() for view in material.views],
            "model": material.model.description if material.model else None,
        },
        splats=material.model.payload if material.model else "",
    )


def summary_cards(material: Material) -> list[Card]:
    """Return the numbers at the top of the page, as far as they are known."""
    return [*_quality_cards(material), *_count_cards(material), *_cost_cards(material)]


def _quality_cards(material: Material) -> list[Card]:
    """PSNR, SSIM and LPIPS of the renders, or the last evaluation during training."""
    means, note = material.means, f"{len(material.views)} {material.split} views"
    if not means:
        evaluation = _last_evaluation(material.log)
        if evaluation is None:
            return []
        means = {"PSNR": evaluation.get("psnr"), "SSIM": evaluation.get("ssim")}
        note = f"{evaluation['split']} views at iteration {evaluation['iteration']:,}"
    cards = []
    for key, title, unit, digits in (
        ("PSNR", "PSNR", "dB", 2),
        ("SSIM", "SSIM", "", 4),
        ("LPIPS", "LPIPS", "", 4),
        ("LPIPS_alex", "LPIPS (AlexNet)", "", 4),
    ):
        if isinstance(means.get(key), int | float):
            cards.append(Card(title, f"{means[key]:.{digits}f}", unit, note if key == "PSNR" else _better(key)))
    return cards


def _count_cards(material: Material) -> list[Card]:
    """How many Gaussians there are, and how many were removed by what."""
    log, cards = material.log, []
    kept = material.model.description["num_total"] if material.model else _last(log.steps, "num_gaussians")
    if kept is not None:
        started = (log.steps[0] if log.steps else {}).get("num_gaussians")
        cards.append(Card("Gaussians", f"{kept:,}", note=f"first logged: {started:,}" if started else ""))
    totals = {key: pruned_by(log, key, kept) for key in ("pruned_mask", "pruned_opacity", "pruned_size")}
    if log.mask_histograms and kept is not None:
        share = totals["pruned_mask"] / max(totals["pruned_mask"] + kept, 1)
        note = f"{100 * share:.{1 if share < 0.1 else 0}f} % of kept and pruned together"
        cards.append(Card("Pruned by masks", f"{totals['pruned_mask']:,}", note=note))
    others = totals["pruned_opacity"] + totals["pruned_size"]
    if others:
        note = f"{totals['pruned_opacity']:,} transparent, {totals['pruned_size']:,} too large"
        cards.append(Card("Pruned otherwise", f"{others:,}", note=note))
    return cards


def _cost_cards(material: Material) -> list[Card]:
    """Time, speed, memory and size."""
    log, cards = material.log, []
    seconds = (log.end or {}).get("seconds") or _last(log.steps, "seconds")
    rate = (log.end or {}).get("images_per_second")
    if seconds:
        cards.append(
            Card("Training time", format_seconds(seconds), note=f"{rate:.1f} images per second" if rate else "")
        )
    memory = (log.end or {}).get("peak_memory_bytes") or max((y.get("memory_bytes") or 0 for y in log.steps), default=0)
    if memory:
        cards.append(Card("Peak memory", f"{memory / 2**30:.2f}", "GiB"))
    gpu_memory, held = (max((y.get(key) or 0 for y in (*log.steps, log.end or {})), default=0) for key in GPU_PEAKS)
    if gpu_memory:
        cards.append(Card("Peak GPU memory", f"{gpu_memory / 2**30:.2f}", "GiB", f"{held / 2**30:.2f} GiB held"))
    if material.iteration is not None:
        size = material.folder.point_cloud(material.iteration).stat().st_size
        cards.append(Card("Model size", f"{size / 1e6:.1f}", "MB", f"iteration {material.iteration:,}, ply"))
    return cards


def last_iteration(log: RunLog) -> int:
    """Return the largest iteration that anything was recorded for, at least 1."""
    return max((int(record["iteration"]) for record in (*log.steps, *log.evaluations, *log.edits)), default=1)


def time_per_phase(log: RunLog) -> dict[str, float]:
    """Return the seconds of each phase until the last phases line, and those of the training outside of all phases."""
    if not log.phases:
        return {}
    phases = {str(name): float(seconds) for name, seconds in log.phases[-1]["seconds"].items()}
    iteration = log.phases[-1]["iteration"]
    total = next((step["seconds"] for step in reversed(log.steps) if step["iteration"] == iteration), None)
    rest = (total or 0.0) - sum(phases.values())
    return {**phases, "everything else": rest} if rest > 0.005 * (total or 0.0) else phases


def _clock(log: RunLog) -> str:
    """Return a sentence on whose time that of the phases is, "" where there is only one."""
    if log.phases[-1].get("clock") == "gpu":
        return "Time of the GPU; everything else is time in which it waits, or works between the phases."
    if any(step.get(GPU_PEAKS[0]) for step in log.steps):
        return "Time of the host, which queues work for the GPU ahead: --enable_timer measures the GPU's own."
    return ""


def pruned_by(log: RunLog, key: str, kept: int | None) -> int:
    """Return how many Gaussians a cause removed in all events; masks also in the final prune before the last save."""
    total = int(sum(record.get(key) or 0 for record in log.edits))
    # a step line follows the edits of its own iteration
    last = _last(sorted((*log.edits, *log.steps), key=lambda record: record["iteration"]), "num_gaussians")
    if key == "pruned_mask" and log.saved and log.mask_histograms and last is not None and kept is not None:
        total += max(int(last) - kept, 0)
    return total


def _rendered(
    folder: ModelFolder, iteration: int | None, image_names: Mapping[str, Sequence[str]]
) -> tuple[str, list[View], dict[str, Any]]:
    """Return split, views and mean measures of the newest rendered set: test views, or training views without a
    test."""
    for split in ("test", "train"):
        rendered = folder.rendered_iterations(split)
        if not rendered:
            continue
        place = folder.split_folder(split, iteration if iteration in rendered else rendered[-1])
        measures = read_measures(folder.per_view(split), place.name)
        views = collect_views(place, measures, image_names.get(split, ()))
        return split, views, read_measures(folder.results(split), place.name)
    return "test", [], {}


def _image_names(log: RunLog, cameras: Sequence[ViewerCamera]) -> dict[str, list[str]]:
    """Return the photos' names of each set in its order: cameras.json lists the test views first."""
    num_test = log.run.get("scene", {}).get("num_test")
    if not isinstance(num_test, int) or num_test > len(cameras):
        return {}
    names = [camera.name for camera in cameras]
    return {"test": names[:num_test], "train": names[num_test:]}


def _model(
    folder: ModelFolder, iteration: int | None, cameras: Sequence[ViewerCamera], config: Mapping[str, Any]
) -> PackedModel | None:
    """Return the saved model for the 3D pane, or None without a model, Gaussians or cameras."""
    if iteration is None or not cameras:
        return None
    params = load_ply(folder.point_cloud(iteration))
    if not len(params["means"]):
        return None
    is_white = bool(config.get("model", {}).get("white_background"))
    antialiased = bool(config.get("pipeline", {}).get("antialiasing"))
    return pack_model(
        params, cameras, background=(1.0, 1.0, 1.0) if is_white else (0.0, 0.0, 0.0), antialiased=antialiased
    )


def _command(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command line as one would type it."""
    words = tuple(map(str, stored.get("command", ())))
    return ("python", *words) if words and words[0].endswith(".py") else words


def _title(material: Material) -> str:
    source = str(material.config.get("model", {}).get("source_path", ""))
    return Path(source).name or material.folder.path.absolute().name


def _facts(material: Material) -> list[tuple[str, str]]:
    """The line below the title."""
    method = material.config.get("mask", {}).get("prune_method", "mask" if material.log.mask_histograms else "3dgs")
    facts = [
        ("Learned masks", "") if method == "mask" else ("3DGS", "without masks") if method == "3dgs" else (method, "")
    ]
    done = material.iteration or _last(material.log.steps, "iteration")
    if done:
        planned = material.config.get("optimization", {}).get("iterations")
        is_partial = isinstance(planned, int) and done < planned
        facts.append((f"{int(done):,}", f"of {planned:,} iterations" if is_partial else "iterations"))
    if material.cameras:
        facts.append((f"{len(material.cameras)}", "photos"))
        sizes = {(camera.width, camera.height) for camera in material.cameras}
        width, height = max(sizes)
        facts.append((f"{width} × {height}", "pixels" if len(sizes) == 1 else "pixels and smaller"))
    return facts


def _notices(material: Material) -> list[str]:
    notices = []
    if material.log.end is None:
        notices.append("The training had not ended when this report was written: it is running, or it was interrupted.")
    if material.log.num_damaged_lines:
        notices.append(f"{material.log.num_damaged_lines} damaged lines of metrics.jsonl were left out.")
    return notices


def _shown_groups(config: Mapping[str, Any], given: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the flags that have an effect in this program, and those that were given, in their groups."""
    idle = {each.name for each in train_flags() if each.spec.inert or (each.spec.refused and not each.spec.choices)}
    groups = {}
    for name, values in config.items():
        if isinstance(values, Mapping):
            shown = {key: value for key, value in values.items() if key not in idle or key in given}
            groups.update({name: shown} if shown else {})
    return groups


def _last_evaluation(log: RunLog) -> Record | None:
    """The newest evaluation, of test views if there is one."""
    for split in ("test", "train"):
        found = [record for record in log.evaluations if record.get("split") == split]
        if found:
            return found[-1]
    return None


def _last(records: Sequence[Record], key: str) -> Any:
    """The last value of a key, or None."""
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def _better(key: str) -> str:
    return "1 is equal" if key == "SSIM" else "0 is equal"


def main(arguments: Sequence[str]) -> int:
    """Write the report that the command line asks for and say where it is.

    Raises:
        InputError: see `write_report`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description="Writes report.html for model folders."
    )
    parser.add_argument("model_paths", nargs="+", type=Path, metavar="MODEL", help="folder that train.py wrote")
    parser.add_argument("-o", "--output", type=Path, help="file to write (with one model) [MODEL/report.html]")
    options = parser.parse_args(arguments)
    if options.output is not None and len(options.model_paths) > 1:
        raise InputError("--output names one file, but several models were given; leave it out or give one model.")
    for model_path in options.model_paths:
        print(f"Report: {write_report(model_path, options.output).absolute()}")
    return 0


if __name__ == "__main__":
    run_main(main)
