# SPDX-License-Identifier: Apache-2.0
"""The measure of the cuda body: its error against float64, beside the error that float32 has on the cpu body."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 4 * torch.finfo(torch.float32).eps
"""A relative error that needs no excuse: a few roundings."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64; the difference's own where `exact` is zero."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    difference, norm = torch.linalg.vector_norm(found - exact).item(), torch.linalg.vector_norm(exact).item()
    return difference / norm if norm > 0 else difference


def assert_as_good(found: Tensor, single: Tensor, exact: Tensor, what: str, *, factor: float = 2.0) -> None:
    """The error of `found` is at most `factor` times that of `single`, the cpu body in float32, or a few roundings."""
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)} for {tuple(exact.shape)}"
    assert bool(torch.isfinite(found).all()), what
    error, allowed = relative_error(found, exact), max(factor * relative_error(single, exact), FLOOR)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"
