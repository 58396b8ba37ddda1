# SPDX-License-Identifier: Apache-2.0
"""Renders the views of a trained model to PNG files: what `render.py` does.

MODEL/{train,test}/ours_N/{renders,gt}/00000.png     8-bit, value * 255 rounded; numbered in the order of the data set
MODEL/{train,test}/ours_N/alpha/00000.png            with --alpha: coverage, 8-bit
MODEL/{train,test}/ours_N/depth/00000.png            with --depth: 16-bit, times the factor in depth/scales.json
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from distributed.communicator import Communicator
from gaussian_renderer.image_quality import to_8bit
from gaussian_renderer.phases import PhaseTimer
from gaussian_renderer.rendering import RenderedView, render_rgb, render_view
from launch.bodies import choose_body
from launch.cli import parse_render
from launch.config import RenderConfig, RenderFlags, pick
from launch.world import device_type_of, joined_world, parse_once, threads_per_rank
from masksplat.ops import Body
from scene.cameras import Camera
from scene.dataset import Scene, SceneOptions, load_scene
from scene.errors import InputError
from scene.images import ImageStore
from scene.model_folder import ModelFolder, write_json_atomically
from scene.ply import load_ply

MOST_PENDING = 16  # pictures that wait to be written
DEPTH_LEVELS = 65535


@dataclass(frozen=True, eq=False)
class Drawer:
    """A model and how it is drawn: raw parameters, active SH degree, background (3,), body, low-pass compensation."""

    params: dict[str, Tensor]
    sh_degree: int
    background: Tensor
    body: Body
    antialiased: bool

    def rgb(self, camera: Camera) -> Tensor:
        """Return the colours of a view, (H, W, 3) in [0, 1]."""
        return render_rgb(
            self.params,
            camera,
            sh_degree=self.sh_degree,
            background=self.background,
            body=self.body,
            antialiased=self.antialiased,
        )

    def view(self, camera: Camera) -> RenderedView:
        """Return colours, coverage and depth of a view."""
        return render_view(
            self.params,
            camera,
            sh_degree=self.sh_degree,
            background=self.background,
            body=self.body,
            antialiased=self.antialiased,
        )


def render_model(config: RenderConfig, ranks: Communicator | None = None) -> int:
    """Render the views that the configuration asks for; return how many were rendered.

    All ranks call it: each has the whole model and draws every W-th view.

    Raises:
        InputError: the model or its data set cannot be read, there is no such view, or a picture cannot be written;
            PeerError on the ranks that had no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    is_shown = ranks.is_main and not config.render.quiet
    with ranks.all_or_none(InputError):
        folder = ModelFolder.open(config.model.model_path)
        iteration = folder.find_iteration(config.render.iteration)
        threads = threads_per_rank(config.pipeline.threads, ranks)
        torch.set_num_threads(threads)
        drawer = load_drawer(config, folder.point_cloud(iteration), threads, ranks.device)
        scene = load_scene(config.model.source_path, pick(SceneOptions, config.model), progress=is_shown)
        splits = _wanted_splits(config, scene)
    if is_shown:
        print(f"{len(drawer.params['means']):,} Gaussians of iteration {iteration:,}")
    places = {split: folder.split_folder(split, iteration) for split in splits}
    return sum(_render_split(config, drawer, cameras, places[split], ranks) for split, cameras in splits.items())


def load_drawer(config: RenderConfig, ply: Path, threads: int, device: torch.device | str = "cpu") -> Drawer:
    """Return the model of a ply file, ready to be drawn as it was trained.

    Raises:
        InputError: the file is missing or damaged, or it holds no Gaussian.
    """
    params = {name: torch.from_numpy(values).to(device) for name, values in load_ply(ply).items()}
    if not len(params["means"]):
        raise InputError(f"{ply} holds no Gaussian; give another --iteration or train again.")
    return Drawer(
        params=params,
        sh_degree={0: 0, 3: 1, 8: 2, 15: 3}[params["shN"].shape[1]],
        background=torch.full((3,), float(config.model.white_background), device=device),
        body=choose_body(config.pipeline.backend, device, threads=threads, has_masks=True, say=_say(config.render)),
        antialiased=config.pipeline.antialiasing,
    )


def _say(flags: RenderFlags) -> Callable[[str], None]:
    """Return what shows a line, unless --quiet."""
    return (lambda line: None) if flags.quiet else print


def chosen_views(count: int, flags: RenderFlags) -> list[int]:
    """Return the indices that --l, --r, --sample_freq and --generate_num leave of `count` views."""
    first, stop = max(flags.l, 0), count if flags.r < 0 else min(flags.r, count)
    views = list(range(first, stop, max(flags.sample_freq, 1)))
    return views if flags.generate_num < 0 else views[: flags.generate_num]


def _wanted_splits(config: RenderConfig, scene: Scene) -> dict[str, tuple[Camera, ...]]:
    """Return the cameras of the sets to render.

    Raises:
        InputError: nothing is left to render.
    """
    skipped = {"train": config.render.skip_train, "test": config.render.skip_test}
    splits = {
        split: cameras
        for split, cameras in (("train", scene.train), ("test", scene.test))
        if not skipped[split] and chosen_views(len(cameras), config.render)
    }
    if splits:
        return splits
    hint = "choose other views (--skip_train, --skip_test, --l, --r, --generate_num)"
    if not scene.test and not skipped["test"]:
        hint = f"{config.model.model_path} was trained without test views: render the training views (no --skip_train)"
        hint += ", or train with --eval"
    raise InputError(f"there is no view to render: {scene.source} has {len(scene.train)} training and "
                     f"{len(scene.test)} test views; {hint}.")  # fmt: skip


def _render_split(
    config: RenderConfig, drawer: Drawer, cameras: Sequence[Camera], place: Path, ranks: Communicator
) -> int:
    """Render the chosen views of one set into its folder; return how many there are. All ranks."""
    flags, indices = config.render, chosen_views(len(cameras), config.render)
    scales = torch.zeros(len(indices), dtype=torch.float64)
    with ranks.all_or_none(InputError):
        if ranks.is_main and len(indices) == len(cameras):
            _remove_stale(place, len(cameras))
        seconds = _draw_views(config, drawer, cameras, place, ranks, scales)
    scales = ranks.sum(scales)  # all ranks
    seconds = float(ranks.max(torch.tensor(seconds, dtype=torch.float64)))
    with ranks.all_or_none(InputError):
        if ranks.is_main and flags.depth:
            factors = {_name(index): scale for index, scale in zip(indices, scales.tolist(), strict=True)}
            write_json_atomically(place / "depth" / "scales.json", factors)
    if ranks.is_main and not flags.quiet:
        rate = len(indices) / max(seconds, 1e-9)
        drawn = f"drawn in {seconds:.2f} s ({rate:.1f} views/s without reading and writing of files)"
        print(f"{len(indices)} {place.parent.name} views in {place}, {drawn}")
    return len(indices)


def _draw_views(
    config: RenderConfig,
    drawer: Drawer,
    cameras: Sequence[Camera],
    place: Path,
    ranks: Communicator,
    scales: Tensor,
) -> float:
    """Draw this rank's views, write their pictures, fill in the factors of depth; return the seconds of drawing."""
    flags, indices, clock = config.render, chosen_views(len(cameras), config.render), PhaseTimer()
    mine = range(ranks.rank, len(indices), ranks.size)
    is_shown = ranks.is_main and not flags.quiet
    bar = tqdm(mine, desc=f"rendering {place.parent.name}", unit="view", disable=not is_shown, dynamic_ncols=True)
    threads = threads_per_rank(config.pipeline.threads, ranks)
    with _open_photos(config, cameras, threads) as photos, PictureWriter(threads) as writer:
        photos.prefetch([indices[number] for number in mine])
        if len(mine):
            drawer.rgb(cameras[indices[mine[0]]])  # kernels are compiled or loaded now, not in the time of drawing
        for number in bar:
            index = indices[number]
            name = _name(index)
            with clock("draw"):
                view = drawer.view(cameras[index]) if flags.depth or flags.alpha else None
                rgb = view.rgb if view is not None else drawer.rgb(cameras[index])
                _wait_for(rgb.device)
            writer.write(place / "renders" / name, to_8bit(rgb))
            writer.write(place / "gt" / name, photos.fetch(index))
            if view is not None and flags.alpha:
                writer.write(place / "alpha" / name, to_8bit(view.alpha))
            if view is not None and flags.depth:
                scale = max(float(view.depth.max()), 1e-12) / DEPTH_LEVELS
                writer.write(place / "depth" / name, _depth_levels(view.depth, scale))
                scales[number] = scale
    return clock.seconds.get("draw", 0.0)


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish: without it, the time of drawing would be that of queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # host sync: time of a view


def _name(index: int) -> str:
    """The file name of a view's pictures."""
    return f"{index:05d}.png"


def _depth_levels(depth: Tensor, scale: float) -> Tensor:
    """Return (H, W) camera z in world units as 16-bit levels of `scale` each, as int32."""
    return (depth / scale).round().clamp(0, DEPTH_LEVELS).to(torch.int32)


def _open_photos(config: RenderConfig, cameras: Sequence[Camera], threads: int) -> ImageStore:
    """Return the photos of some cameras, composited on the model's background."""
    return ImageStore(
        cameras,
        background=(float(config.model.white_background),) * 3,
        byte_budget=int(config.pipeline.image_cache_gb * (1 << 30)),
        num_threads=threads,
    )


def _remove_stale(place: Path, count: int) -> None:
    """Remove numbered pictures of an earlier, larger set, which would be measured with this one."""
    for picture in place.glob("*/[0-9][0-9][0-9][0-9][0-9].png"):
        if int(picture.stem) >= count:
            picture.unlink()


class PictureWriter:
    """Writes PNG files in background threads; a context manager that waits for the last one."""

    def __init__(self, num_threads: int) -> None:
        """Start no thread yet."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")
        self._pending: deque[Future[None]] = deque()

    def write(self, path: Path, pixels: Tensor) -> None:
        """Queue a picture: (H, W, 3) or (H, W) uint8, or (H, W) int32 in 0..65535 for 16 bits.

        Raises:
            InputError: an earlier picture could not be written.
        """
        while len(self._pending) >= MOST_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(_write_picture, path, pixels.cpu().numpy()))

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            while self._pending:
                self._pending.popleft().result()


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write one picture."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint16) if pixels.dtype == np.int32 else pixels).save(path)
    except OSError as error:
        cause = error.strerror or str(error)
        raise InputError(f"{path} cannot be written: {cause}. Free some space or change permissions.") from error


def main(arguments: Sequence[str]) -> int:
    """Render what the command line asks for.

    Raises:
        InputError: see `render_model`.
    """
    config = parse_once(parse_render, arguments)
    with joined_world(device_type_of(config.pipeline.backend)) as ranks:
        if ranks.is_main and not config.render.quiet:
            for notice in config.notices:
                print(notice)
        render_model(config, ranks)
    return 0
