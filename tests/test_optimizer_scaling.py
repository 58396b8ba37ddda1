# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from strategies.optimizer_scaling import Annealing, OptimizerScaling, PositionRate, scaling_for


def test_scaling_of_the_three_modes() -> None:
    sqrt = scaling_for("sqrt", 4)
    assert (sqrt.lr_factor, sqrt.view_weight, sqrt.step_weight) == (2.0, 0.25, 1.0)
    assert sqrt.betas == pytest.approx((0.9**4, 0.999**4), rel=1e-15)
    assert sqrt.eps == pytest.approx(0.5e-15)
    assert scaling_for("linear", 4) == OptimizerScaling(lr_factor=4.0, view_weight=0.25, step_weight=1.0)
    assert scaling_for("accumu", 4) == OptimizerScaling(lr_factor=1.0, view_weight=1.0, step_weight=4.0)


@pytest.mark.parametrize("mode", ["sqrt", "linear", "accumu"])
def test_batches_of_one_are_plain_adam(mode: str) -> None:
    assert scaling_for(mode, 1) == OptimizerScaling()


def test_unknown_modes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="--lr_scale_mode"):
        scaling_for("cubic", 2)
    with pytest.raises(ValueError, match="batch size"):
        scaling_for("sqrt", 0)


def test_position_rate_is_log_linear_and_then_constant() -> None:
    rate = PositionRate(initial=1.6e-4, final=1.6e-6, max_steps=30_000)
    assert rate.at(0) == pytest.approx(1.6e-4, rel=1e-12)
    assert rate.at(15_000) == pytest.approx(1.6e-5, rel=1e-12)
    assert rate.at(30_000) == pytest.approx(1.6e-6, rel=1e-12)
    assert rate.at(50_000) == rate.at(30_000)
    ratios = [rate.at(step + 1) / rate.at(step) for step in (1, 1000, 20_000)]
    assert ratios == pytest.approx([math.exp(math.log(0.01) / 30_000)] * 3, rel=1e-10)


def test_position_rate_of_zero_and_of_nonsense() -> None:
    assert PositionRate(0.0, 0.0, 10).at(5) == 0.0
    with pytest.raises(ValueError, match="both"):
        PositionRate(1e-4, 0.0, 10)


def test_annealing_is_one_and_then_log_linear() -> None:
    annealing = Annealing(30_000, share=0.1, final=0.05)
    assert [annealing.at(iteration) for iteration in (1, 15_000, 27_000)] == [1.0] * 3
    assert annealing.at(28_500) == pytest.approx(math.sqrt(0.05), rel=1e-12)
    assert annealing.at(30_000) == annealing.at(30_003) == 0.05  # the last batch may reach beyond the end
    assert Annealing(100, share=0.0, final=0.05).at(100) == 1.0
    with pytest.raises(ValueError, match="share"):
        Annealing(100, share=1.1, final=0.5)
