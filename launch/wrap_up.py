# SPDX-License-Identifier: Apache-2.0
"""What follows a training: views rendered and measured from what was saved, as render.py would, and the report."""

from __future__ import annotations

from pathlib import Path

from distributed.communicator import Communicator
from launch.config import RenderConfig, RenderFlags, TrainConfig
from launch.measure import choose_measures, measure_model, print_results
from launch.render_views import render_model
from launch.report import write_report
from launch.size_price import tell_price
from launch.world import threads_per_rank

MOST_TRAIN_VIEWS = 12  # rendered for the report of a run without test views


def wrap_up(config: TrainConfig, ranks: Communicator, *, num_train: int, num_test: int) -> Path | None:
    """Render, measure and report the newest saved model of a training that has ended; return the report's path.

    All ranks call it: views are dealt out over them, rank 0 writes the report.

    `--render_and_evaluate` renders both sets and measures the test views with LPIPS, as the LP-3DGS programs do. The
    report alone needs the test views, or some training views without them, and PSNR and SSIM.

    Raises:
        InputError: something cannot be read or written.
    """
    quiet, model_path = config.logging.quiet, config.model.model_path
    is_full = config.logging.render_and_evaluate
    if is_full or config.logging.report:
        flags = RenderFlags(quiet=quiet) if is_full else _flags_for_report(num_train, num_test, quiet=quiet)
        render_model(RenderConfig(config.model, config.pipeline, flags), ranks)
        measures = choose_measures("auto" if is_full and num_test else "none", device=ranks.device)
        mode, is_shown = "test" if num_test else "train", ranks.is_main and not quiet
        threads = threads_per_rank(config.pipeline.threads, ranks)
        results = measure_model(model_path, mode, measures=measures, threads=threads, progress=is_shown, ranks=ranks)
        if is_shown:
            print_results(model_path, results, mode)
    if ranks.is_main and (price := tell_price(config)):
        print(price)
    if not config.logging.report or not ranks.is_main:
        return None
    report = write_report(model_path)
    print(f"Report: {report.absolute()}")
    return report


def _flags_for_report(num_train: int, num_test: int, *, quiet: bool) -> RenderFlags:
    """Return which views the report shows: the test views, or some training views when there are none."""
    if num_test:
        return RenderFlags(skip_train=True, quiet=quiet)
    return RenderFlags(skip_test=True, sample_freq=max(1, -(-num_train // MOST_TRAIN_VIEWS)), quiet=quiet)
