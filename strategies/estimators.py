# SPDX-License-Identifier: Apache-2.0
"""How a learned number x becomes the factor that a Gaussian is drawn with, and what gradient x gets from it.

LP-3DGS draws with a noisy soft factor (Gumbel-sigmoid), Compact-3DGS with a hard one whose gradient is passed straight
through. x is a mask parameter, or its product with an importance score.

Letters: N Gaussians of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ESTIMATORS = ("gumbel", "ste")
STRAIGHT_THROUGH_THRESHOLD = 0.01
"""Compact-3DGS: where sigma(x) is not above it, a Gaussian is not drawn."""

NUM_QUANTILES = 64


class Factor(NamedTuple):
    """What a Gaussian is drawn with, (N,) in [0, 1], and its derivative by x, (N,)."""

    value: Tensor
    slope: Tensor


def gumbel_sigmoid(x: Tensor, noise: Tensor, temperature: float) -> Factor:
    """sigma((x + l) / t) with logistic l = log(u / (1 - u)); LP-3DGS eq. 6.

    Args: x: (N,); noise: (N,) u, uniform in (0, 1); temperature: t > 0.
    """
    value = torch.sigmoid((x + torch.logit(noise)) / temperature)
    return Factor(value, value * (1 - value) / temperature)


def straight_through(x: Tensor, threshold: float = STRAIGHT_THROUGH_THRESHOLD) -> Factor:
    """1 where sigma(x) > threshold and else 0, with the slope of sigma(x); Compact-3DGS eq. 4."""
    probability = torch.sigmoid(x)
    return Factor((probability > threshold).to(x.dtype), probability * (1 - probability))


def mean_gumbel_sigmoid(x: Tensor, temperature: float) -> Tensor:
    """(N,) the mean of `gumbel_sigmoid` over its noise, by the midpoint rule in 64 quantiles (error below 1e-3)."""
    total = torch.zeros_like(x)
    for quantile in range(NUM_QUANTILES):
        noise = x.new_tensor((quantile + 0.5) / NUM_QUANTILES)
        total += gumbel_sigmoid(x, noise, temperature).value
    return total / NUM_QUANTILES
