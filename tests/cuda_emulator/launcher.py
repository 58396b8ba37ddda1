# SPDX-License-Identifier: Apache-2.0
"""`EmulatedLauncher`: masksplat's kernels on CPU tensors; every argument is checked against the kernel's signature."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cuda_emulator.build import EmulationError, Kernel, Parameter, build
from masksplat.cuda.arena import Piece
from masksplat.cuda.compiler import SOURCE_FOLDER
from masksplat.cuda.launcher import Argument

SCALARS = {
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
PLAIN = {"int": int, "long long": int, "float": float, "double": float}
"""Plain numbers that may stand for scalars; np.array refuses an int that is too large."""

INTEGERS_32 = (torch.int32, torch.uint32)
INTEGERS_64 = (torch.int64, torch.uint64)
POINTERS = {
    "float": (torch.float32,),
    "double": (torch.float64,),
    "int": INTEGERS_32,
    "unsigned": INTEGERS_32,
    "unsigned int": INTEGERS_32,
    "long long": INTEGERS_64,
    "unsigned long long": INTEGERS_64,
    "unsigned char": (torch.uint8, torch.bool),
    "bool": (torch.bool, torch.uint8),
    "short": (torch.int16,),
    "unsigned short": (torch.int16, torch.uint16),
    "uint2": (*INTEGERS_32, *INTEGERS_64),
    "int2": (*INTEGERS_32, *INTEGERS_64),
}
"""Element types of tensors that may stand for a pointer; float2 and the like follow their components. A tensor of
uint8 is raw memory and may stand for any pointer."""

MAX_SHARED_BYTES = 227 * 1024


class Slot(ctypes.Structure):
    _fields_ = (("value", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("kind", ctypes.c_int))


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("is_reversed", ctypes.c_int),
        ("is_guarded", ctypes.c_int),
        ("time_limit", ctypes.c_int),
        ("num_slots", ctypes.c_int),
        ("slots", ctypes.POINTER(Slot)),
        ("fault_address", ctypes.c_uint64),
        ("fault_code", ctypes.c_uint64),
        ("num_switches", ctypes.c_uint64),
    )


class EmulatedLauncher:
    """Runs kernels at once, in this thread: blocks in order, the threads of a block as fibers.

    Shared memory is poisoned before each block. A kernel that reads or writes beyond a tensor, misses a barrier, shifts
    too far or overflows raises EmulationError with the thread and the line.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        folder: Path = SOURCE_FOLDER,
        *,
        is_reversed: bool = False,
        is_guarded: bool = True,
        time_limit: int = 120,
    ) -> None:
        """Take the sources of `folder`.

        is_reversed: threads run from the last to the first; a kernel that lacks a barrier gives another result then.
        is_guarded: kernels see copies of the tensors that end where memory ends.
        time_limit: seconds of processor time for one launch.
        """
        self.folder = folder
        self.is_reversed = is_reversed
        self.is_guarded = is_guarded
        self.time_limit = time_limit
        self.num_switches = 0
        self._modules: dict[str, tuple[Path, ctypes.PyDLL, dict[str, Kernel]]] = {}

    def __call__(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Argument,
        shared_bytes: int = 0,
    ) -> None:
        path, library, found = self._load(kernel)
        if len(arguments) != len(found.parameters):
            raise ValueError(f"{kernel} takes {len(found.parameters)} arguments and was given {len(arguments)}")
        slots = (Slot * max(1, len(arguments)))()
        for position, (parameter, argument) in enumerate(zip(found.parameters, arguments, strict=True)):
            slots[position] = _slot(f"{kernel}, argument {position} ({parameter.name})", parameter, argument)
        launch = Launch(
            grid=_extent(grid),
            block=_extent(block),
            shared_bytes=shared_bytes,
            is_reversed=self.is_reversed,
            is_guarded=self.is_guarded,
            time_limit=self.time_limit,
            num_slots=len(arguments),
            slots=slots,
        )
        _check_extents(kernel, launch, found)
        if 0 in tuple(launch.grid):
            return
        message = ctypes.create_string_buffer(4000)
        function = getattr(library, f"emulate_{found.name}")
        if function(ctypes.byref(launch), message, ctypes.c_ulong(4000)) != 0:
            place = _line_of(path, launch.fault_code)
            raise EmulationError(f"{kernel}: {message.value.decode(errors='replace')}{place}")
        self.num_switches += launch.num_switches

    def kernels(self, file: str) -> dict[str, Kernel]:
        """The kernels of a file by name."""
        return self._module(file)[2]

    def _module(self, file: str) -> tuple[Path, ctypes.PyDLL, dict[str, Kernel]]:
        if file not in self._modules:
            if not (self.folder / f"{file}.cu").exists():
                raise ValueError(f"there is no {file}.cu in {self.folder}")
            path, kernels = build(self.folder, file)
            # PyDLL holds the interpreter lock: the emulator runs one kernel at a time.
            self._modules[file] = (path, ctypes.PyDLL(str(path)), kernels)
        return self._modules[file]

    def _load(self, kernel: str) -> tuple[Path, ctypes.PyDLL, Kernel]:
        file, _, function = kernel.partition(".")
        path, library, kernels = self._module(file)
        if function not in kernels:
            raise ValueError(f'{file}.cu has no extern "C" __global__ {function}; it has {", ".join(kernels)}')
        return path, library, kernels[function]


def _extent(extent: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*(extent if isinstance(extent, tuple) else (extent,)), 1, 1)[:3]
    return int(x), int(y), int(z)


def _check_extents(kernel: str, launch: Launch, found: Kernel) -> None:
    """The limits of compute capability 8.0 to 12.0, and the kernel's own."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if not 1 <= threads <= min(1024, found.max_threads) or launch.block[2] > 64:
        raise ValueError(f"{kernel}: a block of {tuple(launch.block)} threads; at most {found.max_threads} are allowed")
    if launch.grid[0] >= 1 << 31 or max(launch.grid[1], launch.grid[2]) > 65535:
        raise ValueError(f"{kernel}: a grid of {tuple(launch.grid)} blocks is too large")
    if not 0 <= launch.shared_bytes <= MAX_SHARED_BYTES:
        raise ValueError(f"{kernel}: {launch.shared_bytes} bytes of shared memory; at most {MAX_SHARED_BYTES} exist")


def _slot(where: str, parameter: Parameter, argument: Argument) -> Slot:
    if not parameter.is_pointer:
        wanted = SCALARS[parameter.type]
        plain = PLAIN.get(parameter.type)
        if type(argument) not in (wanted, plain):
            raise ValueError(f"{where} is {parameter.type}: give {wanted.__name__}, not {type(argument).__name__}")
        return Slot(int.from_bytes(np.array(argument, wanted).tobytes(), "little"), 0, 0)
    kind = 1 if parameter.is_const else 2
    if argument is None:
        return Slot(0, 0, kind)
    if isinstance(argument, Piece):
        return Slot(argument.address, argument.size, kind)
    if not isinstance(argument, Tensor):
        raise ValueError(f"{where} is a pointer: give a tensor, a piece or None, not {type(argument).__name__}")
    if argument.device.type != "cpu" or not argument.is_contiguous():
        raise ValueError(f"{where}: kernels take contiguous tensors on cpu, not {argument.device} {argument.stride()}")
    if argument.dtype not in _allowed(parameter.type):
        raise ValueError(f"{where} is {parameter.declared}, which does not fit a tensor of {argument.dtype}")
    return Slot(argument.data_ptr(), argument.numel() * argument.element_size(), kind)


def _allowed(pointee: str) -> Sequence[torch.dtype]:
    vectors = {"uint": "unsigned", "uchar": "unsigned char", "ushort": "unsigned short", "longlong": "long long"}
    component = pointee.rstrip("1234") if pointee not in POINTERS else pointee
    known = POINTERS.get(vectors.get(component, component))
    if known is None:  # void, or a structure of the file
        return [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    return (*known, torch.uint8)


def _line_of(library: Path, code: int) -> str:
    """Where a faulting instruction comes from, as far as the machine has a tool to tell."""
    if not code or shutil.which("addr2line") is None:
        return ""
    command = ["addr2line", "-e", str(library), "-s", hex(code)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"; at {answer}" if answer and "?" not in answer else ""
