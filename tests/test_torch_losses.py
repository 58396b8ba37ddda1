# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' losses in torch are the loss that training has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.torch_losses import LAMBDA_DSSIM, by_convolutions, by_shifts
from masksplat.reference.photometric import photometric


@pytest.mark.parametrize("loss", [by_convolutions, by_shifts])
def test_the_peers_of_the_loss_have_its_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(37, 52, 3, dtype=torch.float64, generator=generator).requires_grad_()
    target = (torch.rand(37, 52, 3, generator=generator) * 255).to(torch.uint8)
    value = loss(image, target.double() / 255.0)
    (gradient,) = torch.autograd.grad(value, image)
    ours = photometric(image.detach(), target, LAMBDA_DSSIM)
    absolute, similarity = ours.terms.tolist()
    expected = (1 - LAMBDA_DSSIM) * absolute + LAMBDA_DSSIM * (1 - similarity)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, ours.d_rgb, rtol=1e-9, atol=1e-15)
