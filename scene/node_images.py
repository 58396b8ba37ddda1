# SPDX-License-Identifier: Apache-2.0
"""Photos decoded once per machine, into memory that its processes share.

Each process decodes a part of them at the start; afterwards all read the rows they need. The memory is a file without a
name: nothing is left behind, however the processes end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distributed.communicator import Communicator
from scene.cameras import Camera
from scene.errors import InputError, list_problems
from scene.images import IMAGE_FIX, ImageStore
from scene.photo import read_photo

MEMORY_FOLDER = Path("/dev/shm")
LONGEST_PATH = 512
REST_SHARE = 8
"""What is decoded on demand may fill 1/8 of the budget."""

Background = tuple[float, float, float] | None


class NodeImages:
    """The photos of some cameras: the first that fit the budget are shared, the others decoded by who needs them.

    Args:
        ranks: the world; ranks of one machine follow each other, as torchrun numbers them. All ranks construct it.
        background: see `ImageStore`.
        byte_budget: of one machine.
        num_threads: of this process.
        folder: where the memory is; by default /dev/shm, or the folder for temporary files when that is too small.

    Raises:
        InputError: lists the damaged photos that this rank found; PeerError on the ranks that found none.
    """

    def __init__(
        self,
        cameras: Sequence[Camera],
        ranks: Communicator,
        *,
        background: Background,
        byte_budget: int,
        num_threads: int,
        progress: bool = False,
        folder: Path | None = None,
    ) -> None:
        self._cameras, self._background = tuple(cameras), background
        channels = 3 if background is not None else 4
        ends = list(accumulate(channels * camera.width * camera.height for camera in cameras))
        wanted = sum(end <= byte_budget for end in ends)
        # The first bytes say how many channels each photo has: 3, or 4 when its alpha is kept.
        self._offsets = [wanted, *(wanted + end for end in ends[:wanted])]
        shared = _shared_bytes(self._offsets[-1] if wanted else 0, ranks, folder)
        self._num_shared = wanted if shared is not None else 0
        self._shared = shared if shared is not None else torch.empty(0, dtype=torch.uint8)
        self._rest = ImageStore(
            cameras,
            background=background,
            byte_budget=byte_budget // REST_SHARE // ranks.local_size,
            num_threads=num_threads,
        )
        with ranks.all_or_none(InputError):
            self._fill(range(ranks.local_rank, self._num_shared, ranks.local_size), num_threads, progress)

    def fetch(self, index: int, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop) of a photo, as `ImageStore.fetch`: contiguous, on the CPU, read it only.

        Raises:
            IndexError, InputError: as `ImageStore.fetch`.
        """
        height = self._cameras[index].height
        stop = height if row_stop is None else row_stop
        if not 0 <= index < self._num_shared or not 0 <= row_start <= stop <= height:
            return self._rest.fetch(index, row_start, row_stop)
        return self._place(index, int(self._shared[index]))[row_start:stop]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start to decode those of the photos that are not shared."""
        self._rest.prefetch([index for index in indices if index >= self._num_shared])

    def close(self) -> None:
        """Stop the background threads; the memory goes with the last process that reads it."""
        self._rest.close()

    def _place(self, index: int, channels: int) -> Tensor:
        """(height, width, channels): where a photo is."""
        camera, start = self._cameras[index], self._offsets[index]
        size = channels * camera.width * camera.height
        return self._shared[start : start + size].view(camera.height, camera.width, channels)

    def _fill(self, indices: Sequence[int], num_threads: int, progress: bool) -> None:
        """Decode photos into their places. Raises: InputError for all that are damaged."""
        problems = []
        with ThreadPoolExecutor(num_threads, thread_name_prefix="photos") as pool:
            jobs = [pool.submit(self._decode, index) for index in indices]
            for job in tqdm(jobs, desc="Loading images", unit="image", disable=not progress):
                try:
                    job.result()
                except InputError as error:
                    problems.append(str(error))
        if problems:
            raise list_problems("Images cannot be used", problems, IMAGE_FIX)

    def _decode(self, index: int) -> None:
        camera = self._cameras[index]
        pixels = read_photo(camera.image_path, (camera.width, camera.height), self._background)
        self._place(index, pixels.shape[2]).copy_(torch.from_numpy(pixels))
        self._shared[index] = pixels.shape[2]


def _shared_bytes(num_bytes: int, ranks: Communicator, folder: Path | None) -> Tensor | None:
    """(num_bytes,) uint8 that the ranks of this machine share, or None on all ranks when some machine has no room."""
    leader = ranks.rank - ranks.local_rank
    path = _reserve(num_bytes, folder) if ranks.rank == leader and num_bytes else None
    name = os.fsencode(path) if path is not None else b""
    note = torch.zeros(LONGEST_PATH, dtype=torch.uint8)
    note[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    notes = ranks.gather(note)  # all ranks
    found = os.fsdecode(bytes(notes[leader].tolist()).rstrip(b"\0"))
    opened = torch.from_file(found, shared=True, size=num_bytes, dtype=torch.uint8) if found else None
    everybody = [row[0] for row in ranks.gather_counts([int(opened is not None)])]  # all ranks: all have opened it
    if path is not None:
        path.unlink()
    return opened if all(everybody) else None


def _reserve(num_bytes: int, folder: Path | None) -> Path | None:
    """A new file of that size with all of its room taken, or None when there is none."""
    for place in [folder] if folder is not None else [MEMORY_FOLDER, Path(tempfile.gettempdir())]:
        if not place.is_dir() or shutil.disk_usage(place).free < num_bytes:
            continue
        try:
            descriptor, name = tempfile.mkstemp(prefix="mask-grendel-photos-", dir=place)
        except OSError:
            continue
        if len(os.fsencode(name)) <= LONGEST_PATH and _allocate(descriptor, num_bytes):
            return Path(name)
        Path(name).unlink()
    return None


def _allocate(descriptor: int, num_bytes: int) -> bool:
    """Take the room of a file, so that writing into its memory cannot fail later; closes it."""
    take: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    try:
        if take is None:
            return False
        take(descriptor, 0, num_bytes)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
