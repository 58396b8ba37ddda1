# SPDX-License-Identifier: Apache-2.0
"""Which body of masksplat draws: --backend, the device and the pruning method decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.kernel_passage import RoomForRows
from masksplat.ops import Body, get_body
from scene.errors import InputError

if TYPE_CHECKING:
    from masksplat.cuda.compiler import KernelCache


STEPS_AHEAD = 4
"""Steps a GPU may be behind the host: enough to hide the jitter of the host, few enough to repeat."""

STEPS_AHEAD_OF_RANKS = 1
"""The same for ranks that wait for the numbers of rows in every step, by when the step before is done."""

HIDDEN_LOAD = 500_000_000
"""Pairs of pixel and splat that an H200 draws, forth and back, while its host queues a step launch by launch."""


def choose_body(
    backend: str,
    device: torch.device | str,
    *,
    threads: int,
    has_masks: bool,
    say: Callable[[str], None] = print,
) -> Body:
    """The body that --backend means on `device`; diff and default are masksplat's own on the device at hand.

    Args: threads: of the cpu body; has_masks: whether the run's Gaussians are masked, which gsplat cannot composite;
    say: shows a line when kernels have to be compiled first.
    Raises: InputError when the body lacks a library; the message says how to get it.
    """
    device = torch.device(device)
    name = {"diff": "auto", "default": "auto", "gsplat": "cuda"}.get(backend, backend)
    try:
        own = get_body(name, num_threads=threads, device=device if device.type == "cuda" else None)
        launcher = getattr(own, "launcher", None)
        if launcher is not None:
            compile_missing(launcher.cache, launcher.architecture, say)
        if backend != "gsplat":
            return own
        from masksplat.gsplat.body import GsplatBody  # only a run that asks for gsplat may need it

        return GsplatBody(own, masked=has_masks)
    except (ImportError, RuntimeError) as error:
        raise InputError(f"--backend {backend} cannot be used: {error}") from error


def compile_missing(cache: KernelCache, architecture: str, say: Callable[[str], None]) -> None:
    """Compile the CUDA kernels that no run on this machine has used yet, and say so before the wait.

    Raises: CudaUnavailableError or KernelCompileError (both RuntimeError).
    """
    missing = cache.missing(architecture)
    if missing:
        say(f"compiling CUDA kernels for {architecture} (once, about 10 s; they are kept in {cache.place})")
    for name in missing:
        cache.load(name, architecture)


class OverflowWatch(Protocol):
    """A body whose buffers can turn out too small on the device (`masksplat.cuda.body.CudaBody`)."""

    @property
    def status(self) -> Tensor:
        """Words on the device; the first is not 0 once a buffer was too small, and then nothing is updated."""

    @property
    def defers(self) -> bool:
        """Whether the body leaves it to its owner to look at the status."""

    @defers.setter
    def defers(self, defers: bool) -> None:
        """Choose who looks."""

    @property
    def capacity(self) -> RoomForRows:
        """What knows the sizes of the buffers."""

    def recover(self) -> bool:
        """Grow the buffers and clear the status; True when work since must be repeated."""


def overflow_watch(body: Body) -> OverflowWatch | None:
    """What has to be watched while `body` draws; None for bodies that allocate what they need."""
    own: Any = getattr(body, "own", body)  # gsplat's body draws with masksplat's
    return own if hasattr(own, "recover") else None


def room_of_windows(body: Body, communicator: Communicator) -> RoomForRows | None:
    """Room for the copies between ranks of one machine, whose steps wait for nothing then; None where they have to.

    What composites must know of rows that are not in use, and steps must be watched: gsplat's body does not, and a step
    that is complete when it returns is not.
    """
    watch = overflow_watch(body)
    if watch is None or hasattr(body, "own") or not watch.defers:
        return None
    return watch.capacity if 1 < communicator.size == communicator.local_size else None


def steps_ahead(body: Body, communicator: Communicator) -> int:
    """Steps that a GPU may be behind the host; 0 where each step is over before the next begins."""
    watch = overflow_watch(body)
    if watch is None or not watch.defers:
        return 0
    waits = communicator.size > 1 and room_of_windows(body, communicator) is None
    return STEPS_AHEAD_OF_RANKS if waits else STEPS_AHEAD


def hidden_load(body: Body) -> int:
    """Pairs of pixel and splat that a rank draws while its host queues the step; 0 where the host computes itself."""
    watch = overflow_watch(body)
    return HIDDEN_LOAD if watch is not None and watch.status.is_cuda else 0


@contextmanager
def drawn_at_once(body: Body) -> Iterator[None]:
    """A block in which every frame is complete when it is returned, whether or not the body defers otherwise."""
    watch = overflow_watch(body)
    if watch is None or not watch.defers:
        yield
        return
    watch.defers = False
    try:
        yield
    finally:
        watch.defers = True
