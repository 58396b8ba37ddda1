# SPDX-License-Identifier: Apache-2.0
"""The strategy of a training, from its flags: density control and the one method that prunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from distributed.communicator import Communicator
from gaussian_renderer.scores import ScoreViews
from launch.bodies import overflow_watch
from launch.config import TrainConfig, pick
from launch.finetune import trained_before
from masksplat.ops import Body
from scene.cameras import Camera
from scene.errors import InputError
from scene.gaussians import INITIAL_MASK_LOGIT, GaussianTable
from scene.ply import model_columns
from scene.row_edit import RowEdit
from strategies.base import CombinedStrategy, spare_best
from strategies.density import DensityConfig
from strategies.estimators import straight_through
from strategies.lp import mask_parameter, untouched_masks
from strategies.mask import MaskConfig
from strategies.methods import SCORES, PruneConfig, build_strategy

BYTES_PER_MB = 1e6
BYTES_PER_NUMBER = 4

LEARNED = ("mask", "compact_3dgs")
"""Methods whose masks stay in the table between two steps, and in a checkpoint."""


def choose_strategy(
    config: TrainConfig, *, extent: float, cameras: Sequence[Camera], body: Body, communicator: Communicator
) -> CombinedStrategy:
    """Density control and the pruning method that the flags name.

    Args: extent: of the scene, world units; cameras: the training views, which scores are measured in with `body`.
    Raises: InputError for a target size of nothing, or a score without training views.
    """
    density = None if config.density.disable_auto_densification else pick(DensityConfig, config.density, config.model)
    score_views = None
    if config.mask.prune_method in SCORES:
        score_views = ScoreViews(body, cameras, communicator, antialiased=config.pipeline.antialiasing)
    return build_strategy(
        config.mask.prune_method,
        density=density,
        mask=pick(MaskConfig, config.mask),
        extent=extent,
        iterations=config.optimization.iterations,
        first_iteration=trained_before(config),
        prune=replace(pick(PruneConfig, config.prune), target_gaussians=target_count(config)),
        ranks=communicator,
        score_views=score_views,
        status=None if (watch := overflow_watch(body)) is None else watch.status,
    )


def target_count(config: TrainConfig) -> int:
    """The wanted number of Gaussians, 0 for none. Raises: InputError for a file too small for one."""
    if not config.prune.target_mb:
        return config.prune.target_gaussians
    per_gaussian = BYTES_PER_NUMBER * len(model_columns(config.model.sh_degree))
    count = math.floor(config.prune.target_mb * BYTES_PER_MB / per_gaussian)
    if count < 1:
        raise InputError(
            f"--target_mb {config.prune.target_mb:g} is less than one Gaussian needs ({per_gaussian} bytes); MB are "
            "millions of bytes"
        )
    return count


def adopt_masks(table: GaussianTable, before: str, now: str, communicator: Communicator) -> list[str]:
    """Let a training go on with another method than the one that learned the masks in `table`. All ranks.

    What the earlier method would not have saved goes, and every mask begins anew: the same logit means one thing to
    --prune_method mask and another to compact_3dgs. Returns: a sentence if anything changed.
    """
    if before == now or before not in LEARNED:
        return []
    logits = table.params["mask_logits"]
    if not int(communicator.sum((logits != INITIAL_MASK_LOGIT).sum())):  # all ranks
        return []
    is_dropped = logits < 0 if before == "mask" else straight_through(mask_parameter(logits)).value == 0
    is_dropped = spare_best(is_dropped, logits, table.ids, communicator)
    num_dropped = int(communicator.sum(is_dropped.sum()))  # all ranks
    table.apply(RowEdit.identity(table.ids).keep(~is_dropped))
    table.apply(untouched_masks(table))
    return [
        f"The masks were learned by --prune_method {before} and begin anew for {now}; the {num_dropped:,} Gaussians "
        "that it would not have saved are gone."
    ]
