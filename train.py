# SPDX-License-Identifier: Apache-2.0
"""Train 3D Gaussians with masks from posed photos: parse, build, loop. `python train.py --help` lists every flag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from distributed.communicator import Communicator
from launch.cli import parse_train
from launch.config import TrainConfig, cfg_args_values, to_plain
from launch.doctor import run_doctor
from launch.interruption import keep_and_end, noticed_interruption
from launch.late_steps import LateSteps
from launch.machine import prefer_huge_pages
from launch.memory import bytes_per_gaussian
from launch.progress import TrainingProgress
from launch.recorder import Recorder
from launch.rescue import keeping_what_is_trained
from launch.run import run_main, tee_output
from launch.run_logs import open_logs
from launch.start import Start, begin, check_folders, find_start
from launch.step_graphs import compute_step
from launch.training import Training, build_training
from launch.world import agree_on_folder, device_type_of, joined_world, parse_once
from launch.wrap_up import wrap_up
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.ply import save_point_cloud
from scene.row_edit import RowEdit, TableEdit
from strategies.schedule import Window


def main(arguments: Sequence[str]) -> int:
    """Train as the command line says; returns the exit status."""
    prefer_huge_pages()
    config = parse_once(parse_train, arguments)
    if config.logging.doctor:
        return run_doctor(config)
    with joined_world(device_type_of(config.pipeline.backend)) as communicator:
        run(agree_on_folder(config, communicator), communicator, arguments)
    return 0


def run(config: TrainConfig, communicator: Communicator, arguments: Sequence[str]) -> None:
    """Everything from the folder to the report, on this rank; rank 0 shows it."""
    main = communicator.is_main
    with communicator.all_or_none(InputError):
        check_folders(config)
        folder = ModelFolder.create(config.model.model_path)
        log = folder.train_log if main else folder.rank_log(communicator.rank)
    start = find_start(config, folder, communicator)
    with tee_output(log, append=start.is_in_place, quiet=config.logging.quiet, has_terminal=main):
        for notice in (*config.notices, *start.notices):
            print(notice)
        show = main and not config.logging.quiet
        training = build_training(config, communicator, show_progress=show, checkpoint=start.checkpoint)
        with communicator.all_or_none(InputError):
            if main:
                prepare(start, folder, training, arguments)
        if train(training, folder, start):
            wrap_up(config, communicator, num_train=len(training.scene.train), num_test=len(training.scene.test))


def prepare(start: Start, folder: ModelFolder, training: Training, arguments: Sequence[str]) -> None:
    """Set aside what an earlier training left, and write what viewers and later scripts read.

    These are cfg_args, config.json, cameras.json and input.ply. Raises: InputError.
    """
    scene, config = training.scene, training.config
    for notice in begin(start, folder, scene.extent):
        print(notice)
    folder.write_cfg_args(cfg_args_values(config.model))
    folder.write_config(to_plain(config), ["train.py", *arguments])
    folder.write_cameras(scene.train, scene.test)
    save_point_cloud(folder.input_ply, scene.points.xyz, scene.points.rgb)


def train(training: Training, folder: ModelFolder, start: Start) -> bool:
    """Run every step that is not done yet and record what happens; whether the training is over, or was stopped."""
    config, ranks = training.config, training.communicator
    iterations, done = config.optimization.iterations, training.first_step * config.optimization.bsz
    show = ranks.is_main and not config.logging.quiet
    with (
        open_logs(folder, config, ranks, append=start.is_in_place) as logs,
        TrainingProgress(iterations, initial=min(done, iterations), enabled=show) as progress,
    ):
        recorder = Recorder(training, folder, logs, progress)
        count, views = recorder.num_gaussians(), training.scene
        where = f" on {ranks.size} processes" if ranks.size > 1 else ""
        print(f"{len(views.train)} training and {len(views.test)} test views, {count:,} Gaussians to start with{where}")
        print(f"a Gaussian takes {bytes_per_gaussian(training.table)} bytes with its moments and statistics")
        recorder.start()
        if start.checkpoint is not None:
            recorder.resume(start.checkpoint)
        late, step = LateSteps(training, recorder), training.first_step
        with (
            keeping_what_is_trained(training, recorder, late),
            training.recordings(),
            noticed_interruption(ranks) as interruption,
        ):
            while step < training.stop_step:
                step = train_step(training, recorder, late, step)
                if interruption.signal is not None and step < training.stop_step:
                    keep_and_end(training, recorder, late, step, interruption)
        if training.stop_step < training.num_steps:
            print(f"stopped after {config.optimization.stop_after} of {iterations} images, with a checkpoint")
            return False
        seconds, count = recorder.end(), recorder.num_saved
    images, peak = iterations - recorder.untimed_images, recorder.gpu_peak.sentence()
    print(f"trained {images} images in {seconds:.1f} s, {count:,} Gaussians{peak}")
    return True


def train_step(training: Training, recorder: Recorder, late: LateSteps, step: int) -> int:
    """One step: draw the batch with sampled masks, compare, update everything, edit the set of Gaussians.

    Returns: the number of the next step; an earlier one when a buffer was too small and steps changed nothing.
    """
    window, seed = training.window(step), training.config.optimization.seed
    again = late.make_way(window)
    if again is not None:
        return again
    computed = compute_step(training, step, window)
    training.table.num_updates += 1
    late.add(step, window, computed.result, computed.learned)
    with training.phases("density control"):
        edits = training.strategy.after_step(training.table, window, seed)
        first = next(edits, None)
    # Measured and saved before the edits, as in 3DGS: fresh clones and reset opacities have not been trained yet.
    is_read = first is not None or recorder.is_due(window) or step + 1 == training.stop_step
    again = late.settle() if is_read else late.keep_up()
    if again is not None:
        return again
    edit(training, recorder, window, first, edits)
    recorder.after_edits(window, step)
    return step + 1


def edit(
    training: Training, recorder: Recorder, window: Window, first: TableEdit | None, others: Iterator[TableEdit]
) -> None:
    """Apply the edits of a step, each before the next is worked out, and share the rows out again when they did."""
    is_edited = False
    with training.phases("density control"):
        for change in chain([first] if first is not None else [], others):
            training.apply(change)
            recorder.edit(change.report)
            is_edited |= isinstance(change, RowEdit)
    if is_edited:
        recorder.redistribution(window, training.after_event())


if __name__ == "__main__":
    run_main(main)
