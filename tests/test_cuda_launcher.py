# SPDX-License-Identifier: Apache-2.0
"""The launcher of the cuda body against a stand-in for cuda.core; with `-m gpu` against the real one."""

from __future__ import annotations

import contextlib
import ctypes
import struct
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
from masksplat.cuda.arena import Piece
from masksplat.cuda.compiler import CudaUnavailableError
from masksplat.cuda.launcher import DeviceLauncher, Launcher, Packer

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


PLACES = {"fill": ((0, 8), (8, 8), (16, 4), (20, 4)), "wide": ((0, 8),)}
"""Offset and size of each parameter, as the driver tells."""


class FakeCore(SimpleNamespace):
    """cuda.core's names that the launcher uses; records loaded modules and which device was made the current one."""

    def __init__(self) -> None:
        super().__init__(loaded=[], current=[])
        self.ObjectCode = SimpleNamespace(from_cubin=self.open)
        self.Device = lambda index: SimpleNamespace(set_current=lambda: self.current.append(index))

    def open(self, cubin: bytes, *, name: str) -> Any:
        self.loaded.append(name)

        def get_kernel(kernel: str) -> SimpleNamespace:
            places = [SimpleNamespace(offset=offset, size=size) for offset, size in PLACES[kernel]]
            return SimpleNamespace(arguments_info=places, handle=kernel)

        return SimpleNamespace(code=cubin, get_kernel=get_kernel)


class FakeDriver(SimpleNamespace):
    """The driver's functions that the launcher calls; records what they were given."""

    def __init__(self) -> None:
        attributes = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
        super().__init__(launches=[], granted=[], CUfunction_attribute=attributes, CUdevice=int)
        self.CUresult = SimpleNamespace(CUDA_SUCCESS=0)
        self.answer = 0

    def cuLaunchKernel(self, kernel: str, *numbers: int) -> tuple[int]:
        *extents, shared_bytes, stream, pointers, extra = numbers
        assert pointers == 0
        pointer, buffer, length, size, end = (ctypes.c_uint64 * 5).from_address(extra)
        assert (pointer, length, end) == (1, 2, 0)  # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END
        packed = ctypes.string_at(buffer, ctypes.c_size_t.from_address(size).value)
        self.launches.append((kernel, tuple(extents), shared_bytes, stream, packed))
        return (self.answer,)

    def cuKernelSetAttribute(self, attribute: str, size: int, kernel: str, index: int) -> tuple[int]:
        assert (attribute, kernel, index) == ("shared", "wide", CPU_INDEX)
        self.granted.append(size)
        return (0 if size <= 200_000 else 1,)


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
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(module, "_load_driver", lambda: fake)
    return fake


@pytest.fixture
def device(folder: Path, core: FakeCore, driver: FakeDriver, torch_state: SimpleNamespace) -> DeviceLauncher:
    return DeviceLauncher("cuda", cache=folder / "cache", sources=folder)


def arguments(value: int = 3) -> tuple[torch.Tensor, None, np.int32, np.float32]:
    return torch.zeros(64, dtype=torch.int32), None, np.int32(value), np.float32(0.5)


def test_what_reaches_the_driver(device: DeviceLauncher, driver: FakeDriver) -> None:
    given = arguments()
    device("probe.fill", (2, 1), 32, *given, shared_bytes=16)
    ((kernel, extents, shared_bytes, stream, packed),) = driver.launches
    assert (kernel, extents, shared_bytes, stream) == ("fill", (2, 1, 1, 32, 1, 1), 16, 0)
    assert packed == struct.pack("=QQif", given[0].data_ptr(), 0, 3, 0.5)


def test_plain_numbers_and_pieces_do_as_well(device: DeviceLauncher, driver: FakeDriver) -> None:
    device("probe.fill", 1, (8, 2, 2), Piece(1 << 40, 64), None, -3, 0.5)
    device("probe.fill", 1, (8, 2, 2), Piece(1 << 41, 64), Piece(1 << 42, 8), np.int32(4), np.float32(0.25))
    packed = [launch[-1] for launch in driver.launches]
    assert packed == [struct.pack("=QQif", 1 << 40, 0, -3, 0.5), struct.pack("=QQif", 1 << 41, 1 << 42, 4, 0.25)]
    assert driver.launches[0][1] == (1, 1, 1, 8, 2, 2)


def test_arguments_lie_where_the_kernel_expects_them() -> None:
    packer = Packer("apart", ((0, 4), (8, 8), (16, 4)), (np.uint32(1), None, 2.0))
    packer.pack(np.uint32(7), 1 << 40, 0.5)
    buffer, size = (ctypes.c_uint64 * 4).from_address(packer.extra)[1::2]
    assert ctypes.string_at(buffer, ctypes.c_size_t.from_address(size).value) == struct.pack("=I4xQf", 7, 1 << 40, 0.5)


def test_a_launch_that_the_driver_refuses(device: DeviceLauncher, driver: FakeDriver) -> None:
    driver.answer = 701
    with pytest.raises(RuntimeError, match="probe.fill on 9 blocks of 32 threads was not started: 701"):
        device("probe.fill", 9, 32, *arguments())


def test_a_file_is_compiled_and_loaded_once(device: DeviceLauncher, core: FakeCore, folder: Path) -> None:
    for _ in range(3):
        device("probe.fill", 1, 32, *arguments())
    device("probe.wide", 1, 32, arguments()[0])
    assert core.loaded == ["probe"] and len(list((folder / "cache").iterdir())) == 1


def test_the_current_stream_is_taken_at_each_launch(
    device: DeviceLauncher, driver: FakeDriver, torch_state: SimpleNamespace
) -> None:
    for torch_state.stream in (0, 77, 77, 0, 88):
        device("probe.fill", 1, 32, *arguments())
    assert [launch[3] for launch in driver.launches] == [0, 77, 77, 0, 88]


def test_another_current_device_is_put_back(
    device: DeviceLauncher, core: FakeCore, driver: FakeDriver, torch_state: SimpleNamespace
) -> None:
    device("probe.fill", 1, 32, *arguments())
    core.current.clear()
    device("probe.fill", 1, 32, *arguments())
    assert core.current == []
    torch_state.device = 5
    device("probe.fill", 1, 32, *arguments())
    assert core.current == [CPU_INDEX] and torch_state.device == 5 and len(driver.launches) == 3


def test_a_new_thread_is_made_ready(device: DeviceLauncher, core: FakeCore, driver: FakeDriver) -> None:
    device("probe.fill", 1, 32, *arguments())
    for _ in range(2):  # the second thread may get the number of the first
        core.current.clear()
        thread = threading.Thread(target=lambda: device("probe.fill", 1, 32, *arguments()))
        thread.start()
        thread.join()
        assert core.current == [CPU_INDEX]
    assert len(driver.launches) == 3


def test_an_empty_grid_starts_nothing(device: DeviceLauncher, driver: FakeDriver) -> None:
    device("probe.fill", 0, 32, *arguments())
    device("probe.fill", (4, 0), 32, *arguments())
    assert driver.launches == []


def test_shared_memory_beyond_48_kib_is_asked_for_once(device: DeviceLauncher, driver: FakeDriver) -> None:
    for size in (1024, 48 * 1024, 100_000, 60_000, 100_000, 120_000):
        device("probe.wide", 1, 32, arguments()[0], shared_bytes=size)
    assert driver.granted == [100_000, 120_000]
    with pytest.raises(CudaUnavailableError, match="probe.wide asks for 250000 bytes"):
        device("probe.wide", 1, 32, arguments()[0], shared_bytes=250_000)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(8, 8, dtype=torch.int32).t(), r"shape \(8, 8\) on cpu with strides \(1, 8\)"),
        (2, "3", "takes 4 bytes where it was given '3'"),
        (2, np.int64(3), r"takes 4 bytes where it was given (np.int64\()?3"),
        (2, None, "takes 4 bytes where it was given None"),
        (0, 3.0, "takes 8 bytes where it was given 3.0"),
    ],
)
def test_wrong_arguments(
    device: DeviceLauncher, driver: FakeDriver, position: int, wrong: object, message: str
) -> None:
    given: list[Any] = list(arguments())
    given[position] = wrong
    with pytest.raises(ValueError, match=message):
        device("probe.fill", 1, 32, *given)
    assert driver.launches == []


@pytest.mark.parametrize("wrong", [(2, 1 << 31), (2, 0.5), (3, 1e39), (3, "x"), (1, -1)])
def test_arguments_that_do_not_fit_the_first_launch(
    device: DeviceLauncher, driver: FakeDriver, wrong: tuple[int, object]
) -> None:
    device("probe.fill", 1, 32, *arguments())
    given: list[Any] = list(arguments())
    given[wrong[0]] = wrong[1]
    with pytest.raises(ValueError, match="probe.fill (was given|takes)"):
        device("probe.fill", 1, 32, *given)
    assert len(driver.launches) == 1


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


def test_emulator_and_stand_in_take_the_same_call(folder: Path, device: DeviceLauncher, driver: FakeDriver) -> None:
    values = torch.zeros(64, dtype=torch.int32)
    piece = Piece(values.data_ptr(), 4 * len(values))
    for launcher in (EmulatedLauncher(folder), device):
        taken: Launcher = launcher
        taken("probe.fill", 2, 32, values, None, np.int32(6), np.float32(0.5))
        taken("probe.fill", 1, 32, piece, None, 7, 0.5)
    assert values.tolist() == [7] * 32 + [6] * 32 and len(driver.launches) == 2


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
