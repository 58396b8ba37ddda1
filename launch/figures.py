# SPDX-License-Identifier: Apache-2.0
"""Pictures for documents, from a model whose test views were rendered and measured.

    python -m launch.figures MODEL -o docs/images/demo.png

One row a view (worst, middle and best PSNR): photo, render, and four times their absolute difference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from launch.run import run_main
from scene.errors import InputError
from scene.model_folder import ModelFolder

DIFFERENCE_GAIN = 4
GAP = 4  # white pixels between pictures


def choose_views(psnr: Mapping[str, float], count: int) -> list[str]:
    """The names of `count` views (all if there are fewer), evenly spread from the worst to the best PSNR."""
    ranked = sorted(psnr, key=lambda name: (psnr[name], name))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[place] for place in places]


def comparison(photo: np.ndarray, render: np.ndarray) -> np.ndarray:
    """Photo, render and amplified difference side by side.

    Args: photo, render: (H, W, 3) uint8.
    Returns: (H, 3 W + 2 GAP, 3) uint8.
    """
    difference = np.abs(photo.astype(np.int32) - render.astype(np.int32)) * DIFFERENCE_GAIN
    gap = np.full((photo.shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([photo, gap, render, gap, difference.clip(0, 255).astype(np.uint8)])


def comparison_sheet(model_path: Path, num_views: int) -> np.ndarray:
    """Comparisons of some test views of the newest rendered iteration below each other, (H, W, 3) uint8.

    Raises:
        InputError: the views are not rendered and measured yet, or a picture cannot be read.
    """
    folder = ModelFolder.open(model_path)
    rendered = folder.rendered_iterations("test")
    if not rendered:
        raise InputError(f"{model_path} has no rendered test views; run: python render.py -m {model_path} --skip_train")
    place = folder.split_folder("test", rendered[-1])
    rows: list[np.ndarray] = []
    for name in choose_views(_psnr_by_view(folder, place.name), num_views):
        row = comparison(_pixels(place / "gt" / name), _pixels(place / "renders" / name))
        gap = [np.full((GAP, row.shape[1], 3), 255, np.uint8)] if rows else []
        rows += [*gap, row]
    return np.vstack(rows)


def _psnr_by_view(folder: ModelFolder, method: str) -> dict[str, float]:
    try:
        return dict(json.loads(folder.per_view("test").read_text(encoding="utf-8"))[method]["PSNR"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{folder.per_view('test')} has no measures of {method}; run: python metrics.py -m {folder.path}"
        ) from error


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read ({error}); render the views again with render.py.") from error


def main(arguments: Sequence[str]) -> int:
    """Write the picture that the command line asks for and say where it is.

    Raises:
        InputError: see `comparison_sheet`; or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m launch.figures", description="Draws photo, render and difference of test views of a model."
    )
    parser.add_argument("model_path", type=Path, metavar="MODEL", help="folder with rendered and measured test views")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture to write")
    parser.add_argument("--views", type=int, default=3, help="number of views, from the worst to the best PSNR [3]")
    options = parser.parse_args(arguments)
    if options.views < 1:
        raise InputError(f"--views is {options.views}; give 1 or more.")
    sheet = Image.fromarray(comparison_sheet(options.model_path, options.views))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, optimize=True)
    print(f"{sheet.width} x {sheet.height} pixels in {options.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
