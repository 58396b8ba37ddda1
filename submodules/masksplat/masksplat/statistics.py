# SPDX-License-Identifier: Apache-2.0
"""3DGS's densify statistics in plain torch, for any device. Bodies that update in one pass gather them on the way.

Legend: N Gaussians, B views, M packed splats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.types import SLOT_UNSEEN, Splats, Statistics, Views


@torch.no_grad()
def add_statistics(statistics: Statistics, views: Views, splats: Splats, d_rows: Tensor) -> None:
    """Add to `statistics` the norm of each mean's gradient in NDC units, and the views that saw the Gaussian.

    Args: d_rows: (M, 10) gradient of the loss by the packed rows, of which the first two columns count.
    """
    for view, (width, height) in enumerate(views.sizes):
        part = slice(*splats.view_range(view))
        in_ndc = d_rows[part, :2] * d_rows.new_tensor([0.5 * width, 0.5 * height])
        norms = torch.linalg.vector_norm(in_ndc, dim=1).to(statistics.grad_norm_sum.dtype)
        statistics.grad_norm_sum.index_add_(0, splats.gaussians[part].long(), norms)
        statistics.view_count.add_((splats.slots[view] != SLOT_UNSEEN).to(statistics.view_count.dtype))
