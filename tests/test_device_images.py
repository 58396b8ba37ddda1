# SPDX-License-Identifier: Apache-2.0
"""Photos on a device: the same bytes as the source's, fetched once while the budget holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from scene.device_images import DeviceImages


class CountingSource:
    """Photos of 4 x 5 pixels whose bytes tell their number and row; counts what is asked for."""

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int, int | None]] = []
        self.prefetched: list[int] = []
        self.is_closed = False

    def fetch(self, index: int, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        self.fetched.append((index, row_start, row_stop))
        rows = torch.arange(4, dtype=torch.uint8)[:, None, None] + 10 * index
        return rows.expand(4, 5, 3).contiguous()[row_start:row_stop]

    def prefetch(self, indices: Sequence[int]) -> None:
        self.prefetched.extend(indices)

    def close(self) -> None:
        self.is_closed = True


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_whole_photos_are_uploaded_once(device: str) -> None:
    source = CountingSource()
    images = DeviceImages(source, torch.device(device), byte_budget=1 << 20)
    first, again, strip = images.fetch(1), images.fetch(1), images.fetch(1, 1, 3)
    assert source.fetched == [(1, 0, None)]
    assert first.device.type == device and strip.is_contiguous()
    assert torch.equal(first.cpu(), CountingSource().fetch(1)) and torch.equal(first, again)
    assert torch.equal(strip.cpu(), CountingSource().fetch(1, 1, 3))


def test_budget_drops_the_photo_used_longest_ago() -> None:
    source = CountingSource()
    images = DeviceImages(source, torch.device("cpu"), byte_budget=2 * 60)
    for index in (0, 1, 0, 2, 0, 1):
        assert torch.equal(images.fetch(index), CountingSource().fetch(index))
    assert [index for index, _, _ in source.fetched] == [0, 1, 2, 1]


def test_strips_come_from_a_kept_photo_where_there_is_room() -> None:
    source = CountingSource()
    images = DeviceImages(source, torch.device("cpu"), byte_budget=60)
    for index, rows in ((0, (2, 4)), (0, (0, 3)), (1, (2, 4)), (1, (2, 4)), (0, (1, 2))):
        assert torch.equal(images.fetch(index, *rows), CountingSource().fetch(index, *rows))
    assert [index for index, _, _ in source.fetched] == [0, 1, 1]


def test_prefetch_asks_for_what_is_missing_only() -> None:
    source = CountingSource()
    images = DeviceImages(source, torch.device("cpu"), byte_budget=1 << 20)
    images.fetch(0)
    images.prefetch([0, 1])
    images.close()
    assert source.prefetched == [1] and source.is_closed
