# SPDX-License-Identifier: Apache-2.0
"""A step's launches, recorded once as a CUDA graph and replayed while the table's tensors and all sizes stay.

A step of a small scene is a millisecond of Python and half a millisecond of a GPU's work. Between two edits of the
table every step queues the same launches on the same memory; what differs lies in `StepMemory`, and photos are copied
to where the launches read them. The first step of a kind runs as usual, so that everything is compiled and loaded; the
second is recorded; those that follow are replayed, to the same bits. A kind that has been replayed is recorded at once
after the next edit. Whatever looks at the device in the middle of a
step is not recorded: ranks on several machines, immediate mode, methods with factors, lazily updated rows.

Several ranks replay their collectives, too, so all of them record the same steps: what decides is equal on all.

Letters: B views, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.kernel_passage import host_tables
from distributed.pixels import PixelPartition
from gaussian_renderer.step import Batch, StepResult, draw_and_update
from launch.bodies import STEPS_AHEAD
from launch.step_memory import StepMemory, StepNumbersAt
from masksplat.cuda.body import CudaBody
from masksplat.cuda.exchange import HostTables, most_table_words
from strategies.base import Numbers
from strategies.schedule import Window

if TYPE_CHECKING:
    from launch.training import Training

Result = TypeVar("Result")

MOST_RECORDINGS = 8
"""Kinds of step, by the sizes of their photos, that are kept at once: each holds memory."""

ROOM = 2.0
"""A step is recorded while so many times the memory that steps take is free: a recording has its own."""

USUAL_WASTE = 2 << 30
"""Bytes that torch may hold and not use, or as much as a training uses at its peak, but at most MOST_WASTE."""

MOST_WASTE = 0.25
"""Of the GPU's memory."""


@dataclass(frozen=True, eq=False)
class Computed:
    """What came of a step; nothing of it has been read. learned: what the strategies say."""

    result: StepResult
    learned: Numbers


class Graph(Protocol):
    """Launches that can be repeated."""

    def replay(self) -> None:
        """Queue all of them again."""


class GraphMaker(Protocol):
    """Records launches of one device."""

    def has_room(self) -> bool:
        """Whether there is memory for one more recording."""

    def record(self, work: Callable[[], Result]) -> tuple[Graph, Result]:
        """Let `work` queue its launches into a graph, where they are not carried out; what it returned, undefined."""

    def tidy(self) -> None:
        """Give memory of recordings back, if much is held that nobody uses. No recording is left when it is called."""

    def close(self) -> None:
        """Nothing more will be recorded."""


class DeviceGraphMaker:
    """CUDA graphs of the current device by torch's stream capture; all of them share one pool of memory.

    They may: on one stream, one after the other, and nobody keeps what is in a pool beyond the next replay. A pool only
    grows: what a recording of a smaller table had is too small for the next one. `tidy` begins a new pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # What this process can have; asked for once, since it takes milliseconds.
        self._budget = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        self._begin_pool()

    def _begin_pool(self) -> None:
        """Torch gives a pool up with the last graph in it; the first one stays until the next pool."""
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor: tuple[Graph, Tensor] | None = self.record(lambda: torch.zeros(1, device=self._device))

    def has_room(self) -> bool:
        """See `GraphMaker`; the largest step so far is what a step takes."""
        device = self._device
        taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return self._budget - torch.cuda.memory_reserved(device) > ROOM * taken

    def tidy(self) -> None:
        """See `GraphMaker`. Waits for the device when there is something to give back."""
        device, peak = self._device, torch.cuda.max_memory_allocated(self._device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if is_wasteful(unused, peak, self._budget):
            self._anchor = None
            torch.cuda.empty_cache()
            self._begin_pool()

    def record(self, work: Callable[[], Result]) -> tuple[Graph, Result]:
        """See `GraphMaker`. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # says once more that the recording has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, result

    def close(self) -> None:
        """See `GraphMaker`."""
        self._anchor = None


def is_wasteful(unused: int, peak: int, budget: int) -> bool:
    """Whether more bytes are held unused than a training with this peak should, of those that it can have."""
    return unused > min(max(USUAL_WASTE, peak), int(MOST_WASTE * budget))


def compute_now(training: Training, window: Window, batch: Batch, memory: StepNumbersAt | None = None) -> Computed:
    """Sample masks, draw, compare, update everything, on the current stream; changing numbers are read in `memory`."""
    table, strategy, seed = training.table, training.strategy, training.config.optimization.seed
    masks = None if memory is None else memory.masks
    with training.phases("masks"):
        gate = strategy.sample(table, window, seed, masks)
    result = draw_and_update(
        training.tools, table, batch, gate, training.step_settings(window), training.adam_steps(window), memory
    )
    if gate is not None:
        gate = replace(gate, num_drawn_of_all=result.totals.num_drawn)
    with training.phases("masks"):
        learned = strategy.after_backward(table, window, gate, result.d_gate, training.mask_scaling(window), masks)
    return Computed(result, learned)


def compute_step(training: Training, step: int, window: Window) -> Computed:
    """Draw the batch of a step with sampled masks, compare it with its photos, update everything. All ranks."""
    if training.graphs is not None:
        return training.graphs.compute(training, step, window)
    return compute_now(training, window, batch_of(training, step))


def batch_of(training: Training, step: int) -> Batch:
    """The batch of a step that is not replayed."""
    with training.phases("photos"):
        batch = training.batch(step)
        training.number_rows()
    return batch


@dataclass(frozen=True, eq=False)
class _Recording:
    """A kind of step. photos: where its launches read them; result: where they leave what the host reads."""

    graph: Graph
    photos: Sequence[Tensor]
    result: StepResult


class StepGraphs:
    """The recordings of a training, made when they pay and forgotten when the table changes or buffers have to grow.

    A recording has buffers of the sizes that the body's capacity had when it was made.
    """

    def __init__(self, body: CudaBody, num_views: int, maker: GraphMaker, *, num_ranks: int = 1) -> None:
        """Args: num_views: B; num_ranks: W."""
        self._body = body
        self._maker = maker
        table_words = most_table_words(num_views, num_ranks)
        self._memory = StepMemory(num_views, body.device, num_behind=STEPS_AHEAD, num_table_words=table_words)
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: set[Hashable] = set()
        self._recurring: set[Hashable] = set()  # have been replayed, also before an edit
        self._table: Hashable = None

    def compute(self, training: Training, step: int, window: Window) -> Computed:
        """The step, replayed if its kind has been recorded. All ranks."""
        training.number_rows()
        scaling = training.mask_scaling(window)
        mask_numbers = training.strategy.recorded_numbers(training.table, window, scaling)
        kind = None if mask_numbers is None else self._kind(training, step, window, has_masks=len(mask_numbers) > 0)
        if kind is None or mask_numbers is None or not self._is_worth(kind, training.communicator):
            return compute_now(training, window, batch_of(training, step))
        with training.phases("photos"):
            batch = training.batch(step, views_as=self._memory.views(training.sizes(step)))
            tables = _tables(training, batch)
            self._write(training, step, window, mask_numbers, tables)
        recording = self._recordings.get(kind) or self._record(kind, training, window, batch, tables)
        with training.phases("replay"):
            for place, photo in zip(recording.photos, batch.photos, strict=True):
                place.copy_(photo)
            recording.graph.replay()
        result = _of_partition(recording.result, batch.partition)
        num_drawn = result.totals.num_drawn
        return Computed(result, training.strategy.numbers_of(training.table, window, scaling, num_drawn))

    def forget(self) -> None:
        """Drop all recordings: buffers have to grow. All ranks, at the same step."""
        self._recordings.clear()
        self._seen.clear()

    def close(self) -> None:
        """Drop all recordings for good, before the process group ends that they use."""
        self.forget()
        self._maker.close()

    def _kind(self, training: Training, step: int, window: Window, *, has_masks: bool) -> Hashable | None:
        """What must be equal for a recording to fit; None for steps that cannot be recorded. Ranks agree on it."""
        table, lazy_from = training.table, self._body.lazy_from
        is_lazy = table.lazy_bytes > 0 or (lazy_from is not None and len(table) >= lazy_from)
        if is_lazy or not self._body.defers or training.has_random_background:
            return None
        found = (len(table), table.addresses)
        if found != self._table:
            self._table = found
            self.forget()
            self._maker.tidy()
        regions: Hashable = None
        sizes = training.sizes(step)
        if training.communicator.size > 1:
            partition = training.pixels.partition(step)
            regions = (
                tuple(
                    tuple((sizes[region.view], region.tile_start, region.tile_stop) for region in mine)
                    for mine in partition.regions
                ),
                partition.most_regions_of_a_view,
                self._body.capacity.windows,
            )
        return sizes, training.sh_degree(window), has_masks, regions

    def _is_worth(self, kind: Hashable, ranks: Communicator) -> bool:
        """Whether this kind comes again and again, and is recorded or all ranks have room to."""
        if kind in self._recordings:
            self._recurring.add(kind)
            return True
        if kind not in self._seen and kind not in self._recurring:
            self._seen.add(kind)
            return False
        if len(self._recordings) >= MOST_RECORDINGS:
            return False
        return all(row[0] for row in ranks.gather_counts([int(self._maker.has_room())]))  # all ranks

    def _write(
        self,
        training: Training,
        step: int,
        window: Window,
        mask_numbers: Sequence[float],
        tables: HostTables | None,
    ) -> None:
        cameras = training.cameras.numbers(training.pixels.views(step))
        weight, words = training.step_settings(window).view_weight, None if tables is None else tables.packed
        self._memory.write(cameras, training.adam_steps(window), weight, mask_numbers, window.first, words)

    def _record(
        self, kind: Hashable, training: Training, window: Window, batch: Batch, tables: HostTables | None
    ) -> _Recording:
        photos = [photo.clone() for photo in batch.photos]
        work, memory = replace(batch, photos=photos), self._memory.numbers_at(tables)
        graph, computed = self._maker.record(lambda: compute_now(training, window, work, memory))
        recording = self._recordings[kind] = _Recording(graph, photos, computed.result)
        return recording


def _tables(training: Training, batch: Batch) -> HostTables | None:
    """Who draws what in a step, as its kernels read it; None for one rank."""
    ranks, num_rows = training.communicator, len(training.table)
    if ranks.size == 1:
        return None
    offsets = tuple(view * num_rows for view in range(len(batch.views) + 1))
    return host_tables(batch.partition, offsets, batch.views.sizes, ranks.rank)


def _of_partition(result: StepResult, partition: PixelPartition) -> StepResult:
    """The result of a replay, read by who drew what in its own step."""
    if result.totals.partition is partition:
        return result
    return replace(result, totals=replace(result.totals, partition=partition))
