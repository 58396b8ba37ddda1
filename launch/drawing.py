# SPDX-License-Identifier: Apache-2.0
"""Draws cameras to PNG files on any number of ranks: what the views of a data set and a camera path share.

PLACE/renders/00000.png   8-bit, value * 255 rounded
PLACE/alpha/00000.png     with --alpha: coverage, 8-bit
PLACE/depth/00000.png     with --depth: 16-bit, times the factor in depth/scales.json
PLACE/gt/00000.png        the photo, when there are photos
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
from launch.config import RenderConfig, RenderFlags
from masksplat.ops import Body
from scene.cameras import Camera
from scene.errors import InputError
from scene.images import ImageStore
from scene.model_folder import write_json_atomically
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


@dataclass(frozen=True, eq=False)
class Pictures:
    """Which cameras are drawn into which folder: those at `indices`, each under its index; `label` is for messages."""

    label: str
    cameras: Sequence[Camera]
    indices: Sequence[int]
    place: Path


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


def draw_pictures(
    pictures: Pictures,
    drawer: Drawer,
    flags: RenderFlags,
    ranks: Communicator,
    *,
    threads: int,
    photos: ImageStore | None = None,
) -> None:
    """Draw pictures and write them, and say how fast it went. All ranks call it: each draws every W-th.

    Args:
        threads: that write pictures on this rank.
        photos: of all the cameras, written beside the renders; None: there are none.

    Raises:
        InputError: a picture cannot be written; PeerError on the ranks that had no error of their own.
    """
    indices, place = pictures.indices, pictures.place
    scales = torch.zeros(len(indices), dtype=torch.float64)
    with ranks.all_or_none(InputError):
        seconds = _draw_mine(pictures, drawer, flags, ranks, scales, threads=threads, photos=photos)
    scales = ranks.sum(scales)  # all ranks
    seconds = float(ranks.max(torch.tensor(seconds, dtype=torch.float64)))
    with ranks.all_or_none(InputError):
        if ranks.is_main and flags.depth:
            factors = {picture_name(index): scale for index, scale in zip(indices, scales.tolist(), strict=True)}
            write_json_atomically(place / "depth" / "scales.json", factors)
    if ranks.is_main and not flags.quiet:
        rate = len(indices) / max(seconds, 1e-9)
        drawn = f"drawn in {seconds:.2f} s ({rate:.1f} views/s without reading and writing of files)"
        print(f"{len(indices)} {pictures.label} views in {place}, {drawn}")


def _draw_mine(
    pictures: Pictures,
    drawer: Drawer,
    flags: RenderFlags,
    ranks: Communicator,
    scales: Tensor,
    *,
    threads: int,
    photos: ImageStore | None,
) -> float:
    """Draw this rank's pictures, write them, fill in the factors of depth; return the seconds of drawing."""
    cameras, indices, place, clock = pictures.cameras, pictures.indices, pictures.place, PhaseTimer()
    mine = range(ranks.rank, len(indices), ranks.size)
    is_shown = ranks.is_main and not flags.quiet
    bar = tqdm(mine, desc=f"rendering {pictures.label}", unit="view", disable=not is_shown, dynamic_ncols=True)
    with PictureWriter(threads) as writer:
        if photos is not None:
            photos.prefetch([indices[number] for number in mine])
        if len(mine):
            drawer.rgb(cameras[indices[mine[0]]])  # kernels are compiled or loaded now, not in the time of drawing
        for number in bar:
            index = indices[number]
            name = picture_name(index)
            with clock("draw"):
                view = drawer.view(cameras[index]) if flags.depth or flags.alpha else None
                rgb = view.rgb if view is not None else drawer.rgb(cameras[index])
                _wait_for(rgb.device)
            writer.write(place / "renders" / name, to_8bit(rgb))
            if photos is not None:
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


def picture_name(index: int) -> str:
    """Return the file name of a view's pictures."""
    return f"{index:05d}.png"


def _depth_levels(depth: Tensor, scale: float) -> Tensor:
    """Return (H, W) camera z in world units as 16-bit levels of `scale` each, as int32."""
    return (depth / scale).round().clamp(0, DEPTH_LEVELS).to(torch.int32)


def remove_stale(place: Path, count: int) -> None:
    """Remove the numbered pictures from `count` on: those of an earlier, larger set would be measured with this one."""
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
