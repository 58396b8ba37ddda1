# SPDX-License-Identifier: Apache-2.0
"""The test views of report.html: measures of all of them, and pictures of the worst, the best and some between."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gaussian_renderer.image_quality import psnr
from launch.measure import paired_names, read_image

MOST_PICTURED = 12
HIGHEST_PSNR = 99.99  # dB; equal images have an infinite one, which JSON does not know
LONGEST_SIDE = 1000  # pixels of an embedded picture
LOSSLESS_PIXELS = 150_000  # smaller pictures are embedded without loss
DIFFERENCE_RANGE = 64.0  # mean absolute error over the channels, of 255, that is shown brightest
DIFFERENCE_COLORS = np.array(
    [[0, 0, 0], [59, 15, 112], [140, 41, 129], [222, 73, 104], [254, 159, 109], [252, 253, 191]], np.float64
)


@dataclass(frozen=True)
class View:
    """One rendered view. `file` is its PNG, `image` the photo's name; pictures are data URIs, empty when left out."""

    file: str
    image: str
    psnr: float | None
    ssim: float | None
    lpips: float | None
    badge: str = ""
    width: int = 0
    height: int = 0
    photo: str = ""
    render: str = ""
    difference: str = ""

    def plain(self) -> dict[str, Any]:
        """Return the view as JSON values."""
        return asdict(self)


def collect_views(folder: Path, per_view: dict[str, dict[str, float]], image_names: Sequence[str]) -> list[View]:
    """Return the views of a rendered set in file order, with pictures of at most 12.

    Args:
        folder: MODEL/{split}/ours_N with renders and gt.
        per_view: measure -> file name -> value, from per_view.json; PSNR is computed here where it is missing.
        image_names: photos' names in the order of the set, which the files are numbered by; empty when unknown.

    Raises:
        InputError: renders and photos do not belong together, or an image is damaged.
    """
    files = paired_names(folder)
    psnrs = dict(per_view.get("PSNR", {}))
    for file in files:
        if file not in psnrs:
            psnrs[file] = psnr(read_image(folder / "renders" / file), read_image(folder / "gt" / file))
    ranked = sorted(files, key=lambda file: psnrs[file])
    pictured = choose_pictured(ranked)
    badges = {ranked[0]: "worst", ranked[-1]: "best"} if len(ranked) > 1 else {}
    perceptual = per_view.get("LPIPS") or per_view.get("LPIPS_alex") or {}
    views = []
    for file in files:
        view = View(
            file,
            _image_name(file, image_names),
            psnr=min(psnrs[file], HIGHEST_PSNR),
            ssim=per_view.get("SSIM", {}).get(file),
            lpips=perceptual.get(file),
            badge=badges.get(file, ""),
        )
        views.append(replace(view, **picture_pair(folder, file)) if file in pictured else view)
    return views


def _image_name(file: str, image_names: Sequence[str]) -> str:
    """Return the photo's name of a numbered picture, or the picture's own name when there is no such number."""
    stem = Path(file).stem
    return image_names[int(stem)] if stem.isdecimal() and int(stem) < len(image_names) else stem


def choose_pictured(ranked: Sequence[str], most: int = MOST_PICTURED) -> set[str]:
    """Return the files to show of those ranked from worst to best: a third worst, a third best, the rest between."""
    if len(ranked) <= most:
        return set(ranked)
    third = most // 3
    between = ranked[third:-third]
    rest = most - 2 * third
    return {
        *ranked[:third],
        *ranked[-third:],
        *(between[(2 * i + 1) * len(between) // (2 * rest)] for i in range(rest)),
    }


def picture_pair(folder: Path, file: str) -> dict[str, Any]:
    """Return size, photo, render and difference of one view as the fields of `View`."""
    photo, render = (read_image(folder / part / file).numpy() for part in ("gt", "renders"))
    height, width = photo.shape[:2]
    return {
        "width": width,
        "height": height,
        "photo": data_uri(photo),
        "render": data_uri(render),
        "difference": data_uri(difference_image(photo, render)),
    }


def difference_image(photo: np.ndarray, render: np.ndarray) -> np.ndarray:
    """Return the absolute error, mean over the channels, as (H, w, 3) uint8 colours from black to light yellow."""
    error = np.abs(photo.astype(np.float64) - render.astype(np.float64)).mean(axis=-1)
    place = np.clip(error / DIFFERENCE_RANGE, 0, 1) * (len(DIFFERENCE_COLORS) - 1)
    stops = np.arange(len(DIFFERENCE_COLORS))
    channels = [np.interp(place, stops, DIFFERENCE_COLORS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """Return an (H, w, 3) uint8 image as a data URI: PNG when small, otherwise WebP of at most 1000 pixels a side."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if image.width * image.height <= LOSSLESS_PIXELS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=86, method=4)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def read_measures(path: Path, method: str) -> dict[str, Any]:
    """Return the entry of a method in results.json or per_view.json; empty when there is none."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8")).get(method, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return entry if isinstance(entry, dict) else {}
