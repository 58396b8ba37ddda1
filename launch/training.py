# SPDX-License-Identifier: Apache-2.0
"""What a training consists of, and how it is built from a configuration: data, table, strategy, sampler, body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed.communicator import Communicator
from gaussian_renderer.phases import PhaseTimer
from gaussian_renderer.step import Batch, StepSettings
from gaussian_renderer.views import KERNEL_ATTRIBUTES
from launch.config import TrainConfig, pick
from launch.machine import available_cores
from launch.start import check_checkpoint, scene_fingerprints
from masksplat.ops import Body, get_body
from masksplat.random import BACKGROUND, uniform
from masksplat.types import AdamStep, ProjectionSettings
from scene.cameras import Camera
from scene.checkpoint import Checkpoint
from scene.dataset import Scene, SceneOptions, load_scene
from scene.gaussians import GaussianTable
from scene.images import ImageStore
from scene.points import initial_gaussians
from scene.sampler import ViewSampler
from strategies.base import CombinedStrategy
from strategies.density import DensityConfig
from strategies.mask import MaskConfig
from strategies.methods import build_strategy
from strategies.optimizer_scaling import OptimizerScaling, PositionRate, scaling_for
from strategies.schedule import Window

SH_DEGREE_INTERVAL = 1000
"""Images after which one more degree of spherical harmonics is used (3DGS)."""

DROP_STREAM_STEP = 0


@dataclass
class Training:
    """The parts of one training. Only `table` changes while it runs.

    data: fingerprints of what is trained on. first_step: the step to begin with, above 0 when a checkpoint is resumed.
    """

    config: TrainConfig
    communicator: Communicator
    scene: Scene
    photos: ImageStore
    test_photos: ImageStore | None
    sampler: ViewSampler
    table: GaussianTable
    strategy: CombinedStrategy
    scaling: OptimizerScaling
    position_rate: PositionRate
    body: Body
    phases: PhaseTimer
    data: Mapping[str, str]
    first_step: int = 0

    def window(self, step: int) -> Window:
        """The images of step number `step`, counted from 0."""
        size = self.config.optimization.bsz
        return Window(step * size + 1, size)

    @property
    def num_steps(self) -> int:
        """Steps that cover all iterations; the last may reach beyond."""
        return -(-self.config.optimization.iterations // self.config.optimization.bsz)

    def sh_degree(self, window: Window) -> int:
        """The degree in use: one more at every multiple of 1000 images."""
        return min(self.config.model.sh_degree, window.last // SH_DEGREE_INTERVAL)

    def batch(self, step: int) -> Batch:
        """Cameras, photos and backgrounds of a step; the next step's photos start to decode."""
        views = self.sampler.batch(step)
        photos = [self.photos.fetch(view) for view in views]
        self.photos.prefetch(self.sampler.batch(step + 1))
        backgrounds = [self.background(step, k) for k in range(len(views))]
        return Batch([self.scene.train[view] for view in views], photos, backgrounds)

    def background(self, step: int | None = None, view: int = 0) -> Tensor:
        """Black, white or, in training with --random_background, a colour of its own for each view; (3,) in [0, 1]."""
        if step is not None and self.config.optimization.random_background:
            channels = torch.arange(3, dtype=torch.int64) + 3 * view
            first = self.window(step).first
            return uniform(self.config.optimization.seed, first, channels, BACKGROUND, torch.float32)
        return torch.full((3,), float(self.config.model.white_background))

    def step_settings(self, window: Window) -> StepSettings:
        """What the renderer needs to know for this step."""
        optimization = self.config.optimization
        projection = ProjectionSettings(sh_degree=self.sh_degree(window), antialiased=self.config.pipeline.antialiasing)
        view_weight = self.scaling.view_weight * optimization.lr_scale_loss
        return StepSettings(projection, optimization.lambda_dssim, view_weight)

    @property
    def mask_scaling(self) -> OptimizerScaling:
        """The optimizer's numbers for what the strategy learns; --stop_update_param stops that, too."""
        return replace(self.scaling, lr_factor=0.0) if self.config.debug.stop_update_param else self.scaling

    def adam_steps(self, window: Window) -> list[AdamStep]:
        """This step's Adam numbers of each kernel attribute."""
        optimization = self.config.optimization
        steps = []
        for name in KERNEL_ATTRIBUTES:
            spec = next(spec for spec in self.table.attributes if spec.name == name)
            rate = getattr(optimization, spec.learning_rate) * spec.learning_rate_factor * self.scaling.lr_factor
            if name == "means":
                rate = self.position_rate.at(window.first) * self.scaling.lr_factor
            if name in ("means", "scales"):
                rate *= optimization.lr_scale_pos_and_scale
            rate = 0.0 if self.config.debug.stop_update_param else rate
            steps.append(AdamStep(rate, *self.scaling.betas, self.scaling.eps, self.table.num_updates + 1))
        return steps


def build_training(
    config: TrainConfig, communicator: Communicator, *, show_progress: bool, checkpoint: Checkpoint | None = None
) -> Training:
    """Load the data and make everything a training needs; with a checkpoint, its rows and its step are the start.

    Raises: InputError for anything wrong with the data, or when the checkpoint is not of this data.
    """
    threads = config.pipeline.threads or available_cores()
    torch.set_num_threads(1)  # the kernels bring their own threads, and OpenMP's would spin beside them
    scene = load_scene(config.model.source_path, pick(SceneOptions, config.model), progress=show_progress)
    data = scene_fingerprints(scene)
    if checkpoint is not None:
        check_checkpoint(checkpoint, config, data)
    table = checkpoint.table if checkpoint is not None else initial_table(config, scene, show_progress=show_progress)
    optimization = config.optimization
    density = None if config.density.disable_auto_densification else pick(DensityConfig, config.density, config.model)
    return Training(
        config=config,
        communicator=communicator,
        scene=scene,
        photos=open_photos(config, scene.train, threads=threads, show_progress=show_progress),
        test_photos=open_photos(config, scene.test, threads=threads, show_progress=show_progress)
        if scene.test
        else None,
        sampler=ViewSampler(len(scene.train), optimization.bsz, optimization.seed),
        table=table,
        strategy=build_strategy(
            config.mask.prune_method,
            density=density,
            mask=pick(MaskConfig, config.mask),
            extent=scene.extent,
            iterations=optimization.iterations,
            ranks=communicator,
        ),
        scaling=scaling_for(optimization.lr_scale_mode, optimization.bsz),
        position_rate=PositionRate(
            optimization.position_lr_init * scene.extent,
            optimization.position_lr_final * scene.extent,
            optimization.position_lr_max_steps,
        ),
        body=choose_body(config.pipeline.backend, threads),
        phases=PhaseTimer(),
        data=data,
        first_step=checkpoint.state.iteration // optimization.bsz if checkpoint is not None else 0,
    )


def choose_body(backend: str, threads: int) -> Body:
    """The masksplat body that --backend means on this machine: diff and default are the device at hand."""
    return get_body({"diff": "auto", "default": "auto"}.get(backend, backend), num_threads=threads)


def open_photos(config: TrainConfig, cameras: Sequence[Camera], *, threads: int, show_progress: bool) -> ImageStore:
    """The photos of some cameras, decoded as far as the memory for them goes."""
    store = ImageStore(
        cameras,
        background=(float(config.model.white_background),) * 3,
        byte_budget=int(config.pipeline.image_cache_gb * (1 << 30)),
        num_threads=threads,
    )
    store.preload(show_progress)
    return store


def initial_table(config: TrainConfig, scene: Scene, *, show_progress: bool) -> GaussianTable:
    """One Gaussian at every point of the cloud, less those that --drop_initial_3dgs_p takes out."""
    table = GaussianTable.from_arrays(initial_gaussians(scene.points, config.model.sh_degree, progress=show_progress))
    dropped = config.debug.drop_initial_3dgs_p
    if dropped == 0.0:
        return table
    noise = uniform(config.optimization.seed, DROP_STREAM_STEP, table.ids, BACKGROUND, torch.float32)
    keep = noise >= dropped
    kept = {name: values[keep] for name, values in table.params.items()}
    return GaussianTable.from_arrays(kept, ids=table.ids[keep])
