# SPDX-License-Identifier: Apache-2.0
"""The loss of 3DGS, (1 - lambda) L1 + lambda (1 - SSIM), in torch: the peers of our loss, and the faster of them.

`by_convolutions` is what trainers without a kernel of their own do; `fused` is what torch.compile makes of shifted
sums, the nearest that torch alone comes to a fused SSIM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LAMBDA_DSSIM = 0.2
HALO, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2
TRIALS = 20

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of an image and a target, both (h, w, 3) in [0, 1]."""


def by_convolutions(image: Tensor, target: Tensor) -> Tensor:
    """All five blurs in one grouped convolution for each direction."""
    taps = torch.tensor(_window(), device=image.device, dtype=image.dtype).expand(15, 1, 1, 2 * HALO + 1)

    def blur(images: Tensor) -> Tensor:
        across = conv2d(images[None], taps, padding=(0, HALO), groups=15)
        return conv2d(across, taps.transpose(2, 3), padding=(HALO, 0), groups=15)[0]

    return _loss(image, target, blur)


def by_shifts(image: Tensor, target: Tensor) -> Tensor:
    """Each blur as a sum of shifted images, which torch.compile fuses."""

    def blur(images: Tensor) -> Tensor:
        height, width = images.shape[1:]
        wide, window = pad(images, (HALO, HALO)), _window()
        across = sum(tap * wide[:, :, shift : shift + width] for shift, tap in enumerate(window))
        tall = pad(across, (0, 0, HALO, HALO))
        return sum(tap * tall[:, shift : shift + height] for shift, tap in enumerate(window))

    return _loss(image, target, blur)


def fastest_loss(image: Tensor, target: Tensor) -> tuple[str, Loss]:
    """The name and function of the peer that takes less time for such images with its gradient, after warming up."""
    peers: Mapping[str, Loss] = {"convolutions": by_convolutions, "fused": torch.compile(by_shifts, dynamic=False)}
    seconds = {name: _seconds(loss, image, target) for name, loss in peers.items()}
    best = min(seconds, key=seconds.__getitem__)
    return best, peers[best]


def _seconds(loss: Loss, image: Tensor, target: Tensor) -> float:
    """Of TRIALS values with gradients."""
    leaf = image.detach().clone().requires_grad_()
    start = 0.0
    for trial in range(2 * TRIALS):
        if trial == TRIALS:
            torch.cuda.synchronize()
            start = time.perf_counter()
        torch.autograd.grad(loss(leaf, target), leaf)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _window() -> list[float]:
    """The eleven weights of SSIM's window, sum 1."""
    weights = torch.exp(-((torch.arange(2 * HALO + 1, dtype=torch.float64) - HALO) ** 2) / (2 * SIGMA**2))
    return (weights / weights.sum()).tolist()


def _loss(image: Tensor, target: Tensor, blur: Callable[[Tensor], Tensor]) -> Tensor:
    """Args: blur: of (15, h, w) images, zeros beyond the border."""
    x, y = image.permute(2, 0, 1), target.permute(2, 0, 1)
    mu_x, mu_y, xx, yy, xy = blur(torch.cat([x, y, x * x, y * y, x * y])).split(3)
    numerator = (2 * mu_x * mu_y + C1) * (2 * (xy - mu_x * mu_y) + C2)
    denominator = (mu_x**2 + mu_y**2 + C1) * (xx - mu_x**2 + yy - mu_y**2 + C2)
    ssim = (numerator / denominator).mean()
    return (1 - LAMBDA_DSSIM) * (x - y).abs().mean() + LAMBDA_DSSIM * (1 - ssim)
