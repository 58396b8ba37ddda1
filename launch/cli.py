# SPDX-License-Identifier: Apache-2.0
"""From command lines to configurations: `parse_train`, `parse_render`, `parse_metrics`.

Values come from, in rising order: defaults, what is stored with the model (render.py), a preset (`--setting`), the
command line. Every mistake is an InputError.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.config import MetricsConfig, MetricsFlags, RenderConfig, RenderFlags, TrainConfig, fill_group
from launch.finetune import check_finetune, finetune_values
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
from launch.parser import Flag, build_parser, check_value, flags_of, notices_of, parse_given
from launch.presets import setting_values
from launch.prune_checks import check_pruning, flags_without_method, masks_without_pull, scaled_schedules, window_values
from launch.size_price import price_iterations
from scene.errors import InputError
from scene.model_folder import ModelFolder, default_model_path

TRAIN_GROUPS: Mapping[str, type] = MappingProxyType(
    {
        "model": ModelConfig,
        "optimization": OptimizationConfig,
        "density": DensityFlags,
        "mask": MaskFlags,
        "pipeline": PipelineConfig,
        "logging": LoggingConfig,
        "debug": DebugConfig,
        "prune": PruneFlags,
        "checkpoint": CheckpointFlags,
        "distribution": DistributionConfig,
        "benchmark": BenchmarkConfig,
        "viewer": ViewerConfig,
    }
)
DEFAULT_MILESTONES = (7_000, 30_000)
STORED_PIPELINE_FLAGS = ("antialiasing",)
SPELLING = """Flags may be shortened while unique; - and _ in their names are the same; Booleans have a --no_ form.
In brackets: default and unit; the program the flag comes from. Iterations count images."""
TRAIN_SUMMARY = f"""Trains Gaussians on posed photos and learns which of them to keep.

  python train.py -s DATA -m MODEL --eval        then: python render.py -m MODEL; python metrics.py -m MODEL
  python train.py --doctor -s DATA               what this machine and this data are fit for

{SPELLING}"""
RENDER_SUMMARY = f"""Renders the train and test views of a model into MODEL/{{train,test}}/ours_N/{{renders,gt}}.

  python render.py -m MODEL --skip_train         data set, split and background are read from the model folder
  python render.py -m MODEL --path ellipse       a flight through the model: frames and a video in MODEL/path

{SPELLING}"""
METRICS_SUMMARY = f"""Measures rendered views: PSNR, SSIM, LPIPS into MODEL/results.json and MODEL/per_view.json.

  python metrics.py -m MODEL [MODEL ...]         after render.py

{SPELLING}"""


def train_flags() -> tuple[Flag, ...]:
    """Every flag of train.py, in the order of --help."""
    return tuple(each for group in TRAIN_GROUPS.values() for each in flags_of(group))


def render_flags() -> tuple[Flag, ...]:
    """Every flag of render.py; those that only training reads are accepted without effect."""
    own = [*flags_of(RenderFlags), *flags_of(ModelConfig), *flags_of(PipelineConfig)]
    names = {each.name for each in own}
    training = (LoggingConfig, DistributionConfig, BenchmarkConfig, DebugConfig, CheckpointFlags, ViewerConfig)
    ours = {"doctor", "report", "render_and_evaluate", "check_agreement"}
    for each in (each for group in training for each in flags_of(group)):
        if each.name not in names | ours:
            reason = each.spec.inert or "it belongs to training, and render.py does not need it"
            spec = dataclasses.replace(each.spec, inert=reason, refused="", minimum=None, maximum=None)
            own.append(dataclasses.replace(each, spec=spec))
    return tuple(own)


def metrics_flags() -> tuple[Flag, ...]:
    """Every flag of metrics.py."""
    return flags_of(MetricsFlags)


def parse_train(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """The configuration that a command line of train.py (without the script's name) describes.

    Args:
        arguments: what follows `train.py`.
        environment: only OAR_JOB_ID is read, for the default model path, as in 3DGS.

    Raises:
        InputError: an unknown, impossible or refused flag, or no data set.
        SystemExit: after --help.
    """
    flags = train_flags()
    given = parse_given(build_parser("train.py", TRAIN_SUMMARY, flags), flags, arguments)
    values = {**_preset(given), **window_values(given), **finetune_values(given), **given}
    values.update(scaled_schedules(values, given))
    notices = notices_of(flags, given)
    if "source_path" not in given and not values.get("doctor"):
        raise InputError("train.py has no data: give the folder of a data set with -s FOLDER (--help lists all)")
    if "source_path" in given:
        values["source_path"] = given["source_path"].expanduser().absolute()
    if not values.get("doctor"):
        values["model_path"] = given.get("model_path") or default_model_path(environment.get("OAR_JOB_ID", ""))
    iterations = values.get("iterations", OptimizationConfig.iterations)
    values.update(_iteration_lists({**finetune_values(given), **given}, iterations))
    groups: dict[str, Any] = {name: fill_group(group, values) for name, group in TRAIN_GROUPS.items()}
    config = TrainConfig(**groups, given=tuple(sorted(given)))
    _check_together(config)
    tests = tuple(sorted({*config.logging.test_iterations, *price_iterations(config)}))
    config = dataclasses.replace(config, logging=dataclasses.replace(config.logging, test_iterations=tests))
    more = (*flags_without_method(config), *masks_without_pull(config), *_out_of_reach(config, given))
    return dataclasses.replace(config, notices=(*notices, *more))


def _out_of_reach(config: TrainConfig, given: Mapping[str, Any]) -> list[str]:
    """Sentences for numbers that are fine for other trainings, or on other machines."""
    last, threads, cores = config.optimization.iterations, config.pipeline.threads, os.cpu_count() or 1
    lost = [number for number in given.get("checkpoint_iterations", ()) if not 1 <= number <= last]
    notices = [f"--checkpoint_iterations {number} never comes: --iterations is {last}." for number in lost]
    if threads > cores:
        notices.append(f"--threads {threads} is more than the {cores} processors of this machine: they will wait.")
    return notices


def _preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values behind --setting; nothing when the flag is absent, since beta is the default."""
    if "setting" not in given:
        return {}
    if given.get("prune_method", "mask") != "mask":
        raise InputError(
            f"--setting {given['setting']} is a preset of the learned masks and --prune_method {given['prune_method']} "
            "has none; give one of the two"
        )
    if given.get("prune_finetune"):
        raise InputError(
            f"--setting {given['setting']} is a preset of whole trainings and --prune_finetune has schedules of its "
            "own; leave it out, and give --lambda_mask for another weight"
        )
    return setting_values(given["setting"])


def _iteration_lists(given: Mapping[str, Any], iterations: int) -> dict[str, tuple[int, ...]]:
    """Test, save and checkpoint iterations, ascending, within 1..iterations; the last one is always saved."""
    usual = (*DEFAULT_MILESTONES, iterations)
    test, save = given.get("test_iterations", usual), (*given.get("save_iterations", usual), iterations)
    checkpoint = (*given.get("checkpoint_iterations", ()), given.get("stop_after", 0))
    lists = {"test": test, "save": save, "checkpoint": checkpoint}
    return {f"{name}_iterations": _within(wanted, iterations) for name, wanted in lists.items()}


def _within(wanted: Sequence[int], last: int) -> tuple[int, ...]:
    return tuple(sorted({number for number in wanted if 1 <= number <= last}))


def _check_together(config: TrainConfig) -> None:
    """Raises InputError for values that are fine alone and impossible together."""
    mask, optimization = config.mask, config.optimization
    if mask.mask_from_iter > mask.mask_until_iter:
        raise InputError(
            f"the mask loss would end before it begins: --mask_from_iter {mask.mask_from_iter} is larger than "
            f"--mask_until_iter {mask.mask_until_iter}; change one of them"
        )
    if optimization.position_lr_final > 0 and optimization.position_lr_init == 0:
        raise InputError("--position_lr_init 0 needs --position_lr_final 0: the schedule between them is logarithmic")
    if optimization.position_lr_init > 0 and optimization.position_lr_final == 0:
        raise InputError("--position_lr_final 0 needs --position_lr_init 0: the schedule between them is logarithmic")
    check_pruning(config)
    check_finetune(config)


def parse_render(arguments: Sequence[str]) -> RenderConfig:
    """The configuration that a command line of render.py describes, with what the model folder stores below it.

    Raises:
        InputError: an unknown or impossible flag, no model folder, or one without readable configuration.
        SystemExit: after --help.
    """
    flags = render_flags()
    given = parse_given(build_parser("render.py", RENDER_SUMMARY, flags), flags, arguments)
    if "model_path" not in given:
        raise InputError(
            "render.py has no model: give the folder that train.py wrote with -m FOLDER (--help lists all)"
        )
    if "source_path" in given:
        given["source_path"] = given["source_path"].expanduser().absolute()
    stored = _stored_values(ModelFolder.open(given["model_path"]), needed="source_path" not in given)
    values = {**stored, **given}
    groups = {"model": ModelConfig, "pipeline": PipelineConfig, "render": RenderFlags}
    parts: dict[str, Any] = {name: fill_group(group, values) for name, group in groups.items()}
    notices = (*notices_of(flags, given), *_flags_of_the_other_kind(given))
    return RenderConfig(**parts, given=tuple(sorted(given)), notices=notices)


def _flags_of_the_other_kind(given: Mapping[str, Any]) -> list[str]:
    """A sentence for each flag that is about views when a path is drawn, or about a path when there is none."""
    of_path, reason = ("path_frames", "path_fps", "path_width", "path_height"), "without --path there is no path"
    of_views = ("skip_train", "skip_test", "generate_num", "sample_freq", "l", "r")
    names, reason = (of_views, "with --path no view is drawn") if given.get("path") else (of_path, reason)
    return [f"--{name} has no effect: {reason}." for name in names if name in given]


def _stored_values(folder: ModelFolder, *, needed: bool) -> dict[str, Any]:
    """What the model folder says about the flags of ModelConfig and the stored pipeline flags, checked like flags."""
    stored = folder.stored_options(needed=needed)
    values: dict[str, Any] = {}
    for each in (*flags_of(ModelConfig), *flags_of(PipelineConfig)):
        if each.group is PipelineConfig and each.name not in STORED_PIPELINE_FLAGS:
            continue
        if each.name not in stored or each.name == "model_path":
            continue
        value = Path(str(stored[each.name])) if each.kind is Path else stored[each.name]
        if not isinstance(value, each.kind) or (each.kind is int and isinstance(value, bool)):
            raise InputError(
                f"the configuration in {folder.path} gives {each.name} = {value!r}, which is not of the expected kind; "
                f"give --{each.name} on the command line and correct cfg_args or config.json"
            )
        check_value(each, value)
        values[each.name] = value
    return values


def parse_metrics(arguments: Sequence[str]) -> MetricsConfig:
    """The configuration that a command line of metrics.py describes.

    Raises:
        InputError: an unknown or impossible flag, or no model folder.
        SystemExit: after --help.
    """
    flags = metrics_flags()
    given = parse_given(build_parser("metrics.py", METRICS_SUMMARY, flags), flags, arguments)
    if not given.get("model_paths"):
        raise InputError("metrics.py has no model: give the folders to measure with -m FOLDER [FOLDER ...]")
    return MetricsConfig(fill_group(MetricsFlags, given), given=tuple(sorted(given)))
