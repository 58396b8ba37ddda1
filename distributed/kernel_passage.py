# SPDX-License-Identifier: Apache-2.0
"""The way of one step's splats through kernels (`masksplat.cuda.exchange`): float32 on a GPU, few calls of the host.

Blocks lie as those of `distributed.torch_passage`, so the same numbers describe both (`distributed.routes`). The order
of the rows in a region is left to chance.

Letters: W ranks, M packed splats of this rank, Q regions of this rank, R splats received for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.pixels import HALO, PixelPartition
from distributed.routes import OPACITY_NEVER_CAPPED, Routes, region_table
from distributed.transfer import Fetched
from distributed.wire import WORD, Wire
from masksplat.cuda.devices import launcher_of
from masksplat.cuda.exchange import (
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


def kernels_for(splats: Splats) -> Launcher | None:
    """What launches the kernels that exchange these splats; None where torch operations have to do."""
    has_kernels = splats.rows.device.type == "cuda" and splats.rows.dtype == torch.float32
    return launcher_of(splats.rows.device) if has_kernels else None


@dataclass(frozen=True)
class HostNumbers:
    """What the host reads of a `Layout`. Rows to and from each rank; numbers of gradients from and to each rank.

    blocks: (W, K) int32 rows of each block that each rank sends.
    """

    send_rows: list[int]
    receive_rows: list[int]
    returned: list[int]
    returning: list[int]
    region_offsets: Tensor
    blocks: np.ndarray

    @classmethod
    def read(cls, layout: Layout, num_ranks: int, num_regions: int) -> HostNumbers:
        """Waits for the device: the only host sync of an exchange."""
        (values,) = Fetched.start([layout.for_host]).wait()  # host sync: the numbers of rows
        num_sums = 4 * num_ranks
        last = num_sums + num_regions + 1
        to_each, from_each, returned, returning = values[:num_sums].view(4, num_ranks).tolist()
        offsets = values[num_sums:last].to(torch.int64)
        return cls(to_each, from_each, returned, returning, offsets, values[last:].view(num_ranks, -1).numpy())


@dataclass(frozen=True, eq=False)
class KernelPassage:
    """The copies of one step on their way. See `distributed.exchange.Passage`."""

    communicator: Communicator
    wire: Wire
    tables: RegionTables
    copies: SentCopies
    layout: Layout
    numbers: HostNumbers
    num_regions: tuple[int, ...]

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
    ) -> KernelPassage:
        """The way that `ExchangePlan.for_partition` describes. All ranks; host sync: the numbers of rows."""
        rank, num_regions = communicator.rank, tuple(map(len, partition.regions))
        tables = RegionTables.upload(
            launcher,
            regions=region_table(partition, HALO),
            view_offsets=splats.view_offsets.tolist(),
            sizes=[sizes[region.view] for region in partition.regions[rank]] if sizes is not None else [],
            num_regions=num_regions,
            rank=rank,
        )
        copies = SentCopies.route(launcher, tables, splats, keep=keep, never_capped=OPACITY_NEVER_CAPPED)
        layout = arrange(launcher, tables, rank, communicator.gather(tables.blocks))  # all ranks
        numbers = HostNumbers.read(layout, communicator.size, num_regions[rank])
        return cls(communicator, wire, tables, copies, layout, numbers, num_regions)

    @property
    def region_offsets(self) -> Tensor:
        """(Q + 1,) int64, on the host."""
        return self.numbers.region_offsets

    @property
    def routes(self) -> Routes:
        """How many rows travel between whom."""
        return Routes(self.communicator.rank, self.numbers.blocks.astype(np.int64), self.num_regions)

    def forward(self, splats: Splats) -> Splats:
        """The splats of this rank's regions; `splats` are those of the plan. All ranks."""
        numbers, wire = self.numbers, self._words
        packed = self.copies.pack(self.layout, wire, sum(numbers.send_rows))
        arrived = self.communicator.all_to_all_rows(packed, numbers.send_rows, numbers.receive_rows)  # all ranks
        return unpack_rows(self.copies.launcher, self.tables, self.layout, wire, arrived, numbers.region_offsets)

    def backward(self, d_received: Tensor) -> Tensor:
        """(M, 10): gradients by this rank's packed rows; unspecified for rows that are not in use. All ranks."""
        numbers = self.numbers
        going = pack_gradients(
            self.copies.launcher, self.tables, self.layout, d_received.contiguous(), sum(numbers.returning)
        )
        returned = self.communicator.all_to_all_rows(going, numbers.returning, numbers.returned)  # all ranks
        return self.copies.sum_gradients(self.layout, returned)

    @property
    def _words(self) -> WireWords:
        return WireWords(self.wire.id_bytes // WORD, self.wire.sends_boxes)
