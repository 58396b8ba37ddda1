# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that papers quote, each with its scenes and its protocol, and the methods to compare. Needs no torch.

All protocols hold every eighth image back (--eval), or the frames of transforms_test.json. Mip-NeRF 360 is trained on
its own reduced images, a quarter of the size outdoors and half of it indoors; Tanks and Temples and Deep Blending at
the size they are published in; NeRF-synthetic on white. Wider images than 1600 pixels are reduced to 1600, as in 3DGS.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from launch.cli import TRAIN_SUMMARY, train_flags
from launch.parser import build_parser, parse_given
from scene.errors import InputError

EVAL = ("--eval",)
OUTDOOR = (*EVAL, "--images", "images_4")
INDOOR = (*EVAL, "--images", "images_2")
SYNTHETIC = (*EVAL, "--white_background")

PROTOCOLS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "mipnerf360": {
            **dict.fromkeys(("bicycle", "flowers", "garden", "stump", "treehill"), OUTDOOR),
            **dict.fromkeys(("room", "counter", "kitchen", "bonsai"), INDOOR),
        },
        "tanks_and_temples": dict.fromkeys(("train", "truck"), EVAL),
        "deep_blending": dict.fromkeys(("drjohnson", "playroom"), EVAL),
        "nerf_synthetic": dict.fromkeys(
            ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship"), SYNTHETIC
        ),
    }
)
"""Flags of train.py for each scene of each benchmark."""

FINETUNE_BASE = "3dgs"
"""The method whose model is pruned and finetuned by those that need a trained one."""


@dataclass(frozen=True)
class BenchmarkScene:
    """A scene: its benchmark ("" for the user's own), its name in the table, its data, its flags."""

    protocol: str
    name: str
    source: Path
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """A way to train. base: the method whose model it starts from, if any."""

    name: str
    flags: tuple[str, ...]
    base: str = ""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("3dgs", ("--prune_method", "3dgs")),
            *(Method(name, ("--setting", name)) for name in ("alpha", "beta", "gamma")),
            Method("rad_splat", ("--prune_method", "rad_splat", "--use_importance_mask")),
            Method("mini_splatting", ("--prune_method", "mini_splatting", "--use_importance_mask")),
            Method("compact_3dgs", ("--prune_method", "compact_3dgs")),
            Method("percent_rad_splat", ("--prune_method", "rad_splat")),
            Method("percent_mini_splatting", ("--prune_method", "mini_splatting")),
            Method("post", ("--prune_finetune",), base=FINETUNE_BASE),
        )
    }
)
"""Settings alpha, beta and gamma of MaskGaussian, LP-3DGS with both scores, Compact-3DGS, pruning of a share, and
MaskGaussian's pruning of a trained model."""

PROTOCOL_FLAGS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {("nerf_synthetic", "compact_3dgs"): ("--lambda_mask", "4e-3", "--mask_lr", "1e-3")}
)
"""Flags of a method on one benchmark alone: Compact-3DGS's values for NeRF-synthetic, which LP-3DGS has, too."""

USUAL_METHODS = ("3dgs", "alpha", "beta", "gamma", "rad_splat", "mini_splatting", "compact_3dgs", "post")


def scenes_of(protocols: Sequence[str], data: Path, chosen: Sequence[str]) -> list[BenchmarkScene]:
    """The scenes of some benchmarks in `data`/NAME; only the `chosen` ones if there are any.

    Raises: InputError for a scene that no benchmark has, or whose folder is missing.
    """
    scenes = [
        BenchmarkScene(protocol, name, data.absolute() / name, flags)
        for protocol in protocols
        for name, flags in PROTOCOLS[protocol].items()
        if not chosen or name in chosen
    ]
    unknown = sorted(set(chosen) - {scene.name for scene in scenes})
    if unknown:
        raise InputError(f"--scenes: {', '.join(unknown)} is not a scene of {', '.join(protocols)}")
    missing = [str(scene.source) for scene in scenes if not scene.source.is_dir()]
    if missing:
        raise InputError(
            f"there is no folder {', '.join(missing)}; give the folder that holds the scenes with --data, and choose "
            "those that you have with --scenes"
        )
    return scenes


def own_scenes(folders: Sequence[Path]) -> list[BenchmarkScene]:
    """The user's own data sets, by the names of their folders. Raises: InputError for two of the same name."""
    scenes = [BenchmarkScene("", folder.absolute().name, folder.absolute(), EVAL) for folder in folders]
    names = [scene.name for scene in scenes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"several data sets are called {', '.join(twice)}; rename the folders, or run them apart")
    missing = [str(scene.source) for scene in scenes if not scene.source.is_dir()]
    if missing:
        raise InputError(f"there is no folder {', '.join(missing)}; --data takes the folders of data sets")
    return scenes


def methods_of(names: Sequence[str], added: Sequence[Sequence[str]]) -> list[Method]:
    """The methods of these names and those that the user adds as (name, flags); bases come first.

    Raises: InputError for a name that is unknown or taken, or for flags that train.py does not have.
    """
    own = {name: _added_method(name, flags) for name, flags in added}
    taken = sorted(set(own) & set(METHODS))
    if taken:
        raise InputError(f"--add {taken[0]}: this method exists; give yours another name")
    known = {**METHODS, **own}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--methods: {', '.join(unknown)} is unknown; choose from {', '.join(known)}")
    wanted = [known[name] for name in dict.fromkeys((*names, *own))]
    bases = [METHODS[method.base] for method in wanted if method.base]
    return list(dict.fromkeys([*bases, *wanted]))


def _added_method(name: str, text: str) -> Method:
    """A method of the user's flags; one that finetunes, and does not say what, has the base that post has."""
    flags = train_flags()
    try:
        words = tuple(shlex.split(text))
        given = parse_given(build_parser("train.py", TRAIN_SUMMARY, flags), flags, words)
    except ValueError as error:  # shlex's, of open quotes, or InputError
        raise InputError(f"--add {name}: {error}") from error
    has_model = given.get("start_pointcloud") or given.get("start_checkpoint")
    return Method(name, words, FINETUNE_BASE if given.get("prune_finetune") and not has_model else "")
