# SPDX-License-Identifier: Apache-2.0
"""`python -m masksplat.cuda`: compiles every kernel ahead of its first use and lists what each takes.

Without --architecture it compiles for the GPUs of this machine. No GPU is needed when architectures are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from masksplat.cuda.compiler import (
    DEFAULT_CACHE,
    CudaUnavailableError,
    KernelCache,
    KernelCompileError,
    KernelResources,
    architecture_name,
    compile_source,
    read_resources,
    source_names,
    write_entry,
)


def local_architectures() -> list[str]:
    """Return the architectures of this machine's GPUs.

    Raises:
        CudaUnavailableError: when there is none.
    """
    devices = range(torch.cuda.device_count())
    names = sorted({architecture_name(torch.cuda.get_device_capability(device)) for device in devices})
    if not names:
        raise CudaUnavailableError("torch finds no GPU here; name what to compile for: --architecture sm_90a")
    return names


def compile_all(cache: KernelCache, architecture: str) -> dict[str, list[KernelResources]]:
    """Compile every file for one architecture into the cache; return the resources of its kernels by file.

    Raises: as `compile_source`.
    """
    resources = {}
    for name in source_names(cache.sources):
        module = compile_source(name, architecture, folder=cache.sources, ptxas_options=("-v",))
        write_entry(cache.entry(name, architecture), module.cubin)
        resources[name] = read_resources(module.log)
    return resources


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m masksplat.cuda", description=__doc__)
    parser.add_argument("--architecture", action="append", help="such as sm_90a; may be given several times")
    parser.add_argument("--cache", type=Path, help=f"folder of compiled kernels (default {DEFAULT_CACHE})")
    options = parser.parse_args(arguments)
    cache = KernelCache(options.cache)
    try:
        for architecture in options.architecture or local_architectures():
            print(f"{architecture:<30} registers  spilled  stack  shared  (bytes)")
            for file, kernels in compile_all(cache, architecture).items():
                for kernel in kernels:
                    sizes = f"{kernel.registers:9}  {kernel.spilled_bytes:7}  {kernel.stack_bytes:5}"
                    print(f"{f'{file}.{kernel.kernel}':<30} {sizes}  {kernel.shared_bytes:6}", flush=True)
    except (CudaUnavailableError, KernelCompileError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"kept in {cache.place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
