# SPDX-License-Identifier: Apache-2.0
"""Sizes of the device buffers whose need only the device knows, and the sticky status that tells when they lack.

A kernel that finds a buffer too small leaves its lists empty and sets status[0]; from then on no kernel that updates
state does anything. The host looks at the status when it likes, grows the buffers and repeats what was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

STATUS_WORDS = 8
"""int32 words of the status: overflow flag, then what was needed: instances, buckets, the three of `Windows`; zeros."""

MOST_NUMBERS_BACK = 10
"""Numbers of a gradient that return for a copy, at most."""

GROWTH = 1.5
"""A buffer that was too small gets this much more than was needed."""

FIRST_INSTANCES = 1 << 16
FIRST_BUCKETS = 1 << 12
INSTANCES_PER_ROW = 2
"""What is assumed at first of a row, which need not be in use: most splats touch a few tiles."""

INSTANCES_PER_BUCKET = 64
"""Likewise: a bucket holds 32, and about half of a list lies behind pixels that have ended."""

MOST_INSTANCES = 1 << 30
"""The radix sort counts in 30 bits."""


FIRST_WINDOW = 1024
SEEN_SHARE = 16
"""At first, a region is thought to show one in so many Gaussians, equally many from each rank. That is rather too few:
a window that grows fits what is needed, one that was too large at first would travel to the end."""

NEARLY_FULL = 0.8
"""A window of which more than this was needed gets more room before it overflows."""

WINDOW_GRAIN = 256
"""Rows and numbers of a window are a multiple of this (`cuda.exchange.THREADS`)."""


class Windows(NamedTuple):
    """Room of an exchange between the ranks of one machine; equal on all of them.

    rows: copies that one rank may send another. numbers: that come back for them. region_rows: splats of a region.
    """

    rows: int
    numbers: int
    region_rows: int

    @classmethod
    def expected(cls, num_gaussians: int, num_regions: int, num_ranks: int) -> Windows:
        """A guess that all ranks make alike, for the Gaussians and the regions of all of them."""
        region = num_gaussians // SEEN_SHARE
        rows = _whole_grains(region * -(-num_regions // num_ranks) // num_ranks)
        return cls(rows, MOST_NUMBERS_BACK * rows, _whole_grains(region))

    def grown(self, needed: Sequence[int]) -> Windows:
        """With more room where it was not enough, or nearly so."""
        pairs = zip(self, needed, strict=True)
        return Windows(
            *(_whole_grains(int(GROWTH * need)) if need > NEARLY_FULL * have else have for have, need in pairs)
        )


def _whole_grains(count: int) -> int:
    return -(-max(count, FIRST_WINDOW) // WINDOW_GRAIN) * WINDOW_GRAIN


class Capacity:
    """Instances and checkpointed buckets that a view may have, room of exchanges, and the status words of one body.

    An instance is a (splat, tile) pair, a bucket 32 neighbours of a tile's list. Capacities only grow. windows: None as
    long as nobody has asked for any.
    """

    def __init__(self, device: torch.device, *, instances: int = FIRST_INSTANCES, buckets: int = FIRST_BUCKETS) -> None:
        """Start with these capacities; `device` is where the kernels work."""
        self.instances = instances
        self.buckets = buckets
        self.windows: Windows | None = None
        self.defers = False
        """True: nobody waits for the device after a view; the owner calls `recover` when it suits."""
        self.status = torch.zeros(STATUS_WORDS, dtype=torch.int32, device=device)
        self._is_fresh = True

    def expect(self, num_rows: int) -> None:
        """Provide for a view of `num_rows` splats before the first one is binned."""
        if self._is_fresh:
            self._is_fresh = False
            self.instances = max(self.instances, min(INSTANCES_PER_ROW * num_rows, MOST_INSTANCES))
            self.buckets = max(self.buckets, self.instances // INSTANCES_PER_BUCKET)

    def windows_for(self, num_gaussians: int, num_regions: int, num_ranks: int) -> Windows:
        """The room of an exchange; what it is at first follows from these, equal on all ranks."""
        if self.windows is None:
            self.windows = Windows.expected(num_gaussians, num_regions, num_ranks)
        return self.windows

    def provide(self, needed: Sequence[int]) -> bool:
        """Give windows that are nearly full more room from the next exchange on; all ranks call it at the same step.

        Args: needed: the words of the status that say what was needed of the three of `Windows`.
        Returns: whether there were such.
        """
        before = self.windows
        if before is not None:
            self.windows = before.grown(needed)
        return self.windows != before

    def recover(self) -> bool:
        """Grow what was too small and clear the status; True when the work since the last call must be repeated.

        Raises:
            MemoryError: when a view needs more than 2^30 instances.
        """
        overflow, instances, buckets, *others = self.status.tolist()  # host sync: status
        if not overflow:
            return False
        if instances > MOST_INSTANCES:
            raise MemoryError(
                f"a view covers {instances:,} (splat, tile) pairs, or more, and {MOST_INSTANCES:,} can be sorted; "
                "render it in strips of rows, at a lower resolution, or with smaller Gaussians"
            )
        if instances > self.instances:
            self.instances = min(int(GROWTH * instances), MOST_INSTANCES)
        if buckets > self.buckets:
            self.buckets = int(GROWTH * buckets)
        self.provide(others[: len(Windows._fields)])
        self.status.zero_()
        return True
