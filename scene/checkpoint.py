# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything a training needs to go on as if it had never stopped, written by any number of ranks.

    MODEL/checkpoints/N/shard-00000-of-00002.safetensors   rank 0's rows: parameters, moments, statistics, ids
    MODEL/checkpoints/N/shard-00001-of-00002.safetensors
    MODEL/checkpoints/N/manifest.json                      what the rows are, where the run stands, SHA-256 of all

A checkpoint has its name only when it is complete and on disk: it is written as .N.partial, put on disk and renamed.
Every byte is covered by a checksum, and nothing in it can run: there is no pickle. Knows nothing of how a run is
configured; configuration and fingerprint of the data pass through as plain values.

Letters: N rows, W ranks that wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from masksplat.lazy import CAPACITY, FACTORS, Behind
from scene.checkpoint_manifest import (
    MANIFEST,
    Manifest,
    RunState,
    ShardRecord,
    file_sha256,
    read_manifest,
    shard_name,
    tensor_sha256,
)
from scene.errors import InputError
from scene.gaussians import OPTIONAL_STATISTICS, STATISTICS, GaussianTable, attributes_for

DIGEST_BYTES = 32
SPARE_BYTES = 1 << 20  # beside the tensors: headers, manifest, folder entries
COPY_AGAIN = "Restore this checkpoint from a copy, or start from an older one with --start_checkpoint."


class Ranks(Protocol):
    """What writing needs to know of the ranks; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def size(self) -> int:
        """The number of processes, W."""

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was read: rows, where its run stood, and the file or folder it came from.

    num_shards: ranks that wrote it, each a part; 1 for a predecessor's.
    """

    table: GaussianTable
    state: RunState
    path: Path
    num_shards: int = 1


RowChoice = Callable[[Tensor, Tensor], Tensor]
"""From the means (N, 3) and ids (N,) of all rows to the int64 indices of those that this rank shall own."""


def save_checkpoint(place: Path, number: int, table: GaussianTable, state: RunState, ranks: Ranks) -> Path:
    """Write the rows of all ranks as `place`/`number`, replacing a checkpoint of that name; all ranks call it.

    Returns: the checkpoint's folder.
    Raises: InputError, on all ranks, when any of them could not write; older checkpoints are untouched then.
    """
    partial, final = place / f".{number}.partial", place / str(number)
    tensors = _tensors_of(table, _held_by(table, ranks))
    try:
        _together(ranks, lambda: _make_room(partial, tensors, ranks.size) if ranks.rank == 0 else None, partial)
        record = _together(ranks, lambda: _write_shard(partial, tensors, state, ranks), partial)
        records = _gathered(record, ranks)
        manifest = Manifest.describe(table, state, records)
        _together(ranks, lambda: _finish(partial, final, manifest) if ranks.rank == 0 else None, partial)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def load_checkpoint(
    folder: Path, *, shards: Sequence[int] | None = None, choose: RowChoice | None = None
) -> Checkpoint:
    """Read a checkpoint that any number of ranks wrote, every byte checked.

    Args:
        folder: the checkpoint's own folder.
        shards: numbers of the shards to read, all by default. A rank of the same world reads its own.
        choose: which of the rows read this rank shall own, in which order; all of them, in the order of the shards and
            of the rows in them, by default.

    Raises: InputError naming the file and what is wrong with it; ValueError when `shards` is empty.
    """
    manifest = read_manifest(folder)
    wanted = range(manifest.world_size) if shards is None else shards
    if len(wanted) == 0:
        raise ValueError("a checkpoint is read from one shard at least; `choose` may take no row")
    parts = [_read_shard(folder, manifest, index) for index in wanted]
    behind = _behind_of(parts[0]) if len(parts) == 1 and choose is None else None
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not name.startswith("behind.")}
    ids = tensors["ids"]
    if len(torch.unique(ids)) != len(ids):
        raise InputError(f"the shards of {folder} hold a Gaussian twice (an id occurs twice). {COPY_AGAIN}")
    if choose is not None:
        rows = choose(tensors["params.means"], ids)
        tensors = {name: values.index_select(0, rows) for name, values in tensors.items()}
    return Checkpoint(_table_of(tensors, manifest, behind), manifest.state, folder, manifest.world_size)


@dataclass(frozen=True, eq=False)
class Search:
    """What a folder of checkpoints held: the newest complete one, if any, and a sentence for each one passed over."""

    checkpoint: Checkpoint | None
    skipped: tuple[str, ...]


def load_newest(place: Path, load: Callable[[Path], Checkpoint] = load_checkpoint) -> Search:
    """Read the complete checkpoint with the highest number in a folder; damaged and unfinished ones are passed over.

    Args: load: reads one of them, or raises InputError when it cannot be used.
    """
    skipped: list[str] = []
    for folder in _candidates(place):
        if folder.name.endswith(".partial"):
            skipped.append(f"{folder} was passed over: the run ended while it was being written.")
            continue
        try:
            return Search(load(folder), tuple(skipped))
        except InputError as error:
            skipped.append(f"{folder} was passed over: {error}")
    return Search(None, tuple(skipped))


def _candidates(place: Path) -> list[Path]:
    """Finished, replaced and unfinished checkpoint folders, the highest number first.

    A replaced folder (.N.replaced) counts only while N itself is missing: a crash came between two renames.
    """
    found: list[tuple[int, int, Path]] = []
    for entry in place.iterdir() if place.is_dir() else ():
        match = re.fullmatch(r"(\d{1,18})|\.(\d{1,18})\.(partial|replaced)", entry.name)
        if match is None or not entry.is_dir():
            continue
        number = int(match[1] or match[2])
        if match[3] == "replaced" and (place / str(number)).is_dir():
            continue
        found.append((number, ("partial", "replaced", None).index(match[3]), entry))
    return [entry for _, _, entry in sorted(found, key=lambda each: each[:2], reverse=True)]


def _held_by(table: GaussianTable, ranks: Ranks) -> Behind | None:
    """How this rank's rows lie that are behind, on all ranks or on none: no rows where it has none. All ranks."""
    held = table.held
    num_behind = ranks.sum(torch.tensor([int(held is not None)]))  # all ranks
    return Behind.of_nothing(table.params["shN"][:0]) if held is None and int(num_behind) else held


def _tensors_of(table: GaussianTable, behind: Behind | None) -> dict[str, Tensor]:
    """Every tensor of the table by its name in a shard, on the host."""
    groups = {"params": table.params, "exp_avg": table.exp_avg, "exp_avg_sq": table.exp_avg_sq}
    groups["statistics"] = table.statistics
    tensors = {f"{group}.{name}": values for group, members in groups.items() for name, values in members.items()}
    tensors["ids"] = table.ids
    if behind is not None:
        tensors.update({f"behind.{name}": values for name, values in behind._asdict().items()})
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}


def _behind_of(tensors: Mapping[str, Tensor]) -> Behind | None:
    """How rows lay that were behind, where the table was of such."""
    if "behind.updates" not in tensors:
        return None
    return Behind(*(tensors[f"behind.{name}"] for name in Behind._fields))


def _table_of(tensors: Mapping[str, Tensor], manifest: Manifest, behind: Behind | None) -> GaussianTable:
    """The table whose tensors `_tensors_of` gave."""

    def group(prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: tensors[f"{prefix}.{name}"] for name in names}

    names = [spec.name for spec in attributes_for(manifest.sh_degree)]
    kept = [name for name in OPTIONAL_STATISTICS if f"statistics.{name}" in tensors]
    return GaussianTable(
        params=group("params", names),
        exp_avg=group("exp_avg", names),
        exp_avg_sq=group("exp_avg_sq", names),
        statistics=group("statistics", [*STATISTICS, *kept]),
        ids=tensors["ids"],
        num_updates=manifest.num_updates,
        behind=behind,
    )


def _expected_shapes(sh_degree: int, num_rows: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a shard."""
    shapes: dict[str, tuple[int, ...]] = {f"statistics.{name}": (num_rows,) for name in STATISTICS}
    for spec in attributes_for(sh_degree):
        for group in ("params", "exp_avg", "exp_avg_sq"):
            shapes[f"{group}.{spec.name}"] = (num_rows, *spec.shape)
    return {**shapes, "ids": (num_rows,)}


def _together(ranks: Ranks, action: Callable[[], ShardRecord | None], partial: Path) -> ShardRecord | None:
    """The action's result, once it has succeeded on all ranks.

    Raises: InputError on every rank when it failed on any.
    """
    failed = torch.zeros(ranks.size, dtype=torch.int64)
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except (OSError, SafetensorError, InputError) as error:
        failure = error
        failed[ranks.rank] = 1
    failed = ranks.sum(failed)  # all ranks
    if isinstance(failure, InputError):
        raise failure
    if failure is not None:
        cause = getattr(failure, "strerror", None) or str(failure)
        raise InputError(
            f"the checkpoint {partial} cannot be written: {cause}. Free some space or change the permissions; older "
            "checkpoints, if there are any, are untouched, and --auto_start_checkpoint goes on from the newest."
        ) from failure
    if int(failed.sum()):
        culprits = ", ".join(str(rank) for rank in range(ranks.size) if int(failed[rank]))
        raise InputError(
            f"the checkpoint {partial} is given up: rank {culprits} could not write its part (see its log)"
        )
    return result


def _make_room(partial: Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Make an empty folder; check that `size` parts like this rank's fit on the disk. Raises: OSError, InputError."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    needed = size * sum(values.nbytes for values in tensors.values()) + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise InputError(
            f"the checkpoint {partial} needs {needed:,} bytes and its disk has {free:,} left; free some space. Older "
            "checkpoints are untouched: resume from the newest with --auto_start_checkpoint."
        )


def _write_shard(folder: Path, tensors: dict[str, Tensor], state: RunState, ranks: Ranks) -> ShardRecord:
    """Write this rank's rows and put them on disk. Raises: OSError, SafetensorError."""
    path = folder / shard_name(ranks.rank, ranks.size)
    # One entry only: safetensors orders several at random, and equal tables shall give equal files.
    save_file(tensors, str(path), metadata={"iteration": str(state.iteration)})
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors gives it to its owner alone
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return ShardRecord(
        num_rows=len(tensors["ids"]),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        tensors={name: tensor_sha256(values) for name, values in tensors.items()},
    )


def _gathered(record: ShardRecord | None, ranks: Ranks) -> list[ShardRecord]:
    """The records of all ranks: each fills its row of a matrix of whole numbers, and the matrices are added."""
    if record is None:
        raise RuntimeError("every rank writes a shard before the records are gathered")
    digests = bytes.fromhex(record.sha256 + "".join(record.tensors.values()))
    rows = torch.zeros(ranks.size, 2 + len(digests), dtype=torch.int64)
    rows[ranks.rank] = torch.tensor([record.num_rows, record.num_bytes, *digests])
    rows = ranks.sum(rows)  # all ranks
    records = []
    for num_rows, num_bytes, *numbers in rows.tolist():
        pieces = [bytes(numbers[k : k + DIGEST_BYTES]).hex() for k in range(0, len(numbers), DIGEST_BYTES)]
        records.append(ShardRecord(num_rows, num_bytes, pieces[0], dict(zip(record.tensors, pieces[1:], strict=True))))
    return records


def _finish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, put all on disk, and give the folder its name. Raises: OSError."""
    with (partial / MANIFEST).open("wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a rename survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_shard(folder: Path, manifest: Manifest, index: int) -> dict[str, Tensor]:
    """The tensors of one shard, after its checksum was compared. Raises: InputError."""
    if not 0 <= index < manifest.world_size:
        raise InputError(f"{folder} has {manifest.world_size} shards, there is no number {index}")
    record, path = manifest.shards[index], folder / shard_name(index, manifest.world_size)
    try:
        num_bytes = path.stat().st_size
        found = file_sha256(path) if num_bytes == record.num_bytes else ""
    except OSError as error:
        raise InputError(f"the shard {path} cannot be read: {error.strerror}. {COPY_AGAIN}") from error
    if num_bytes != record.num_bytes:
        raise InputError(
            f"the shard {path} has {num_bytes} bytes where its manifest says {record.num_bytes}: it is cut off, or "
            f"belongs to another checkpoint. {COPY_AGAIN}"
        )
    if found != record.sha256:
        raise InputError(
            f"the shard {path} is damaged or belongs to another checkpoint: its SHA-256 is not the manifest's "
            f"({_damaged_part(path, record)}). {COPY_AGAIN}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the shard {path} cannot be read: {error}. {COPY_AGAIN}") from error
    _check_tensors(path, tensors, manifest, record)
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest, record: ShardRecord) -> None:
    """Raises: InputError unless a shard holds exactly the tensors of a table of the manifest's kind."""
    expected = _expected_shapes(manifest.sh_degree, record.num_rows)
    optional = (f"statistics.{name}" for name in OPTIONAL_STATISTICS)
    expected.update({name: (record.num_rows,) for name in optional if name in tensors})
    if "behind.updates" in tensors:
        num_blocks = len(tensors["behind.updates"])
        shape = expected["params.shN"] if num_blocks else (0, *expected["params.shN"][1:])
        expected.update(_shapes_behind(shape, num_blocks))
    found = {name: tuple(values.shape) for name, values in tensors.items()}
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise InputError(f"the shard {path} does not fit this program: {', '.join(names[:5])} differ. {COPY_AGAIN}")
    kinds = {values.dtype for name, values in tensors.items() if name not in ("ids", "behind.updates")}
    if tensors["ids"].dtype != torch.int64 or len(kinds) != 1 or not next(iter(kinds)).is_floating_point:
        raise InputError(f"the shard {path} does not fit this program: its numbers are of other kinds. {COPY_AGAIN}")


def _shapes_behind(shape: tuple[int, ...], num_blocks: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `Behind`, of rows of this shape."""
    shapes = {f"behind.{name}": shape for name in ("param", "exp_avg", "exp_avg_sq")}
    return {**shapes, "behind.updates": (num_blocks,), "behind.ring": (CAPACITY, FACTORS)}


def _damaged_part(path: Path, record: ShardRecord) -> str:
    """Which records of a shard differ from the manifest, as far as that can still be told."""
    with contextlib.suppress(SafetensorError, OSError, ValueError, TypeError, RuntimeError):
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            digests = {name: tensor_sha256(file.get_tensor(name)) for name in sorted(names)}
        wrong = [name for name, digest in record.tensors.items() if digests.get(name) != digest]
        return f"{len(wrong)} of {len(record.tensors)} records differ: {', '.join(wrong[:3])}" if wrong else "header"
    return "its header cannot be read"


def fingerprint(*parts: bytes) -> str:
    """SHA-256 over some byte strings and their lengths, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
