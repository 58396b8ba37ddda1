# SPDX-License-Identifier: Apache-2.0
"""How the optimizer's numbers follow the batch size, and the schedule of the position learning rate.

Grendel's independent-gradients rule ("sqrt") lets one set of hyper-parameters serve any number of views B per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCALE_MODES = ("sqrt", "linear", "accumu")


@dataclass(frozen=True)
class OptimizerScaling:
    """The optimizer's numbers for one batch size.

    lr_factor: multiplies every learning rate. betas, eps: of Adam.
    view_weight: weight of each view's loss and gradient in the step's sum: 1/B (a mean), or 1 (a sum).
    step_weight: weight of a term that enters a step once (a regulariser), B * view_weight.
    """

    lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    view_weight: float = 1.0
    step_weight: float = 1.0


def scaling_for(
    mode: str, batch_size: int, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15
) -> OptimizerScaling:
    """The scaling of `mode` for B = `batch_size` views per step.

    sqrt: lr * sqrt(B), betas^B, eps / sqrt(B), gradient mean; linear: lr * B, gradient mean; accumu: gradient sum.
    Raises: ValueError for another mode or B < 1.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be 1 or more, got {batch_size}")
    mean = 1.0 / batch_size
    if mode == "sqrt":
        root = math.sqrt(batch_size)
        return OptimizerScaling(root, (betas[0] ** batch_size, betas[1] ** batch_size), eps / root, mean, 1.0)
    if mode == "linear":
        return OptimizerScaling(float(batch_size), betas, eps, mean, 1.0)
    if mode == "accumu":
        return OptimizerScaling(1.0, betas, eps, 1.0, float(batch_size))
    raise ValueError(f"unknown mode {mode!r} for --lr_scale_mode; choose one of {', '.join(SCALE_MODES)}")


@dataclass(frozen=True)
class PositionRate:
    """The learning rate of the means: log-linear from `initial` to `final` over `max_steps` iterations, then constant.

    Multiply `initial` and `final` by the scene's extent first, as 3DGS does.
    """

    initial: float
    final: float
    max_steps: int

    def __post_init__(self) -> None:
        if self.initial < 0 or self.final < 0 or (self.initial > 0) != (self.final > 0) or self.max_steps < 1:
            raise ValueError(f"rates must both be positive, or both 0, and max_steps 1 or more, got {self}")

    def at(self, iteration: int) -> float:
        """The rate at an iteration: initial^(1 - t) * final^t with t = iteration / max_steps in [0, 1]."""
        if self.initial == 0:
            return 0.0
        t = min(max(iteration / self.max_steps, 0.0), 1.0)
        return math.exp((1 - t) * math.log(self.initial) + t * math.log(self.final))


@dataclass(frozen=True)
class Annealing:
    """A factor on learning rates: 1, and in the last `share` of the iterations log-linear down to `final`.

    Adam's steps do not shrink with the gradient: with constant rates the last photo's noise is in the result. 3DGS lets
    only the rate of the means fall.
    """

    iterations: int
    share: float
    final: float

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 < self.final <= 1) or self.iterations < 1:
            raise ValueError(f"share must be in [0, 1], final in (0, 1] and iterations 1 or more, got {self}")

    def at(self, iteration: int) -> float:
        """The factor at an iteration, from 1."""
        if self.share == 0:
            return 1.0
        start = (1 - self.share) * self.iterations
        t = min(max((iteration - start) / (self.share * self.iterations), 0.0), 1.0)
        return self.final**t
