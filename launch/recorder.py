# SPDX-License-Identifier: Apache-2.0
"""What a training tells the world while it runs: metrics.jsonl, the progress bar, saved models, checkpoints.

All ranks call the same methods; what needs their numbers is decided by iterations, never by clocks. Rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

from distributed.exchange import ExchangeRecord
from distributed.totals import StepNumbers
from launch.bodies import drawn_at_once
from launch.config import to_plain
from launch.evaluation import evaluate
from launch.memory import GpuPeak, bytes_per_gaussian
from launch.progress import TrainingProgress, gpu_memory_bytes
from launch.prune_checks import has_target
from launch.run_logs import RunLogs
from launch.sharing import Redistribution, shares_to_plain
from launch.start import run_state
from launch.training import Training
from scene.checkpoint import Checkpoint, save_checkpoint
from scene.gaussians import INITIAL_MASK_LOGIT
from scene.model_folder import ModelFolder
from scene.ply import save_ply
from scene.row_edit import EditReport
from strategies.schedule import Schedule, Window

HISTOGRAM_BINS = 20
GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Seen:
    """What is known of a step. loss: with the strategy's part; learned: the strategy's numbers; both over all ranks."""

    step: int
    numbers: StepNumbers
    exchanged: ExchangeRecord
    learned: Mapping[str, float]
    loss: float


@dataclass
class Recorder:
    """Writes the logs of one training and shows its progress. Seconds exclude evaluation and saving.

    train_seconds: of all runs since the training began; total_seconds: of this run, everything included;
    untimed_images: images trained before the clock was started, by the program that a checkpoint was imported from;
    num_saved: Gaussians in the model that was saved last.
    """

    training: Training
    folder: ModelFolder
    logs: RunLogs
    progress: TrainingProgress
    train_seconds: float = 0.0
    peak_memory: int = 0
    gpu_peak: GpuPeak = GpuPeak()
    untimed_images: int = 0
    num_saved: int = 0
    _process: psutil.Process = field(default_factory=psutil.Process)
    _started: float = field(default_factory=time.perf_counter)
    _resumed: float = field(default_factory=time.perf_counter)
    _expected: float = 0.0

    def start(self) -> None:
        """The first line of the log: what is trained with what. All ranks."""
        training = self.training
        scene, ranks = training.scene, training.communicator
        entry = {
            "source": str(scene.source),
            "num_train": len(scene.train),
            "num_test": len(scene.test),
            "num_points": len(scene.points.xyz),
            "extent": scene.extent,
            "test_names": [camera.name for camera in scene.test],
        }
        rows = [row[0] for row in ranks.gather_counts([len(training.table)])]
        threads = training.config.pipeline.threads
        config = to_plain(training.config)
        each = bytes_per_gaussian(training.table)
        self.logs.main.write(
            "run", config=config, scene=entry, threads=threads, num_ranks=ranks.size, rows=rows, bytes_per_gaussian=each
        )
        self._resumed = time.perf_counter()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Let the clocks of the run that wrote a checkpoint go on, and say in the log where it went on. All ranks."""
        clocks = checkpoint.state.clocks
        self.train_seconds = float(clocks.get("seconds", 0.0))
        self.peak_memory = int(clocks.get("peak_memory_bytes", 0))
        self.gpu_peak = GpuPeak(*map(int, clocks.get("gpu_peak_bytes", (0, 0))))
        self.untimed_images = int(clocks.get("untimed_images", 0 if clocks else checkpoint.state.iteration))
        self.training.phases.seconds.update(clocks.get("phases", {}))
        iteration, path = checkpoint.state.iteration, str(checkpoint.path)
        self.logs.main.write("resumed", iteration=iteration, path=path, num_gaussians=self.num_gaussians())

    def num_gaussians(self) -> int:
        """Gaussians of all ranks. All ranks."""
        return int(self.training.total(len(self.training.table))[0])

    def is_due(self, window: Window) -> bool:
        """Whether `after_update` or `after_edits` will look at the table of this very step."""
        config = self.training.config
        logging = config.logging
        iterations = (*logging.test_iterations, *logging.save_iterations, *config.checkpoint.checkpoint_iterations)
        return bool(_due(iterations, window)) or Schedule(0, window.last, logging.log_interval).fires(window)

    def after_update(self, window: Window, seen: Seen) -> None:
        """Progress bar in every step; lines and a histogram at every log interval; measures and models when due."""
        training = self.training
        self.progress.advance(min(window.size, training.config.optimization.iterations - window.first + 1))
        if Schedule(0, window.last, training.config.logging.log_interval).fires(window):
            self._write_step(window, seen)
        if training.config.distribution.save_strategy_history:
            self.logs.history.write("step", training.pixels.history(seen.step, seen.numbers), iteration=window.last)
        if self.progress.is_due():
            count = sum(seen.numbers.rows)
            self.progress.update(loss=seen.loss, num_gaussians=count, expected_gaussians=self._expected or count)
        for iteration in _due(training.config.logging.test_iterations, window):
            self._pause(lambda it: self._measure(it, window), iteration)
        for iteration in _due(training.config.logging.save_iterations, window):
            self._pause(self._save, iteration)

    def after_edits(self, window: Window, step: int) -> None:
        """A checkpoint when one is due: update and edits of the step are done, the next one has not begun."""
        for iteration in _due(self.training.config.checkpoint.checkpoint_iterations, window):
            self._pause(lambda it: self._save_checkpoint(it, window, step), iteration)

    def save_checkpoint(self, step: int) -> Path:
        """A checkpoint behind `step`, which nobody has asked for; its folder. All ranks."""
        window = self.training.window(step)
        self._pause(lambda iteration: self._save_checkpoint(iteration, window, step), window.last)
        return self.folder.checkpoints / str(window.last)

    def save_model(self, step: int) -> Path:
        """The model behind `step`, which nobody has asked for; its file. All ranks."""
        iteration = min(self.training.window(step).last, self.training.config.optimization.iterations)
        self._pause(self._save, iteration)
        return self.folder.point_cloud(iteration)

    def edit(self, report: EditReport | None) -> None:
        """A line for an edit of the table, with the numbers of all ranks. All ranks."""
        if report is not None:
            names = ("cloned", "split", "pruned_opacity", "pruned_size", "pruned_mask", "num_gaussians")
            totals = self.training.total(*(getattr(report, name) for name in names))
            counts = {name: int(total) for name, total in zip(names, totals, strict=True)}
            self.logs.main.write("edit", {**asdict(report), **counts})

    def redistribution(self, window: Window, found: Redistribution | None) -> None:
        """A line when Gaussians were shared out again."""
        if found is not None:
            self.logs.main.write("redistribution", asdict(found), iteration=window.last)
            self.logs.history.write("redistribution", asdict(found), iteration=window.last)

    def end(self) -> float:
        """The last line; returns the seconds of training. All ranks."""
        self._clock()
        own = self.gpu_peak = self.gpu_peak.or_more(GpuPeak.now())
        for row in self.training.communicator.gather_counts([own.allocated, own.reserved]):
            self.gpu_peak = self.gpu_peak.or_more(GpuPeak(*row))
        self.peak_memory = max(self.peak_memory, self._process.memory_info().rss)
        iterations = self.training.config.optimization.iterations
        self.logs.main.write(
            "end",
            seconds=self.train_seconds,
            total_seconds=time.perf_counter() - self._started,
            images_per_second=self._rate(iterations),
            peak_memory_bytes=self.peak_memory,
            gpu_peak_bytes=self.gpu_peak.allocated,
            gpu_peak_reserved_bytes=self.gpu_peak.reserved,
        )
        return self.train_seconds

    def _rate(self, iteration: int) -> float:
        return (iteration - self.untimed_images) / max(self.train_seconds, 1e-9)

    def _clock(self) -> float:
        now = time.perf_counter()
        self.train_seconds += now - self._resumed
        self._resumed = now
        return self.train_seconds

    def _pause(self, action: Callable[[int], None], iteration: int) -> None:
        """Run an action whose time is not training time."""
        self._clock()
        phases, table = self.training.phases, self.training.table
        with drawn_at_once(self.training.body), phases.untimed("measuring and saving"), table.undisturbed():
            action(iteration)
        self._resumed = time.perf_counter()

    def _expected_count(self) -> float:
        """The Gaussians of all ranks, each by its keep probability. All ranks."""
        table = self.training.table
        if self.training.config.mask.prune_method != "mask":
            return float(self.num_gaussians())
        logits = table.params["mask_logits"].double()
        probabilities = torch.sigmoid(logits)
        if has_target(self.training.config):  # before and after its masks are learned, every Gaussian is certain
            probabilities[logits == INITIAL_MASK_LOGIT] = 1.0
        return self.training.total(float(probabilities.sum()))[0]

    def _write_step(self, window: Window, seen: Seen) -> None:
        """The lines of a log interval. All ranks."""
        training, numbers = self.training, seen.numbers
        seconds, iteration = self._clock(), min(window.last, training.config.optimization.iterations)
        memory = self._process.memory_info().rss
        self.peak_memory = max(self.peak_memory, memory)
        self.gpu_peak = self.gpu_peak.or_more(GpuPeak.now())
        self._expected = self._expected_count()
        self.logs.main.write(
            "step",
            iteration=iteration,
            loss=seen.loss,
            l1=numbers.l1,
            ssim=numbers.ssim,
            num_gaussians=sum(numbers.rows),
            expected_gaussians=self._expected,
            num_splats=numbers.num_splats,
            num_pairs=numbers.num_pairs,
            images_per_second=self._rate(iteration),
            memory_bytes=memory,
            gpu_peak_bytes=self.gpu_peak.allocated,
            gpu_peak_reserved_bytes=self.gpu_peak.reserved,
            seconds=seconds,
            **seen.learned,
        )
        phases = training.phases.read()
        self.logs.main.write("phases", iteration=iteration, seconds=phases, clock=training.phases.clock)
        self._write_ranks(iteration, seen)
        self._write_histogram(iteration)
        self._write_curves(iteration, seen, memory)

    def _write_ranks(self, iteration: int, seen: Seen) -> None:
        """What several ranks did: rows of each, bytes of the exchange, and this rank's own phases and memory."""
        training, flags = self.training, self.training.config.benchmark
        if training.communicator.size == 1:
            return
        traffic = seen.exchanged.traffic()
        sent, unused, copies, grendel = training.total(
            traffic.num_bytes, traffic.unused_bytes, traffic.copies, traffic.grendel_bytes
        )
        own = {"cpu_bytes": self._process.memory_info().rss, "gpu_bytes": gpu_memory_bytes()}
        memory = training.communicator.gather_counts(list(own.values()))
        self.logs.main.write(
            "ranks",
            iteration=iteration,
            rows=seen.numbers.rows,
            exchange_bytes=int(sent),
            exchange_needed_bytes=int(sent - unused),
            exchange_copies=int(copies),
            grendel_bytes=int(grendel),
            cpu_bytes=[row[0] for row in memory] if flags.check_cpu_memory else None,
            gpu_bytes=[row[1] for row in memory] if flags.check_gpu_memory else None,
        )
        if flags.enable_timer:
            self.logs.rank.write("phases", iteration=iteration, seconds=training.phases.read())
        if flags.check_cpu_memory or flags.check_gpu_memory:
            self.logs.rank.write("memory", own, iteration=iteration)

    def _write_histogram(self, iteration: int) -> None:
        """How many Gaussians of all ranks have which keep probability."""
        if self.training.config.mask.prune_method == "mask":
            probabilities = torch.sigmoid(self.training.table.params["mask_logits"])
            counts = torch.histc(probabilities, HISTOGRAM_BINS, 0.0, 1.0).long()
            counts = self.training.communicator.sum(counts)
            self.logs.main.write("mask_histogram", iteration=iteration, counts=counts.tolist())

    def _write_curves(self, iteration: int, seen: Seen, memory: int) -> None:
        """The curves that MaskGaussian's users know, by its names."""
        self.logs.curves.write(
            iteration,
            {
                "train_loss_patches/l1_loss": seen.numbers.l1,
                "train_loss_patches/total_loss": seen.loss,
                "iter_time": 1000.0 / max(self._rate(iteration), 1e-9),
                "total_points": float(sum(seen.numbers.rows)),
                "num_used_gs": self._expected,
                "GPU_mem": gpu_memory_bytes() / GIGABYTE,
                "CPU_mem": memory / GIGABYTE,
            },
        )

    def _measure(self, iteration: int, window: Window) -> None:
        for measured in evaluate(self.training, window):
            self.logs.main.write("evaluation", asdict(measured), iteration=iteration)
            name = f"{measured.split}/loss_viewpoint"
            self.logs.curves.write(iteration, {f"{name} - psnr": measured.psnr, f"{name} - l1_loss": measured.l1})
            self.progress.show_psnr(measured.psnr, measured.split)
            self.progress.message(
                f"[iteration {iteration}] {measured.split}: PSNR {measured.psnr:.3f} dB, SSIM {measured.ssim:.4f}, "
                f"L1 {measured.l1:.5f}, {measured.num_gaussians:,} Gaussians"
            )

    def _save(self, iteration: int) -> None:
        training, path = self.training, self.folder.point_cloud(iteration)
        keep = training.strategy.keep(training.table)
        count = save_ply(path, training.strategy.final_params(training.table), keep=keep, ranks=training.communicator)
        name = str(path.relative_to(self.folder.path))
        self.num_saved = count
        self.logs.main.write("saved", iteration=iteration, path=name, num_gaussians=count)
        self.progress.message(f"[iteration {iteration}] saved {count:,} Gaussians to {path}")

    def _save_checkpoint(self, iteration: int, window: Window, step: int) -> None:
        clocks = {
            "seconds": self.train_seconds,
            "peak_memory_bytes": self.peak_memory,
            "gpu_peak_bytes": [self.gpu_peak.allocated, self.gpu_peak.reserved],
            "untimed_images": self.untimed_images,
            "phases": self.training.phases.read(),
        }
        training = self.training
        shares = shares_to_plain(training.pixels, training.rows)
        state = run_state(training.config, training.data, window, step + 1, training.scene.extent, clocks, shares)
        path = save_checkpoint(self.folder.checkpoints, iteration, training.table, state, training.communicator)
        name, count = str(path.relative_to(self.folder.path)), self.num_gaussians()
        self.logs.main.write("checkpoint", iteration=iteration, path=name, num_gaussians=count)
        self.progress.message(f"[iteration {iteration}] checkpoint of {count:,} Gaussians in {path}")


def _due(iterations: tuple[int, ...], window: Window) -> list[int]:
    return [iteration for iteration in iterations if window.first <= iteration <= window.last]
