# SPDX-License-Identifier: Apache-2.0
"""Starts kernels by name on torch's current stream.

A kernel is called "file.function" and is an `extern "C" __global__` function of source/file.cu. The body is written
against `Launcher`; tests give it one that runs the same sources on the CPU.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.compiler import (
    SOURCE_FOLDER,
    CudaUnavailableError,
    KernelCache,
    architecture_name,
    kernel_names,
    load_cuda_core,
)

Extent = int | tuple[int, ...]
Argument = Tensor | np.generic | None

FREE_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory of a block that needs no permission."""

MOST_CONFIGS = 4096
"""Launch shapes that a launcher remembers; grids follow the number of Gaussians, which changes."""


class Launcher(Protocol):
    """Starts kernels that work on tensors of `device`."""

    device: torch.device

    def __call__(self, kernel: str, grid: Extent, block: Extent, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Queue a kernel on the current stream and return at once.

        Args:
            kernel: "file.function".
            grid: blocks in x, or in (x, y, z). A grid without blocks starts nothing.
            block: threads of a block, likewise.
            arguments: contiguous tensors of `device` (their data pointer), None (a null pointer), and numpy scalars
                (by value: np.int32 for int, np.uint32 for unsigned, np.int64 for long long, np.float32 for float).
            shared_bytes: dynamic shared memory of a block.

        Raises:
            ValueError: for an argument of another kind, on another device, or not contiguous.
        """


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
        self.architecture = architecture_name(torch.cuda.get_device_capability(self.device))
        self.cache = KernelCache(cache, sources=sources)
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, tuple[Any, int]] = {}  # and how many arguments each takes
        self._configs: dict[tuple[Extent, Extent, int], Any] = {}
        self._shared_limits: dict[str, int] = {}
        self._streams: dict[int, Any] = {0: self._core.LEGACY_DEFAULT_STREAM}
        self._ready_threads: set[int] = set()
        self._launch = self._core.launch
        self._stream_handle, self._current_device = _stream_functions()

    def __call__(self, kernel: str, grid: Extent, block: Extent, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Queue a kernel on torch's current stream of the device; see `Launcher`."""
        if grid == 0 or (grid.__class__ is tuple and 0 in grid):
            return
        loaded, num_arguments = self._kernels.get(kernel) or self.load(kernel)
        if shared_bytes > FREE_SHARED_BYTES and shared_bytes > self._shared_limits.get(kernel, 0):
            self._raise_shared_limit(kernel, shared_bytes)
        index = self._index
        values: list[int | np.generic] = []
        for argument in arguments:  # 0.3 us a tensor
            if argument is None:
                values.append(0)
            elif isinstance(argument, Tensor):
                if argument.get_device() != index or not argument.is_contiguous():
                    raise self._refusal(kernel, argument)
                values.append(argument.data_ptr())
            elif isinstance(argument, np.generic):
                values.append(argument)
            else:
                raise ValueError(f"{kernel}: {argument!r} is neither a tensor nor None nor a numpy scalar")
        if len(values) != num_arguments:
            raise ValueError(f"{kernel} takes {num_arguments} arguments and was given {len(values)}")
        config = self._configs.get((grid, block, shared_bytes)) or self._make_config(grid, block, shared_bytes)
        if self._current_device() == index and threading.get_ident() in self._ready_threads:
            handle = self._stream_handle(index)
            self._launch(self._streams.get(handle) or self._borrow_stream(handle), config, loaded, *values)
        else:
            self._launch_elsewhere(config, loaded, values)

    def load(self, kernel: str) -> tuple[Any, int]:
        """Compile the kernel's file (or read it from the cache); return cuda.core's kernel and how much it takes.

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
            self._kernels[kernel] = (loaded, loaded.num_arguments)
        return self._kernels[kernel]

    def _make_config(self, grid: Extent, block: Extent, shared_bytes: int) -> Any:
        if len(self._configs) >= MOST_CONFIGS:
            self._configs.clear()
        config = self._core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
        self._configs[grid, block, shared_bytes] = config
        return config

    def _refusal(self, kernel: str, tensor: Tensor) -> ValueError:
        return ValueError(
            f"{kernel}: an argument of shape {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}; "
            f"kernels take contiguous tensors on {self.device}"
        )

    def _borrow_stream(self, handle: int) -> Any:
        stream = self._streams[handle] = self._core.Stream.from_handle(handle)
        return stream

    def _launch_elsewhere(self, config: Any, kernel: Any, values: list[Any]) -> None:
        """Launch from a thread that is new to CUDA, or while another device is the current one."""
        with torch.cuda.device(self.device):
            self._core.Device(self._index).set_current()
            self._ready_threads.add(threading.get_ident())
            handle = self._stream_handle(self._index)
            self._launch(self._streams.get(handle) or self._borrow_stream(handle), config, kernel, *values)

    def _raise_shared_limit(self, kernel: str, shared_bytes: int) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle, device = self._kernels[kernel][0].handle, driver.CUdevice(self._index)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, device)
        if int(status) != 0:
            raise CudaUnavailableError(
                f"{kernel} asks for {shared_bytes} bytes of shared memory a block, which {self.device} "
                f"({self.architecture}) does not give: {status}"
            )
        self._shared_limits[kernel] = shared_bytes


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
