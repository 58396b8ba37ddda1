# SPDX-License-Identifier: Apache-2.0
"""What a training tells the world while it runs: metrics.jsonl, the progress bar, saved models."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import psutil
import torch

from gaussian_renderer.step import StepResult
from launch.config import to_plain
from launch.evaluation import evaluate
from launch.metrics_log import MetricsLog
from launch.progress import TrainingProgress
from launch.start import run_state
from launch.training import Training
from scene.checkpoint import Checkpoint, save_checkpoint
from scene.model_folder import ModelFolder
from scene.ply import save_ply
from scene.row_edit import EditReport
from strategies.schedule import Schedule, Window

HISTOGRAM_BINS = 20


@dataclass
class Recorder:
    """Writes the log of one training and shows its progress. Seconds exclude evaluation and saving.

    train_seconds: of all runs since the training began; untimed_images: images trained before the clock was started,
    by the program that a checkpoint was imported from.
    """

    training: Training
    folder: ModelFolder
    log: MetricsLog
    progress: TrainingProgress
    train_seconds: float = 0.0
    peak_memory: int = 0
    untimed_images: int = 0
    _process: psutil.Process = field(default_factory=psutil.Process)
    _resumed: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """The first line of the log: what is trained with what."""
        scene = self.training.scene
        entry = {
            "source": str(scene.source),
            "num_train": len(scene.train),
            "num_test": len(scene.test),
            "num_points": len(scene.points.xyz),
            "extent": scene.extent,
            "test_names": [camera.name for camera in scene.test],
        }
        self.log.write(
            "run", config=to_plain(self.training.config), scene=entry, threads=self.training.config.pipeline.threads
        )
        self._resumed = time.perf_counter()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Let the clocks of the run that wrote a checkpoint go on, and say in the log where it went on."""
        clocks = checkpoint.state.clocks
        self.train_seconds = float(clocks.get("seconds", 0.0))
        self.peak_memory = int(clocks.get("peak_memory_bytes", 0))
        self.untimed_images = int(clocks.get("untimed_images", 0 if clocks else checkpoint.state.iteration))
        self.training.phases.seconds.update(clocks.get("phases", {}))
        self.log.write(
            "resumed",
            iteration=checkpoint.state.iteration,
            path=str(checkpoint.path),
            num_gaussians=len(self.training.table),
        )

    def after_update(self, window: Window, result: StepResult, numbers: dict[str, float], loss: float) -> None:
        """Progress bar in every step; a line and a histogram at every log interval; measures and models when due."""
        training = self.training
        self.progress.advance(min(window.size, training.config.optimization.iterations - window.first + 1))
        is_logged = Schedule(0, window.last, training.config.logging.log_interval).fires(window)
        if is_logged or self.progress.is_due():
            expected = self._expected_count()
            self.progress.update(loss=loss, num_gaussians=len(training.table), expected_gaussians=expected)
            if is_logged:
                self._write_step(window, result, numbers, loss, expected)
        for iteration in _due(training.config.logging.test_iterations, window):
            self._pause(window, lambda it: self._measure(it, window), iteration)
        for iteration in _due(training.config.logging.save_iterations, window):
            self._pause(window, self._save, iteration)

    def after_edits(self, window: Window, step: int) -> None:
        """A checkpoint when one is due: update and edits of the step are done, the next one has not begun."""
        for iteration in _due(self.training.config.checkpoint.checkpoint_iterations, window):
            self._pause(window, lambda it: self._save_checkpoint(it, window, step), iteration)

    def edit(self, report: EditReport | None) -> None:
        """A line for an edit of the table."""
        if report is not None:
            self.log.write("edit", asdict(report))

    def end(self) -> float:
        """The last line; returns the seconds of training."""
        self._clock()
        iterations = self.training.config.optimization.iterations
        self.log.write(
            "end",
            seconds=self.train_seconds,
            images_per_second=self._rate(iterations),
            peak_memory_bytes=self.peak_memory,
        )
        return self.train_seconds

    def _rate(self, iteration: int) -> float:
        return (iteration - self.untimed_images) / max(self.train_seconds, 1e-9)

    def _clock(self) -> float:
        now = time.perf_counter()
        self.train_seconds += now - self._resumed
        self._resumed = now
        return self.train_seconds

    def _pause(self, window: Window, action, iteration: int) -> None:  # type: ignore[no-untyped-def]
        """Run an action whose time is not training time."""
        self._clock()
        action(iteration)
        self._resumed = time.perf_counter()

    def _expected_count(self) -> float:
        if self.training.config.mask.prune_method != "mask":
            return float(len(self.training.table))
        return float(torch.sigmoid(self.training.table.params["mask_logits"].double()).sum())

    def _write_step(
        self, window: Window, result: StepResult, numbers: dict[str, float], loss: float, expected: float
    ) -> None:
        seconds, iteration = self._clock(), min(window.last, self.training.config.optimization.iterations)
        memory = self._process.memory_info().rss
        self.peak_memory = max(self.peak_memory, memory)
        self.log.write(
            "step",
            iteration=iteration,
            loss=loss,
            l1=result.l1,
            ssim=result.ssim,
            num_gaussians=len(self.training.table),
            expected_gaussians=expected,
            num_splats=result.num_splats,
            num_pairs=result.num_pairs,
            images_per_second=self._rate(iteration),
            memory_bytes=memory,
            seconds=seconds,
            **numbers,
        )
        self.log.write("phases", iteration=iteration, seconds=dict(self.training.phases.seconds))
        if self.training.config.mask.prune_method == "mask":
            probabilities = torch.sigmoid(self.training.table.params["mask_logits"])
            counts = torch.histc(probabilities, HISTOGRAM_BINS, 0.0, 1.0).long().tolist()
            self.log.write("mask_histogram", iteration=iteration, counts=counts)

    def _measure(self, iteration: int, window: Window) -> None:
        for measured in evaluate(self.training, window):
            self.log.write("evaluation", asdict(measured), iteration=iteration)
            self.progress.show_psnr(measured.psnr, measured.split)
            self.progress.message(
                f"[iteration {iteration}] {measured.split}: PSNR {measured.psnr:.3f} dB, SSIM {measured.ssim:.4f}, "
                f"L1 {measured.l1:.5f}, {measured.num_gaussians:,} Gaussians"
            )

    def _save(self, iteration: int) -> None:
        training = self.training
        path = self.folder.point_cloud(iteration)
        count = save_ply(path, training.table.params, keep=training.strategy.keep(training.table))
        self.log.write("saved", iteration=iteration, path=str(path.relative_to(self.folder.path)), num_gaussians=count)
        self.progress.message(f"[iteration {iteration}] saved {count:,} Gaussians to {path}")

    def _save_checkpoint(self, iteration: int, window: Window, step: int) -> None:
        clocks = {
            "seconds": self.train_seconds,
            "peak_memory_bytes": self.peak_memory,
            "untimed_images": self.untimed_images,
            "phases": dict(self.training.phases.seconds),
        }
        training = self.training
        state = run_state(training.config, training.data, window, step + 1, training.scene.extent, clocks)
        path = save_checkpoint(self.folder.checkpoints, iteration, training.table, state, training.communicator)
        name = str(path.relative_to(self.folder.path))
        self.log.write("checkpoint", iteration=iteration, path=name, num_gaussians=len(training.table))
        self.progress.message(f"[iteration {iteration}] checkpoint of {len(training.table):,} Gaussians in {path}")


def _due(iterations: tuple[int, ...], window: Window) -> list[int]:
    return [iteration for iteration in iterations if window.first <= iteration <= window.last]
