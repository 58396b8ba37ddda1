# SPDX-License-Identifier: Apache-2.0
"""Train 3D Gaussians with masks from posed photos: parse, build, loop. `python train.py --help` lists every flag."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distributed.communicator import Communicator
from gaussian_renderer.step import draw_and_update
from launch.cli import parse_train
from launch.config import cfg_args_values, to_plain
from launch.doctor import run_doctor
from launch.metrics_log import MetricsLog
from launch.progress import TrainingProgress
from launch.recorder import Recorder
from launch.run import run_main, tee_output
from launch.start import Start, begin, find_start
from launch.training import Training, build_training
from launch.world import refuse_several_processes
from launch.wrap_up import wrap_up
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import save_point_cloud
from strategies.schedule import Window


def main(arguments: Sequence[str]) -> int:
    """Train as the command line says; returns the exit status."""
    config = parse_train(arguments)
    if config.logging.doctor:
        return run_doctor(config)
    communicator = join_world()
    folder = ModelFolder.create(config.model.model_path)
    start = find_start(config, folder)
    with tee_output(folder.train_log, append=start.is_in_place, quiet=config.logging.quiet):
        for notice in (*config.notices, *start.notices):
            print(notice)
        quiet = config.logging.quiet
        training = build_training(config, communicator, show_progress=not quiet, checkpoint=start.checkpoint)
        for notice in begin(start, folder, training.scene.extent):
            print(notice)
        describe(folder, training, arguments)
        train(training, folder, start)
        wrap_up(config, num_train=len(training.scene.train), num_test=len(training.scene.test))
    return 0


def join_world() -> Communicator:
    """This process's place among the processes of the run. Raises: InputError when there are several."""
    try:
        refuse_several_processes()
        return Communicator.from_environment()
    except ValueError as error:
        raise InputError(str(error)) from error


def describe(folder: ModelFolder, training: Training, arguments: Sequence[str]) -> None:
    """Write what viewers and later scripts read: cfg_args, config.json, cameras.json, input.ply."""
    scene, config = training.scene, training.config
    folder.write_cfg_args(cfg_args_values(config.model))
    folder.write_config(to_plain(config), ["train.py", *arguments])
    folder.write_cameras(scene.train, scene.test)
    save_point_cloud(folder.input_ply, scene.points.xyz, scene.points.rgb)
    print(
        f"{len(scene.train)} training and {len(scene.test)} test views, {len(training.table):,} Gaussians to start with"
    )


def train(training: Training, folder: ModelFolder, start: Start) -> None:
    """Run every step that is not done yet and record what happens."""
    config = training.config
    iterations, done = config.optimization.iterations, training.first_step * config.optimization.bsz
    with (
        MetricsLog(folder.metrics, append=start.is_in_place) as log,
        TrainingProgress(iterations, initial=min(done, iterations), enabled=not config.logging.quiet) as progress,
    ):
        recorder = Recorder(training, folder, log, progress)
        recorder.start()
        if start.checkpoint is not None:
            recorder.resume(start.checkpoint)
        for step in range(training.first_step, training.num_steps):
            train_step(training, recorder, step)
        seconds = recorder.end()
    print(f"trained {iterations} images in {seconds:.1f} s, {len(training.table):,} Gaussians")


def train_step(training: Training, recorder: Recorder, step: int) -> None:
    """One step: draw the batch with sampled masks, compare, update everything, edit the set of Gaussians."""
    table, strategy, phases = training.table, training.strategy, training.phases
    window, seed = training.window(step), training.config.optimization.seed
    with phases("photos"):
        batch = training.batch(step)
    with phases("masks"):
        gate = strategy.sample(table, window, seed)
    mask = gate.mask if gate is not None else None
    result = draw_and_update(
        training.body, table, batch, mask, training.step_settings(window), training.adam_steps(window), phases
    )
    with phases("masks"):
        numbers = strategy.after_backward(table, window, gate, result.d_mask, training.mask_scaling)
    table.num_updates += 1
    loss = result.image_loss(training.config.optimization.lambda_dssim) + numbers.get("mask_loss", 0.0)
    require_finite(loss, window)
    # Measured and saved before the edits, as in 3DGS: fresh clones and reset opacities have not been trained yet.
    recorder.after_update(window, result, numbers, loss)
    with phases("density control"):
        for edit in strategy.after_step(table, window, seed):
            table.apply(edit)
            recorder.edit(edit.report)
    recorder.after_edits(window, step)


def require_finite(loss: float, window: Window) -> None:
    """Raises: FloatingPointError when the loss is not a number any more."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of iteration {window.first} is {loss}")


if __name__ == "__main__":
    run_main(main)
