# SPDX-License-Identifier: Apache-2.0
"""The probabilistic mask of MaskGaussian: one keep logit per Gaussian, sampled hard, learned straight through.

The keep probability is p = sigmoid(logit). With u uniform in (0, 1), the two-class Gumbel softmax at temperature 1 is
soft = sigmoid(logit + log(u / (1 - u))), and its hard sample is 1 where soft > 1/2, which has probability p.
Both functions have a numba body for CPU tensors, kernels for CUDA ones, and a torch body for any device; they know
nothing about rendering.

Letters: N Gaussians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from masksplat.cpu.mask import sample_kernel, update_kernel
from masksplat.random import MASK_SAMPLE, require_key, uniform
from masksplat.types import AdamStep, Counted

# Below these logits the derivative is 0 to the dtype's precision; exp(-logit) times 2^24 must not overflow.
_LOWEST_LOGIT = {torch.float32: -60.0, torch.float64: -600.0}


class MaskSample(NamedTuple):
    """mask: (N,) exactly 0 or 1; keep_gradient: (N,) soft * (1 - soft), the straight-through derivative by logits.

    num_drawn: () int64 on the same device, how many are 1.
    """

    mask: Tensor
    keep_gradient: Tensor
    num_drawn: Tensor


def mask_sample(logits: Tensor, ids: Tensor, seed: int, step: int, *, step_at: Tensor | None = None) -> MaskSample:
    """A hard sample of the masks for one training step, and what its backward needs.

    Args: logits: (N,) float32 or float64; ids: (N,) int64 keys of the noise; seed: 64 bits; step: 32 bits; step_at:
    (1,) int32 beside logits that kernels draw, which read the step there, whatever it is by then.
    The same (seed, step, id, logit) gives the same sample, whatever the rows' order.
    Raises: ValueError for other dtypes or shapes, or a number out of its range.
    """
    if logits.dtype not in _LOWEST_LOGIT or logits.shape != ids.shape:
        raise ValueError(f"mask logits must be float32 or float64 of shape {tuple(ids.shape)}, got {logits.dtype}")
    require_key(seed, step)
    require_kernels(logits, step_at)
    source = logits.detach().contiguous()
    if _has_kernels(source):
        from masksplat.cuda import devices, mask

        key = step if step_at is None else step_at
        return MaskSample(*mask.sample(devices.launcher_of(source.device), source, ids.contiguous(), seed, key))
    if source.device.type != "cpu":
        return mask_sample_torch(source, ids, seed, step)
    drawn, keep_gradient = torch.empty_like(source), torch.empty_like(source)
    dtype = source.numpy().dtype.type
    sample_kernel(
        source.numpy(),
        ids.contiguous().numpy().view(np.uint64),
        tuple(np.uint64(word) for word in (step, MASK_SAMPLE, seed & 0xFFFFFFFF, seed >> 32)),
        tuple(dtype(number) for number in (0.5, 1.0, 2.0**23, _LOWEST_LOGIT[logits.dtype], 0.0)),
        drawn.numpy(),
        keep_gradient.numpy(),
    )
    return MaskSample(drawn, keep_gradient, torch.count_nonzero(drawn))


def mask_sample_torch(logits: Tensor, ids: Tensor, seed: int, step: int) -> MaskSample:
    """`mask_sample` in torch operations, for any device and as the oracle of the kernel."""
    drawn = uniform(seed, step, ids, MASK_SAMPLE, logits.dtype)
    against = torch.exp(-logits.detach().clamp(min=_LOWEST_LOGIT[logits.dtype])) * ((1 - drawn) / drawn)
    is_drawn = against < 1
    return MaskSample(is_drawn.to(logits.dtype), against / (1 + against) ** 2, torch.count_nonzero(is_drawn))


def mask_update(
    logits: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    d_mask: Tensor,
    keep_gradient: Tensor,
    d_all: float | Counted,
    adam: AdamStep,
    numbers: Tensor | None = None,
    status: Tensor | None = None,
) -> None:
    """One Adam update (torch.optim.Adam without weight decay) of the logits and their moments, in place.

    Args: logits, exp_avg, exp_avg_sq: (N,) contiguous; d_mask: (N,) gradient of the loss by the hard sample;
    keep_gradient: (N,) of the same sample; d_all: a gradient that every sample gets on top (the regulariser's), a
    number, or one that follows a count on the same device; numbers: (6,) float32 beside logits that kernels update,
    which read there (`update_numbers`) what `d_all` and `adam` say, whatever it is by then; status: the cuda
    body's status words, nothing is updated once they tell of an overflow.
    """
    require_kernels(logits, numbers)
    if _has_kernels(logits):
        from masksplat.cuda import devices, mask

        launcher, given = devices.launcher_of(logits.device), d_mask.to(logits).contiguous()
        mask.update(
            launcher, logits, exp_avg, exp_avg_sq,
            d_mask=given, keep_gradient=keep_gradient.contiguous(), d_all=d_all, adam=adam, numbers=numbers,
            status=status,
        )  # fmt: skip
        return
    if status is not None and int(status[0]) != 0:
        return
    if logits.device.type != "cpu":
        mask_update_torch(
            logits, exp_avg, exp_avg_sq, d_mask=d_mask, keep_gradient=keep_gradient, d_all=d_all, adam=adam
        )
        return
    dtype = logits.numpy().dtype
    step_size, correction = _bias_corrected(adam)
    factors = [adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, step_size, correction, adam.eps]
    update_kernel(
        logits.numpy(),
        d_mask.to(logits).contiguous().numpy(),
        keep_gradient.contiguous().numpy(),
        exp_avg.numpy(),
        exp_avg_sq.numpy(),
        dtype.type(float(d_all.num) * d_all.factor if isinstance(d_all, Counted) else d_all),
        np.array(factors, dtype),
    )


def update_numbers(factor: float, adam: AdamStep) -> tuple[float, ...]:
    """What `mask_update` reads in memory: the number or the factor of `d_all`, then what `adam` comes to."""
    from masksplat.cuda import mask

    return mask.update_numbers(factor, adam)


def mask_update_torch(
    logits: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    d_mask: Tensor,
    keep_gradient: Tensor,
    d_all: float | Counted,
    adam: AdamStep,
) -> None:
    """`mask_update` in torch operations, for any device and as the oracle of the kernel."""
    added = d_all.num * d_all.factor if isinstance(d_all, Counted) else d_all
    gradient = (d_mask + added) * keep_gradient
    exp_avg.mul_(adam.beta1).add_(gradient, alpha=1 - adam.beta1)
    exp_avg_sq.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
    step_size, correction = _bias_corrected(adam)
    logits.addcdiv_(exp_avg, exp_avg_sq.sqrt().mul_(correction).add_(adam.eps), value=-step_size)


def require_kernels(logits: Tensor, numbers: Tensor | None) -> None:
    """Raises: ValueError for numbers in memory where kernels would not read them."""
    if numbers is not None and not _has_kernels(logits):
        raise ValueError(f"numbers in memory are for float32 logits on a GPU, not {logits.dtype} on {logits.device}")


def _has_kernels(logits: Tensor) -> bool:
    return logits.device.type == "cuda" and logits.dtype == torch.float32


def _bias_corrected(adam: AdamStep) -> tuple[float, float]:
    """Step size lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""
    return (
        adam.learning_rate / (1 - adam.beta1**adam.update),
        1 / math.sqrt(1 - adam.beta2**adam.update),
    )
