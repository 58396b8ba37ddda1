# SPDX-License-Identifier: Apache-2.0
"""How scripts end and log: exit codes in a real process, train.log, metrics.jsonl, the progress bar, the doctor."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from colmap_builder import build_model, write_binary, write_photos
from launch import doctor, machine
from launch.cli import parse_train
from launch.metrics_log import MetricsLog
from launch.progress import TrainingProgress, short_count
from launch.run import tee_output
from masksplat.cuda import compiler
from scene.errors import InputError

ROOT = Path(__file__).parents[1]
PREAMBLE = "from launch.run import run_main, tee_output\nfrom scene.errors import InputError\n"


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    """Runs a main function with this body through run_main in a process of its own."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"{PREAMBLE}def main(arguments):\n{lines}\nrun_main(main)"
    command = [sys.executable, "-c", code, "first", "second"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_input_error_is_one_paragraph_and_status_2() -> None:
    done = run_script("raise InputError('cannot read\\n  /data/x.bin: ' + 'long words ' * 30 + 'fix it with -s')")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "\n\n" not in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 100
    assert done.stderr.startswith("error: cannot read /data/x.bin: long words")
    assert done.stderr.endswith("fix it with -s\n")


@pytest.mark.parametrize(
    ("body", "status", "stdout", "stderr"),
    [
        ("print(arguments)", 0, "['first', 'second']\n", ""),
        ("return 3", 3, "", ""),
        ("raise KeyboardInterrupt", 130, "", "interrupted"),
        (
            "raise OSError(28, 'No space left on device', 'f')",
            2,
            "",
            "f cannot",
        ),
    ],
)
def test_status(body: str, status: int, stdout: str, stderr: str) -> None:
    done = run_script(body)
    assert (done.returncode, done.stdout) == (status, stdout)
    assert stderr in done.stderr
    assert "Traceback" not in done.stderr


def test_defects_keep_their_traceback() -> None:
    done = run_script("return 1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_train_log_has_what_the_terminal_shows(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    terminal, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(errors), tee_output(log):
        print("one\ntwo")
        print("warning", file=sys.stderr)
        with tqdm(total=3, file=sys.stderr, mininterval=0, ascii=True) as bar:
            for _ in range(3):
                bar.update()
        print("no end", end="")
    assert terminal.getvalue() == "one\ntwo\nno end"
    assert errors.getvalue().count("\r") >= 3
    lines = log.read_text().splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines)
    texts = [line.split("] ", 1)[1] for line in lines]
    assert texts[0].startswith("started ")
    assert texts[1:4] == ["one", "two", "warning"]
    assert texts[4].startswith("100%|")
    assert texts[5] == "no end"
    assert texts[6].startswith("ended after ")
    assert len(texts) == 7, "a bar leaves one line"


def test_train_log_survives_errors_and_appends(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    for append in (False, True):
        with pytest.raises(InputError, match="bad"), tee_output(log, append=append):
            raise InputError("bad images")
    assert log.read_text().count("ended by InputError: bad images after ") == 2
    with tee_output(log):
        pass
    assert "bad images" not in log.read_text()


def test_quiet_keeps_stdout_off_the_terminal(tmp_path: Path) -> None:
    terminal, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(terminal),
        contextlib.redirect_stderr(errors),
        tee_output(tmp_path / "l", quiet=True),
    ):
        print("hidden")
        print("seen", file=sys.stderr)
    assert terminal.getvalue() == ""
    assert errors.getvalue() == "seen\n"
    assert "hidden" in (tmp_path / "l").read_text()


def test_interrupted_run_is_in_the_log(tmp_path: Path) -> None:
    done = run_script(
        f"import pathlib\nwith tee_output(pathlib.Path({str(tmp_path / 'l')!r})):\n    raise KeyboardInterrupt"
    )
    assert done.returncode == 130
    assert "ended by KeyboardInterrupt" in (tmp_path / "l").read_text()


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_log_takes_numbers_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("step", {"loss": np.float32(0.5), "counts": np.arange(3)}, psnr=torch.tensor(2.5), path=Path("a"))
        assert read_lines(path) == [{"kind": "step", "loss": 0.5, "counts": [0, 1, 2], "psnr": 2.5, "path": "a"}]
        log.write("end", seconds=float("nan"), nested={"a": (1, True, None)}, bad=torch.tensor([float("inf")]))
        with pytest.raises(TypeError, match="cannot hold a object"):
            log.write("step", thing=object())
    assert read_lines(path)[1] == {"kind": "end", "seconds": None, "nested": {"a": [1, True, None]}, "bad": [None]}
    assert len(read_lines(path)) == 2, "a refused line leaves nothing behind"


def test_metrics_log_starts_anew_or_appends_after_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"run"}\n{"kind":"st')
    with MetricsLog(path, append=True) as log:
        log.write("step")
    assert path.read_text() == '{"kind":"run"}\n{"kind":"st\n{"kind":"step"}\n'
    with MetricsLog(path) as log:
        log.write("run")
    assert read_lines(path) == [{"kind": "run"}]
    with MetricsLog(None) as log:
        log.write("run")
    with pytest.raises(InputError, match="cannot be written"):
        MetricsLog(tmp_path)


def test_a_full_disk_names_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsLog(tmp_path / "metrics.jsonl") as log, monkeypatch.context() as patch:
        patch.setattr(log, "_file", SimpleNamespace(name="metrics.jsonl", write=full))
        with pytest.raises(InputError, match=r"metrics.jsonl cannot be written any more: No space left on device"):
            log.write("step", loss=1.0)


def test_progress_shows_what_users_ask_for() -> None:
    shown, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(printed), TrainingProgress(100) as progress:
        progress.show_psnr(29.314)
        progress.update(loss=0.04123, num_gaussians=81_204, expected_gaussians=56_842.8)
        assert not progress.is_due(), "refreshed at most twice a second"
        progress.advance(100)
        progress.message("[ITER 100] ...")
    assert printed.getvalue() == "[ITER 100] ...\n"
    last = [state for state in shown.getvalue().split("\r") if state.strip()][-1]
    parts = ("100/100", "img/s", "loss 0.0412", "test 29.31 dB", "81.2k Gaussians, 24.4k to prune", " GB")
    assert [part for part in parts if part not in last] == [], last


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (81_204, "81.2k"),
        (999_949, "999.9k"),
        (999_950, "1.00M"),
        (3.2e6, "3.20M"),
    ],
)
def test_short_count(number: float, text: str) -> None:
    assert short_count(number) == text


def test_progress_is_silent_when_disabled() -> None:
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), TrainingProgress(10, enabled=False) as progress:
        progress.update(loss=1.0, num_gaussians=1, expected_gaussians=1.0)
        progress.advance(10)
        assert not progress.is_due()
    assert shown.getvalue() == ""


def test_container_limits_count(tmp_path: Path) -> None:
    free_cores, free_memory = machine.available_cores(tmp_path), machine.available_memory(tmp_path)
    assert free_cores >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert machine.available_cores(tmp_path) == 1
    assert machine.available_memory(tmp_path) == 2000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_cores(tmp_path) == free_cores
    assert machine.available_memory(tmp_path) == pytest.approx(free_memory, rel=0.5)
    assert machine.free_disk(tmp_path / "not" / "there") > 0


def test_doctor_names_missing_parts_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = doctor.Part("no_such_module_here", "no-such", "flying", "make wings")
    monkeypatch.setattr(doctor, "OPTIONAL", (absent,))
    lines: list[str] = []
    assert doctor.run_doctor(parse_train(["--doctor"], {}), lines.append) == 0
    assert any("no-such  missing; would give flying: make wings" in line for line in lines)
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)
    monkeypatch.setattr(doctor, "REQUIRED", (absent,))
    assert doctor.run_doctor(parse_train(["--doctor"], {}), lines.append) == 2
    assert lines[-1].startswith("1 fault(s)")


def test_doctor_reports_unusable_data(tmp_path: Path) -> None:
    lines: list[str] = []
    assert doctor.run_doctor(parse_train(["--doctor", "-s", str(tmp_path)], {}), lines.append) == 2
    assert any(line.split()[:2] == ["fault", "data"] and "COLMAP" in line for line in lines)


def asked_about(source: Path, *flags: str) -> tuple[int, list[str]]:
    """The doctor's status and lines on a data set."""
    lines: list[str] = []
    status = doctor.run_doctor(parse_train(["--doctor", "-s", str(source), *flags], {}), lines.append)
    return status, lines


def test_doctor_decodes_every_photo(tmp_path: Path) -> None:
    model = build_model(num_views=12, size=(160, 120))
    for image in model.images:
        image.name = image.name.replace(".png", ".jpg")
    write_binary(tmp_path / "sparse" / "0", model)
    write_photos(tmp_path / "images", model)
    status, lines = asked_about(tmp_path)
    assert (status, lines[-1]) == (0, "Nothing stands in the way of training here.")
    for number in (3, 7):
        path = tmp_path / "images" / f"view{number:03d}.jpg"
        path.write_bytes(path.read_bytes()[:-300])
    status, lines = asked_about(tmp_path)
    (fault,) = [line for line in lines if line.split()[0] == "fault"]
    assert status == 2
    assert "view003.jpg: image file is truncated" in fault and "view007.jpg" in fault
    assert lines[-1] == "1 fault(s), see above: mend it and ask again."


def test_doctor_says_what_makes_a_poor_training(tmp_path: Path) -> None:
    model = build_model(num_views=5, num_points=2)
    write_photos(tmp_path / "images", model)
    del model.images[3:]
    write_binary(tmp_path / "sparse" / "0", model)
    status, lines = asked_about(tmp_path, "-r", "100")
    notes = [line for line in lines if line.split()[:2] == ["note", "data"]]
    assert status == 0
    assert len(notes) == 3
    for text in ("2 of 5 photos", "2 points to start from", "3 of 3 images are enlarged"):
        assert any(text in note for note in notes)
    assert asked_about(tmp_path, "-r", "100000")[0] == 2


def test_doctor_says_what_cuda_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def findings() -> dict[str, tuple[str, str]]:
        return {finding.name: (finding.status, finding.detail) for finding in doctor.cuda_findings()}

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr(doctor, "driver_version", lambda: None)
    without = findings()
    assert without["gpu"] == ("note", "none usable (this torch is built without CUDA): training runs on the CPU")
    assert without["driver"][0] == "note" and "no NVIDIA driver" in without["driver"][1]
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.1")
    assert findings()["driver"][1].endswith("pip uninstall torch, then make setup")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Chip")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    full = findings()
    assert full["gpu"] == ("ok", "2 x Chip; torch is built for CUDA 13.0")
    assert full["driver"] == ("ok", "NVIDIA 580.1")


def test_doctor_says_why_the_kernels_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def detail() -> str:
        found = next(finding for finding in doctor.cuda_findings() if finding.name == "nvrtc")
        assert found.status == "note"
        return found.detail

    monkeypatch.setattr("masksplat.cuda.compiler.nvrtc_version", lambda: "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Chip")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 0))
    assert "compute capability 7.0" in detail()
    monkeypatch.undo()
    compiler._load_nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install cuda-core" in detail()
    monkeypatch.undo()
    compiler._load_nvrtc.cache_clear()


def test_doctor_looks_at_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def finding() -> tuple[str, str]:
        found = next(finding for finding in doctor.cuda_findings() if finding.name == "kernels")
        return found.status, found.detail

    place = tmp_path / "cache" / "masksplat"
    monkeypatch.setattr("masksplat.cuda.compiler.DEFAULT_CACHE", place)
    assert finding() == ("ok", f"0 compiled files, 0.0 MB, in {place}")
    place.mkdir(parents=True)
    (place / "a-sm_90a-0.cubin").write_bytes(bytes(2_000_000))
    assert finding() == ("ok", f"1 compiled files, 2.0 MB, in {place}")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("masksplat.cuda.compiler.DEFAULT_CACHE", tmp_path / "file" / "masksplat")
    assert finding()[0] == "note" and "cannot be written" in finding()[1]


@pytest.mark.parametrize(
    ("body", "expected"), [("echo 580.159; echo 580.159", "580.159"), ("exit 9", None), ("echo broken; exit 1", None)]
)
def test_the_driver_answers_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, expected: str | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(tool))
    assert doctor.driver_version() == expected


def test_memory_forecast_warns_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory", lambda: 4_000_000_000)
    sizes = [(4000, 3000)] * 100
    plenty = doctor.memory_finding(sizes, cache_gb=1.0)
    assert plenty.status == "ok"
    assert "all images would need 3.6 GB" in plenty.detail
    assert doctor.memory_finding(sizes, cache_gb=8.0).status == "ok"
    assert doctor.memory_finding([(4000, 3000)] * 110, cache_gb=8.0).status == "note"


HUGE_PAGES = """
import train, torch
from launch.machine import prefer_huge_pages
prefer_huge_pages({environment})
table = torch.ones(1 << 24)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


def huge_page_kilobytes(environment: str) -> int:
    """Of a process that imports train.py, asks for huge pages and makes a tensor of 64 MiB."""
    code = HUGE_PAGES.format(environment=environment)
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=clean)
    return int(done.stdout)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="Linux does not give huge pages to those that ask for them",
)
def test_large_tensors_of_the_cpu_lie_in_huge_pages() -> None:
    """Nothing that train.py imports may make a tensor: torch asks the environment once. A user's own setting stays."""
    assert huge_page_kilobytes("") > 48_000
    assert huge_page_kilobytes("{}") == 0  # another environment than the process's
