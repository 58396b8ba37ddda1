# SPDX-License-Identifier: Apache-2.0
"""The launcher of the cuda body against a stand-in for cuda.core; with `-m gpu` against the real one."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_emulator.launcher import EmulatedLauncher
from masksplat.cuda import launcher as module
from masksplat.cuda.compiler import CudaUnavailableError
from masksplat.cuda.launcher import DeviceLauncher, Launcher

CPU_INDEX = -1
"""What a CPU tensor answers to get_device(): the stand-in's device has this index, so that CPU tensors are on it."""

SOURCE = """
extern "C" __global__ void fill(int* values, float* more, int value, float other) {
    values[blockIdx.x * blockDim.x + threadIdx.x] = value;
    if (more != nullptr) more[threadIdx.x] = other;
}
extern "C" __global__ void wide(int* values) {
    extern __shared__ int kept[];
    kept[threadIdx.x] = int(threadIdx.x);
    __syncthreads();
    values[threadIdx.x] = kept[threadIdx.x ^ 1];
}
"""


class FakeCore(SimpleNamespace):
    """cuda.core's names that the launcher uses; records launches, streams and loaded modules."""

    def __init__(self) -> None:
        super().__init__(LEGACY_DEFAULT_STREAM="default stream", launches=[], borrowed=[], loaded=[], current=[])
        self.Stream = SimpleNamespace(from_handle=self.borrow)
        self.ObjectCode = SimpleNamespace(from_cubin=self.open)
        self.Device = lambda index: SimpleNamespace(set_current=lambda: self.current.append(index))

    def LaunchConfig(self, **values: Any) -> dict[str, Any]:
        return values

    def launch(self, stream: str, config: dict[str, Any], kernel: Any, *values: Any) -> None:
        self.launches.append((stream, config, kernel.name, values))

    def borrow(self, handle: int) -> str:
        self.borrowed.append(handle)
        return f"stream {handle}"

    def open(self, cubin: bytes, *, name: str) -> Any:
        self.loaded.append(name)
        counts = {"fill": 4, "wide": 1}
        return SimpleNamespace(
            code=cubin,
            get_kernel=lambda kernel: SimpleNamespace(name=kernel, num_arguments=counts[kernel], handle=kernel),
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "probe.cu").write_text(SOURCE)
    return tmp_path


@pytest.fixture
def torch_state(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of its current stream and device."""
    state = SimpleNamespace(stream=0, device=CPU_INDEX)

    @contextlib.contextmanager
    def guard(_: object) -> Iterator[None]:
        before, state.device = state.device, CPU_INDEX
        yield
        state.device = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(module, "_stream_functions", lambda: (lambda _: state.stream, lambda: state.device))
    monkeypatch.setattr(module, "_existing_device", lambda _: SimpleNamespace(index=CPU_INDEX))
    return state


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()
    monkeypatch.setattr(module, "load_cuda_core", lambda: fake)
    return fake


@pytest.fixture
def device(folder: Path, core: FakeCore, torch_state: SimpleNamespace) -> DeviceLauncher:
    return DeviceLauncher("cuda", cache=folder / "cache", sources=folder)


def arguments(value: int = 3) -> tuple[torch.Tensor, None, np.int32, np.float32]:
    return torch.zeros(64, dtype=torch.int32), None, np.int32(value), np.float32(0.5)


def test_what_reaches_the_driver(device: DeviceLauncher, core: FakeCore) -> None:
    given = arguments()
    device("probe.fill", (2, 1), 32, *given, shared_bytes=16)
    ((stream, config, name, values),) = core.launches
    assert (stream, name) == ("default stream", "fill")
    assert config == {"grid": (2, 1), "block": 32, "shmem_size": 16}
    assert values == (given[0].data_ptr(), 0, np.int32(3), np.float32(0.5))


def test_a_file_is_compiled_and_loaded_once(device: DeviceLauncher, core: FakeCore, folder: Path) -> None:
    for _ in range(3):
        device("probe.fill", 1, 32, *arguments())
    device("probe.wide", 1, 32, arguments()[0])
    assert core.loaded == ["probe"] and len(list((folder / "cache").iterdir())) == 1


def test_launch_shapes_are_remembered_up_to_a_bound(device: DeviceLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CONFIGS", 10)
    for grid in [*range(1, 26), *range(1, 26)]:
        device("probe.fill", grid, 32, *arguments())
        assert 1 <= len(device._configs) <= 10
        assert device._configs[grid, 32, 0] == {"grid": grid, "block": 32, "shmem_size": 0}


def test_the_current_stream_is_taken_at_each_launch(
    device: DeviceLauncher, core: FakeCore, torch_state: SimpleNamespace
) -> None:
    for torch_state.stream in (0, 77, 77, 0, 88):
        device("probe.fill", 1, 32, *arguments())
    streams = [launch[0] for launch in core.launches]
    assert streams == ["default stream", "stream 77", "stream 77", "default stream", "stream 88"]
    assert core.borrowed == [77, 88]


def test_another_current_device_is_put_back(
    device: DeviceLauncher, core: FakeCore, torch_state: SimpleNamespace
) -> None:
    device("probe.fill", 1, 32, *arguments())
    core.current.clear()
    device("probe.fill", 1, 32, *arguments())
    assert core.current == []
    torch_state.device = 5
    device("probe.fill", 1, 32, *arguments())
    assert core.current == [CPU_INDEX] and torch_state.device == 5 and len(core.launches) == 3


def test_a_new_thread_is_made_ready(device: DeviceLauncher, core: FakeCore) -> None:
    device("probe.fill", 1, 32, *arguments())
    core.current.clear()
    thread = threading.Thread(target=lambda: device("probe.fill", 1, 32, *arguments()))
    thread.start()
    thread.join()
    assert core.current == [CPU_INDEX]


def test_an_empty_grid_starts_nothing(device: DeviceLauncher, core: FakeCore) -> None:
    device("probe.fill", 0, 32, *arguments())
    device("probe.fill", (4, 0), 32, *arguments())
    assert core.launches == []


def test_shared_memory_beyond_48_kib_is_asked_for_once(device: DeviceLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: list[int] = []

    def set_attribute(attribute: str, size: int, kernel: str, index: int) -> tuple[int]:
        assert (attribute, kernel, index) == ("shared", "wide", CPU_INDEX)
        granted.append(size)
        return (0 if size <= 200_000 else 1,)

    names = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    driver = SimpleNamespace(CUfunction_attribute=names, CUdevice=int, cuKernelSetAttribute=set_attribute)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    for size in (1024, 48 * 1024, 100_000, 60_000, 100_000, 120_000):
        device("probe.wide", 1, 32, arguments()[0], shared_bytes=size)
    assert granted == [100_000, 120_000]
    with pytest.raises(CudaUnavailableError, match="probe.wide asks for 250000 bytes"):
        device("probe.wide", 1, 32, arguments()[0], shared_bytes=250_000)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(8, 8, dtype=torch.int32).t(), r"shape \(8, 8\) on cpu with strides \(1, 8\)"),
        (2, 3, "3 is neither a tensor nor None nor a numpy scalar"),
    ],
)
def test_wrong_arguments(device: DeviceLauncher, core: FakeCore, position: int, wrong: object, message: str) -> None:
    given: list[Any] = list(arguments())
    given[position] = wrong
    with pytest.raises(ValueError, match=message):
        device("probe.fill", 1, 32, *given)
    assert core.launches == []


def test_a_tensor_on_another_device(device: DeviceLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    device("probe.fill", 1, 32, *arguments())
    monkeypatch.setattr(device, "_index", 1)
    with pytest.raises(ValueError, match=r"shape \(64,\) on cpu"):
        device("probe.fill", 1, 32, *arguments())


def test_wrong_number_of_arguments_and_wrong_name(device: DeviceLauncher) -> None:
    with pytest.raises(ValueError, match="probe.fill takes 4 arguments and was given 3"):
        device("probe.fill", 1, 32, *arguments()[:3])
    with pytest.raises(ValueError, match="has no .* __global__ nothing"):
        device("probe.nothing", 1, 32)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CudaUnavailableError, match="was given cpu; use the cpu body"):
        DeviceLauncher("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(CudaUnavailableError, match="built without CUDA"):
        DeviceLauncher("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(CudaUnavailableError, match="finds no GPU or driver"):
        DeviceLauncher(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CudaUnavailableError, match="there is no cuda:2"):
        DeviceLauncher(2)


def test_emulator_and_stand_in_take_the_same_call(folder: Path, device: DeviceLauncher, core: FakeCore) -> None:
    given = arguments(7)
    for launcher in (EmulatedLauncher(folder), device):
        taken: Launcher = launcher
        taken("probe.fill", 2, 32, *given)
    assert given[0].tolist() == [7] * 64 and len(core.launches) == 1


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    launcher = DeviceLauncher("cuda", cache=folder / "cache", sources=folder)
    values = torch.zeros(64, dtype=torch.int32, device=launcher.device)
    more = torch.zeros(32, device=launcher.device)
    launcher("probe.fill", 2, 32, values, more, np.int32(5), np.float32(0.5))
    assert values.tolist() == [5] * 64 and more.tolist() == [0.5] * 32
    stream = torch.cuda.Stream(launcher.device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        launcher("probe.fill", 2, 32, values, None, np.int32(6), np.float32(0.5))
        assert not stream.query()  # it waits behind the sleep
    stream.synchronize()
    assert values.tolist() == [6] * 64
    thread = threading.Thread(target=lambda: launcher("probe.wide", 1, 64, values, shared_bytes=160 * 1024))
    thread.start()
    thread.join()
    assert values.tolist() == [index ^ 1 for index in range(64)]


@pytest.mark.gpu
def test_on_the_last_of_several_gpus(folder: Path) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU here")
    launcher = DeviceLauncher(count - 1, cache=folder / "cache", sources=folder)
    values = torch.zeros(64, dtype=torch.int32, device=launcher.device)
    with torch.cuda.device(0):
        launcher("probe.fill", 2, 32, values, None, np.int32(5), np.float32(0.5))
        assert torch.cuda.current_device() == 0
    assert values.tolist() == [5] * 64
    with pytest.raises(ValueError, match="kernels take contiguous tensors on cuda"):
        launcher("probe.fill", 2, 32, values.to("cuda:0"), None, np.int32(5), np.float32(0.5))
