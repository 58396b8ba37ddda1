# SPDX-License-Identifier: Apache-2.0
"""Who this process is among the processes of a run, and how they talk. One process is a world of size 1.

Every method that talks is a collective: all ranks call it, in the same order. Without a process group the same methods
return what a world of one would get. Sums are formed in rank order from gathered values, so every rank gets the same
bits whatever the backend's algorithm is. This module knows nothing of Gaussians, views or files.

Letters: W ranks, S rows sent by this rank, R rows received by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

JOIN_SECONDS = 300.0
"""How long a rank waits for the others to appear."""

STEP_SECONDS = 600.0
"""How long a rank waits inside a collective."""


FAILURE_KEY = "failure"


class PeerError(RuntimeError):
    """Another rank raised the error; it prints the message, this rank only has to end."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.rank = rank
        self.message = message


class DisagreementError(RuntimeError):
    """Ranks that must hold the same value do not."""


@dataclass(frozen=True)
class Place:
    """What a launcher says about this process: torchrun's variables.

    attempt: how often the launcher has restarted the job; each attempt meets under keys of its own.
    local_size: processes on this machine.
    """

    rank: int
    size: int
    local_rank: int = 0
    address: str = ""
    port: int = 0
    attempt: int = 0
    launcher_hosts_store: bool = False
    local_size: int = 1

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> Place:
        """The place that WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe; without any, alone.

        Raises: ValueError for variables that are missing, not whole numbers or contradict each other.
        """
        size = _whole(variables, "WORLD_SIZE", 1, default=1)
        if size == 1:
            return cls(0, 1, _whole(variables, "LOCAL_RANK", 0, default=0))
        place = cls(
            rank=_whole(variables, "RANK", 0),
            size=size,
            local_rank=_whole(variables, "LOCAL_RANK", 0),
            address=_text(variables, "MASTER_ADDR"),
            port=_whole(variables, "MASTER_PORT", 1),
            attempt=_whole(variables, "TORCHELASTIC_RESTART_COUNT", 0, default=0),
            launcher_hosts_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            local_size=_whole(variables, "LOCAL_WORLD_SIZE", 1, default=1),
        )
        if place.rank >= size:
            raise ValueError(f"RANK is {place.rank} but WORLD_SIZE is {size}; ranks go from 0 to {size - 1}")
        return place


@dataclass(frozen=True, eq=False)
class Communicator:
    """Rank and size of the world, and its collectives. `Communicator()` is a world of one without a process group.

    device: this rank's own. Tensors travel from where they are: those of a GPU by nccl, those of the host by gloo, so
    that small host numbers wait for no GPU.
    has_group: whether a process group exists; a group may have size 1. local_size: ranks on this machine.
    store: where ranks leave notes for each other without a collective (`announce`).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    has_group: bool = False
    local_size: int = 1
    store: dist.Store | None = None

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        device_type: str = "cpu",
        join_seconds: float = JOIN_SECONDS,
        step_seconds: float = STEP_SECONDS,
    ) -> Communicator:
        """The world that torchrun describes, or a world of one; waits for all ranks.

        Args: device_type: "cpu" (gloo) or "cuda" (nccl, one GPU per process).
        Raises: ValueError for variables that make no sense; RuntimeError when the others do not appear in time.
        """
        place = Place.from_variables(environment)
        if place.size == 1:
            return cls(local_rank=place.local_rank, device=_device(device_type, place.local_rank))
        is_host = place.rank == 0 and not place.launcher_hosts_store
        wait = timedelta(seconds=join_seconds)
        try:
            store = dist.TCPStore(place.address, place.port, place.size, is_host, timeout=wait)
        except RuntimeError as error:
            raise RuntimeError(
                f"[rank {place.rank}/{place.size}] no contact with {place.address}:{place.port} within "
                f"{join_seconds:g} s ({error}); check MASTER_ADDR and MASTER_PORT and that all "
                f"{place.size} processes were started"
            ) from error
        prefixed = dist.PrefixStore(f"mask-grendel/{place.attempt}", store)
        return cls._joined(prefixed, place, device_type, join_seconds, step_seconds)

    @classmethod
    def from_file(
        cls, path: Path, rank: int, size: int, *, device_type: str = "cpu", step_seconds: float = STEP_SECONDS
    ) -> Communicator:
        """The world of `size` processes of one machine that meet in a file; it must not exist before. No port opens."""
        place = Place(rank, size, local_rank=rank, local_size=size)
        return cls._joined(dist.FileStore(str(path), size), place, device_type, step_seconds, step_seconds)

    @classmethod
    def _joined(
        cls, store: dist.Store, place: Place, device_type: str, join_seconds: float, step_seconds: float
    ) -> Communicator:
        """Meet the other ranks: a long wait until all are there, then the time-out of the steps."""
        device = _device(device_type, place.local_rank)
        store.set_timeout(timedelta(seconds=join_seconds))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=step_seconds),
            device_id=device if device.type == "cuda" else None,
        )
        return cls(place.rank, place.size, place.local_rank, device, True, place.local_size, store)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the files that exist once."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """How messages name this rank."""
        return f"[rank {self.rank}/{self.size}]"

    def gather(self, values: Tensor) -> Tensor:
        """(W, *shape): the `values` of every rank, of one shape and dtype, on the device of `values`."""
        if not self.has_group:
            return values.unsqueeze(0)
        received = values.new_empty((self.size, *values.shape))
        if values.numel() > 0:
            _gather_flat(received.view(-1), values.detach().reshape(-1))  # all ranks
        return received

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over ranks, in rank order: meant for small tensors (W copies are gathered)."""
        if not self.has_group:
            return values
        gathered = self.gather(values)
        total = gathered[0].clone()
        for rank in range(1, self.size):
            total += gathered[rank]
        return total

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum over ranks; NaN on any rank gives NaN."""
        return self.gather(values).amax(0) if self.has_group else values

    def gather_counts(self, counts: Sequence[int]) -> list[list[int]]:
        """[rank][k]: whole numbers of every rank, equally many from each; no GPU is asked."""
        return self.gather(torch.tensor(list(counts), dtype=torch.int64)).tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.has_group:
            dist.barrier()  # all ranks

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Send consecutive rows to every rank and receive theirs; counts may differ and may be 0.

        Args: rows: (S, *shape), the rows for rank 0 first; send_counts, receive_counts: W numbers of rows each.
        Returns: (R, *shape), the rows of rank 0 first. Without a group: `rows` itself.
        Raises: ValueError when the counts do not fit.
        """
        if len(send_counts) != self.size or len(receive_counts) != self.size or sum(send_counts) != len(rows):
            raise ValueError(
                f"{self.label} {len(rows)} rows cannot be sent as {list(send_counts)} and received as "
                f"{list(receive_counts)} between {self.size} ranks"
            )
        if not self.has_group:
            if list(send_counts) != list(receive_counts):
                raise ValueError(f"one rank sends itself {send_counts[0]} rows but expects {receive_counts[0]}")
            return rows
        sent = rows.detach().contiguous()
        received = sent.new_empty((sum(receive_counts), *rows.shape[1:]))
        if sent.shape[1:].numel() > 0:
            dist.all_to_all_single(received, sent, list(receive_counts), list(send_counts))  # all ranks
        return received

    def all_to_all_into(
        self, received: Tensor, sent: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> None:
        """`all_to_all_rows` into memory that is there, of contiguous tensors; between no ranks it does nothing."""
        if self.size > 1:
            dist.all_to_all_single(received, sent, receive_counts, send_counts)  # all ranks

    def broadcast_bytes(self, payload: bytes, source: int = 0) -> bytes:
        """The byte string of rank `source`; what the others pass is ignored."""
        if not self.has_group:
            return payload
        length = torch.tensor([len(payload)], dtype=torch.int64)
        dist.broadcast(length, source)  # all ranks
        content = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source:
            content.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else content)
        if int(length) > 0:
            dist.broadcast(content, source)  # all ranks
        return content.numpy().tobytes()

    def raise_together(self, error: Exception | None) -> None:
        """Return when no rank brings an error; otherwise raise on every rank.

        The lowest rank with an error raises it; all others raise `PeerError`, so one message is printed.
        """
        failed = [rank for rank, flag in enumerate(self.gather_counts([int(error is not None)])) if flag[0]]
        if not failed:
            return
        message = self.broadcast_bytes(str(error).encode() if error is not None else b"", failed[0]).decode()
        if error is not None and self.rank == failed[0]:
            raise error
        raise PeerError(failed[0], message) from error

    @contextmanager
    def all_or_none(self, *kinds: type[Exception]) -> Iterator[None]:
        """A block that succeeds on every rank or raises on every rank (`raise_together`).

        Args: kinds: the errors that count; any other leaves at once. The block must not contain collectives.
        """
        caught: Exception | None = None
        try:
            yield
        except kinds as error:
            caught = error
        self.raise_together(caught)

    def announce(self, error: BaseException) -> PeerError | None:
        """Leave word why this rank ends, for ranks whose collectives fail because of it. Not a collective.

        Returns: None when this rank is the first to fail, otherwise what the first one left.
        """
        if self.store is None:
            return None
        note = f"{self.rank} {error}"
        try:
            rank, _, message = self.store.compare_set(FAILURE_KEY, "", note).decode().partition(" ")
        except RuntimeError:  # whoever hosts the store has gone
            return None
        return PeerError(int(rank), message) if int(rank) != self.rank else None

    def require_agreement(self, what: str, digest: int) -> None:
        """Check that all ranks bring the same number (a hash, 0 <= digest < 2**63).

        Raises: DisagreementError on every rank, naming the first rank that differs from rank 0.
        """
        digests = [row[0] for row in self.gather_counts([digest])]
        differing = [rank for rank in range(self.size) if digests[rank] != digests[0]]
        if differing:
            raise DisagreementError(
                f"{self.label} {what}: rank {differing[0]} has {digests[differing[0]]:016x} where rank 0 has "
                f"{digests[0]:016x} ({len(differing)} of {self.size} ranks differ)"
            )

    def close(self) -> None:
        """Leave the process group. A second call does nothing."""
        if self.has_group and dist.is_initialized():
            dist.destroy_process_group()


def _gather_flat(received: Tensor, values: Tensor) -> None:
    """Into one tensor: with a list of them, nccl copies what it has gathered once more. torch renamed it in 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, values)


def _device(device_type: str, local_rank: int) -> torch.device:
    """The device of this process. Raises: ValueError when there is none."""
    if device_type == "cpu":
        return torch.device("cpu")
    if device_type != "cuda":
        raise ValueError(f"processes talk over cpu (gloo) or cuda (nccl), got {device_type!r}")
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} but this machine has {available} usable GPUs; start at most that many "
            "processes on it (--nproc-per-node) or train on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _text(variables: Mapping[str, str], name: str) -> str:
    """A variable that must be there."""
    if not variables.get(name):
        raise ValueError(
            f"WORLD_SIZE is {variables.get('WORLD_SIZE')} but {name} is not set; start the processes with torchrun, "
            "or run without WORLD_SIZE for a single process"
        )
    return variables[name]


def _whole(variables: Mapping[str, str], name: str, lowest: int, *, default: int | None = None) -> int:
    """A variable that must be a whole number of at least `lowest`."""
    if name not in variables and default is not None:
        return default
    text = _text(variables, name)
    if not text.isascii() or not text.isdigit() or int(text) < lowest:
        raise ValueError(f"{name} is {text!r}; it must be a whole number of at least {lowest}")
    return int(text)
