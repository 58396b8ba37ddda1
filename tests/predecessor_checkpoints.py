# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoint files in exactly the structure of the predecessors, by running their optimizer for some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EXTENT = np.float32(4.5)
NAMES = ("xyz", "f_dc", "f_rest", "opacity", "mask", "scaling", "rotation")


def raw_parameters(num_rows: int, seed: int = 0) -> dict[str, nn.Parameter]:
    """Parameters under 3DGS's names, in its shapes, of SH degree 3; the mask has MaskGaussian's two columns."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(num_rows, *shape, generator=generator).requires_grad_(True))

    return {
        "xyz": some(3), "f_dc": some(1, 3), "f_rest": some(15, 3), "opacity": some(1), "mask": some(2),
        "scaling": some(3), "rotation": some(4),
    }  # fmt: skip


def optimizer_after(parameters: dict[str, nn.Parameter], num_steps: int, *, has_masks: bool) -> torch.optim.Adam:
    """Adam with one named group for each parameter, in the predecessors' order, after some steps."""
    names = [name for name in NAMES if has_masks or name != "mask"]
    groups = [{"params": [parameters[name]], "lr": 1e-3, "name": name} for name in names]
    optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
    for step in range(num_steps):
        for name in names:
            values = parameters[name]
            values.grad = torch.sin(values.detach() * (step + 1))
            if name == "mask":  # the gradients of the two logits of a softmax are opposite
                values.grad[:, 1] = -values.grad[:, 0]
        optimizer.step()
    return optimizer


def capture(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Adam, *, has_masks: bool, extent: Any = EXTENT
) -> tuple[Any, ...]:
    """The tuple of GaussianModel.capture(): 12 items, or 13 with the mask's logits."""
    num_rows = len(parameters["xyz"])
    order = ["xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity", *(["mask"] if has_masks else [])]
    statistics: list[Tensor] = [torch.rand(num_rows), torch.rand(num_rows, 1), torch.ones(num_rows, 1) * 3]
    return (3, *(parameters[name] for name in order), *statistics, optimizer.state_dict(), extent)


def write_checkpoint(
    path: Path, num_rows: int = 7, *, iteration: int = 30, has_masks: bool = False, seed: int = 0, num_steps: int = 3
) -> tuple[Any, ...]:
    """Write (capture, iteration) as 3DGS does; return the capture."""
    parameters = raw_parameters(num_rows, seed)
    optimizer = optimizer_after(parameters, num_steps, has_masks=has_masks)
    captured = capture(parameters, optimizer, has_masks=has_masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((captured, iteration), path)
    return captured
