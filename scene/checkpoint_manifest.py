# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint: what its shards hold, where the run stands, and the checksums of all of it.

The file is JSON in one canonical form (sorted keys, fixed indent) that includes the SHA-256 of the rest. A reader
writes what it has read in that form again and compares: no byte can differ without being noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scene.errors import InputError
from scene.gaussians import GaussianTable, attributes_for

MANIFEST = "manifest.json"
SCHEMA = "mask-grendel/checkpoint"
VERSION = 1
LARGEST_MANIFEST_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a training stands and which training it is.

    iteration: images done; next_step: number of the next step, from 0; batch_size: images per step so far.
    extent: of the scene, world units. config, data: configuration and fingerprints of the data as plain values, empty
    where unknown (predecessors' checkpoints). clocks: seconds and memory so far, for the log. shares: what later
    decisions about who draws and owns what depend on.
    """

    iteration: int
    next_step: int
    batch_size: int
    seed: int
    extent: float
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.iteration, self.next_step, self.batch_size, self.seed)
        if not all(isinstance(number, int) for number in numbers) or min(numbers) < 0 or self.batch_size < 1:
            raise ValueError(f"iteration, step, batch size and seed of a checkpoint are whole numbers, got {numbers}")


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """Rows, bytes and SHA-256 (hexadecimal) of one shard, and the SHA-256 of each tensor in it."""

    num_rows: int
    num_bytes: int
    sha256: str
    tensors: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json says."""

    state: RunState
    sh_degree: int
    num_gaussians: int
    num_updates: int
    attributes: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardRecord, ...]
    torch_version: str = ""

    @classmethod
    def describe(cls, table: GaussianTable, state: RunState, shards: Sequence[ShardRecord]) -> Manifest:
        """The manifest of shards whose tables are like this rank's `table`."""
        return cls(
            state=state,
            sh_degree=table.sh_degree,
            num_gaussians=sum(shard.num_rows for shard in shards),
            num_updates=table.num_updates,
            attributes=_attribute_table(table.sh_degree),
            shards=tuple(shards),
            torch_version=torch.__version__,
        )

    @property
    def world_size(self) -> int:
        """The number of ranks that wrote, W."""
        return len(self.shards)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return canonical_bytes({"schema": SCHEMA, "version": VERSION, **dataclasses.asdict(self)})


def canonical_bytes(content: Mapping[str, Any]) -> bytes:
    """The canonical JSON of a mapping, with the SHA-256 of the canonical JSON of the rest under "sha256"."""
    checksum = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "sha256": checksum})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises: InputError when it is missing, damaged, of a newer version, or describes other attributes than ours.
    """
    path = folder / MANIFEST
    content = _read_content(path)
    if content.get("schema") != SCHEMA:
        raise InputError(f"{path} is not the manifest of a checkpoint of mask-grendel; give another folder")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has version {content.get('version')!r}, this program reads {VERSION}; update it")
    try:
        manifest = _parsed(content)
        is_ours = [dict(each) for each in manifest.attributes] == [
            dict(each) for each in _attribute_table(manifest.sh_degree)
        ]
        counts = sum(shard.num_rows for shard in manifest.shards)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} lacks something or has it in another form ({error}); restore it") from error
    if not is_ours or counts != manifest.num_gaussians or not manifest.shards:
        raise InputError(f"{path} describes other Gaussians than this program trains; use the version that wrote it")
    return manifest


def _read_content(path: Path) -> dict[str, Any]:
    """The JSON object in a manifest, its checksum compared. Raises: InputError."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. A checkpoint is a folder with a {MANIFEST} and its shards."
        ) from error
    damaged = f"{path} is damaged or was edited: its checksum does not fit. Restore it, or use an older checkpoint."
    try:
        content = json.loads(data) if len(data) <= LARGEST_MANIFEST_BYTES else None
        if isinstance(content, dict):
            rest = {key: value for key, value in content.items() if key != "sha256"}
            if canonical_bytes(rest) == data:
                return content
    except (ValueError, RecursionError) as error:
        raise InputError(damaged) from error
    raise InputError(damaged)


def _parsed(content: Mapping[str, Any]) -> Manifest:
    """The manifest in a JSON object. Raises: KeyError, TypeError, ValueError, AttributeError."""
    return Manifest(
        state=RunState(**content["state"]),
        sh_degree=content["sh_degree"],
        num_gaussians=content["num_gaussians"],
        num_updates=content["num_updates"],
        attributes=tuple(content["attributes"]),
        shards=tuple(ShardRecord(**shard) for shard in content["shards"]),
        torch_version=content["torch_version"],
    )


def _attribute_table(sh_degree: int) -> tuple[Mapping[str, Any], ...]:
    """Name and row shape of every attribute, as JSON has them."""
    return tuple({"name": spec.name, "shape": list(spec.shape)} for spec in attributes_for(sh_degree))


def shard_name(index: int, world_size: int) -> str:
    """The file name of a rank's shard."""
    return f"shard-{index:05d}-of-{world_size:05d}.safetensors"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits. Raises: OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tensor_sha256(values: Tensor) -> str:
    """SHA-256 of a host tensor's bytes in hexadecimal digits."""
    return hashlib.sha256(values.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
