# SPDX-License-Identifier: Apache-2.0
"""Where a training starts: at its points, or at a checkpoint, of ours or a predecessor's, that fits it.

Reading and writing of checkpoints is in `scene/checkpoint.py`; here is which one is meant, and whether it is of the
same training.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator, PeerError
from launch.config import FREE_GROUPS, TrainConfig, to_plain
from launch.finetune import TRAINED_ITERATIONS
from launch.parser import show_value
from launch.prune_checks import last_prune
from launch.pruning import adopt_masks, target_count
from scene.checkpoint import Checkpoint, fingerprint, load_checkpoint, load_newest
from scene.checkpoint_import import Imported, import_file, import_grendel_folder, is_grendel_folder
from scene.checkpoint_manifest import MANIFEST, RunState, read_manifest
from scene.dataset import Scene
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.model_folder import ModelFolder
from scene.model_import import import_model
from strategies.schedule import Window

FREE_FLAGS = frozenset({"iterations", "bsz", "source_path", "model_path", "threads", "image_cache_gb", "data_device"})
DATA_FLAGS = frozenset(
    {"images", "resolution", "eval", "llffhold", "num_train_cameras", "num_test_cameras", "dataset_type"}
)
"""Flags that show in the fingerprints of the data."""
LARGEST_EXTENT_RATIO = 1.01
RESULTS = ("point_cloud", "train", "test", "path", "results*.json", "per_view*.json", "report.html")
"""What a training and the scripts behind it leave in a model folder."""

LITTLE_SPACE = 1 << 30
"""Bytes free on a disk below which a training says so."""


@dataclass(frozen=True, eq=False)
class Start:
    """How a training begins.

    checkpoint: None at the beginning. is_in_place: the checkpoint is one of the model folder's own, so that its logs go
    on. notices: sentences to print.
    """

    checkpoint: Checkpoint | None = None
    is_in_place: bool = False
    notices: tuple[str, ...] = ()


def check_folders(config: TrainConfig) -> None:
    """Raises: InputError when there is no data, or the model would be written into it. Before anything is written."""
    source, model = config.model.source_path, config.model.model_path
    if not source.exists():
        raise InputError(f"The scene folder {source} does not exist. Set --source_path (-s) to a data set.")
    if source.resolve() == model.expanduser().resolve():
        raise InputError(f"-m {model} is the data folder, which is never written into; give another folder with -m")


def find_start(config: TrainConfig, folder: ModelFolder, communicator: Communicator) -> Start:
    """The checkpoint or model that --auto_start_checkpoint, --start_checkpoint or --start_pointcloud mean, read and
    compared with the flags.

    All ranks call it; each gets rows of its own. Raises: InputError on all ranks when there is no usable one where one
    was asked for, or it does not fit the flags.
    """
    checkpoint: Checkpoint | None = None
    notices: list[str] = []
    load = partial(load_part, communicator)
    if config.checkpoint.auto_start_checkpoint:
        checkpoint, notices = _newest(folder.checkpoints, load)
        if checkpoint is None and not (config.checkpoint.start_checkpoint or config.prune.start_pointcloud):
            notices.append(f"There is no checkpoint in {folder.checkpoints}: the training starts at the beginning.")
    if checkpoint is None and config.checkpoint.start_checkpoint:
        checkpoint, more = _named(Path(config.checkpoint.start_checkpoint).expanduser(), config, communicator)
        notices += more
    if checkpoint is None and config.prune.start_pointcloud:
        path = Path(config.prune.start_pointcloud).expanduser()
        imported = import_model(path, TRAINED_ITERATIONS, config.model.sh_degree)
        checkpoint, more = _adopted(imported, path, config, communicator)
        notices += more
    is_in_place = checkpoint is not None and _is_inside(checkpoint.path, folder.checkpoints)
    if checkpoint is not None:
        if not is_in_place:
            checkpoint, more = _to_prune(checkpoint, config)
            notices += more
            check_size(checkpoint, config, communicator)
        before = checkpoint.state.config.get("mask", {}).get("prune_method", "mask")
        notices += adopt_masks(checkpoint.table, before, config.mask.prune_method, communicator)
        check_flags(checkpoint, config, is_in_place=is_in_place)
        notices += [
            f"Going on behind image {checkpoint.state.iteration} from {checkpoint.path}.",
            *_changes(checkpoint, config),
        ]
    return Start(checkpoint, is_in_place, tuple(notices))


def _to_prune(checkpoint: Checkpoint, config: TrainConfig) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of another model folder as one to start from, and what to say of it.

    --prune_finetune begins where a whole training ends: shorter ones count as whole, with clocks and shares of their
    own.
    """
    state, notices = checkpoint.state, []
    if config.prune.prune_finetune and state.iteration < TRAINED_ITERATIONS:
        notices.append(f"{checkpoint.path} of {state.iteration} images counts as trained for {TRAINED_ITERATIONS}.")
        step = TRAINED_ITERATIONS // config.optimization.bsz
        state = replace(state, iteration=TRAINED_ITERATIONS, next_step=step, clocks={}, shares={})
    last = last_prune(config)
    if last is not None and state.iteration >= last:
        notices.append(
            f"Nothing will be pruned: the last prune of these flags is at iteration {last}, and the model stands "
            f"behind {state.iteration}."
        )
    return replace(checkpoint, state=state), notices


def load_part(communicator: Communicator, folder: Path) -> Checkpoint:
    """This rank's share of a checkpoint's shards: its own when as many ranks wrote it. All ranks.

    More ranks than shards: some get no row, until rows are shared out. Raises: InputError on all ranks when any of them
    could not read its shards.
    """

    def nothing(means: Tensor, ids: Tensor) -> Tensor:
        return ids[:0]

    checkpoint, failure = None, None
    try:
        world_size = read_manifest(folder).world_size
        mine = range(communicator.rank, world_size, communicator.size)
        checkpoint = load_checkpoint(folder, shards=mine or [0], choose=None if mine else nothing)
    except InputError as error:
        failure = error
    try:
        communicator.raise_together(failure)  # all ranks
    except PeerError as error:
        raise InputError(error.message) from error
    if checkpoint is None:
        raise RuntimeError("a checkpoint was neither read nor refused")
    return checkpoint


def _newest(place: Path, load: Callable[[Path], Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a folder, and what was passed over.

    Raises: InputError when there are finished ones and all of them are damaged.
    """
    search = load_newest(place, load)
    finished = [folder for folder in place.glob("[0-9]*") if (folder / MANIFEST).exists()] if place.is_dir() else []
    if search.checkpoint is None and finished:
        raise InputError(f"none of the checkpoints in {place} can be used. {' '.join(search.skipped)}")
    return search.checkpoint, list(search.skipped)


def _named(path: Path, config: TrainConfig, communicator: Communicator) -> tuple[Checkpoint, list[str]]:
    """The checkpoint at a path that the user gave. Raises: InputError."""
    load = partial(load_part, communicator)
    if path.is_file():
        if path.name == MANIFEST:
            return load(path.parent), []
        if path.suffix == ".ply":
            raise InputError(f"--start_checkpoint {path} is a model without history: give it to --start_pointcloud")
        return _adopted(import_file(path), path, config, communicator)
    if not path.is_dir():
        raise InputError(f"--start_checkpoint {path} does not exist; give a checkpoint's folder, or a .pth file")
    if (path / MANIFEST).exists():
        return load(path), []
    if is_grendel_folder(path):
        return _adopted(import_grendel_folder(path), path, config, communicator)
    for place in (path, path / "checkpoints"):
        checkpoint, notices = _newest(place, load)
        if checkpoint is not None:
            return checkpoint, notices
        grendel = [folder for folder in place.glob("[0-9]*") if folder.name.isdecimal() and is_grendel_folder(folder)]
        if grendel:
            newest = max(grendel, key=lambda folder: int(folder.name))
            return _adopted(import_grendel_folder(newest), newest, config, communicator)
    hint = next((f"; it holds {file.name}: give that file" for file in sorted(path.glob("chkpnt*.pth"))), "")
    raise InputError(f"--start_checkpoint {path} holds no complete checkpoint ({MANIFEST} and shards){hint}")


def _adopted(
    imported: Imported, path: Path, config: TrainConfig, communicator: Communicator
) -> tuple[Checkpoint, list[str]]:
    """A predecessor's checkpoint, or a model without history, as a checkpoint of ours; rank 0 has all of its rows."""
    table = imported.table
    if not communicator.is_main:
        table = GaussianTable.empty(table.sh_degree, dtype=table.params["means"].dtype)
        table.num_updates = imported.table.num_updates
    size = config.optimization.bsz if imported.iteration % config.optimization.bsz == 0 else 1
    state = RunState(
        iteration=imported.iteration,
        next_step=imported.iteration // size,
        batch_size=size,
        seed=config.optimization.seed,
        extent=imported.extent,
    )
    notice = "another program's: rows, Adam moments and statistics are taken over, its random state is not"
    if not imported.table.num_updates:
        notice = f"a model without history: Adam starts anew, and it counts as one of {imported.iteration} iterations"
    return Checkpoint(table, state, path), [*imported.notices, f"{path} is {notice}."]


def _is_inside(path: Path, place: Path) -> bool:
    return path.resolve().parent == place.resolve() and (path / MANIFEST).exists()


def begin(start: Start, folder: ModelFolder, extent: float) -> list[str]:
    """Make the model folder ready for a start whose data (of this extent, world units) have been found to be right.

    Checkpoints in it that do not lead to the start, of an earlier training or behind the one that is resumed, are moved
    elsewhere: none of them is ever taken for the new training's.
    Returns: sentences to print. Raises: InputError when they cannot be moved.
    """
    past = int(re.sub(r"\D", "", start.checkpoint.path.name)) if start.checkpoint and start.is_in_place else -1
    notices = _set_aside(folder.checkpoints, past)
    if not start.is_in_place:
        notices += _set_results_aside(folder)
    free = shutil.disk_usage(folder.path).free
    if free < LITTLE_SPACE:
        notices.append(
            f"Only {free / 1e6:.0f} MB are free where {folder.path} is: a model of a million Gaussians takes 248 MB, "
            "a checkpoint three times as much."
        )
    before = start.checkpoint.state.extent if start.checkpoint is not None else extent
    if max(before, extent) > LARGEST_EXTENT_RATIO * min(before, extent):
        notices.append(
            f"In the checkpoint the extent of the scene is {before:.4g}, these cameras give {extent:.4g}, which is "
            "used: is it a checkpoint of these data?"
        )
    return notices


def _set_aside(place: Path, behind: int) -> list[str]:
    """Move checkpoints with a number above `behind` elsewhere; a sentence if there were any. Raises: InputError.

    Those of Grendel-GS, too: one of ours with the same number would replace them.
    """
    entries = [entry for entry in place.iterdir() if entry.name.isdecimal()] if place.is_dir() else []
    later = [entry for entry in entries if int(entry.name) > behind]
    if not later:
        return []
    target = _moved_aside(later, place.with_name(f"{place.name}-before"))
    where = "at the beginning" if behind < 0 else f"behind image {behind}"
    return [
        f"{place} held checkpoints that are not of the past of this training ({len(later)}), which starts {where}: "
        f"they are in {target} now. --auto_start_checkpoint goes on from the newest of a model folder."
    ]


def _set_results_aside(folder: ModelFolder) -> list[str]:
    """Move models, pictures and measures of an earlier training into their own folder; a sentence if there are any.

    Whoever looks for the newest of them finds this training's. Raises: InputError.
    """
    found = [path for name in RESULTS for path in folder.path.glob(name)]
    if not found:
        return []
    target = _moved_aside(found, folder.path / "before")
    return [f"{folder.path} held the model of an earlier training: what it saved is in {target} now."]


def _moved_aside(entries: Sequence[Path], prefix: Path) -> Path:
    """The new folder, `prefix` with the first number that is free, that files or folders were moved to.

    Raises: InputError when they cannot be moved.
    """
    number = 1
    while (target := prefix.with_name(f"{prefix.name}-{number}")).exists():
        number += 1
    try:
        target.mkdir()
        for entry in entries:
            entry.rename(target / entry.name)
    except OSError as error:
        raise InputError(
            f"{prefix.parent} holds files of another training that cannot be moved to {target}: {error}"
        ) from error
    return target


def check_size(checkpoint: Checkpoint, config: TrainConfig, communicator: Communicator) -> None:
    """Raises: InputError when a target size would be missed: its last prune lies before the checkpoint. All ranks."""
    last, target, done = last_prune(config), target_count(config), checkpoint.state.iteration
    count = int(communicator.sum(torch.tensor(len(checkpoint.table))))  # all ranks
    if target and last is not None and done >= last and count > target:
        raise InputError(
            f"the last prune to the target size of {target:,} Gaussians would be at iteration {last}, and "
            f"{checkpoint.path} with {count:,} stands behind {done}: raise --iterations, or give --prune_finetune"
        )


def check_flags(checkpoint: Checkpoint, config: TrainConfig, *, is_in_place: bool) -> None:
    """Raises: InputError when a training with these flags cannot go on from a checkpoint."""
    state, path, size = checkpoint.state, checkpoint.path, config.optimization.bsz
    iterations = config.optimization.iterations
    if checkpoint.table.sh_degree != config.model.sh_degree:
        raise InputError(
            f"the checkpoint {path} has spherical harmonics of degree {checkpoint.table.sh_degree} and --sh_degree is "
            f"{config.model.sh_degree}; give --sh_degree {checkpoint.table.sh_degree}"
        )
    if state.iteration % size:
        raise InputError(
            f"the checkpoint {path} stands behind image {state.iteration}, which is not a whole number of steps of "
            f"--bsz {size}; give --bsz {state.batch_size}"
        )
    num_steps = -(-iterations // size)
    if state.iteration // size > num_steps - (not is_in_place):
        raise InputError(
            f"the checkpoint {path} stands behind image {state.iteration} and --iterations is {iterations}: nothing is "
            "left to train; raise --iterations"
        )


def check_checkpoint(checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, str]) -> None:
    """Raises: InputError when a checkpoint was written with other data than `data`, the fingerprints of the scene."""
    stored = checkpoint.state.data
    different = [what for what in data if stored and stored.get(what) != data[what]]
    if different:
        before = _flat(checkpoint.state.config)
        now = _flat(to_plain(config))
        known = sorted(name for name in DATA_FLAGS if name in before)  # an older checkpoint lacks newer flags
        changed = [f"--{name} (was {before[name]})" for name in known if before[name] != now.get(name)]
        hint = f"other flags: {', '.join(changed)}" if changed else "the folder's content has changed"
        raise InputError(
            f"the checkpoint {checkpoint.path} was trained on other data than {config.model.source_path}: "
            f"{' and '.join(different)} differ ({hint}). Give the data it was trained on, or start anew."
        )


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """A sentence for each flag that influences the result and has another value than in the checkpoint."""
    if not checkpoint.state.config:
        return []
    before, now = _flat(checkpoint.state.config), _flat(to_plain(config))
    notices = [
        f"--{name} was {_shown(before[name])} in the checkpoint and is {_shown(now[name])} now, which is used."
        for name in now
        if name in before and before[name] != now[name] and name not in DATA_FLAGS
    ]
    if checkpoint.state.batch_size != config.optimization.bsz:
        notices.append(
            f"--bsz was {checkpoint.state.batch_size} in the checkpoint and is {config.optimization.bsz} now."
        )
    return notices


def _shown(value: Any) -> str:
    return show_value(tuple(value) if isinstance(value, list) else value)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that influence the result, by name."""
    groups = {name: group for name, group in config.items() if name not in FREE_GROUPS and isinstance(group, Mapping)}
    flags = {name: value for group in groups.values() for name, value in group.items()}
    return {name: value for name, value in flags.items() if name not in FREE_FLAGS}


def run_state(
    config: TrainConfig,
    data: Mapping[str, str],
    window: Window,
    next_step: int,
    extent: float,
    clocks: Mapping[str, Any],
    shares: Mapping[str, Any],
) -> RunState:
    """What a checkpoint that is written behind `window` says about its run."""
    plain = to_plain(config)
    return RunState(
        iteration=window.last,
        next_step=next_step,
        batch_size=config.optimization.bsz,
        seed=config.optimization.seed,
        extent=extent,
        config={name: value for name, value in plain.items() if name != "given"},
        data=dict(data),
        clocks=dict(clocks),
        shares=dict(shares),
    )


def scene_fingerprints(scene: Scene) -> dict[str, str]:
    """SHA-256 of what a training reads: cameras with their split, points, names and sizes of the photos.

    Paths are not part of it: a data set may be moved. Photos count by name and number of bytes.
    """
    cameras = [
        part
        for split, members in (("train", scene.train), ("test", scene.test))
        for camera in members
        for part in (
            f"{split} {camera.name} {camera.width} {camera.height}".encode(),
            np.array([camera.fx, camera.fy, camera.cx, camera.cy], dtype="<f8").tobytes(),
            np.ascontiguousarray(camera.viewmat, dtype="<f8").tobytes(),
        )
    ]
    photos = [f"{camera.name} {camera.image_path.stat().st_size}".encode() for camera in (*scene.train, *scene.test)]
    points = (np.ascontiguousarray(scene.points.xyz), np.ascontiguousarray(scene.points.rgb))
    return {
        "cameras": fingerprint(*cameras),
        "points": fingerprint(*(values.tobytes() for values in points)),
        "photos": fingerprint(*sorted(photos)),
    }
