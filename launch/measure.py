# SPDX-License-Identifier: Apache-2.0
"""Measures rendered views against their photos by the 3DGS protocol: what `metrics.py` does.

    MODEL/{test,train}/ours_N/{renders,gt}/*.png  ->  MODEL/results.json, MODEL/per_view.json

Both files have the form of 3DGS, so that scripts of its ecosystem read them; "protocol" is one more entry beside
the means. LPIPS by VGG is called "LPIPS", as in 3DGS; by AlexNet "LPIPS_alex", since the two are different scales.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from distributed.communicator import Communicator, PeerError
from gaussian_renderer.image_quality import psnr, ssim
from gaussian_renderer.lpips import Lpips, WeightsMissingError, load_lpips
from launch.cli import parse_metrics
from launch.config import MetricsFlags
from launch.machine import available_memory
from launch.world import joined_world, parse_once, threads_per_rank, torch_threads
from scene.errors import InputError
from scene.model_folder import SPLITS, ModelFolder, write_json_atomically

PROTOCOL = "3dgs"
LPIPS_KEYS = {"vgg": "LPIPS", "alex": "LPIPS_alex"}

BYTES_PER_PIXEL = 2_000
"""Memory that measuring one view takes, generously: the activations of VGG for both images (75 MB for 151 x 270)."""


@dataclass(frozen=True, eq=False)
class Measures:
    """What is measured on each pair of images, and on which device; `lpips` None leaves it out."""

    lpips: Lpips | None = None
    lpips_key: str = "LPIPS"
    device: torch.device | str = "cpu"

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the measures."""
        return ("SSIM", "PSNR") if self.lpips is None else ("SSIM", "PSNR", self.lpips_key)

    def of(self, render: torch.Tensor, photo: torch.Tensor) -> dict[str, float]:
        """Return SSIM, PSNR (dB) and perhaps LPIPS of two (H, w, 3) uint8 images."""
        render, photo = render.to(self.device), photo.to(self.device)
        values = {"SSIM": ssim(render, photo), "PSNR": psnr(render, photo)}
        if self.lpips is not None:
            values[self.lpips_key] = self.lpips(render, photo)
        return values


def choose_measures(
    network: str, *, device: torch.device | str = "cpu", notify: Callable[[str], None] = print
) -> Measures:
    """Return the measures that `--lpips NETWORK` asks for; `notify` gets a sentence when "auto" has to leave LPIPS out.

    Raises:
        InputError: the network was asked for by name and its weights are not installed or damaged.
    """
    if network == "none":
        return Measures(device=device)
    net = "vgg" if network == "auto" else network
    try:
        return Measures(load_lpips(net, device=device), LPIPS_KEYS[net], device)
    except WeightsMissingError as error:
        if network != "auto":
            raise InputError(f"--lpips {network} cannot be used. {error}") from error
        notify(str(error))
        return Measures(device=device)


def measure_model(
    model_path: Path,
    mode: str = "test",
    *,
    measures: Measures | None = None,
    threads: int = 1,
    progress: bool = True,
    ranks: Communicator | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every rendered iteration of a model, write the two JSON files, and return the content of the first.

    All ranks call it: views are dealt out over them, rank 0 writes.

    Args:
        model_path: folder of the model.
        mode: "test" or "train", the set whose renders are measured.
        measures: what to measure; None: SSIM and PSNR.
        threads: that measure on this rank.
        progress: show a bar on stderr.
        ranks: the processes that share the work; None: this one alone.

    Raises:
        InputError: nothing was rendered, or renders and photos do not belong together; PeerError on the ranks that had
            no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    folder = ModelFolder.open(model_path)
    methods = _rendered_methods(folder, mode)
    results: dict[str, dict[str, Any]] = {}
    per_view: dict[str, dict[str, dict[str, float]]] = {}
    for method in methods:
        place, chosen = folder.path / mode / method, measures or Measures()
        views = measure_views(place, chosen, threads=threads, progress=progress, ranks=ranks)
        keys = next(iter(views.values())).keys()
        per_view[method] = {key: {name: values[key] for name, values in views.items()} for key in keys}
        means = {key: float(np.mean(list(column.values()))) for key, column in per_view[method].items()}
        results[method] = {**means, "protocol": PROTOCOL}
    with ranks.all_or_none(InputError):
        if ranks.is_main:
            write_json_atomically(folder.results(mode), results)
            write_json_atomically(folder.per_view(mode), per_view)
    return results


def measure_views(
    folder: Path, measures: Measures, *, threads: int = 1, progress: bool = True, ranks: Communicator | None = None
) -> dict[str, dict[str, float]]:
    """Return the measures of each pair of `folder`/renders and `folder`/gt by file name, in the order of names.

    All ranks call it and get all of them. On a CPU each of `threads` measures a view of its own: threads that share the
    operations of one view wait for each other hundreds of times in it. Raises:
        InputError: a folder is missing or empty, the names differ, an image is damaged, or a pair differs in size;
            PeerError on the ranks that had no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    with ranks.all_or_none(InputError):
        names = paired_names(folder)
        mine = names[ranks.rank :: ranks.size]
        numbers = torch.zeros(len(names), len(measures.keys), dtype=torch.float64)
        at_once = 1
        if torch.device(measures.device).type == "cpu":
            num_pixels = read_image(folder / "gt" / names[0]).shape[:2].numel()
            at_once = views_at_once(threads, len(mine), num_pixels, available_memory() // ranks.local_size)
        with torch_threads(max(1, threads // at_once)), ThreadPoolExecutor(at_once, "measures") as pool:
            measured = pool.map(lambda name: measures.of(*_read_pair(folder, name)), mine)
            label, shown = f"measuring {folder.name}", {"disable": not progress, "dynamic_ncols": True}
            bar = tqdm(measured, desc=label, unit="view", total=len(mine), **shown)
            for row, values in zip(numbers[ranks.rank :: ranks.size], bar, strict=True):
                row.copy_(torch.tensor([values[key] for key in measures.keys], dtype=torch.float64))
    rows = ranks.sum(numbers).tolist()  # all ranks
    return {name: dict(zip(measures.keys, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def views_at_once(threads: int, num_views: int, num_pixels: int, memory: int) -> int:
    """How many views are measured at the same time: one a thread, as far as half of `memory` (bytes) has room.

    Args: num_pixels: of one view. Threads that are left over share the operations of the views.
    """
    return max(1, min(threads, num_views, memory // (2 * BYTES_PER_PIXEL * num_pixels)))


def paired_names(folder: Path) -> list[str]:
    """Return the sorted names of the images that `folder`/renders and `folder`/gt have in common.

    Raises:
        InputError: one of them is missing or empty, or has an image that the other has not.
    """
    renders, photos = (_image_names(folder / part) for part in ("renders", "gt"))
    if renders != photos:
        lone = sorted(renders ^ photos)
        raise InputError(
            f"renders and photos do not belong together: {folder / 'renders'} has {len(renders)} images and "
            f"{folder / 'gt'} has {len(photos)}; {lone[0]} is in only one of them. Delete {folder} and render again "
            "with render.py."
        )
    return sorted(renders)


def read_image(path: Path) -> torch.Tensor:
    """Return an image file as (H, w, 3) uint8.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"the image {path} cannot be read ({error}). Render again with render.py.") from error


def _read_pair(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return render and photo of one view."""
    render, photo = (read_image(folder / part / name) for part in ("renders", "gt"))
    if render.shape != photo.shape:
        sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (render, photo))
        raise InputError(f"render and photo of {folder / 'renders' / name} differ in size: {sizes}. Render again.")
    return render, photo


def _rendered_methods(folder: ModelFolder, mode: str) -> list[str]:
    """Return the sub-folders of MODEL/{mode} in the order of their iterations."""
    if mode not in SPLITS:
        raise ValueError(f"mode is {mode!r}, not one of {SPLITS}")
    iterations = folder.rendered_iterations(mode)
    if not iterations:
        hint = " --skip_train (test views exist only after train.py --eval)" if mode == "test" else " --skip_test"
        raise InputError(
            f"there is nothing to measure: {folder.path / mode} has no ours_N/renders. Render first: "
            f"python render.py -m {folder.path}{hint}."
        )
    return [folder.split_folder(mode, iteration).name for iteration in iterations]


def _image_names(folder: Path) -> set[str]:
    """Return the names of the PNG files of a folder."""
    names = {entry.name for entry in folder.glob("*.png")} if folder.is_dir() else set()
    if not names:
        raise InputError(f"there are no PNG images in {folder}. Render the views first with render.py.")
    return names


def print_results(model_path: Path, results: dict[str, dict[str, Any]], mode: str) -> None:
    """Print the means of every method of a model as 3DGS's metrics.py does; of the training views, it says so."""
    print(f"\nScene: {model_path}")
    if mode == "train":
        print("Training views, seen in training: no measure of views that it has not seen (train.py --eval).")
    for method, means in results.items():
        print(f"Method: {method}")
        for key, value in means.items():
            if isinstance(value, float):
                print(f"  {key + ' ':<5}: {value:>12.7f}")


def _ignore(sentence: str) -> None:
    """Show nothing."""


def main(arguments: Sequence[str]) -> int:
    """Measure every model that the command line names; one that cannot be measured does not keep the others from it.

    Returns:
        0, or 2 when a model could not be measured.

    Raises:
        InputError: the command line is wrong, or LPIPS weights that were asked for by name are missing.
    """
    flags = parse_once(parse_metrics, arguments).metrics
    with joined_world() as ranks:
        return 2 if _measure_models(flags, ranks) else 0


def _gpu_of(ranks: Communicator) -> torch.device:
    """This process's GPU, which it may share; the CPU on a machine without one."""
    count = torch.cuda.device_count()
    return torch.device("cuda", ranks.local_rank % count) if count else torch.device("cpu")


def _measure_models(flags: MetricsFlags, ranks: Communicator) -> int:
    """Measure one model after the other; return how many could not be measured. All ranks."""
    threads = threads_per_rank(flags.threads, ranks)
    is_shown = ranks.is_main and not flags.quiet
    measures = choose_measures(flags.lpips, device=_gpu_of(ranks), notify=print if is_shown else _ignore)
    failures = 0
    for model_path in flags.model_paths:
        try:
            results = measure_model(
                model_path, flags.mode, measures=measures, threads=threads, progress=is_shown, ranks=ranks
            )
        except (InputError, PeerError) as error:
            if ranks.is_main:
                print(f"error: {error}", file=sys.stderr)
            failures += 1
            continue
        if is_shown:
            print_results(model_path, results, flags.mode)
    return failures
