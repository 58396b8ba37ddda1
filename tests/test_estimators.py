# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from strategies.estimators import gumbel_sigmoid, mean_gumbel_sigmoid, straight_through

DTYPE = torch.float64


def test_gumbel_sigmoid_and_its_slope() -> None:
    x = torch.linspace(-4, 4, 41, dtype=DTYPE, requires_grad=True)
    noise = torch.linspace(0.02, 0.98, 41, dtype=DTYPE)
    found = gumbel_sigmoid(x.detach(), noise, 0.5)
    expected = torch.sigmoid((x + torch.log(noise / (1 - noise))) / 0.5)
    torch.testing.assert_close(found.value, expected.detach(), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(found.slope, slope, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("x", "mean"), [(0.0, 0.50), (0.5, 0.61), (1.0, 0.70), (2.0, 0.85), (4.0, 0.97)])
def test_means_are_those_of_many_draws(x: float, mean: float) -> None:
    """The means that the specification lists for temperature 0.5, and a simulation."""
    found = float(mean_gumbel_sigmoid(torch.tensor([x], dtype=DTYPE), 0.5))
    assert found == pytest.approx(mean, abs=0.005)
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=DTYPE).clamp(1e-9, 1 - 1e-9)
    draws = gumbel_sigmoid(torch.full_like(noise, x), noise, 0.5).value
    assert found == pytest.approx(float(draws.mean()), abs=4 * float(draws.std()) / math.sqrt(len(draws)) + 1e-3)


def test_straight_through_is_hard_with_a_soft_slope() -> None:
    edge = math.log(0.01 / 0.99)
    x = torch.tensor([edge - 1e-6, edge + 1e-6, -30.0, 0.0, 1.0], dtype=DTYPE)
    found = straight_through(x)
    assert found.value.tolist() == [0, 1, 0, 1, 1]
    soft = torch.sigmoid(x)
    torch.testing.assert_close(found.slope, soft * (1 - soft))
    assert straight_through(torch.tensor([-1e-3, 0.0, 1e-3], dtype=DTYPE), 0.5).value.tolist() == [0, 0, 1]
