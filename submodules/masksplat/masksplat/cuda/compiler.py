# SPDX-License-Identifier: Apache-2.0
"""Compiles the `.cu` files of source/ with NVRTC (the one that cuda.core binds) and keeps the machine code on disk.

One module per file and architecture. Every kernel is `extern "C" __global__`, so that its name is plain. No GPU and no
driver are needed to compile. This module knows nothing of launches or of tensors.

The place on disk is ~/.cache/masksplat unless another one is given; everything in it may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

SOURCE_FOLDER = Path(__file__).resolve().parent / "source"
DEFAULT_CACHE = Path("~/.cache/masksplat")
OLDEST_ARCHITECTURE = (8, 0)
NVRTC_DISTRIBUTIONS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
OPTIONS = ("--std=c++17", "--generate-line-info")
"""What every file is compiled with; part of the cache's key. Division and square root round as IEEE 754 says."""

_CHECKSUM_BYTES = hashlib.sha256().digest_size
_ELF_MAGIC = b"\x7fELF"
_RESOURCE_PATTERNS = (
    r"Used (\d+) registers",
    r"(\d+) bytes spill stores",
    r"(\d+) bytes stack frame",
    r"(\d+) bytes smem",
)


class CudaUnavailableError(RuntimeError):
    """A library or device that the cuda body needs is missing; the message says how to get it."""


class KernelCompileError(RuntimeError):
    """A `.cu` file does not compile (or warns, where warnings are errors); the message is the compiler's."""


class CompiledModule(NamedTuple):
    """Machine code of one file for one architecture, and what the compiler said."""

    cubin: bytes
    log: str


def load_cuda_core() -> Any:
    """Import cuda.core.

    Raises:
        CudaUnavailableError: when it or the bindings below it cannot be imported; with the pip command.
    """
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise CudaUnavailableError(
            f"the cuda body needs cuda-core, which cannot be imported here ({error}); run: {install_command()}"
        ) from error


def install_command() -> str:
    """Return the pip command that installs what the cuda body needs, for the CUDA version of this torch."""
    import torch  # imported here: compiling needs no torch

    if (torch.version.cuda or "13").split(".")[0] == "12":
        return 'pip install cuda-core "cuda-bindings==12.*" "nvidia-cuda-nvrtc-cu12==12.*"'
    return 'pip install cuda-core "cuda-bindings==13.*" "nvidia-cuda-nvrtc==13.*"'


def architecture_name(capability: tuple[int, int]) -> str:
    """Return NVRTC's name of a compute capability: (9, 0) is "sm_90a", (10, 0) is "sm_100".

    Raises:
        CudaUnavailableError: for a device older than OLDEST_ARCHITECTURE.
    """
    if capability < OLDEST_ARCHITECTURE:
        raise CudaUnavailableError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}; the cuda body needs 8.0 (Ampere) or "
            "newer: use another GPU, or the CPU"
        )
    suffix = "a" if capability == (9, 0) else ""
    return f"sm_{capability[0]}{capability[1]}{suffix}"


def nvrtc_version() -> str:
    """Return the version of the NVRTC that compiles, for example "13.0 13.0.88" (the build only where pip knows it).

    Raises:
        CudaUnavailableError: when NVRTC cannot be loaded.
    """
    nvrtc = _load_nvrtc()
    major, minor = _checked(nvrtc.nvrtcVersion())
    return f"{major}.{minor} {_installed_build()}".strip()


def supported_architectures() -> list[int]:
    """Return the architectures that this NVRTC compiles for, as 80 for sm_80.

    Raises:
        CudaUnavailableError: when NVRTC cannot be loaded.
    """
    nvrtc = _load_nvrtc()
    return list(_checked(nvrtc.nvrtcGetSupportedArchs())[0])


@functools.cache
def _load_nvrtc() -> Any:
    """Return cuda.core's bindings of NVRTC, with the library behind them loaded."""
    load_cuda_core()
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the library is looked for at the first call
        raise CudaUnavailableError(
            f"the cuda body needs NVRTC, which cannot be loaded here ({error}); run: {install_command()}"
        ) from error
    return nvrtc


def _checked(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if int(status) != 0:
        raise CudaUnavailableError(f"NVRTC answers {status}; install another one: {install_command()}")
    return tuple(values)


def _installed_build() -> str:
    for name in NVRTC_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def source_names(folder: Path = SOURCE_FOLDER) -> list[str]:
    """Return the names of all `.cu` files, without the ending, in order."""
    return sorted(path.stem for path in folder.glob("*.cu"))


def compile_source(
    name: str,
    architecture: str,
    *,
    folder: Path = SOURCE_FOLDER,
    is_strict: bool = False,
    ptxas_options: tuple[str, ...] = (),
) -> CompiledModule:
    """Compile `folder`/`name`.cu, without looking at the disk cache.

    Args:
        architecture: such as "sm_90a".
        is_strict: a warning is an error.
        ptxas_options: for example ("-v",), which makes the log tell registers and spills of each kernel.

    Raises:
        KernelCompileError: with the compiler's messages.
        CudaUnavailableError: when the compiler is missing or does not know the architecture.
    """
    check_architecture(architecture)
    path = folder / f"{name}.cu"
    options = [*OPTIONS, f"-arch={architecture}", f"-I{folder}"]
    options += [f"--ptxas-options={option}" for option in ptxas_options]
    is_compiled, cubin, log = _compile(path, options)
    if not is_compiled:
        raise KernelCompileError(f"{path.name} does not compile for {architecture}:\n{log}")
    if is_strict and re.search(r"\bwarning\b", log, re.IGNORECASE):
        raise KernelCompileError(f"{path.name} compiles for {architecture} with warnings:\n{log}")
    return CompiledModule(cubin, log)


def _compile(path: Path, options: list[str]) -> tuple[bool, bytes, str]:
    """Run NVRTC over one file; return whether it succeeded, the machine code and the log."""
    nvrtc = _load_nvrtc()
    text = path.read_text(encoding="utf-8").encode()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(text, str(path).encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program))[0])
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        cubin = bytearray(0)
        if int(status) == 0:
            cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program))[0])
            _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return int(status) == 0, bytes(cubin), log.decode(errors="replace").replace("\0", "").strip()


def check_architecture(architecture: str) -> None:
    """Check that this NVRTC compiles for an architecture.

    Raises:
        CudaUnavailableError: when it does not, or is missing.
    """
    number = int(re.sub(r"\D", "", architecture))
    known = supported_architectures()
    if number not in known:
        newest = "newer" if number > max(known) else "other"
        raise CudaUnavailableError(
            f"NVRTC {nvrtc_version()} cannot compile for {architecture} (it knows {', '.join(map(str, known))}); "
            f"install a {newest} one that fits the driver: {install_command()}"
        )


def kernel_names(cubin: bytes) -> list[str]:
    """Return the kernels in machine code, in order: each has a section of its own."""
    return sorted({match.decode() for match in re.findall(rb"\0\.nv\.info\.(\w+)(?=\0)", cubin)})


class KernelResources(NamedTuple):
    """What one kernel takes on one architecture, as ptxas says: bytes of a thread, and shared bytes of a block."""

    kernel: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int


def read_resources(log: str) -> list[KernelResources]:
    """Return the resources of every kernel from the log of a compilation with ptxas's option -v."""
    resources = []
    for part in log.split("Compiling entry function '")[1:]:
        found = [re.search(pattern, part) for pattern in _RESOURCE_PATTERNS]
        resources.append(KernelResources(part.split("'")[0], *(int(match[1]) if match else 0 for match in found)))
    return resources


class KernelCache:
    """Machine code on disk, keyed by sources, options, architecture and compiler version.

    Any number of processes may use one folder at once: an entry appears whole or not at all, by an atomic rename, and
    carries a checksum (behind the ELF image, where cuobjdump and the driver do not look). A damaged entry is compiled
    again. A folder that cannot be written costs a compilation in each process and one warning.
    """

    def __init__(self, place: Path | None = None, *, sources: Path = SOURCE_FOLDER) -> None:
        self.place = (DEFAULT_CACHE if place is None else place).expanduser()
        self.sources = sources

    def load(self, name: str, architecture: str) -> bytes:
        """Return the machine code of `name`.cu, from disk or compiled now and written there.

        Raises: as `compile_source`.
        """
        path = self.entry(name, architecture)
        cubin = read_entry(path)
        if cubin is None:
            cubin = compile_source(name, architecture, folder=self.sources).cubin
            try:
                write_entry(path, cubin)
            except OSError as error:
                warnings.warn(
                    f"compiled kernels cannot be kept in {self.place} ({error}); every process compiles them again",
                    stacklevel=2,
                )
        return cubin

    def missing(self, architecture: str) -> list[str]:
        """Return the files whose machine code is not on disk yet.

        Raises:
            CudaUnavailableError: when NVRTC, whose version is part of the key, cannot be loaded.
        """
        names = source_names(self.sources)
        return [name for name in names if read_entry(self.entry(name, architecture)) is None]

    def entry(self, name: str, architecture: str) -> Path:
        """Return where the machine code of `name`.cu is, or would be."""
        return self.place / f"{name}-{architecture}-{self.key(name, architecture)[:32]}.cubin"

    def key(self, name: str, architecture: str) -> str:
        """Return the hash of all that decides the machine code: the file, every header, options and compiler."""
        digest = hashlib.sha256()
        for text in (architecture, " ".join(OPTIONS), _cached_nvrtc_version()):
            digest.update(text.encode() + b"\0")
        for path in [self.sources / f"{name}.cu", *sorted(self.sources.glob("*.cuh"))]:
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()


@functools.cache
def _cached_nvrtc_version() -> str:
    return nvrtc_version()


def write_entry(path: Path, cubin: bytes) -> None:
    """Write machine code and its checksum so that `path` is whole at every moment.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin + hashlib.sha256(cubin).digest())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_entry(path: Path) -> bytes | None:
    """Return the machine code in an entry; None when there is none, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    cubin, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    is_whole = cubin.startswith(_ELF_MAGIC) and hashlib.sha256(cubin).digest() == checksum
    return cubin if is_whole else None
