# SPDX-License-Identifier: Apache-2.0
"""How a script becomes one of several processes, and how all of them end when one does.

An error on one rank ends the others within seconds and is printed once: a rank that fails leaves a note before it ends,
and a rank whose collectives fail because of that finds the note and ends without a word.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from distributed.communicator import Communicator, DisagreementError, PeerError
from launch.config import TrainConfig
from launch.machine import available_cores
from masksplat.ops import BODY_NAMES
from scene.checkpoint import fingerprint
from scene.errors import InputError

Config = TypeVar("Config")

DEVICE_BACKENDS = frozenset({"cuda", "gsplat"})


def parse_once(
    parse: Callable[[Sequence[str]], Config],
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """`parse(arguments)`; all ranks have the same command line, so only rank 0 speaks about a mistake in it.

    Raises: InputError on rank 0, PeerError on the others.
    """
    try:
        return parse(arguments)
    except InputError as error:
        if environment.get("RANK", "0") == "0":
            raise
        raise PeerError(0, str(error)) from error


def device_type_of(backend: str) -> str:
    """Where --backend draws, "cuda" or "cpu"; diff and default mean a CUDA device when there is one."""
    if backend in DEVICE_BACKENDS:
        return "cuda"
    is_free = backend in ("diff", "default", "auto")
    return "cuda" if is_free and "cuda" in BODY_NAMES and torch.cuda.is_available() else "cpu"


@contextmanager
def joined_world(device_type: str = "cpu", environment: Mapping[str, str] = os.environ) -> Iterator[Communicator]:
    """This process's place among the processes of the run, until the block ends.

    Raises: InputError when there is no GPU and one is needed, when the launcher's variables make no sense or the others
    do not appear; PeerError when another rank failed first.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        text = no_gpu_text(torch.version.cuda)
        raise InputError(text) if environment.get("RANK", "0") == "0" else PeerError(0, text)
    try:
        communicator = Communicator.from_environment(environment, device_type=device_type)
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error
    has_ended = False
    try:
        with ending_together(communicator):
            yield communicator
        has_ended = True
    finally:
        # gloo's threads must have ended before the process does; nccl would wait for ranks that are in a collective.
        if has_ended or communicator.device.type == "cpu":
            communicator.close()


def no_gpu_text(built: str | None) -> str:
    """Why no GPU can be used, and what to do; built: the CUDA version that torch is built for."""
    named = " and ".join(f"--backend {name}" for name in sorted(DEVICE_BACKENDS))
    why = "this torch is built without CUDA" if built is None else f"torch, built for CUDA {built}, finds none here"
    return (
        f"{named} draw on an NVIDIA GPU, and {why}. --backend diff, the default, takes a GPU where there is one, the "
        "CPU elsewhere; train.py --doctor says what a GPU would need"
    )


@contextmanager
def ending_together(communicator: Communicator) -> Iterator[None]:
    """A block whose errors end all ranks and are reported by the first rank that has one.

    Raises: PeerError instead of the block's error when another rank was first.
    """
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        first = communicator.announce(error)
        if first is not None:
            raise first from error
        raise


def agree_on_folder(config: TrainConfig, communicator: Communicator) -> TrainConfig:
    """The configuration with rank 0's model folder: without -m its name is random."""
    path = communicator.broadcast_bytes(os.fsencode(config.model.model_path))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_path=Path(os.fsdecode(path))))


def require_same(communicator: Communicator, what: str, *parts: bytes) -> None:
    """Check that all ranks bring the same bytes.

    Raises: InputError on every rank, naming the first one that differs.
    """
    try:
        communicator.require_agreement(what, int(fingerprint(*parts)[:15], 16))
    except DisagreementError as error:
        raise InputError(
            f"{error}; start all processes with the same command and let them see the same files"
        ) from error


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads an operation, in this thread and in those that start meanwhile.

    Its threads wait for each other by spinning: beside other threads that want the cores, one is faster than many.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def leave_cores_to(backend: str, threads: int) -> None:
    """Give torch one thread beside a body that brings its own, and `threads` with the reference, which is all torch."""
    torch.set_num_threads(threads if backend == "reference" else 1)


def threads_per_rank(threads: int, communicator: Communicator) -> int:
    """CPU threads of this process: what --threads says, or its share of the machine's cores."""
    return threads or max(1, available_cores() // communicator.local_size)
