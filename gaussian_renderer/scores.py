# SPDX-License-Identifier: Apache-2.0
"""How much every Gaussian contributes to the training views: the scores of RadSplat and Mini-Splatting.

A pass draws every view once, whole views on different ranks at the same time. A Gaussian's blending weights alpha T in
a view are known where the view is drawn; their maximum and sum travel back to the Gaussian's owner on the way that
gradients take. Each view is drawn by one rank and the owner goes through the views in their order, so that the scores
do not depend on the number of ranks.

Letters: N Gaussians of this rank, V views, W ranks, M packed splats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed.communicator import Communicator
from distributed.exchange import ExchangePlan
from distributed.pixels import PixelPartition
from gaussian_renderer.views import gaussians_of, views_of
from masksplat.ops import Body
from masksplat.types import NUM_ROW_COLUMNS, Gaussians, ProjectionSettings, Splats, compact
from scene.cameras import Camera
from scene.errors import InputError
from scene.gaussians import GaussianTable


@dataclass(frozen=True, eq=False)
class ScoreViews:
    """The pass over `cameras`, the V training views, as a function that strategies are handed.

    antialiased: as in training. All ranks call it, with their parts of one table.
    """

    body: Body
    cameras: Sequence[Camera]
    communicator: Communicator = Communicator()
    antialiased: bool = False

    def __post_init__(self) -> None:
        """Raises: InputError when there is no view."""
        if not self.cameras:
            raise InputError("importance scores need training views and there are none; check the data set and --eval")

    def __call__(self, table: GaussianTable, opacity_factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two (N,) tensors, 0 where no pixel accepts the Gaussian: the maximum and the sum of alpha T.

        Over all pixels of all views. Args: opacity_factor: (N,), multiplies the opacities; by default they are plain.
        """
        gaussians = gaussians_of(table.params)
        settings = ProjectionSettings(sh_degree=None, antialiased=self.antialiased)  # colours play no part
        if opacity_factor is not None:
            settings = replace(settings, activated=True)
            opacities = torch.sigmoid(gaussians.opacities) * opacity_factor
            gaussians = replace(gaussians, scales=gaussians.scales.exp(), opacities=opacities)
        largest = torch.zeros_like(gaussians.opacities)
        total = torch.zeros_like(gaussians.opacities, dtype=torch.float64)
        for first in range(0, len(self.cameras), self.communicator.size):
            cameras = self.cameras[first : first + self.communicator.size]
            splats, scores = self._score_round(gaussians, table.ids, cameras, settings)
            for view in range(len(cameras)):
                part = slice(*splats.view_range(view))
                rows = splats.gaussians[part].long()  # no row twice in a view
                largest[rows] = torch.maximum(largest[rows], scores[part, 0])
                total[rows] += scores[part, 1]
        return largest, total.to(largest.dtype)

    def _score_round(
        self, gaussians: Gaussians, ids: Tensor, cameras: Sequence[Camera], settings: ProjectionSettings
    ) -> tuple[Splats, Tensor]:
        """This rank's splats of up to W views, one drawn by each rank, and (M, 10) their scores in columns 0 and 1."""
        views = views_of(cameras, gaussians.means)
        splats = self.body.project(gaussians, views, settings, ids=ids)
        splats = compact(splats)  # rows that are not in use name no Gaussian
        heights = [camera.height for camera in cameras]
        partition = PixelPartition.of_whole_views(heights, range(len(cameras)), self.communicator.size)
        plan = ExchangePlan.for_partition(self.communicator, splats, partition, sizes=views.sizes)  # all ranks
        received = plan.forward(splats)  # all ranks
        scores = received.rows.new_zeros((len(received), NUM_ROW_COLUMNS))
        for number, region in enumerate(partition.regions[self.communicator.rank]):
            part = slice(*received.view_range(number))
            largest, total = self.body.blend_scores(received, number, views.sizes[region.view])
            scores[part, 0], scores[part, 1] = largest, total
        return splats, plan.backward(scores)  # all ranks; a sum of one term for each packed row
