# SPDX-License-Identifier: Apache-2.0
"""Steps that are recorded and replayed end at the bits of steps that are queued launch by launch.

On the emulator a recording calls the same functions again, which is what a graph does but for one thing: numbers that
the host works out must lie in the step's memory. Real graphs: the same tests under `-m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import launch.step_graphs
import launch.training
import masksplat.cuda.devices
import masksplat.masks
import strategies.mask
import train
from cuda_launchers import launchers, make_launcher
from distributed.communicator import Communicator
from launch.config import TrainConfig
from launch.late_steps import LateSteps
from launch.step_graphs import Computed, DeviceGraphMaker, Graph, GraphMaker, StepGraphs, is_wasteful
from masksplat.cuda.body import CudaBody
from masksplat.cuda.launcher import Launcher
from masksplat.types import Counted
from test_late_steps import NobodyIsDue, NobodyLooks, assert_same, built, trained


@dataclass(eq=False)
class CalledAgain:
    """In place of a graph: what is replayed is called, and its results are put where the first ones are."""

    work: Callable[[], Computed]
    first: Computed
    is_done: bool = True
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        if self.is_done:  # by the recording, which a graph leaves to its first replay
            self.is_done = False
            return
        again = self.work().result.totals
        mine = self.first.result.totals
        mine.values.copy_(again.values)
        if mine.num_drawn is not None:
            mine.num_drawn.copy_(again.num_drawn)


class CallingMaker:
    """Records by calling."""

    def __init__(self) -> None:
        self.graphs: list[CalledAgain] = []
        self.num_tidied = 0

    def has_room(self) -> bool:
        return True

    def tidy(self) -> None:
        self.num_tidied += 1

    def close(self) -> None:
        pass

    def record(self, work: Callable[[], Computed]) -> tuple[Graph, Computed]:
        self.graphs.append(CalledAgain(work, work()))
        return self.graphs[-1], self.graphs[-1].first


class CountingMaker(DeviceGraphMaker):
    """Real graphs, counted."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[CalledAgain] = []
        super().__init__(device)
        self.graphs.clear()  # of the anchor

    def record(self, work):
        graph, result = super().record(work)
        counted = CalledAgain(graph.replay, result)
        counted.replay = lambda: (setattr(counted, "num_replays", counted.num_replays + 1), graph.replay())
        self.graphs.append(counted)
        return counted, result


@pytest.fixture(params=launchers())
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """A launcher through which masks go as well; on the CPU they have a body of their own otherwise."""
    chosen = make_launcher(request.param)
    monkeypatch.setattr(masksplat.cuda.devices, "launcher_of", lambda _: chosen)
    monkeypatch.setattr(masksplat.masks, "_has_kernels", lambda logits: logits.dtype == torch.float32)
    monkeypatch.setattr(strategies.mask, "_pull", counted_pull)
    return chosen


def counted_pull(num_drawn: torch.Tensor, num_all: int, weight: float) -> Counted:
    """The pull as a GPU has it; on the CPU the host would read the count."""
    return Counted(num_drawn, strategies.mask._pull_factor(num_all, weight))


def maker_for(launcher: Launcher) -> CallingMaker | CountingMaker:
    return CountingMaker(launcher.device) if launcher.device.type == "cuda" else CallingMaker()


def record_with(monkeypatch: pytest.MonkeyPatch, maker: GraphMaker | None) -> None:
    """Let trainings that are built from now on record with `maker`, or not at all."""

    def graphs(config: TrainConfig, body: CudaBody, ranks: Communicator) -> StepGraphs | None:
        return None if maker is None else StepGraphs(body, config.optimization.bsz, maker, num_ranks=ranks.size)

    monkeypatch.setattr(launch.training, "step_graphs", graphs)


METHODS: Sequence[tuple[str, ...]] = (
    ("mask",),
    ("mask", "--bsz", "2"),
    ("3dgs",),
    ("mask", "--mask_from_iter", "10", "--mask_until_iter", "20", "--opacity_decay", "0"),
    ("rad_splat", "--use_importance_mask", "--prune_iterations", "32", "--train_mask_iters", "8"),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "_".join(method[:3]))
def test_replayed_steps_leave_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path, method: Sequence[str]
) -> None:
    """Tables and logs; with edits, rising degrees of harmonics, learning rates that fall, and evaluations between."""
    flags = ("--prune_method", *method)
    monkeypatch.setattr(launch.training, "SH_DEGREE_INTERVAL", 14)
    record_with(monkeypatch, None)
    queued = trained(monkeypatch, launcher, generated_scene, tmp_path / "queued", *flags)
    maker = maker_for(launcher)
    record_with(monkeypatch, maker)
    replayed = trained(monkeypatch, launcher, generated_scene, tmp_path / "replayed", *flags)
    assert sum(graph.num_replays for graph in maker.graphs) > len(maker.graphs) >= 3
    assert_same(replayed, queued)


def test_steps_that_go_back_are_replayed_too(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """A buffer that turns out too small, in steps that are queued and in those that are recorded and replayed."""
    record_with(monkeypatch, None)
    smooth = trained(monkeypatch, launcher, generated_scene, tmp_path / "smooth")
    record_with(monkeypatch, maker_for(launcher))
    rough = trained(
        monkeypatch, launcher, generated_scene, tmp_path / "rough", too_small_at={0, 1, 6, 12, 13, 14, 15, 25, 27, 43}
    )
    assert_same(rough, smooth)


def test_only_what_stays_is_replayed(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """What a recording is for follows the table's tensors and the degree; steps that are not deferred have none."""
    maker = maker_for(launcher)
    record_with(monkeypatch, maker)
    training = built(monkeypatch, launcher, generated_scene, tmp_path / "m")
    training.body.defers = True
    graphs, window = training.graphs, training.window(0)
    ranks, kind = training.communicator, graphs._kind(training, 0, window, has_masks=True)
    assert kind == graphs._kind(training, 1, training.window(1), has_masks=True)
    assert kind != graphs._kind(training, 999, training.window(999), has_masks=True)  # another degree
    assert not graphs._is_worth(kind, ranks) and graphs._is_worth(kind, ranks)
    graphs.forget()
    assert not graphs._is_worth(kind, ranks) and graphs._is_worth(kind, ranks)
    training.table.params["means"] = training.table.params["means"].clone()
    assert graphs._kind(training, 0, window, has_masks=True) == kind
    assert not graphs._is_worth(kind, ranks)  # other tensors: it has to come once before it is recorded
    graphs._recordings[kind] = None
    assert graphs._is_worth(kind, ranks)
    graphs.forget()
    assert graphs._is_worth(kind, ranks)  # at once: it has been replayed before
    training.body.defers = False
    assert graphs._kind(training, 0, window, has_masks=True) is None


def test_a_random_background_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    maker = maker_for(launcher)
    record_with(monkeypatch, maker)
    trained(monkeypatch, launcher, generated_scene, tmp_path / "m", "--random_background")
    assert not maker.graphs


def test_memory_of_former_recordings_is_bounded() -> None:
    """Two gigabytes, or what the training itself uses at its peak, but never more than a quarter of the GPU."""
    gib = 1 << 30
    assert [is_wasteful(unused * gib, 1 * gib, 140 * gib) for unused in (1, 2, 3, 30)] == [False, False, True, True]
    assert [is_wasteful(unused * gib, 8 * gib, 140 * gib) for unused in (3, 8, 9)] == [False, False, True]
    assert [is_wasteful(unused * gib, 8 * gib, 24 * gib) for unused in (5, 6, 7)] == [False, False, True]


@pytest.mark.gpu
def test_a_new_pool_takes_the_place_of_a_wasteful_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    maker, count = DeviceGraphMaker(torch.device("cuda")), torch.zeros(1, device="cuda")
    monkeypatch.setattr(launch.step_graphs, "is_wasteful", lambda unused, *_: unused > 1 << 26)
    for size in range(1, 5):  # each needs memory that those before it cannot have left

        def work(size: int = size) -> None:
            count.add_(torch.ones(size << 24, device="cuda").max())

        graph, _ = maker.record(work)
        graph.replay()
        graph.replay()
        del graph
        maker.tidy()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        assert float(count) == 2 * size and unused <= 1 << 26


def test_lazily_updated_rows_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """Which update a row is behind at is known to the host; where a table grows into it, too."""
    record_with(monkeypatch, maker_for(launcher))
    training = built(monkeypatch, launcher, generated_scene, tmp_path / "m")
    training.body.defers = True
    window, body = training.window(0), training.body
    assert training.graphs._kind(training, 0, window, has_masks=True) is not None
    body.lazy_from = len(training.table)
    assert training.graphs._kind(training, 0, window, has_masks=True) is None
    train.train_step(training, NobodyIsDue(), NobodyLooks(), 0)
    body.lazy_from = None
    assert training.table.lazy_bytes > 0  # of rows that are behind already
    assert training.graphs._kind(training, 0, window, has_masks=True) is None


def test_recordings_end_with_the_buffers_that_were_too_small(
    monkeypatch: pytest.MonkeyPatch, launcher: Launcher, generated_scene: Path, tmp_path: Path
) -> None:
    """A replay would overflow again and again. The emulator's recordings look sizes up anew, so this asks directly."""
    record_with(monkeypatch, maker_for(launcher))
    training = built(monkeypatch, launcher, generated_scene, tmp_path / "m")
    training.graphs._recordings["a kind"] = None
    training.body.status[:3] = torch.tensor([1, 1 << 14, 1 << 14])
    assert LateSteps(training, NobodyIsDue())._go_back(5, training.body) == 5
    assert not training.graphs._recordings
    assert training.body.capacity.instances > 1 << 14 and not bool(training.body.status.any())
