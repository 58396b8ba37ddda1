# SPDX-License-Identifier: Apache-2.0
"""The set-up chooses the right torch, refuses what cannot work in one sentence, and the Makefile's targets exist."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import install
from launch.install import InstallError, Machine, constraints_file, create_environment, torch_attempts, venv_problem

ROOT = Path(__file__).resolve().parent.parent


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_cpu_machine_never_gets_the_cuda_build() -> None:
    attempts = torch_attempts(Machine("Linux", has_nvidia_driver=False), "")
    assert len(attempts) == 2 and all(attempt[0].endswith("+cpu") for attempt in attempts)
    assert attempts[1][1:] == ["--index-url", install.CPU_INDEX]


def test_default_builds_where_they_are_right() -> None:
    for machine in (Machine("Linux", True), Machine("Darwin", False)):
        assert torch_attempts(machine, "") == [[f"torch=={install.TORCH_VERSION}"]]


def test_the_users_index_wins() -> None:
    for machine in (Machine("Linux", True), Machine("Linux", False)):
        assert torch_attempts(machine, "https://x/cpu") == [
            [f"torch=={install.TORCH_VERSION}", "--index-url", "https://x/cpu"]
        ]


def test_a_python_without_venv_gets_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = str(script(tmp_path / "python3", "exit 1"))
    found = {"apt-get": "/usr/bin/apt-get"}
    monkeypatch.setattr(shutil, "which", found.get)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    problem = venv_problem(python)
    assert problem is not None and problem.endswith(f"Run: sudo apt-get install -y python{version}-venv")
    found.clear()
    assert "ensurepip" in (venv_problem(python) or "")
    assert venv_problem(sys.executable) is None
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(InstallError, match="ensurepip"):
        create_environment(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_an_existing_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = script(tmp_path / "bin" / "python", "echo torch-is-here")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert create_environment(tmp_path) == python


def fake_python(tmp_path: Path, torch: str, pip_status: int) -> tuple[Path, Path]:
    """Return an interpreter that prints `torch` as torch's version ("" fails), and the file it logs pip calls to."""
    log = tmp_path / "pip.log"
    body = f'if [ "$1" = -m ]; then echo "$@" >> {log}; exit {pip_status}; fi; '
    return script(tmp_path / "bin" / "python", body + (f"echo {torch}" if torch else "exit 1")), log


def test_torch_is_left_alone_when_it_is_there(tmp_path: Path) -> None:
    python, log = fake_python(tmp_path, "2.9.1+cu128", 0)
    install.install_torch(python, Machine("Linux", False), "", [])
    assert not log.exists()


def test_an_old_torch_is_refused(tmp_path: Path) -> None:
    python, _ = fake_python(tmp_path, "2.5.1", 0)
    with pytest.raises(InstallError, match=r"torch 2\.5\.1; 2\.6 or newer"):
        install.install_torch(python, Machine("Linux", False), "", [])


def test_both_places_are_tried_for_torch(tmp_path: Path) -> None:
    python, log = fake_python(tmp_path, "", 1)
    with pytest.raises(InstallError, match="TORCH_INDEX"):
        install.install_torch(python, Machine("Linux", False), "", ["--constraint", "pins.txt"])
    calls = log.read_text(encoding="utf-8").splitlines()
    assert len(calls) == 2 and all("+cpu" in call and "--constraint pins.txt" in call for call in calls)
    assert install.CPU_INDEX in calls[1] and install.CPU_INDEX not in calls[0]


def test_constraints_are_claimed_only_where_they_exist(tmp_path: Path) -> None:
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "python3.11.txt").write_text("numpy==2.4.6\n", encoding="utf-8")
    assert constraints_file("3.11", tmp_path) == tmp_path / "constraints" / "python3.11.txt"
    assert constraints_file("3.13", tmp_path) is None


def test_pins_hold_every_dependency_but_torch() -> None:
    """A constraint on torch would replace a build that somebody chose."""
    for path in (ROOT / "constraints").glob("python*.txt"):
        names = {line.split("==")[0].lower() for line in path.read_text("utf-8").splitlines() if "==" in line}
        assert "torch" not in names
        assert {"numpy", "numba", "scipy", "pillow", "safetensors", "tqdm", "psutil", "setuptools", "pytest"} <= names


GPU, NO_GPU = Machine("Linux", has_nvidia_driver=True), Machine("Linux", has_nvidia_driver=False)


@pytest.mark.parametrize(
    ("cuda", "machine", "extras", "expected"),
    [
        ("13.0", GPU, "view", "[cuda]"),
        ("12.8", GPU, "view", "[cuda12]"),
        ("11.8", GPU, "view", "[cuda12]"),
        ("", GPU, "view", ""),  # a torch without CUDA, chosen by the user
        ("", NO_GPU, "view", ""),
        ("", NO_GPU, "view,tests,lint", "[cuda]"),
        ("12.8", NO_GPU, "tests", "[cuda12]"),
    ],
)
def test_the_kernels_compiler_is_installed_where_it_is_of_use(
    cuda: str, machine: Machine, extras: str, expected: str
) -> None:
    assert install.kernel_extra(cuda, machine, extras) == expected
    text = (ROOT / "submodules" / "masksplat" / "pyproject.toml").read_text("utf-8")
    assert expected == "" or f"\n{expected.strip('[]')} = [" in text


def test_the_compiler_is_held_unless_torch_brings_one(tmp_path: Path) -> None:
    """With a torch for CUDA the pins would contradict torch's own."""
    (tmp_path / "constraints").mkdir()
    pins = tmp_path / "constraints" / "compiler-python3.11.txt"
    pins.write_text("nvidia-cuda-nvrtc==13.5.37\n", encoding="utf-8")
    answers = 'case "$2" in *torch*) echo {};; *) echo 3.11;; esac'
    without = script(tmp_path / "cpu", answers.format(""))
    assert install.torch_cuda(without) == ""
    assert install.compiler_constraints(without, tmp_path) == ["--constraint", str(pins)]
    with_cuda = script(tmp_path / "gpu", answers.format("13.0"))
    assert install.torch_cuda(with_cuda) == "13.0"
    assert install.compiler_constraints(with_cuda, tmp_path) == []


def test_extras_reach_pip(tmp_path: Path) -> None:
    python, log = fake_python(tmp_path, "2.13.0", 0)
    install.install_project(python, ["--constraint", "pins.txt"], "view,tests", "[cuda]")
    call = log.read_text(encoding="utf-8").splitlines()[-1]
    assert "masksplat[cuda] " in call and call.split("--editable")[-1].split()[0].endswith("[view,tests]")


def test_frozen_versions_become_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = [
        "cuda-bindings==13.5.0",
        "cuda-core==1.2.2",
        "numpy==2.4.6",
        "nvidia-cuda-nvrtc==13.5.37",
        "torch==2.13.0",
    ]
    lines = "".join(f"{line}\\n" for line in frozen)
    body = f'case "$2" in *torch*) echo;; pip) printf "{lines}";; *) echo 3.11;; esac'
    python = script(tmp_path / "python", body)
    (tmp_path / "constraints").mkdir()
    monkeypatch.setattr(install, "ROOT", tmp_path)
    pins = install.write_constraints(python)
    assert pins.read_text("utf-8").splitlines()[1:] == ["cuda-core==1.2.2", "numpy==2.4.6"]
    compiler = pins.with_name("compiler-python3.11.txt")
    assert compiler.read_text("utf-8").splitlines()[1:] == ["cuda-bindings==13.5.0", "nvidia-cuda-nvrtc==13.5.37"]


@pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")
def test_make_refuses_an_old_or_missing_python(tmp_path: Path) -> None:
    def setup(python: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "Install Python 3.10 or newer" in setup("no-such-python").stderr
    pretend = 'code=$(echo "$2" | sed "s/sys.version_info/(3, 9)/g")'
    old = script(tmp_path / "old", f'{pretend}\n{sys.executable} -c "$code"')
    answer = setup(str(old))
    assert answer.returncode != 0 and "Python 3.10 or newer is needed" in answer.stderr and "is 3.9" in answer.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")
def test_make_lists_its_targets() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lint", "types", "bench", "kernels", "lpips", "doctor", "clean"):
        assert f"make {target} " in listed
