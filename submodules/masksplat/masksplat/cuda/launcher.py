# SPDX-License-Identifier: Apache-2.0
"""Starts kernels by name on torch's current stream.

A kernel is called "file.function" and is an `extern "C" __global__` function of source/file.cu. The body is written
against `Launcher`; tests give it one that runs the same sources on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.arena import Piece
from masksplat.cuda.compiler import (
    SOURCE_FOLDER,
    CudaUnavailableError,
    KernelCache,
    architecture_name,
    kernel_names,
    load_cuda_core,
)

Extent = int | tuple[int, ...]
Argument = Tensor | Piece | np.generic | int | float | None

FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory of a block that needs no permission."""

FORMATS = {np.int32: "i", np.uint32: "I", np.int64: "q", np.uint64: "Q", np.float32: "f", np.float64: "d"}
"""How `struct` packs a numpy scalar."""

PLAIN_FORMATS = {(int, 4): "i", (int, 8): "q", (float, 4): "f"}
"""How it packs a plain number, by the bytes that the kernel takes."""

BUFFER_POINTER, BUFFER_SIZE, END = 1, 2, 0
"""CU_LAUNCH_PARAM_*: a launch takes its arguments from one buffer, each where the kernel expects it."""


class Launcher(Protocol):
    """Starts kernels that work on tensors of `device`."""

    device: torch.device

    def __call__(self, kernel: str, grid: Extent, block: Extent, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Queue a kernel on the current stream and return at once.

        Args:
            kernel: "file.function".
            grid: blocks in x, or in (x, y, z). A grid without blocks starts nothing.
            block: threads of a block, likewise.
            arguments: contiguous tensors of `device` (their data pointer), pieces of an arena, None (a null pointer),
                and numbers by value: int for int and long long, float for float, numpy scalars for these and for
                unsigned ones.
            shared_bytes: dynamic shared memory of a block.

        Raises:
            ValueError: for an argument of another kind, on another device, or not contiguous.
        """


class Packer:
    """Lays the arguments of one kernel out as its launch takes them. For one thread."""

    def __init__(self, kernel: str, places: Sequence[tuple[int, int]], arguments: Sequence[Argument]) -> None:
        """Args: places: offset and size in bytes of each parameter; arguments: of the first launch, which decide types.

        Raises:
            ValueError: for an argument of another kind, or another number of them.
        """
        if len(arguments) != len(places):
            raise ValueError(f"{kernel} takes {len(places)} arguments and was given {len(arguments)}")
        form, end = "=", 0
        for argument, (offset, size) in zip(arguments, places, strict=True):
            form += "x" * (offset - end) + _format(kernel, argument, size)
            end = offset + size
        packing = struct.Struct(form)
        self._buffer = ctypes.create_string_buffer(max(end, 1))
        self._size = ctypes.c_size_t(packing.size)
        self._extra = (ctypes.c_void_p * 5)(
            BUFFER_POINTER, ctypes.addressof(self._buffer), BUFFER_SIZE, ctypes.addressof(self._size), END
        )
        self.extra = ctypes.addressof(self._extra)
        """What cuLaunchKernel takes as `extra`."""
        self.pack = functools.partial(packing.pack_into, self._buffer, 0)
        """Puts what it is given, numbers and addresses, where `extra` points to; raises struct.error, OverflowError."""


class LoadedKernel(NamedTuple):
    """A kernel on the device. places: see `Packer`."""

    handle: Any
    places: tuple[tuple[int, int], ...]


class DeviceLauncher:
    """Starts kernels on one NVIDIA GPU; compiles each file at its first use.

    Host time is what this class is about: everything that can be looked up once is. Usable from any thread.
    """

    def __init__(
        self, device: torch.device | int | str = "cuda", *, cache: Path | None = None, sources: Path = SOURCE_FOLDER
    ) -> None:
        """Take a device such as "cuda:1" (default: the current one).

        Args:
            cache: folder of compiled kernels, by default ~/.cache/masksplat.
            sources: folder of the `.cu` files.

        Raises:
            CudaUnavailableError: when there is no such device, or cuda.core or NVRTC is missing.
        """
        self.device = _existing_device(device)
        self._index = self.device.index
        self._core = load_cuda_core()
        self._driver = _load_driver()
        self.architecture = architecture_name(torch.cuda.get_device_capability(self.device))
        self.cache = KernelCache(cache, sources=sources)
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, LoadedKernel] = {}
        self._shared_limits: dict[str, int] = {}
        self._of_thread = threading.local()  # packers: its own by kernel; absent in a thread that is new to CUDA
        self._start = self._driver.cuLaunchKernel
        self._success = self._driver.CUresult.CUDA_SUCCESS
        self._stream_handle, self._current_device = _stream_functions()

    def __call__(self, kernel: str, grid: Extent, block: Extent, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Queue a kernel on torch's current stream of the device; see `Launcher`."""
        if grid == 0 or (grid.__class__ is tuple and 0 in grid):
            return
        packers: dict[str, Packer] | None = getattr(self._of_thread, "packers", None)
        if packers is not None and self._current_device() == self._index:
            self._queue(packers, kernel, grid, block, arguments, shared_bytes)
            return
        with torch.cuda.device(self.device):  # another device is the current one, or the thread is new to CUDA
            self._core.Device(self._index).set_current()
            packers = self._of_thread.packers = packers if packers is not None else {}
            self._queue(packers, kernel, grid, block, arguments, shared_bytes)

    def _queue(
        self,
        packers: dict[str, Packer],
        kernel: str,
        grid: Extent,
        block: Extent,
        arguments: Sequence[Argument],
        shared_bytes: int,
    ) -> None:
        """Start a kernel on the current device; `packers` are this thread's."""
        values: list[Any] = []
        add, index = values.append, self._index
        for argument in arguments:  # 0.05 us a number or piece, 0.25 us a tensor
            kind = argument.__class__
            if kind is int or kind is float:
                add(argument)
            elif kind is Piece:
                add(argument[0])  # type: ignore[index]
            elif isinstance(argument, Tensor):
                if argument.get_device() != index or not argument.is_contiguous():
                    raise self._refusal(kernel, argument)
                add(argument.data_ptr())
            else:
                add(0 if argument is None else argument)
        loaded = self._kernels.get(kernel) or self.load(kernel)
        packer = packers.get(kernel)
        if packer is None:
            packer = packers[kernel] = Packer(kernel, loaded.places, arguments)
        try:
            packer.pack(*values)
        except (struct.error, OverflowError) as error:
            Packer(kernel, loaded.places, arguments)  # says what is wrong with their kinds or number
            raise ValueError(f"{kernel} was given {arguments}: {error}") from error
        if shared_bytes > FREE_SHARED_BYTES and shared_bytes > self._shared_limits.get(kernel, 0):
            self._raise_shared_limit(kernel, shared_bytes)
        (status,) = self._start(
            loaded.handle, *_three(grid), *_three(block), shared_bytes, self._stream_handle(index), 0, packer.extra
        )
        if status != self._success:
            raise RuntimeError(f"{kernel} on {grid} blocks of {block} threads was not started: {status}")

    def load(self, kernel: str) -> LoadedKernel:
        """Compile the kernel's file (or read it from the cache); return the kernel.

        Raises:
            ValueError: when there is no such kernel.
        """
        file, _, function = kernel.partition(".")
        if file not in self._modules:
            cubin = self.cache.load(file, self.architecture)
            self._modules[file] = self._core.ObjectCode.from_cubin(cubin, name=file)
        if function not in kernel_names(self._modules[file].code):
            raise ValueError(f'{file}.cu has no extern "C" __global__ {function}')
        with torch.cuda.device(self.device):
            self._core.Device(self._index).set_current()
            loaded = self._modules[file].get_kernel(function)
            places = tuple((place.offset, place.size) for place in loaded.arguments_info)
            self._kernels[kernel] = LoadedKernel(loaded.handle, places)
        return self._kernels[kernel]

    def _refusal(self, kernel: str, tensor: Tensor) -> ValueError:
        return ValueError(
            f"{kernel}: an argument of shape {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
            f"kernels take contiguous tensors on {self.device}"
        )

    def _raise_shared_limit(self, kernel: str, shared_bytes: int) -> None:
        driver = self._driver
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle, device = self._kernels[kernel].handle, driver.CUdevice(self._index)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, device)
        if int(status) != 0:
            raise CudaUnavailableError(
                f"{kernel} asks for {shared_bytes} bytes of shared memory a block, which {self.device} "
                f"({self.architecture}) does not give: {status}"
            )
        self._shared_limits[kernel] = shared_bytes


def _load_driver() -> Any:
    """The driver's functions as Python calls, which cuda.core is built on; imported when a GPU is used."""
    return importlib.import_module("cuda.bindings.driver")


def _three(extent: Extent) -> tuple[int, ...]:
    return (extent, 1, 1) if extent.__class__ is int else (*extent, 1, 1)[:3]  # type: ignore[misc]


def _format(kernel: str, argument: Argument, size: int) -> str:
    """How `struct` packs an argument for a parameter of `size` bytes. Raises: ValueError."""
    if argument is None or isinstance(argument, (Tensor, Piece)):
        code = "Q"
    elif isinstance(argument, np.generic):
        code = FORMATS.get(type(argument), "")
    else:
        code = PLAIN_FORMATS.get((type(argument), size), "")
    if not code or struct.calcsize(f"={code}") != size:
        raise ValueError(f"{kernel} takes {size} bytes where it was given {argument!r}")
    return code


def _existing_device(device: torch.device | int | str) -> torch.device:
    """Return the device with its index. Raises: CudaUnavailableError."""
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if wanted.type != "cuda":
        raise CudaUnavailableError(f"the cuda body needs a CUDA device and was given {wanted}; use the cpu body there")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"torch (CUDA {built}) finds no GPU or driver"
        raise CudaUnavailableError(f"the cuda body has no device: {why}; `train.py --doctor` says more")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise CudaUnavailableError(f"there is no {wanted}: this machine shows {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def _stream_functions() -> tuple[Callable[[int], int], Callable[[], int]]:
    """Return torch's functions for the raw stream of a device and the current device.

    The raw ones that compiled code of torch itself calls take 0.1 us; where a build has none of them, the public ones.
    """
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    device = getattr(torch._C, "_cuda_getDevice", None)
    return (
        stream or (lambda index: torch.cuda.current_stream(index).cuda_stream),
        device or torch.cuda.current_device,
    )
