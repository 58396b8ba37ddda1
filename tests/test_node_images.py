# SPDX-License-Identifier: Apache-2.0
"""Photos shared by the processes of a machine: the same bytes on every rank, damage reported once, no file left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.communicator import Communicator, PeerError
from rank_harness import run_ranks
from scene.cameras import Camera
from scene.errors import InputError
from scene.images import ImageStore
from scene.node_images import NodeImages

BLACK = (0.0, 0.0, 0.0)
WIDTHS = (9, 4, 7, 12, 5)


@pytest.fixture
def cameras(tmp_path: Path) -> list[Camera]:
    """Photos of different sizes; number 2 is transparent in places."""
    found = []
    for number, width in enumerate(WIDTHS):
        pixels = np.random.default_rng(number).integers(0, 256, (6, width, 4), dtype=np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels if number == 2 else pixels[..., :3]).save(path)
        found.append(Camera(path.name, path, width, 6, 5.0, 5.0, 2.0, 3.0, np.eye(3), np.zeros(3)))
    return found


def num_bytes(count: int, channels: int = 3) -> int:
    return channels * 6 * sum(WIDTHS[:count])


def read_all(
    world: Communicator, cameras: list[Camera], budget: int, background: tuple[float, float, float] | None, place: Path
) -> list[np.ndarray]:
    """Every photo, whole and a strip of it, as this rank sees them."""
    images = NodeImages(
        cameras, world, background=background, byte_budget=budget, num_threads=2, folder=place if budget else None
    )
    images.prefetch(range(len(cameras)))
    found = [images.fetch(index).numpy().copy() for index in range(len(cameras))]
    found += [images.fetch(index, 2, 5).numpy().copy() for index in range(len(cameras))]
    images.close()
    return found


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("num_shared", [0, 3, 5])
@pytest.mark.parametrize("background", [BLACK, None])
def test_every_rank_reads_the_same_photos(
    cameras: list[Camera], tmp_path: Path, size: int, num_shared: int, background: tuple[float, float, float] | None
) -> None:
    place = tmp_path / "memory"
    place.mkdir()
    budget = num_bytes(num_shared, 3 if background else 4)
    answers = run_ranks(read_all, size, cameras, budget, background, place)
    with ImageStore(cameras, background=background) as store:
        expected = [store.fetch(index) for index in range(len(cameras))]
        expected += [store.fetch(index, 2, 5) for index in range(len(cameras))]
    assert expected[2].shape[2] == (3 if background else 4)
    for answer in answers:
        assert all(np.array_equal(found, wanted.numpy()) for found, wanted in zip(answer, expected, strict=True))
    assert list(place.iterdir()) == []


def test_without_room_each_rank_decodes_for_itself(cameras: list[Camera], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scene.node_images._allocate", lambda descriptor, num_bytes: False)
    images = NodeImages(cameras, Communicator(), background=BLACK, byte_budget=num_bytes(5), num_threads=1)
    with ImageStore(cameras) as store:
        assert torch.equal(images.fetch(3, 1, 4), store.fetch(3, 1, 4))
    images.close()


def read_damaged(world: Communicator, cameras: list[Camera]) -> str:
    try:
        NodeImages(cameras, world, background=BLACK, byte_budget=num_bytes(5), num_threads=1)
    except (InputError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_damaged_photo_ends_all_ranks_with_one_message(cameras: list[Camera]) -> None:
    cameras[1].image_path.write_bytes(b"\x89PNG no more")
    answers = run_ranks(read_damaged, 2, cameras)
    assert answers[1].startswith("InputError: Images cannot be used (1): ")
    assert answers[0].startswith("PeerError: rank 1 failed: Images cannot be used (1): ")
