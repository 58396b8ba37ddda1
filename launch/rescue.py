# SPDX-License-Identifier: Apache-2.0
"""When memory does not suffice in the middle of a training: one paragraph, and what was trained is kept if it can be.

A step that runs out of memory before it updates anything leaves the table as the step before it did: that is a
checkpoint, and a run that goes on from it loses nothing. After that moment only the model is worth saving. Several
ranks save nothing: the others are in the middle of a step that cannot end.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launch.late_steps import LateSteps
from launch.memory import out_of_memory_text
from launch.recorder import Recorder
from launch.shortage import is_out_of_memory
from launch.training import Training
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.model_folder import ModelFolder

BEFORE_UPDATES = frozenset({"photos", "project", "rasterize", "loss", "rasterize backward", "larger buffers"})
"""Phases in which nothing of the table has changed yet since the step began."""


@contextmanager
def keeping_what_is_trained(training: Training, recorder: Recorder, late: LateSteps) -> Iterator[None]:
    """The loop of a training, whose errors for want of memory become the user's.

    Raises: InputError in place of an error that `is_out_of_memory`, with what there is to do and where the model is.
    """
    before = training.table.num_updates
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        phase = training.phases.current
        text = out_of_memory_text(training, error, phase or "between two phases")
        traceback.clear_frames(error.__traceback__)  # they hold what the step had allocated
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        kept = _keep(training, recorder, late, before, is_exact=phase in BEFORE_UPDATES)
        raise InputError(f"{text} {kept} {_newest(recorder.folder)}".strip()) from error


def _keep(training: Training, recorder: Recorder, late: LateSteps, before: int, *, is_exact: bool) -> str:
    """Save what the finished steps have left, as far as that is possible; a sentence about it, "" when it is not."""
    if training.communicator.size > 1:
        return ""
    try:
        late.settle()
        step = training.first_step + training.table.num_updates - before - 1
        if step < training.first_step or not _is_whole(training.table):
            return ""
        if is_exact:
            path = recorder.save_checkpoint(step)
            return f"All that was trained is in {path}: go on with --start_checkpoint {path}."
        return f"The model is in {recorder.save_model(step)}."
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            return ""
        raise


def _is_whole(table: GaussianTable) -> bool:
    """Whether every tensor has the same rows: an edit that was broken off leaves some with the old ones."""
    groups = (table.params, table.exp_avg, table.exp_avg_sq, table.statistics)
    return all(len(values) == len(table) for group in groups for values in group.values())


def _newest(folder: ModelFolder) -> str:
    """Where the newest checkpoint and model are; "" when there are none."""
    place = folder.checkpoints
    numbers = [int(entry.name) for entry in place.iterdir() if entry.name.isdecimal()] if place.is_dir() else []
    saved = folder.saved_iterations()
    found = [f"the newest checkpoint is {place / str(max(numbers))}"] if numbers else []
    found += [f"the newest saved model {folder.point_cloud(saved[-1])}"] if saved else []
    text = ", ".join(found) or "no checkpoint or model has been saved (--checkpoint_iterations)"
    return f"{text[:1].upper()}{text[1:]}."
