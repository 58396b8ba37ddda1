# SPDX-License-Identifier: Apache-2.0
"""What the training in a folder was started with, kept in started.json, so that no other one is taken for it.

Two trainings are the same when every flag that decides the model has the same value, however it was typed. What is
measured, shown and kept besides may differ. Needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli import TRAIN_GROUPS, parse_train, train_flags
from launch.config import FREE_GROUPS, TrainConfig, to_plain
from launch.parser import show_value
from scene.errors import InputError
from scene.model_folder import ModelFolder, write_json_atomically

STARTED_FILE = "started.json"
RUN_FILE = "run.json"
"""Of a finished run of launch.run_all."""

FREE_FLAGS = frozenset({"model_path", "threads", "image_cache_gb", "cuda_graphs", "check_agreement"})
"""Flags that decide nothing, in groups whose others do."""

WITHOUT_START = ("--start_checkpoint", "", "--start_pointcloud", "")


@dataclass(frozen=True)
class Origin:
    """The data set and the flags of train.py that a training is started with; of the same flag the last one counts.

    base: the flags of the training whose model it goes on from, which are not among its own; None when there is none,
    or when nobody wrote it down.
    """

    source: Path
    flags: tuple[str, ...]
    base: tuple[str, ...] | None = None

    def config(self) -> TrainConfig:
        """The training that they make. Raises: InputError when they are impossible."""
        # --auto_start_checkpoint: what a finetune starts from is not among its flags.
        return parse_train([*self.flags, "-s", str(self.source), "--auto_start_checkpoint"])

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        base = {} if self.base is None else {"base": list(self.base)}
        return {"source": str(self.source), "flags": list(self.flags), **base}

    def write(self, folder: Path) -> None:
        """Write it down beside the training that is about to start."""
        write_json_atomically(folder / STARTED_FILE, self.plain())


def check_origin(folder: Path, now: Origin) -> str:
    """Whether what a folder holds, if anything, was started with what a training is to be started with `now`.

    Returns: a sentence when a training that had saved nothing is begun anew with other flags, else nothing.
    Raises: InputError when something in the folder would be lost, or taken for what it is not.
    """
    before, is_worth_keeping = origin_of(folder), _holds_results(folder)
    if before is None and is_worth_keeping:
        raise InputError(
            f"{folder} holds a training, and neither {STARTED_FILE} nor config.json says with which flags; choose "
            "another output folder with -o, or remove that one to have it trained anew"
        )
    found = [] if before is None else differences(before, now)
    if found and is_worth_keeping:
        raise InputError(
            f"{folder} holds a run of other flags or data: {'; '.join(found)}. Choose another output folder with -o, "
            "or remove that one to have it trained anew"
        )
    return f"{folder} is begun anew ({'; '.join(found)}): nothing had been saved there" if found else ""


def origin_of(folder: Path) -> Origin | None:
    """What is written down in a folder; what train.py noted there itself where no suite or sweep did. None: nothing.

    Raises: InputError for a damaged file.
    """
    for path in (folder / STARTED_FILE, folder / RUN_FILE):
        if path.exists():
            return _read(path)
    model = ModelFolder(folder)
    if not model.config.exists():
        return None
    content = model.read_config()
    try:
        source, flags = content["config"]["model"]["source_path"], content["command"][1:]
    except (KeyError, TypeError) as error:
        raise InputError(f"{model.config} is damaged; remove {folder} to have it trained anew") from error
    return Origin(Path(source), (*flags, *WITHOUT_START))


def differences(before: Origin, now: Origin) -> list[str]:
    """A few words for each flag that decides the model and has another value now.

    Raises: InputError when the flags of now are impossible.
    """
    found = _changed(before, now)
    if before.base is not None and now.base is not None:
        changed = _changed(Origin(before.source, before.base), Origin(now.source, now.base))
        found += [f"of the model it starts from, {each}" for each in changed if each not in found]
    return found


def _changed(before: Origin, now: Origin) -> list[str]:
    if (before.source, before.flags) == (now.source, now.flags):
        return []
    try:
        old = before.config()
    except InputError as error:
        return [f"its flags {' '.join(before.flags)} are not understood any more ({error})"]
    new = now.config()
    values, values_now = _deciding_values(old), _deciding_values(new)
    names = [name for name in values_now if values[name] != values_now[name]]
    # Schedules and presets follow the flags that were typed: those are named, not what became of them.
    typed = [name for name in names if name in old.given or name in new.given]
    return [f"--{name} was {_shown(values[name])} and is {_shown(values_now[name])}" for name in typed or names]


def _deciding_values(config: TrainConfig) -> dict[str, Any]:
    free = {TRAIN_GROUPS[name] for name in FREE_GROUPS}
    values = {name: value for group in TRAIN_GROUPS for name, value in to_plain(getattr(config, group)).items()}
    return {
        each.name: values[each.name]
        for each in train_flags()
        if (each.group not in free or each.name == "start_checkpoint")
        and each.name not in FREE_FLAGS
        and not each.spec.inert
    }


def _shown(value: Any) -> str:
    return show_value(tuple(value) if isinstance(value, list) else value) or "nothing"


def _holds_results(folder: Path) -> bool:
    """Whether a folder has a model, a checkpoint or measures in it."""
    model = ModelFolder(folder)
    checkpoints = model.checkpoints.iterdir() if model.checkpoints.is_dir() else ()
    measures = (folder / RUN_FILE, model.results("test"))
    return (
        any(path.exists() for path in measures)
        or any(entry.name.isdecimal() for entry in checkpoints)
        or bool(model.saved_iterations())
    )


def _read(path: Path) -> Origin:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        base = kept.get("base")
        return Origin(Path(kept["source"]), tuple(kept["flags"]), None if base is None else tuple(base))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); remove the run's folder to have it made again") from error
