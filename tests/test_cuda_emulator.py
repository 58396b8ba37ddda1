# SPDX-License-Identifier: Apache-2.0
"""The emulator does what a GPU does, and says so when a kernel does what is undefined there.

The expected values are written out in numpy. Under `-m gpu` the same kernels run on the device.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_emulator.build import HERE, EmulationError, find_kernels
from cuda_emulator.launcher import EmulatedLauncher
from cuda_launchers import EMULATED, launchers, make_launcher
from masksplat.cuda.compiler import SOURCE_FOLDER
from masksplat.cuda.launcher import Launcher

LANES = np.arange(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("kernels")
    for path in (*HERE.glob("*.cu"), SOURCE_FOLDER / "common.cuh"):
        shutil.copy(path, place)
    return place


@pytest.fixture(params=launchers(is_reversed=True))
def launcher(request: pytest.FixtureRequest, folder: Path) -> Launcher:
    return make_launcher(request.param, folder)


def integers(launcher: Launcher, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(launcher.device)


def empty(launcher: Launcher, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=launcher.device)


def test_shuffles(launcher: Launcher) -> None:
    values = np.random.default_rng(1).integers(-1000, 1000, 64)
    output = empty(launcher, 64, 8)
    launcher("probes.shuffles", 1, 64, integers(launcher, values), output)
    sources = [
        LANES * 0 + 5,
        LANES // 8 * 8 + (LANES + 3) % 8,
        np.where(LANES >= 2, LANES - 2, LANES),
        np.where(LANES % 4 >= 1, LANES - 1, LANES),
        np.where(LANES + 3 < 32, LANES + 3, LANES),
        np.where(LANES % 16 + 1 < 16, LANES + 1, LANES),
        LANES ^ 9,
        np.where(LANES % 8 < 4, LANES, LANES - 4),  # a later group of four may not be read, an earlier one may
    ]
    expected = np.stack([np.concatenate([values[:32][source], values[32:][source]]) for source in sources], axis=1)
    assert np.array_equal(output.cpu().numpy(), expected)


def mask_of(members: np.ndarray) -> int:
    return int((members.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum())


def test_votes_and_reductions(launcher: Launcher) -> None:
    values = np.random.default_rng(2).integers(0, 100, 32)
    output = empty(launcher, 32, 9)
    launcher("probes.votes", 1, 32, integers(launcher, values), output)
    found = output.cpu().numpy().view(np.uint32)
    odd, even = LANES % 2 == 1, LANES % 2 == 0
    common = [mask_of(values % 2 == 1), int((values == 7).any()), 1]
    for lane in range(32):
        shuffled = int(values[1]) if odd[lane] and lane < 16 else 0
        expected = [
            *common,
            mask_of(values % 3 == values[lane] % 3),
            values.sum(),
            np.uint32(np.int32(values.max() - 20)),
            values[odd].sum() if odd[lane] else mask_of((values > 10) & even),
            shuffled,
            mask_of(odd & (LANES < 16)) if values[1] else 0,
        ]
        assert found[lane].tolist() == [int(value) for value in expected], lane


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_shared_memory_barriers_and_atomics(launcher: Launcher, size: int) -> None:
    values = torch.from_numpy(np.random.default_rng(3).integers(0, 100, size).astype(np.float32)).to(launcher.device)
    blocks = (size + 255) // 256
    output, counts = empty(launcher, blocks, dtype=torch.float32), empty(launcher, 2)
    launcher("probes.block_sums", blocks, 256, values, output, counts, np.int32(size), shared_bytes=1024)
    parts = [part.sum().item() for part in values.split(256)]
    assert output.tolist() == parts  # whole numbers: exact in any order
    assert counts.tolist() == [int((values > 0).sum()), 0]


def test_more_shared_memory_than_needs_no_permission(launcher: Launcher) -> None:
    values = torch.ones(256, device=launcher.device)
    output, counts = empty(launcher, 1, dtype=torch.float32), empty(launcher, 2)
    for shared_bytes in (100 * 1024, 64 * 1024, 160 * 1024):
        launcher("probes.block_sums", 1, 256, values, output, counts, np.int32(256), shared_bytes=shared_bytes)
    assert output.item() == 256.0


def test_bits_and_rounding(launcher: Launcher) -> None:
    floats = np.float32([0.0, -0.0, 1.5, -1.5, 2.5, 3e9, -3e9, 1e30, np.inf, -np.inf, np.nan, 1e-40])
    values = np.concatenate([floats.view(np.int32), np.int32([0, 1, -1, 2**31 - 1, -(2**31), 12345678])])
    output = empty(launcher, len(values), 12)
    launcher("probes.bits", 3, 8, integers(launcher, values), output, np.int32(len(values)))
    for index, (value, found) in enumerate(zip(values.tolist(), output.cpu().numpy(), strict=True)):
        assert found.tolist() == expected_bits(value, index), value


def expected_bits(value: int, index: int) -> list[int]:
    pattern, number = value & 0xFFFFFFFF, float(np.int32(value).view(np.float32))
    exact = index * float(np.float32(1.000001)) - 0.5  # fits a double: rounded once
    selected = [pattern & 0xFF, index & 0xFF, pattern >> 8 & 0xFF, index >> 8 & 0xFF]
    results = [
        bin(pattern).count("1"),
        (pattern & -pattern).bit_length(),
        32 - pattern.bit_length(),
        int(f"{pattern:032b}"[::-1], 2),
        pattern * 0xD2511F53 >> 32,
        clamped(number, np.floor),
        clamped(number, np.ceil),
        clamped(float(np.float32(number) * np.float32(0.5)), np.round),
        int(np.float32(exact).view(np.uint32)),
        int(np.sqrt(np.float32(index)).view(np.uint32)),
        int((np.float32(1) / np.float32(index + 1)).view(np.uint32)),
        sum(byte << 8 * place for place, byte in enumerate(selected)) ^ min(value, index) ^ max(value, index),
    ]
    return [int(np.uint32(result & 0xFFFFFFFF).view(np.int32)) for result in results]


def clamped(number: float, rounding: Callable[[float], float]) -> int:
    return 0 if np.isnan(number) else int(min(max(rounding(number), -(2.0**31)), 2.0**31 - 1))


def test_kernels_that_macros_write(launcher: Launcher) -> None:
    values = torch.arange(16, dtype=torch.float32, device=launcher.device).reshape(4, 4)
    for factor in (2, 3):
        output = torch.zeros_like(values)
        launcher(f"probes.scaled_{factor}", 1, 4, values, output)
        expected = values.clone()
        expected[:, 0] *= factor
        assert torch.equal(output, expected)


def test_scalars_of_every_type_and_null(launcher: Launcher) -> None:
    output = empty(launcher, 64, dtype=torch.float64)
    scalars = (np.int32(-3), np.uint32(2**32 - 1), np.int64(-(2**40)), np.uint64(2**41))
    launcher("probes.scalars", 1, 64, *scalars, np.float32(0.25), np.float64(1e-3), None, output)
    total = sum(int(value) for value in scalars) + 0.25 + 1e-3 + 0.5
    assert output.tolist() == pytest.approx([(thread ^ 1) + total for thread in range(64)], rel=1e-15)


def test_blocks_and_threads_in_three_dimensions(launcher: Launcher) -> None:
    output = empty(launcher, 24, 30)
    launcher("probes.where", (2, 3, 4), (5, 3, 2), output)
    z, y, x = np.meshgrid(range(2), range(3), range(5), indexing="ij")
    threads = (z * 1000 + y * 100 + x).reshape(-1)
    assert np.array_equal(output.cpu().numpy(), np.arange(24)[:, None] * 10000 + threads[None])


def test_an_empty_grid_starts_nothing(launcher: Launcher) -> None:
    output = empty(launcher, 4)
    launcher("probes.where", 0, 32, output)
    launcher("probes.where", (3, 0, 1), 32, output)
    assert not output.any()


def test_arguments_that_no_kernel_can_take(launcher: Launcher) -> None:
    values = empty(launcher, 8, 8)
    with pytest.raises(ValueError, match="contiguous"):
        launcher("probes.where", 1, 8, values.t())
    with pytest.raises(ValueError, match="takes 1 argument"):
        launcher("probes.where", 1, 8, values, np.int32(1))
    with pytest.raises(ValueError, match="nothing"):
        launcher("probes.nothing", 1, 8, values)


# --- offences: the emulator alone


@pytest.fixture
def strict(folder: Path) -> Launcher:
    return make_launcher(EMULATED, folder)


FLOATS, INTEGERS = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
OFFENCES = {
    "lane_never_comes": (
        (INTEGERS,),
        32,
        0,
        r"deadlock.*\n.*__shfl_sync at offences.cu:10.*\n.*\(3,0,0\).*__sync",
    ),
    "different_barriers": ((INTEGERS,), 64, 0, r"thread \(32,0,0\).*while other threads"),
    "caller_left_out": ((INTEGERS,), 32, 0, "leaves out the caller"),
    "writes_beyond": ((FLOATS[:32], np.int32(32)), 32, 0, r"belongs to no argument; at offences.cu"),
    "reads_before": ((FLOATS[32:], FLOATS[:4]), 1, 0, "belongs to no argument"),
    "null_write": ((None,), 1, 0, "undefined|no argument"),
    "shared_overrun": ((FLOATS, np.int32(1)), 32, 0, r"thread \(31,0,0\): undefined"),
    "dynamic_overrun": ((FLOATS, np.int32(4)), 32, 128, r"thread \(28,0,0\): memory"),
    "misaligned": ((FLOATS, FLOATS), 1, 0, "undefined"),
    "float_too_large": ((FLOATS + 1e20, INTEGERS), 1, 0, "undefined"),
    "divides_by_zero": ((INTEGERS[:1], INTEGERS[1:]), 1, 0, "undefined"),
    "deep_stack": ((FLOATS, np.int32(100000)), 1, 0, "stack of a thread is full"),
    "traps": ((INTEGERS,), 1, 0, "__trap"),
}


@pytest.mark.parametrize("name", OFFENCES)
def test_what_is_undefined_on_a_gpu_is_an_error(strict: Launcher, name: str) -> None:
    arguments, threads, shared_bytes, message = OFFENCES[name]
    copies = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    with pytest.raises(EmulationError, match=message):
        strict(f"offences.{name}", 1, threads, *copies, shared_bytes=shared_bytes)


def test_a_small_step_before_a_tensor_is_seen(strict: Launcher) -> None:
    with pytest.raises(EmulationError, match="just before or behind"):
        strict("offences.writes_beyond", 1, 1, torch.zeros(64), np.int32(-1))


def test_a_piece_of_an_arena_ends_where_it_ends(strict: Launcher) -> None:
    """The next piece of the same allocation is no part of the argument."""
    arena = torch.zeros(128)
    with pytest.raises(EmulationError, match="no argument"):
        strict("offences.writes_beyond", 1, 32, arena[:64], np.int32(64))
    assert not arena.any()


def test_a_kernel_that_never_ends(folder: Path, strict: Launcher) -> None:
    impatient = EmulatedLauncher(folder, time_limit=1)
    with pytest.raises(EmulationError, match="does not end"):
        impatient("offences.never_ends", 1, 1, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def test_the_launcher_works_on_after_an_offence(strict: Launcher) -> None:
    with pytest.raises(EmulationError):
        strict("offences.misaligned", 1, 1, torch.zeros(64), torch.zeros(64))
    output = torch.zeros(32, dtype=torch.int32)
    strict("probes.where", 1, 32, output)
    assert output.tolist() == list(range(32))


def test_a_forgotten_barrier_depends_on_the_order(folder: Path, strict: Launcher) -> None:
    results = []
    for is_reversed in (False, True):
        output = torch.zeros(64, dtype=torch.int32)
        EmulatedLauncher(folder, is_reversed=is_reversed)("offences.forgotten_barrier", 1, 64, output)
        results.append(output)
    assert not torch.equal(*results)


def test_shared_memory_is_never_zero_by_luck(strict: Launcher) -> None:
    output = torch.zeros(64)
    for _ in range(2):
        strict("offences.unwritten_shared", 1, 32, output, shared_bytes=128)
        assert output.isnan().all()


WRONG = [
    ((np.int64(1),), "give int32, not int64"),
    ((3.0,), "give int32, not float"),
    ((True,), "give int32, not bool"),
]


@pytest.mark.parametrize(("scalars", "message"), WRONG)
def test_scalars_of_another_type_are_refused(strict: Launcher, scalars: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict("offences.writes_beyond", 1, 1, torch.zeros(4), *scalars)


def test_tensors_of_another_type_are_refused(strict: Launcher) -> None:
    with pytest.raises(ValueError, match=r"int\*, which does not fit a tensor of torch.float32"):
        strict("probes.where", 1, 1, torch.zeros(4))
    strict("probes.where", 1, 1, torch.zeros(4, dtype=torch.uint8))  # raw memory


def test_limits_of_a_block(strict: Launcher) -> None:
    output = torch.zeros(128, dtype=torch.float64)
    scalars = (np.int32(0), np.uint32(0), np.int64(0), np.uint64(0), np.float32(0), np.float64(0))
    with pytest.raises(ValueError, match="at most 64"):
        strict("probes.scalars", 1, 128, *scalars, None, output)
    with pytest.raises(ValueError, match="shared memory"):
        strict("probes.where", 1, 1, torch.zeros(4, dtype=torch.int32), shared_bytes=228 * 1024)


def test_signatures_are_read_from_the_file(folder: Path, strict: Launcher) -> None:
    kernels = find_kernels(folder / "probes.cu")
    assert {"scaled_2", "scaled_3", "scalars", "block_sums"} <= set(kernels)
    assert kernels["scalars"].max_threads == 64
    declared = [(parameter.name, parameter.declared) for parameter in kernels["scaled_2"].parameters]
    assert declared == [("input", "const float4*"), ("output", "float4*")]
