# SPDX-License-Identifier: Apache-2.0
"""Updates of shN that are made when rows are seen, on the GPU: launches of `lazy.cu`, and what `update` is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from masksplat.cuda.launcher import Argument, Launcher
from masksplat.lazy import LazyRows
from masksplat.types import Gaussians, ProjectionSettings, Splats

BLOCK = 128
"""Threads of a block, with one Gaussian each."""


def catch_up(launcher: Launcher, lazy: LazyRows, status: Tensor | None) -> None:
    """Bring all rows up to the last update, unless an overflow is noted in `status`."""
    num_rows = len(lazy.updates)
    launcher(
        "lazy.catch_up", -(-num_rows // BLOCK), BLOCK,
        lazy.param, lazy.exp_avg, lazy.exp_avg_sq, lazy.updates, lazy.ring, np.int32(num_rows), *_extent(lazy), status,
    )  # fmt: skip


def colour(
    launcher: Launcher,
    lazy: LazyRows,
    gaussians: Gaussians,
    settings: ProjectionSettings,
    cameras: Tensor,
    splats: Splats,
    status: Tensor | None,
) -> None:
    """Bring the rows that are drawn up to the last update, and write their splats' colours of a degree above 0."""
    num_views, num_gaussians = splats.slots.shape
    degree = settings.sh_degree or 0
    launcher(
        f"lazy.colour_degree_{degree}", -(-num_gaussians // BLOCK), BLOCK,
        lazy.param, lazy.exp_avg, lazy.exp_avg_sq, lazy.updates, lazy.ring, *_extent(lazy), status,
        gaussians.means, gaussians.sh0, cameras, splats.slots, np.int32(num_gaussians), np.int32(num_views),
        splats.rows, shared_bytes=4 * BLOCK * 3 * ((degree + 1) ** 2 - 1),
    )  # fmt: skip


def of_update(lazy: LazyRows | None, update: int) -> Sequence[Argument]:
    """The last arguments of the kernels `update_*`: rows that are drawn get update number `update`; None: all rows."""
    if lazy is None:
        return None, None, np.int32(0)
    return lazy.updates, lazy.ring, np.int32(update)


def _extent(lazy: LazyRows) -> tuple[np.int32, np.int32]:
    """Floats of a row, and the last update."""
    return np.int32(lazy.param.shape[1] * 3), np.int32(lazy.latest)
