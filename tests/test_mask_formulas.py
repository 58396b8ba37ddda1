# SPDX-License-Identifier: Apache-2.0
"""Claims of docs/masks.md that are not about compositing: one logit for two, logistic noise, ten draws in one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from masksplat.random import MASK_SAMPLE, uniform


def test_one_logit_with_twice_the_rate_follows_two_logits_under_adam():
    """The paper's parametrisation (softmax of two scores, Gumbel noise, Adam) and ours under the same gradients."""
    generator = torch.Generator().manual_seed(0)
    count, rate = 50, 0.01
    scores = torch.tensor([[10.0, 1.0]], dtype=torch.float64).repeat(count, 1).requires_grad_()
    logit = torch.full((count,), 9.0, dtype=torch.float64, requires_grad=True)
    two = torch.optim.Adam([scores], lr=rate, eps=1e-15)
    one = torch.optim.Adam([logit], lr=2 * rate, eps=1e-15)
    for _ in range(300):
        gumbel = -torch.log(-torch.log(torch.rand(count, 2, generator=generator, dtype=torch.float64)))
        d_mask = torch.randn(count, generator=generator, dtype=torch.float64) + 0.3
        soft = torch.softmax(torch.log_softmax(scores, dim=1) + gumbel, dim=1)[:, 0]
        scores.grad = torch.autograd.grad(soft, scores, d_mask)[0]
        ours = torch.sigmoid(logit + gumbel[:, 0] - gumbel[:, 1])
        torch.testing.assert_close(ours, soft, atol=1e-12, rtol=1e-9)
        logit.grad = d_mask * (ours * (1 - ours)).detach()
        two.step()
        one.step()
    difference = (scores[:, 0] - scores[:, 1]).detach()
    torch.testing.assert_close(logit.detach(), difference, atol=1e-9, rtol=0)
    assert (difference - 9).abs().mean() > 0.3


@pytest.mark.parametrize("probability", [0.9998, 0.7, 0.1])
def test_a_hard_sample_is_one_with_the_keep_probability(probability):
    drawn = uniform(1, 2, torch.arange(400_000), MASK_SAMPLE, torch.float64)
    logit = np.log(probability / (1 - probability))
    ones = (logit + torch.log(drawn / (1 - drawn)) > 0).double().mean().item()
    spread = np.sqrt(probability * (1 - probability) / 400_000)
    assert abs(ones - probability) < 4 * spread


@pytest.mark.parametrize("probability", [0.5, 0.2, 0.1, 0.05, 0.01])
def test_ten_draws_that_are_all_zero_have_the_probability_of_one_number(probability):
    rng = np.random.default_rng(0)
    vanished = (rng.random((100_000, 10)) >= probability).all(axis=1).mean()
    expected = (1 - probability) ** 10
    assert abs(vanished - expected) < 4 * np.sqrt(expected * (1 - expected) / 100_000)
