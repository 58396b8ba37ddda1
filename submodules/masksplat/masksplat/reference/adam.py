# SPDX-License-Identifier: Apache-2.0
"""Adam (Kingma and Ba, 2015) as torch.optim.Adam computes it, without AMSGrad, and then a constant drift."""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.types import AdamStep


@torch.no_grad()
def adam(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
    """Update `param` and its moments in place; all four have the same shape and dtype."""
    exp_avg.lerp_(grad, 1.0 - step.beta1)
    exp_avg_sq.mul_(step.beta2).addcmul_(grad, grad, value=1.0 - step.beta2)
    correction = 1.0 - step.beta1**step.update
    root = (1.0 - step.beta2**step.update) ** 0.5
    denominator = exp_avg_sq.sqrt().div_(root).add_(step.eps)
    param.addcdiv_(exp_avg, denominator, value=-step.learning_rate / correction)
    if step.drift:
        param.sub_(step.drift)
