# SPDX-License-Identifier: Apache-2.0
"""Compiles one `.cu` file for the CPU: finds its kernels, adapts the text, makes a library that Python can call.

Libraries are kept in the system's temporary folder, named by the content of all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNTIME = ("emulated_cuda.h", "runtime.h", "runtime.cpp")
CHECKS = "alignment,bounds,float-cast-overflow,integer-divide-by-zero,null,shift,signed-integer-overflow"
FLAGS = (
    *("-std=gnu++17", "-O2", "-g1", "-fPIC", "-shared", "-w", "-march=native"),
    # One rounding for each operation; float4 loads of float arrays are legal in CUDA.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fvisibility=hidden"),
    "-fstack-clash-protection",  # so that a large frame cannot step over the page below its stack
    *(f"-fsanitize={CHECKS}", "-fsanitize-undefined-trap-on-error"),
)
KERNEL = re.compile(
    r'extern\s*"C"\s*__global__\s+(?:__launch_bounds__\s*\((?P<before>[^)]*)\)\s*)?void\s+'
    r"(?:__launch_bounds__\s*\((?P<after>[^)]*)\)\s*)?(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)"
)
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?(?P<type>[\w:\s]+?)\s+"
    r"(?:(?:__align__|alignas)\s*\(\s*\d+\s*\)\s*)?(?P<name>\w+)\s*\[\s*\]\s*;"
)


class EmulationError(RuntimeError):
    """A kernel does not compile for the CPU, or does what is undefined on a GPU."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: `type` without const and __restrict__, of what is pointed to for a pointer."""

    name: str
    type: str
    is_pointer: bool
    is_const: bool

    @property
    def declared(self) -> str:
        return f"{'const ' if self.is_const else ''}{self.type}{'*' if self.is_pointer else ''}"


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, its parameters and the most threads a block may have."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int


def find_compiler() -> str | None:
    """The g++ of this machine."""
    return shutil.which("g++")


def build(folder: Path, name: str) -> tuple[Path, dict[str, Kernel]]:
    """The library of `folder`/`name`.cu and the kernels in it; compiled unless the same text was compiled before."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    sources[f"{name}.cu"] = (folder / f"{name}.cu").read_text(encoding="utf-8")
    kernels = find_kernels(folder / f"{name}.cu")
    library = _cache_folder() / f"{name}-{_key(sources)}.so"
    if not library.exists():
        _compile(folder, name, sources, kernels, library)
    return library, kernels


def find_kernels(path: Path) -> dict[str, Kernel]:
    """Every kernel of a file, also those that macros write."""
    keep = ["-D__global__=__global__", "-D__launch_bounds__=__launch_bounds__", "-DEMULATED=1", f"-I{path.parent}"]
    text = _run_compiler(["-E", "-P", "-x", "c++", *keep, str(path)])
    kernels = (_kernel(match) for match in KERNEL.finditer(text))
    return {kernel.name: kernel for kernel in kernels}


def _kernel(match: re.Match[str]) -> Kernel:
    bounds = (match["before"] or match["after"] or "1024").split(",")[0]
    if not re.fullmatch(r"[\d\s*]+", bounds):
        # A constant of the file; the GPU's own limit is checked instead.
        bounds = "1024"
    threads = 1
    for factor in bounds.split("*"):
        threads *= int(factor)
    texts = [text for text in match["parameters"].split(",") if text.strip() not in ("", "void")]
    return Kernel(match["name"], tuple(_parameter(text) for text in texts), threads)


def _parameter(text: str) -> Parameter:
    words = re.findall(r"\w+|\*", text)
    name = words.pop()
    stars = words.count("*")
    if stars > 1:
        raise EmulationError(f"the kernel parameter {text.strip()!r} points to a pointer, which no launcher can give")
    kept = [word for word in words if word not in ("*", "const", "__restrict__")]
    return Parameter(name, " ".join(kept), stars == 1, "const" in words)


def _compile(folder: Path, name: str, sources: dict[str, str], kernels: dict[str, Kernel], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        place = Path(scratch)
        for file, text in sources.items():
            # Line numbers stay those of the original.
            adapted = DYNAMIC_SHARED.sub(_dynamic_shared, text)
            (place / file).write_text(f'#line 1 "{folder / file}"\n{adapted}', encoding="utf-8")
        (place / "main.cpp").write_text(_main_text(name, kernels), encoding="utf-8")
        built = place / "built.so"
        inputs = [str(place / "main.cpp"), str(HERE / "runtime.cpp")]
        _run_compiler([*FLAGS, f"-I{HERE}", f"-I{place}", *inputs, "-o", str(built)])
        built.replace(library)


def _dynamic_shared(match: re.Match[str]) -> str:
    kind = match["type"].strip()
    return f"{kind}* const {match['name']} = reinterpret_cast<{kind}*>(::emulator::dynamic_shared);"


def _main_text(name: str, kernels: dict[str, Kernel]) -> str:
    """The kernels in an unnamed namespace, where shared arrays of templates are no duplicates, and their entries."""
    lines = ['#include "emulated_cuda.h"', "namespace {", f'#include "{name}.cu"', "}"]
    for kernel in kernels.values():
        values = ", ".join(
            f"emulator::read_slot<{parameter.declared}>(slots[{position}])"
            for position, parameter in enumerate(kernel.parameters)
        )
        lines += [
            f'extern "C" __attribute__((visibility("default"))) int emulate_{kernel.name}'
            "(emulator::Launch* launch, char* message, unsigned long size) {",
            f"const auto body = [](const emulator::Slot* slots) {{ {kernel.name}({values}); }};",
            "return emulator::run(launch, body, message, size);",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _run_compiler(arguments: list[str]) -> str:
    compiler = find_compiler()
    if compiler is None:
        raise EmulationError("g++ is not there")
    answer = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise EmulationError(f"g++ refuses a kernel:\n{answer.stderr}")
    return answer.stdout


def _key(sources: dict[str, str]) -> str:
    # -march=native: a library is of use on this machine only
    parts = [
        platform.node(),
        platform.machine(),
        *FLAGS,
        *((HERE / file).read_text(encoding="utf-8") for file in RUNTIME),
    ]
    parts += [Path(__file__).read_text(encoding="utf-8")]
    parts += [part for pair in sorted(sources.items()) for part in pair]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"masksplat-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
