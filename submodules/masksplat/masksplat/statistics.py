# SPDX-License-Identifier: Apache-2.0
"""3DGS's densify statistics in plain torch, for any device. Bodies that update in one pass gather them on the way.

Legend: N Gaussians, B views, M packed splats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.types import SLOT_UNSEEN, Splats, Statistics, Views


@torch.no_grad()
def add_statistics(
    statistics: Statistics, views: Views, splats: Splats, d_rows: Tensor, *, status: Tensor | None = None
) -> None:
    """Add to `statistics` the norm of each mean's gradient in NDC units, and the views that saw the Gaussian.

    Args: d_rows: (M, 10) gradient of the loss by the packed rows, of which the first two columns count; status: words
    of the cuda body: once they tell of an overflow, d_rows may hold anything and nothing is added.
    """
    for slots, (width, height) in zip(splats.slots, views.sizes, strict=True):
        if status is not None:
            slots = slots.masked_fill(status[0] != 0, SLOT_UNSEEN)
        statistics.view_count.add_((slots != SLOT_UNSEEN).to(statistics.view_count.dtype))
        if len(d_rows) == 0:
            continue
        # By slots: rows that are not in use hold anything.
        of_gaussians = d_rows[:, :2].index_select(0, slots.clamp(min=0))
        # Numbers of the host as scalars: as a tensor they would have to be copied to the device, and waited for.
        in_ndc = torch.stack((of_gaussians[:, 0] * (0.5 * width), of_gaussians[:, 1] * (0.5 * height)), dim=1)
        norms = torch.linalg.vector_norm(in_ndc, dim=1)
        statistics.grad_norm_sum.add_(norms.masked_fill_(slots < 0, 0.0).to(statistics.grad_norm_sum.dtype))
