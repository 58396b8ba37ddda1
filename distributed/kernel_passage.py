# SPDX-License-Identifier: Apache-2.0
"""The way of one step's splats through kernels (`masksplat.cuda.exchange`): float32 on a GPU, few calls of the host.

Blocks lie as those of `distributed.torch_passage`, so the same numbers describe both (`distributed.routes`). The order
of the rows in a region is left to chance. A rank's copies for itself are written where they would arrive.

Between the ranks of one machine copies travel in windows whose size all ranks know beforehand, so that nobody has to
read how many rows there are; what is too much for them is found on the device (`RoomForRows`). Between machines, where
bytes matter more than waiting, the host reads the numbers of rows and sends just those.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import HALO, PixelPartition
from distributed.routes import OPACITY_NEVER_CAPPED, LateRoutes, Routes, region_table
from distributed.transfer import Fetched
from distributed.wire import WORD, Wire
from masksplat.cuda.capacity import MOST_NUMBERS_BACK, Windows
from masksplat.cuda.devices import launcher_of
from masksplat.cuda.exchange import (
    Extents,
    HostTables,
    Layout,
    RegionTables,
    SentCopies,
    WireWords,
    arrange,
    pack_gradients,
    unpack_rows,
)
from masksplat.cuda.launcher import Launcher
from masksplat.types import Splats

REMEMBERED = 64
"""Tables and sizes that are kept: whole views are shared out in few ways."""


def kernels_for(splats: Splats) -> Launcher | None:
    """What launches the kernels that exchange these splats; None where torch operations have to do."""
    has_kernels = splats.rows.device.type == "cuda" and splats.rows.dtype == torch.float32
    return launcher_of(splats.rows.device) if has_kernels else None


class RoomForRows(Protocol):
    """What says how large windows are and keeps the status words (`masksplat.cuda.capacity.Capacity`)."""

    @property
    def status(self) -> Tensor:
        """Words on the device; the first is not 0 once something had no room."""

    def windows_for(self, num_gaussians: int, num_regions: int, num_ranks: int) -> Windows:
        """The room of this exchange, equal on all ranks."""

    def provide(self, needed: Sequence[int]) -> bool:
        """Make room where `needed` (`StepNumbers.needed`) nearly fills it, at the same step on all ranks.

        Returns: whether windows are larger now than in the steps before.
        """


@dataclass(frozen=True)
class HostNumbers:
    """What the host knows of an exchange: how large its buffers are, and what they hold if that has been read.

    rows, numbers: of copies on their way, of what goes back for them and comes back. region_offsets: (Q + 1,) int64.
    """

    rows: Extents
    numbers: Extents
    region_offsets: Tensor
    num_received: int
    routes: Routes | LateRoutes
    windows: Windows | None = None

    @classmethod
    def read(cls, layout: Layout, rank: int, num_regions: tuple[int, ...]) -> HostNumbers:
        """Just what is needed. Waits for the device: the only host sync of an exchange."""
        num_ranks, own_regions = len(num_regions), num_regions[rank]
        (values,) = Fetched.start([layout.for_host]).wait()  # host sync: the numbers of rows
        num_sums = 4 * num_ranks
        last = num_sums + own_regions + 1
        to_each, from_each, returned, returning = values[:num_sums].view(4, num_ranks).tolist()
        own_rows, own_numbers, num_received = to_each[rank], returned[rank], sum(from_each)
        for counts in (to_each, from_each, returned, returning):
            counts[rank] = 0
        offsets = values[num_sums:last].to(torch.int64)
        blocks = values[last:].view(num_ranks, -1).numpy().astype(np.int64)
        return cls(
            Extents.of(to_each, from_each, own_rows),
            Extents.of(returning, returned, own_numbers),
            offsets,
            num_received,
            Routes(rank, blocks, num_regions),
        )

    @classmethod
    def of_windows(cls, windows: Windows, layout: Layout, rank: int, num_regions: tuple[int, ...]) -> HostNumbers:
        """Windows between this rank and each other one; its own has room for all that its regions may show."""
        num_received = windows.region_rows * num_regions[rank]
        rows, numbers, offsets = _sizes_of_windows(windows, rank, len(num_regions), num_regions[rank])
        return cls(rows, numbers, offsets, num_received, LateRoutes(rank, layout.for_host, num_regions), windows)


@lru_cache(REMEMBERED)
def _sizes_of_windows(windows: Windows, rank: int, num_ranks: int, num_regions: int) -> tuple[Extents, Extents, Tensor]:
    """Rows, numbers and where the regions of this rank begin; nobody changes them."""
    own_rows = windows.region_rows * num_regions
    rows = [0 if other == rank else windows.rows for other in range(num_ranks)]
    numbers = [0 if other == rank else windows.numbers for other in range(num_ranks)]
    offsets = torch.arange(num_regions + 1, dtype=torch.int64) * windows.region_rows
    return Extents.of(rows, rows, own_rows), Extents.of(numbers, numbers, MOST_NUMBERS_BACK * own_rows), offsets


@dataclass(frozen=True, eq=False)
class KernelPassage:
    """The copies of one step on their way. See `distributed.exchange.Passage`."""

    communicator: Communicator
    wire: Wire
    tables: RegionTables
    copies: SentCopies
    layout: Layout
    numbers: HostNumbers

    @classmethod
    def for_partition(
        cls,
        communicator: Communicator,
        splats: Splats,
        partition: PixelPartition,
        *,
        wire: Wire,
        sizes: Sequence[tuple[int, int]] | None,
        keep: Tensor | None,
        launcher: Launcher,
        windows: Windows | None = None,
        status: Tensor | None = None,
        tables: RegionTables | None = None,
    ) -> KernelPassage:
        """The way that `ExchangePlan.for_partition` describes. All ranks.

        Args: windows, status: room that all ranks give alike, and the words that say when it did not suffice; None: the
        numbers of rows are read, a host sync. tables: `host_tables` on the device, if they are there already.
        """
        rank, num_regions = communicator.rank, tuple(map(len, partition.regions))
        if tables is None:
            offsets = tuple(splats.view_offsets.tolist())
            tables = RegionTables.upload(launcher, host_tables(partition, offsets, sizes and tuple(sizes), rank))
        copies = SentCopies.route(launcher, tables, splats, keep=keep, never_capped=OPACITY_NEVER_CAPPED)
        blocks = communicator.gather(tables.blocks)  # all ranks
        layout = arrange(launcher, tables, blocks, windows=windows, status=status)
        if windows is None:
            numbers = HostNumbers.read(layout, rank, num_regions)
        else:
            numbers = HostNumbers.of_windows(windows, layout, rank, num_regions)
        return cls(communicator, wire, tables, copies, layout, numbers)

    @property
    def region_offsets(self) -> Tensor:
        """(Q + 1,) int64, on the host."""
        return self.numbers.region_offsets

    @property
    def routes(self) -> Routes | LateRoutes:
        """How many rows travel between whom."""
        return self.numbers.routes

    @property
    def windows(self) -> Windows | None:
        """What travels whether it is filled or not; None: just what is needed."""
        return self.numbers.windows

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions; `splats` are those of the plan. All ranks."""
        numbers, wire = self.numbers, self._words
        packed = self.copies.pack(self.layout, wire, numbers.rows.total)
        return unpack_rows(
            self.copies.launcher,
            self.tables,
            self.layout,
            wire,
            self._exchanged(packed, numbers.rows),
            region_offsets=numbers.region_offsets,
            num_received=numbers.num_received,
            counts=None if numbers.windows is None else self.layout.in_use,
        )

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows; unspecified for rows that are not in use. All ranks."""
        numbers = self.numbers
        going = pack_gradients(
            self.copies.launcher,
            self.tables,
            self.layout,
            d_received.contiguous(),
            num_arrived=numbers.rows.num_arriving,
            num_numbers=numbers.numbers.total,
        )
        return self.copies.sum_gradients(self.layout, self._exchanged(going, numbers.numbers))

    def _exchanged(self, buffer: Tensor, extents: Extents) -> Tensor:
        """What has arrived in a buffer, this rank's own included. All ranks."""
        arrived = buffer[extents.first_received :]
        self.communicator.all_to_all_into(  # all ranks
            arrived[: extents.num_received], buffer[: extents.num_sent], extents.sent, extents.received
        )
        return arrived

    @property
    def _words(self) -> WireWords:
        return WireWords(self.wire.id_bytes // WORD, self.wire.sends_boxes)


@lru_cache(REMEMBERED)
def host_tables(
    partition: PixelPartition, view_offsets: tuple[int, ...], sizes: tuple[tuple[int, int], ...] | None, rank: int
) -> HostTables:
    """All that the kernels have to be told about a step, before it: no device is asked. Nobody changes it.

    Args: view_offsets: of the packed splats of this rank; sizes: see `ExchangePlan.for_partition`.
    """
    mine = partition.regions[rank]
    return HostTables.pack(
        regions=region_table(partition, HALO),
        view_offsets=view_offsets,
        sizes=None if sizes is None else [sizes[region.view] for region in mine],
        num_regions=tuple(map(len, partition.regions)),
        rank=rank,
    )
