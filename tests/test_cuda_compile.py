# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for every architecture without a warning, here without a GPU; and what compiled is kept."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import masksplat.types as types
from masksplat.cuda import __main__ as command
from masksplat.cuda import compiler
from masksplat.cuda.compiler import (
    SOURCE_FOLDER,
    CudaUnavailableError,
    KernelCache,
    KernelCompileError,
    architecture_name,
    compile_source,
    kernel_names,
    read_entry,
    read_resources,
    source_names,
    write_entry,
)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
MOST_REGISTERS = 255

PROBE = """extern "C" __global__ void {name}(float* values) {{ {body} }}
"""
CLEAN = "values[threadIdx.x] *= 2.0f;"


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    """These tests need the compiler, which `make test` installs; nothing else may skip them."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip(f"no cuda-core here: {compiler.install_command()}")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "probe.cu").write_text('#include "shared.cuh"\n' + PROBE.format(name="scale", body=CLEAN))
    (folder / "shared.cuh").write_text("constexpr int WIDTH = 3;\n")
    return folder


def strict_log(name: str, architecture: str) -> str:
    """The compiler's log without warnings; kept in the temporary folder as long as nothing in it could change."""
    place = Path(tempfile.gettempdir()) / f"masksplat-compiled-{os.getuid()}"
    kept = place / KernelCache(place).entry(name, architecture).with_suffix(".log").name
    if not kept.exists():
        module = compile_source(name, architecture, is_strict=True, ptxas_options=("-v",))
        place.mkdir(exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(module.log, encoding="utf-8")
        partial.replace(kept)
    return kept.read_text(encoding="utf-8")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", source_names())
def test_every_kernel_compiles_without_a_warning(
    name: str, architecture: str, record_property: pytest.RecordProperty
) -> None:
    resources = read_resources(strict_log(name, architecture))
    text = (SOURCE_FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    assert resources and "__global__" in text
    for kernel in resources:
        assert 0 < kernel.registers <= MOST_REGISTERS
        assert kernel.shared_bytes <= 48 * 1024
        record_property(f"{name}.{kernel.kernel} {architecture}", str(kernel))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_resources_of_a_kernel(sources: Path, architecture: str) -> None:
    text = PROBE.format(
        name="another",
        body="__shared__ float kept[96]; kept[threadIdx.x] = values[threadIdx.x]; "
        "__syncthreads(); values[threadIdx.x] = kept[threadIdx.x ^ 1];",
    )
    (sources / "probe.cu").write_text((sources / "probe.cu").read_text() + text)
    module = compile_source("probe", architecture, folder=sources, ptxas_options=("-v",))
    assert kernel_names(module.cubin) == ["another", "scale"]
    resources = {kernel.kernel: kernel for kernel in read_resources(module.log)}
    assert set(resources) == {"another", "scale"}
    reserved = resources["scale"].shared_bytes  # newer architectures keep some for themselves
    assert resources["another"].shared_bytes == reserved + 96 * 4
    assert resources["scale"].spilled_bytes == resources["scale"].stack_bytes == 0 < resources["scale"].registers


def test_a_spill_is_seen(sources: Path) -> None:
    body = (
        "float kept[200]; for (int i = 0; i < 200; ++i) kept[i] = values[i]; __syncthreads(); "
        "for (int i = 0; i < 200; ++i) values[i] = kept[int(values[i])];"
    )
    (sources / "probe.cu").write_text(PROBE.format(name="scale", body=body))
    (kernel,) = read_resources(compile_source("probe", "sm_90a", folder=sources, ptxas_options=("-v",)).log)
    assert kernel.stack_bytes == 800


def test_a_warning_is_an_error_where_it_is_asked_for(sources: Path) -> None:
    (sources / "probe.cu").write_text(PROBE.format(name="scale", body=f"int unused; {CLEAN}"))
    assert compile_source("probe", "sm_90a", folder=sources).cubin
    with pytest.raises(KernelCompileError, match=r'(?s)probe.cu compiles for sm_90a with warnings.*"unused"'):
        compile_source("probe", "sm_90a", folder=sources, is_strict=True)


def test_an_error_names_file_and_line(sources: Path) -> None:
    (sources / "probe.cu").write_text("\n" + PROBE.format(name="scale", body="missing;"))
    with pytest.raises(KernelCompileError, match=r'probe.cu\(2\): error: identifier "missing"'):
        compile_source("probe", "sm_90a", folder=sources)


def test_architectures() -> None:
    names = [architecture_name(capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert names == ["sm_80", "sm_89", "sm_90a", "sm_100", "sm_120"]
    with pytest.raises(CudaUnavailableError, match=r"7\.5; the cuda body needs 8\.0"):
        architecture_name((7, 5))
    with pytest.raises(CudaUnavailableError, match="cannot compile for sm_999.*pip install"):
        compile_source("probe", "sm_999")


def test_constants_of_the_kernels_are_those_of_python() -> None:
    text = (SOURCE_FOLDER / "common.cuh").read_text(encoding="utf-8")

    def constant(name: str) -> float:
        found = re.search(rf"\b{name} = ([^;,]+)[;,]", text)
        assert found is not None, name
        numerator, _, denominator = found[1].replace("f", "").partition("/")
        return float(numerator) / float(denominator or 1)

    for name in (
        "TILE",
        "ALPHA_MAX",
        "ALPHA_MIN",
        "TRANSMITTANCE_MIN",
        "NUM_ROW_COLUMNS",
        "SLOT_UNSEEN",
        "SLOT_NO_PIXEL",
    ):
        assert constant(name) == getattr(types, name), name
    columns = ("MEAN_X", "MEAN_Y", "CONIC_A", "CONIC_B", "CONIC_C", "OPACITY", "RED", "GREEN", "BLUE", "MASK")
    assert [constant(name) for name in columns] == list(range(types.NUM_ROW_COLUMNS))
    short = {"r": "RED", "g": "GREEN", "b": "BLUE"}
    assert [short.get(name, name.upper()) for name in types.ROW_COLUMNS] == list(columns)


# --- the cache


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compiled: list[str] = []
    real = compiler.compile_source

    def counted(name: str, architecture: str, **options: Path) -> compiler.CompiledModule:
        compiled.append(f"{name} {architecture}")
        return real(name, architecture, **options)

    monkeypatch.setattr(compiler, "compile_source", counted)
    return compiled


def test_a_second_look_finds_it(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = count_compilations(monkeypatch)
    first = KernelCache(tmp_path / "cache", sources=sources).load("probe", "sm_90a")
    again = KernelCache(tmp_path / "cache", sources=sources).load("probe", "sm_90a")
    assert first == again and compiled == ["probe sm_90a"]
    KernelCache(tmp_path / "cache", sources=sources).load("probe", "sm_80")
    assert compiled == ["probe sm_90a", "probe sm_80"]


def test_the_key_sees_everything(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return KernelCache(sources=sources).key("probe", "sm_90a")

    keys = [key(), KernelCache(sources=sources).key("probe", "sm_80")]
    (sources / "shared.cuh").write_text("constexpr int WIDTH = 4;\n")
    keys.append(key())
    (sources / "probe.cu").write_text("// nothing\n")
    keys.append(key())
    (sources / "shared.cuh").rename(sources / "other.cuh")
    keys.append(key())
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-fmad=false"))
    keys.append(key())
    monkeypatch.setattr(compiler, "_cached_nvrtc_version", lambda: "12.9")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    (sources / "unrelated.cu").write_text("// another module\n")
    assert key() == keys[-1]


def test_damaged_entries_are_compiled_again(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = count_compilations(monkeypatch)
    cache = KernelCache(tmp_path / "cache", sources=sources)
    cache.load("probe", "sm_90a")
    path = cache.entry("probe", "sm_90a")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for number, damaged in enumerate(
        (b"", whole[:-1], whole[: len(whole) // 2], bytes(flipped), whole + b"\0"), start=2
    ):
        path.write_bytes(damaged)
        assert read_entry(path) is None
        assert kernel_names(cache.load("probe", "sm_90a")) == ["scale"]
        assert len(compiled) == number
        assert read_entry(path) is not None
    cache.load("probe", "sm_90a")
    assert len(compiled) == number


WRITER = """
import importlib.util
import sys
from pathlib import Path
specification = importlib.util.spec_from_file_location("compiler", sys.argv[1])  # without torch: it starts sooner
compiler = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compiler)
path, code = Path(sys.argv[2]), b"\\x7fELF" + bytes([int(sys.argv[3])]) * 200_000
for _ in range(100):
    compiler.write_entry(path, code)
    found = compiler.read_entry(path)
    assert found is not None and len(set(found[4:])) == 1 and len(found) == len(code)
"""


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    """Every process that looks finds a whole entry, whoever wrote it, and nothing is left behind."""
    path = tmp_path / "cache" / "probe-sm_90a-0.cubin"
    command_line = [sys.executable, "-c", WRITER, compiler.__file__, str(path)]
    writers = [subprocess.Popen([*command_line, str(number)]) for number in range(1, 5)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_costs_a_warning(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = KernelCache(tmp_path / "file" / "cache", sources=sources)
    with pytest.warns(UserWarning, match="cannot be kept in .*every process compiles them again"):
        assert kernel_names(cache.load("probe", "sm_90a")) == ["scale"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "probe.cubin"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        write_entry(path, b"\x7fELF")
    assert list(tmp_path.iterdir()) == [path]


def test_entries_are_machine_code_with_a_checksum(tmp_path: Path) -> None:
    write_entry(tmp_path / "a.cubin", b"\x7fELF123")
    assert (tmp_path / "a.cubin").read_bytes() == b"\x7fELF123" + hashlib.sha256(b"\x7fELF123").digest()


def test_the_default_place_is_the_users_cache() -> None:
    assert KernelCache().place == Path.home() / ".cache" / "masksplat"


# --- what is missing is named


def test_a_missing_cuda_core_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CudaUnavailableError, match=r'needs cuda-core.*pip install cuda-core "cuda-b'):
        compiler.load_cuda_core()


def test_a_missing_nvrtc_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler._load_nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    try:
        with pytest.raises(CudaUnavailableError, match="needs NVRTC.*pip install.*nvidia-cuda-nvrtc"):
            compiler.nvrtc_version()
    finally:
        compiler._load_nvrtc.cache_clear()


@pytest.mark.parametrize(
    ("built_for", "package"), [("12.8", "nvidia-cuda-nvrtc-cu12==12.*"), ("13.0", "nvidia-cuda-nvrtc==13.*")]
)
def test_the_command_fits_torch(monkeypatch: pytest.MonkeyPatch, built_for: str, package: str) -> None:
    monkeypatch.setattr("torch.version.cuda", built_for)
    assert f'"{package}"' in compiler.install_command()
    assert f'"cuda-bindings=={built_for[:2]}.*"' in compiler.install_command()


# --- the command


def test_compiling_ahead(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "KernelCache", lambda place: KernelCache(place, sources=sources))
    assert command.main(["--architecture", "sm_90a", "--cache", str(tmp_path / "cache")]) == 0
    compiled = count_compilations(monkeypatch)
    KernelCache(tmp_path / "cache", sources=sources).load("probe", "sm_90a")
    assert compiled == []


def test_compiling_ahead_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert command.main([]) == 2
    assert "--architecture sm_90a" in capsys.readouterr().err
