# SPDX-License-Identifier: Apache-2.0
"""Random words by the kernel are those of the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from cuda_launchers import launcher  # noqa: F401
from masksplat import random
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.random import words


@pytest.mark.parametrize("count", [0, 1, 255, 1000])
def test_the_kernel_draws_what_the_cpu_draws(launcher: Launcher, count: int) -> None:  # noqa: F811
    ids = torch.arange(count) * 0x1234_5678_9ABC + (torch.arange(count) % 3 << 61)
    seed, step, stream = (0xFFFF_FFF0 << 32) | 0xFEDC_BA98, 0xFFFF_FFFE, random.CHILD_ID
    found = words(launcher, seed, step, ids.to(launcher.device), stream)
    assert found.dtype == torch.int64 and torch.equal(found.cpu(), random.words(seed, step, ids, stream))


@pytest.mark.gpu
def test_numbers_of_ids_on_a_gpu_are_those_of_the_cpu() -> None:
    ids = torch.arange(5000) * 7919
    for make in (random.uniform, random.normal):
        torch.testing.assert_close(make(3, 4, ids.cuda(), random.SPLIT).cpu(), make(3, 4, ids, random.SPLIT))
    assert torch.equal(random.child_ids(ids.cuda(), 5, 2).cpu(), random.child_ids(ids, 5, 2))
