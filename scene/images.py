# SPDX-License-Identifier: Apache-2.0
"""Pixels on demand: photos decoded by background threads and kept as bytes within a budget. Knows nothing of splits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from scene.cameras import Camera
from scene.errors import InputError, list_problems
from scene.photo import check_photo, read_photo

IMAGE_FIX = "Replace these files, or take them out of the COLMAP model (colmap image_deleter) or of transforms_*.json."


def on_background(pixels: Tensor, background: Tensor) -> Tensor:
    """Returns RGB pixels, (rows, width, 3) uint8, of what `ImageStore.fetch` gave.

    Args:
        pixels: (rows, width, 3 or 4) uint8; with four channels, colours times alpha and alpha. Three are returned as
            they are.
        background: (3,) float32 in 0..1, what is seen through transparent pixels; on any device.
    """
    if pixels.shape[2] == 3:
        return pixels
    behind = background.to(pixels.device) * (255 - pixels[..., 3:]).float()
    return (pixels[..., :3].float() + behind).round().clamp(max=255).to(torch.uint8)


def check_all_pixels(cameras: Sequence[Camera], *, num_threads: int, progress: bool) -> None:
    """Decodes the photo of every camera once and keeps nothing; headers alone do not show that a file is cut off.

    Raises:
        InputError: lists all photos that are missing or damaged.
    """

    def problem(camera: Camera) -> str | None:
        try:
            check_photo(camera.image_path)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(num_threads, thread_name_prefix="check") as pool:
        answers = pool.map(problem, cameras)
        bar = tqdm(answers, "Decoding images", len(cameras), unit="image", delay=2.0, disable=not progress)
        problems = [answer for answer in bar if answer is not None]
    if problems:
        raise list_problems("Images cannot be used", problems, IMAGE_FIX)


class ImageStore:
    """The photos of a list of cameras, as uint8 at the size of their cameras.

    Decoded photos are kept in memory up to `byte_budget` bytes; those used longest ago go first. Whatever the budget
    and the timing of the threads, the same bytes are returned. All methods may be called from several threads.
    """

    def __init__(
        self,
        cameras: Sequence[Camera],
        *,
        background: tuple[float, float, float] | None = (0.0, 0.0, 0.0),
        byte_budget: int = 8 << 30,
        num_threads: int = 2,
    ) -> None:
        """Decodes nothing yet.

        `background` (RGB in 0..1) is what images with alpha are composited on; with None they keep their alpha, so that
        `on_background` can put them on another colour at every step.
        """
        self._cameras = tuple(cameras)
        self._background = background
        self._byte_budget = byte_budget
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._cached_bytes = 0
        self._pending: dict[int, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="images")

    def __len__(self) -> int:
        return len(self._cameras)

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fetch(self, index: int, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Returns rows [row_start, row_stop) of a photo: (rows, width, 3) uint8, contiguous, on the CPU.

        Photos that keep their alpha have four channels, see `on_background`. The tensor shares memory with the store:
        read it, never write to it. Zero rows are legal.

        Raises:
            IndexError: no such camera or rows outside the image.
            InputError: the file is missing or damaged.
        """
        height = self._cameras[index].height
        stop = height if row_stop is None else row_stop
        if index < 0 or not 0 <= row_start <= stop <= height:
            raise IndexError(f"rows {row_start}:{stop} of image {index}, which has {height} rows")
        image = self._get(index)
        try:
            pixels = image.result() if isinstance(image, Future) else image
        except InputError as error:
            raise InputError(f"An image cannot be used: {error}. {IMAGE_FIX}") from error
        return pixels[row_start:stop]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Starts to decode photos in the background and returns at once; stops at what the byte budget holds."""
        with self._lock:
            room = self._byte_budget - sum(self._num_bytes(index) for index in self._pending)
            for index in indices:
                if index in self._cache or index in self._pending:
                    continue
                room -= self._num_bytes(index)
                if room < 0:
                    return
                self._submit(index)

    def preload(self, progress: bool) -> None:
        """Decodes the first photos, as many as the byte budget holds, with a progress bar if asked for.

        Raises:
            InputError: lists all photos among them that are missing or damaged.
        """
        problems = []
        for image in tqdm(self._start_preload(), desc="Loading images", unit="image", disable=not progress):
            try:
                image.result()
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise list_problems("Images cannot be used", problems, IMAGE_FIX)

    def close(self) -> None:
        """Stops the background threads and forgets all pixels. The store cannot be used afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._cache.clear()
            self._pending.clear()
            self._cached_bytes = 0

    def _num_bytes(self, index: int) -> int:
        """Returns the most that a decoded photo can take."""
        channels = 3 if self._background is not None else 4
        return channels * self._cameras[index].width * self._cameras[index].height

    def _start_preload(self) -> list[Future[Tensor]]:
        room, started = self._byte_budget, []
        with self._lock:
            for index in range(len(self._cameras)):
                room -= self._num_bytes(index)
                if room < 0:
                    break
                if index not in self._cache:
                    started.append(self._pending.get(index) or self._submit(index))
        return started

    def _get(self, index: int) -> Tensor | Future[Tensor]:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            return self._pending.get(index) or self._submit(index)

    def _submit(self, index: int) -> Future[Tensor]:
        """Queues a photo for decoding; the caller holds the lock, so the worker cannot finish before it is listed."""
        self._pending[index] = future = self._pool.submit(self._decode, index)
        return future

    def _decode(self, index: int) -> Tensor:
        camera = self._cameras[index]
        pixels = None
        try:
            pixels = torch.from_numpy(read_photo(camera.image_path, (camera.width, camera.height), self._background))
            return pixels
        finally:
            with self._lock:
                self._pending.pop(index, None)
                if pixels is not None:
                    self._keep(index, pixels)

    def _keep(self, index: int, pixels: Tensor) -> None:
        """Puts a photo into the cache and drops those used longest ago until the budget holds (lock is held)."""
        self._cache[index] = pixels
        self._cached_bytes += pixels.numel()
        while self._cached_bytes > self._byte_budget:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.numel()
