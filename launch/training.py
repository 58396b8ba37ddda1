# SPDX-License-Identifier: Apache-2.0
"""What a training consists of, and how it is built from a configuration: data, table, strategy, shares, body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from distributed.balance import COST_DELAY
from distributed.communicator import Communicator
from distributed.numbering import OrderNumbers, order_numbers
from distributed.transfer import sent_to
from gaussian_renderer.phases import PhaseTimer, phase_timer
from gaussian_renderer.step import Batch, StepSettings, StepTools
from gaussian_renderer.views import KERNEL_ATTRIBUTES, CameraTable
from launch.bodies import choose_body, hidden_load, overflow_watch, room_of_windows, steps_ahead
from launch.config import TrainConfig, pick, to_plain
from launch.finetune import rate_factor
from launch.pruning import choose_strategy
from launch.sharing import LocalViews, PixelShares, Redistribution, RowShares, restore_shares
from launch.start import check_checkpoint, scene_fingerprints
from launch.step_graphs import DeviceGraphMaker, StepGraphs
from launch.world import require_same, threads_per_rank
from masksplat.cuda.body import CudaBody
from masksplat.ops import Body
from masksplat.random import BACKGROUND, uniform
from masksplat.types import AdamStep, ProjectionSettings, Views
from scene.cameras import Camera
from scene.checkpoint import Checkpoint
from scene.dataset import Scene, SceneOptions, load_scene
from scene.device_images import DeviceImages, PixelSource
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.images import ImageStore, on_background
from scene.node_images import NodeImages
from scene.points import initial_gaussians, notice_on_few
from scene.row_edit import RowEdit, TableEdit
from scene.sampler import ViewSampler
from strategies.base import CombinedStrategy
from strategies.optimizer_scaling import Annealing, OptimizerScaling, PositionRate, scaling_for
from strategies.schedule import Window

SH_DEGREE_INTERVAL = 1000
"""Images after which one more degree of spherical harmonics is used (3DGS)."""

SHORTEST_PASS = 40
"""Images that a pass over the training views counts at least for the decay of opacities, which was measured with 43
views and more: with three views an image could not hold against a decay by the number of views alone."""

DROP_STREAM_STEP = 0


@dataclass
class Training:
    """The parts of one training on this rank. Only `table`, `pixels` and `rows` change while it runs.

    cameras: those of the training views. photos, test_photos: on the table's device. data: fingerprints of what is
    trained on. first_step: the step to begin with, above 0 when a checkpoint is resumed. graphs: recorded steps, where
    a GPU can replay them.
    """

    config: TrainConfig
    communicator: Communicator
    scene: Scene
    cameras: CameraTable
    photos: DeviceImages
    test_photos: DeviceImages | None
    pixels: PixelShares
    rows: RowShares
    table: GaussianTable
    strategy: CombinedStrategy
    scaling: OptimizerScaling
    position_rate: PositionRate
    annealing: Annealing
    body: Body
    phases: PhaseTimer
    data: Mapping[str, str]
    first_step: int = 0
    graphs: StepGraphs | None = None
    _plain_background: Tensor | None = None
    _ties: OrderNumbers | None = None
    _numbered: Tensor | None = None  # the ids that have these numbers

    @property
    def tools(self) -> StepTools:
        """What the training step draws with."""
        watch = overflow_watch(self.body)
        status = watch.status if watch is not None and watch.defers else None
        room = room_of_windows(self.body, self.communicator)
        return StepTools(self.body, self.communicator, self.phases, self._ties, status, room)

    def number_rows(self) -> None:
        """Give the rows new small numbers when the rows are others than before. All ranks."""
        if self.communicator.size > 1 and self._numbered is not self.table.ids:
            self._ties = order_numbers(self.table.ids, self.communicator)
            self._numbered = self.table.ids

    def window(self, step: int) -> Window:
        """The images of step number `step`, counted from 0."""
        size = self.config.optimization.bsz
        return Window(step * size + 1, size)

    @property
    def num_steps(self) -> int:
        """Steps that cover all iterations; the last may reach beyond."""
        return -(-self.config.optimization.iterations // self.config.optimization.bsz)

    @property
    def stop_step(self) -> int:
        """Steps that are done when the loop ends: all of them, or those that --stop_after asks for."""
        wanted = -(-self.config.optimization.stop_after // self.config.optimization.bsz)
        return min(wanted, self.num_steps) if wanted else self.num_steps

    def sh_degree(self, window: Window) -> int:
        """The degree in use: one more at every multiple of 1000 images."""
        return min(self.config.model.sh_degree, window.last // SH_DEGREE_INTERVAL)

    def sizes(self, step: int) -> tuple[tuple[int, int], ...]:
        """(width, height) of the views of a step."""
        return self.cameras.sizes(self.pixels.views(step))

    @property
    def has_random_background(self) -> bool:
        """Whether every view of a step has a background of its own."""
        return self.config.optimization.random_background

    def batch(self, step: int, *, views_as: Views | None = None) -> Batch:
        """Cameras, backgrounds and this rank's photos of a step; the next step's photos start to decode.

        Args: views_as: the cameras, where a recorded step reads them; None: from the table of cameras.
        """
        partition, views = self.pixels.partition(step), self.pixels.views(step)
        if self.config.debug.check_agreement:
            self._check_agreement(step, views)
        backgrounds = [self.background(step, view) for view in views]
        photos = []
        for region in partition.regions[self.communicator.rank]:
            height = partition.heights[region.view]
            rows = region.drawn_rows(height)
            is_whole = rows == (0, height)  # whole photos may stay on the device, strips do not
            pixels = self.photos.fetch(views[region.view], *(() if is_whole else rows))
            photos.append(on_background(pixels, backgrounds[region.view]))
        self._prefetch(step + 1)
        return Batch(views_as or self.cameras.views(views), backgrounds, partition, photos)

    def _prefetch(self, step: int) -> None:
        """Start to decode what this rank will draw in a step."""
        mine, views = self.pixels.partition(step).regions[self.communicator.rank], self.pixels.views(step)
        self.photos.prefetch([views[region.view] for region in mine])

    def _check_agreement(self, step: int, views: Sequence[int]) -> None:
        """Compare views, partition and number of updates over ranks. Raises: DisagreementError."""
        digest = self.pixels.partition(step).digest(step, views) ^ self.table.num_updates
        self.communicator.require_agreement(f"views and partition of step {step}", digest)

    def background(self, step: int | None = None, view: int = 0) -> Tensor:
        """Black, white or, in training with --random_background, a colour of its own for each view; (3,) in [0, 1]."""
        means = self.table.params["means"]
        if step is not None and self.config.optimization.random_background:
            channels = torch.arange(3, dtype=torch.int64) + 3 * view
            first = self.window(step).first
            drawn = uniform(self.config.optimization.seed, first, channels, BACKGROUND, torch.float32)
            return sent_to(drawn.to(means.dtype), means.device)
        if self._plain_background is None:
            self._plain_background = means.new_full((3,), float(self.config.model.white_background))
        return self._plain_background

    @contextmanager
    def recordings(self) -> Iterator[None]:
        """A block behind which no recorded step is left: the process group that steps use may end then."""
        try:
            yield
        finally:
            if self.graphs is not None:
                self.graphs.close()

    @property
    def steps_ahead(self) -> int:
        """Steps that are queued ahead of a GPU (`launch.late_steps`); what they change must know the status words."""
        return steps_ahead(self.body, self.communicator)

    def apply(self, edit: TableEdit) -> None:
        """Edit the table. On a CPU rows that come together in space are kept together, as the first ones were.

        What a view draws is then read from memory in long runs, and the other runs are left alone. Results do not
        depend on the order of the rows.
        """
        if isinstance(edit, RowEdit) and self.table.ids.device.type == "cpu":
            edit = edit.beside_sources()
        self.table.apply(edit)

    def after_event(self) -> Redistribution | None:
        """Share the Gaussians out again when edits have left the shards uneven. All ranks."""
        with self.phases("redistribution"):
            return self.rows.after_event(self.table)

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over ranks (exact for whole numbers). All ranks."""
        return self.communicator.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def step_settings(self, window: Window) -> StepSettings:
        """What the renderer needs to know for this step."""
        optimization = self.config.optimization
        projection = ProjectionSettings(sh_degree=self.sh_degree(window), antialiased=self.config.pipeline.antialiasing)
        view_weight = self.scaling.view_weight * optimization.lr_scale_loss
        return StepSettings(projection, optimization.lambda_dssim, view_weight)

    @cached_property
    def _base_rates(self) -> dict[str, float]:
        """Learning rates of KERNEL_ATTRIBUTES as the flags give them; for the means, that of the first step."""
        specs, flags = {spec.name: spec for spec in self.table.attributes}, self.config.optimization
        return {
            name: getattr(flags, specs[name].learning_rate) * specs[name].learning_rate_factor
            for name in KERNEL_ATTRIBUTES
        }

    def mask_scaling(self, window: Window) -> OptimizerScaling:
        """The optimizer's numbers for what the strategy learns; --stop_update_param stops that, too."""
        factor = 0.0 if self.config.debug.stop_update_param else rate_factor(self.config, window.first)
        return replace(self.scaling, lr_factor=self.scaling.lr_factor * factor)

    def adam_steps(self, window: Window) -> list[AdamStep]:
        """This step's Adam numbers of each kernel attribute."""
        optimization, common = self.config.optimization, self.scaling.lr_factor * self.annealing.at(window.first)
        drift_of_rate = self._opacity_drift_of_rate
        steps = []
        for name, base_rate in self._base_rates.items():
            if name == "means":
                rate = self.position_rate.at(window.first)
            else:
                rate = base_rate * rate_factor(self.config, window.first)
            rate *= common
            if name in ("means", "scales"):
                rate *= optimization.lr_scale_pos_and_scale
            rate = 0.0 if self.config.debug.stop_update_param else rate
            drift = rate * drift_of_rate if name == "opacities" else 0.0
            steps.append(AdamStep(rate, *self.scaling.betas, self.scaling.eps, self.table.num_updates + 1, drift))
        return steps

    @property
    def _opacity_drift_of_rate(self) -> float:
        """What opacity logits fall by in a step, as a share of their learning rate: --opacity_decay in a pass."""
        optimization, rate = self.config.optimization, self.config.optimization.opacity_lr
        images = max(len(self.scene.train), SHORTEST_PASS)
        return optimization.opacity_decay / (rate * images) if rate > 0 else 0.0


def build_training(
    config: TrainConfig, communicator: Communicator, *, show_progress: bool, checkpoint: Checkpoint | None = None
) -> Training:
    """Load the data and make everything a training needs; with a checkpoint, its rows and its step are the start.

    All ranks call it. Raises: InputError for anything wrong with the data, or when the checkpoint is not of this data;
    PeerError when another rank raised that.
    """
    optimization = config.optimization
    torch.set_num_threads(1)  # the kernels bring their own threads, and OpenMP's would spin beside them
    with communicator.all_or_none(InputError):
        scene = load_scene(config.model.source_path, pick(SceneOptions, config.model), progress=show_progress)
        data = scene_fingerprints(scene)
        if checkpoint is not None:
            check_checkpoint(checkpoint, config, data)
        batches = choose_batches(config, len(scene.train), communicator)
    require_same(communicator, "command line and data", repr(to_plain(config)).encode(), repr(data).encode())
    body = choose_body(
        config.pipeline.backend,
        communicator.device,
        threads=threads_per_rank(config.pipeline.threads, communicator),
        has_masks=config.mask.prune_method == "mask",
    )
    defer_steps(body)
    pixels = pixel_shares(config, scene, batches, communicator, body)
    rows = row_shares(config, communicator)
    table = first_table(config, scene, communicator, checkpoint, show_progress=show_progress)
    if checkpoint is not None:
        restore_shares(pixels, rows, checkpoint.state.shares)
    if checkpoint is None or checkpoint.num_shards != communicator.size:
        rows.share_out(table)
    photos, test_photos = open_all_photos(config, scene, communicator, show_progress=show_progress)
    return Training(
        config=config,
        communicator=communicator,
        scene=scene,
        cameras=CameraTable(scene.train, table.params["means"]),
        photos=photos,
        test_photos=test_photos,
        pixels=pixels,
        rows=rows,
        table=table,
        strategy=choose_strategy(
            config, extent=scene.extent, cameras=scene.train, body=body, communicator=communicator
        ),
        scaling=scaling_for(optimization.lr_scale_mode, optimization.bsz),
        position_rate=PositionRate(
            optimization.position_lr_init * scene.extent,
            optimization.position_lr_final * scene.extent,
            optimization.position_lr_max_steps,
        ),
        annealing=Annealing(optimization.iterations, optimization.anneal_share, optimization.anneal_to),
        body=body,
        phases=phase_timer(communicator.device, on_device=config.benchmark.enable_timer),
        data=data,
        first_step=checkpoint.state.iteration // optimization.bsz if checkpoint is not None else 0,
        graphs=step_graphs(config, body, communicator),
    )


def step_graphs(config: TrainConfig, body: Body, communicator: Communicator) -> StepGraphs | None:
    """What records steps and replays them, on GPUs of one machine, which wait for nothing in a step.

    None with --no_cuda_graphs, or when phases are timed by the device's clock.
    """
    is_wanted = config.pipeline.cuda_graphs and not config.benchmark.enable_timer
    waits = communicator.size > 1 and room_of_windows(body, communicator) is None
    if not is_wanted or waits or not isinstance(body, CudaBody) or body.device.type != "cuda":
        return None
    maker = DeviceGraphMaker(body.device)
    return StepGraphs(body, config.optimization.bsz, maker, num_ranks=communicator.size)


def choose_batches(config: TrainConfig, num_views: int, communicator: Communicator) -> ViewSampler | LocalViews:
    """Which views each step draws. Raises: InputError when --local_sampling does not fit the number of processes."""
    optimization = config.optimization
    if config.distribution.local_sampling and communicator.size > 1:
        return LocalViews(num_views, optimization.bsz, optimization.seed, communicator.size)
    return ViewSampler(num_views, optimization.bsz, optimization.seed)


def defer_steps(body: Body) -> None:
    """Let the host queue steps ahead, where everything that a step changes heeds the body's status words."""
    watch = overflow_watch(body)
    if watch is not None:
        watch.defers = True


def pixel_shares(
    config: TrainConfig, scene: Scene, batches: ViewSampler | LocalViews, communicator: Communicator, body: Body
) -> PixelShares:
    """How pixels are shared out over ranks; costs count later where steps are read late."""
    learns_costs = not config.distribution.no_heuristics_update
    delay = COST_DELAY + steps_ahead(body, communicator)
    return PixelShares(
        communicator, scene.train, batches,
        learns_costs=learns_costs, delay=delay, hidden_load=hidden_load(body),
    )  # fmt: skip


def row_shares(config: TrainConfig, communicator: Communicator) -> RowShares:
    """How Gaussians are shared out over ranks, by the flags."""
    flags = config.distribution
    return RowShares(
        communicator,
        flags.redistribute_gaussians_mode,
        flags.redistribute_gaussians_frequency,
        flags.redistribute_gaussians_threshold,
        config.optimization.seed,
    )


def open_all_photos(
    config: TrainConfig, scene: Scene, communicator: Communicator, *, show_progress: bool
) -> tuple[DeviceImages, DeviceImages | None]:
    """The photos of the training and of the test views, if there are any. All ranks.

    Raises: InputError, PeerError as `build_training`.
    """
    white = float(config.model.white_background)
    fixed = (white, white, white)
    background = None if config.optimization.random_background else fixed
    photos = open_photos(config, scene.train, communicator, background, show_progress=show_progress)
    if not scene.test:
        return photos, None
    return photos, open_photos(config, scene.test, communicator, fixed, show_progress=show_progress)


def open_photos(
    config: TrainConfig,
    cameras: Sequence[Camera],
    communicator: Communicator,
    background: tuple[float, float, float] | None,
    *,
    show_progress: bool,
) -> DeviceImages:
    """The photos of some cameras, decoded as far as the memory for them goes. All ranks.

    Several processes of one machine share that memory, unless --no_distributed_dataset_storage gives each its own part.
    """
    ranks, budget = communicator, int(config.pipeline.image_cache_gb * (1 << 30))
    threads = threads_per_rank(config.pipeline.threads, ranks)
    store: PixelSource
    # By the number of all ranks: machines with one process take part in what is agreed on between the others.
    if ranks.size > 1 and config.distribution.distributed_dataset_storage:
        store = NodeImages(
            cameras, ranks, background=background, byte_budget=budget, num_threads=threads, progress=show_progress
        )
    else:
        own = ImageStore(cameras, background=background, byte_budget=budget // ranks.local_size, num_threads=threads)
        with ranks.all_or_none(InputError):
            own.preload(show_progress)
        store = own
    return DeviceImages(store, ranks.device, byte_budget=device_budget(config, cameras, ranks.device))


def device_budget(config: TrainConfig, cameras: Sequence[Camera], device: torch.device) -> int:
    """Bytes of GPU memory for photos: all of them when --preload_dataset_to_gpu or its threshold says so, else none."""
    flags, channels = config.distribution, 4 if config.optimization.random_background else 3  # 4: alpha is kept
    num_bytes = sum(channels * camera.width * camera.height for camera in cameras)
    is_small = num_bytes <= flags.preload_dataset_to_gpu_threshold * 1e9
    return num_bytes if device.type == "cuda" and (flags.preload_dataset_to_gpu or is_small) else 0


def first_table(
    config: TrainConfig,
    scene: Scene,
    communicator: Communicator,
    checkpoint: Checkpoint | None,
    *,
    show_progress: bool,
) -> GaussianTable:
    """This rank's rows to begin with: a checkpoint's, or those of the points, which rank 0 has before they are shared.

    On the device of the communicator.
    """
    if checkpoint is not None:
        return checkpoint.table.to(communicator.device)
    if not communicator.is_main:
        return GaussianTable.empty(config.model.sh_degree).to(communicator.device)
    return initial_table(config, scene, show_progress=show_progress).to(communicator.device)


def initial_table(config: TrainConfig, scene: Scene, *, show_progress: bool) -> GaussianTable:
    """One Gaussian at every point of the cloud, less those that --drop_initial_3dgs_p takes out."""
    notice = notice_on_few(len(scene.points.xyz))
    if notice is not None:
        print(notice)
    table = GaussianTable.from_arrays(initial_gaussians(scene.points, config.model.sh_degree, progress=show_progress))
    dropped = config.debug.drop_initial_3dgs_p
    if dropped == 0.0:
        return table
    noise = uniform(config.optimization.seed, DROP_STREAM_STEP, table.ids, BACKGROUND, torch.float32)
    keep = noise >= dropped
    if not bool(keep.any()):
        raise InputError(
            f"--drop_initial_3dgs_p {dropped:g} leaves none of the {len(table):,} first Gaussians; give a smaller share"
        )
    kept = {name: values[keep] for name, values in table.params.items()}
    return GaussianTable.from_arrays(kept, ids=table.ids[keep])
