# SPDX-License-Identifier: Apache-2.0
"""The configuration of train.py, render.py and metrics.py as frozen dataclasses, and its form as plain JSON values.

A `TrainConfig` is complete and checked: iteration lists are resolved, presets applied, paths set. How it comes from a
command line is in `launch/cli.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from launch.flag import flag
from launch.flag_groups import (
    DensityFlags,
    LoggingConfig,
    MaskFlags,
    ModelConfig,
    OptimizationConfig,
    PipelineConfig,
    PruneFlags,
)
from launch.flag_groups_process import (
    BenchmarkConfig,
    CheckpointFlags,
    DebugConfig,
    DistributionConfig,
    ViewerConfig,
)

Group = TypeVar("Group")

FREE_GROUPS = frozenset({"logging", "checkpoint", "distribution", "benchmark", "viewer"})
"""Groups of a `TrainConfig` that decide what is shown, measured and kept, and not what is trained."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides one training."""

    model: ModelConfig = ModelConfig()
    """Data, model folder, test split, background."""
    optimization: OptimizationConfig = OptimizationConfig()
    """Length, batch size, loss, learning rates, seed."""
    density: DensityFlags = DensityFlags()
    """Clone, split, prune, opacity reset."""
    mask: MaskFlags = MaskFlags()
    """Pruning method and probabilistic masks; presets are already applied."""
    pipeline: PipelineConfig = PipelineConfig()
    """Drawing body, threads, image memory."""
    logging: LoggingConfig = LoggingConfig()
    """Measuring, saving, reporting; the iteration lists are sorted and within 1..iterations."""
    debug: DebugConfig = DebugConfig()
    """Experiments that cripple a run on purpose."""
    prune: PruneFlags = PruneFlags()
    """Scores, windows, percentages, target sizes."""
    checkpoint: CheckpointFlags = CheckpointFlags()
    """Writing checkpoints and going on from them; iterations sorted and within 1..iterations."""
    distribution: DistributionConfig = DistributionConfig()
    """Several processes (without effect for now)."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """Grendel-GS's timers (without effect)."""
    viewer: ViewerConfig = ViewerConfig()
    """Viewer socket of 3DGS (without effect)."""
    given: tuple[str, ...] = ()
    """Names of the flags that the command line gave."""
    notices: tuple[str, ...] = ()
    """Sentences to print once at the start: flags without effect."""


@dataclasses.dataclass(frozen=True)
class RenderFlags:
    """Rendering: which model, which views, what is written."""

    iteration: int = flag(-1, source="3DGS", minimum=-1, unit="images")
    """Saved iteration to render; -1: the newest."""
    skip_train: bool = flag(False, source="3DGS")
    """Leaves the training views out."""
    skip_test: bool = flag(False, source="3DGS")
    """Leaves the test views out."""
    generate_num: int = flag(-1, source="Grendel", minimum=-1, unit="images")
    """Renders at most so many views of each set; -1: all."""
    sample_freq: int = flag(-1, source="Grendel", minimum=-1, unit="images")
    """Renders every so-many-th view; -1: every one."""
    l: int = flag(-1, source="Grendel", minimum=-1)  # noqa: E741 (the flag's name is Grendel-GS's)
    """First view index to render; -1: from the first."""
    r: int = flag(-1, source="Grendel", minimum=-1)
    """View index before which rendering stops; -1: to the last."""
    depth: bool = flag(False)
    """Writes depth images beside the renders, too."""
    alpha: bool = flag(False)
    """Writes coverage (alpha) images beside the renders, too."""
    path: str = flag("")
    """Instead of views: frames and a video of a flight, into MODEL/path. ellipse: among the training cameras, looking
    at what they look at; spiral: for cameras that look the same way; interpolate: from one to the next; or a JSON file,
    like MODEL/cameras.json or nerfstudio's camera_path.json."""
    path_frames: int = flag(240, minimum=1, unit="frames")
    """Length of the path. The cameras of a file are the frames, unless this is given: then a smooth path goes through
    them."""
    path_fps: float = flag(30.0, minimum=1.0, maximum=1000.0, unit="frames/s")
    """Speed of the video; the default is a file's own, if it has one."""
    path_width: int = flag(0, minimum=0, maximum=16384, unit="pixels")
    """Width of the frames; 0: of the first camera, or what fits --path_height. Cuts what the camera sees rather than
    widening it."""
    path_height: int = flag(0, minimum=0, maximum=16384, unit="pixels")
    """Height of the frames; 0: of the first camera, or what fits --path_width."""
    quiet: bool = flag(False, source="3DGS")
    """Nothing on the terminal except errors."""
    bsz: int = flag(
        1, source="Grendel", minimum=1, inert="views are drawn one after another; images do not depend on it"
    )
    """Views per batch."""
    distributed_load: bool = flag(False, source="Grendel", inert="the model is always one merged ply")
    """Loads one ply per process."""


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """Everything that decides one run of render.py."""

    model: ModelConfig = ModelConfig()
    """As stored with the model, overridden by the command line."""
    pipeline: PipelineConfig = PipelineConfig()
    """Drawing body and threads from the command line; antialiasing as stored with the model unless given."""
    render: RenderFlags = RenderFlags()
    """Which views, and what is written."""
    given: tuple[str, ...] = ()
    """Names of the flags that the command line gave."""
    notices: tuple[str, ...] = ()
    """Sentences to print once at the start: flags without effect."""


@dataclasses.dataclass(frozen=True)
class MetricsFlags:
    """Measuring: PSNR, SSIM and LPIPS of rendered views, by the 3DGS protocol."""

    model_paths: tuple[Path, ...] = flag((), source="3DGS", short="-m", aliases=("--model_path",))
    """One or more model folders whose {test,train}/ours_N/{renders,gt} images are compared. Required."""
    mode: str = flag("test", source="Grendel", choices=("test", "train"))
    """Which rendered set is measured; results go to results.json (test) or results_train.json (train)."""
    lpips: str = flag("auto", choices=("auto", "vgg", "alex", "none"))
    """Network of LPIPS. auto: vgg (the 3DGS protocol) when its weights are installed, otherwise a line says how."""
    threads: int = flag(0, minimum=0, unit="threads")
    """CPU threads; 0: the cores this process may use."""
    quiet: bool = flag(False)
    """Nothing on the terminal except errors."""


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Everything that decides one run of metrics.py."""

    metrics: MetricsFlags = MetricsFlags()
    """Folders, set and networks."""
    given: tuple[str, ...] = ()
    """Names of the flags that the command line gave."""
    notices: tuple[str, ...] = ()
    """Sentences to print once at the start."""


def fill_group(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A group with the entries of `values` that it declares, and its defaults for the others."""
    names = {field.name for field in dataclasses.fields(group)}  # type: ignore[arg-type]
    return group(**{name: value for name, value in values.items() if name in names})


def pick(kind: type[Group], *groups: Any) -> Group:
    """A settings dataclass of another module, filled from the flags of the same names in `groups`.

    For example `pick(DensityConfig, config.density, config.model)`.

    Raises:
        KeyError: a field of `kind` has no flag in the groups.
    """
    values = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: values[name] for name in names})


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON values: groups as objects, paths as text, tuples as lists; `notices` is left out."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name != "notices"
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def cfg_args_values(model: ModelConfig) -> dict[str, Any]:
    """The entries that 3DGS (also its newest version) expects in a model folder's cfg_args."""
    names = ("sh_degree", "source_path", "model_path", "images", "depths", "resolution", "white_background")
    plain = _plain(model)
    return {name: plain[name] for name in (*names, "train_test_exp", "data_device", "eval")}
