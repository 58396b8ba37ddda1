# SPDX-License-Identifier: Apache-2.0
"""Renders the views of a trained model to PNG files: what `render.py` does unless it is asked for a path.

MODEL/{train,test}/ours_N/{renders,gt}/00000.png     numbered in the order of the data set; see `launch/drawing.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from distributed.communicator import Communicator
from launch.cli import parse_render
from launch.config import RenderConfig, RenderFlags, pick
from launch.drawing import Drawer, Pictures, draw_pictures, load_drawer, remove_stale
from launch.render_path import render_path
from launch.world import device_type_of, joined_world, leave_cores_to, parse_once, threads_per_rank
from scene.cameras import Camera
from scene.dataset import Scene, SceneOptions, load_scene
from scene.errors import InputError
from scene.images import ImageStore
from scene.model_folder import ModelFolder

SAME_PLACE = 1e-3
"""Of the scene's extent, within which two cameras are the same."""


def render_model(config: RenderConfig, ranks: Communicator | None = None) -> int:
    """Render the views that the configuration asks for; return how many were rendered.

    All ranks call it: each has the whole model and draws every W-th view.

    Raises:
        InputError: the model or its data set cannot be read, there is no such view, or a picture cannot be written;
            PeerError on the ranks that had no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    is_shown = ranks.is_main and not config.render.quiet
    with ranks.all_or_none(InputError):
        folder = ModelFolder.open(config.model.model_path)
        iteration = folder.find_iteration(config.render.iteration)
        threads = threads_per_rank(config.pipeline.threads, ranks)
        leave_cores_to(config.pipeline.backend, threads)
        drawer = load_drawer(config, folder.point_cloud(iteration), threads, ranks.device)
        notify = print if is_shown else _say_nothing
        options = pick(SceneOptions, config.model)
        scene = load_scene(config.model.source_path, options, notify=notify, progress=is_shown)
        check_scene(scene, folder)
        splits = _wanted_splits(config, scene)
    if is_shown:
        print(f"{len(drawer.params['means']):,} Gaussians of iteration {iteration:,}")
    places = {split: folder.split_folder(split, iteration) for split in splits}
    return sum(_render_split(config, drawer, cameras, places[split], ranks) for split, cameras in splits.items())


def _say_nothing(notice: str) -> None:
    """Takes the notices of ranks that show nothing: rank 0 has said the same."""


def check_scene(scene: Scene, folder: ModelFolder) -> None:
    """Raises: InputError when no camera of a scene is where one of a model's cameras.json is."""
    known = folder.camera_centers()
    centers = np.array([camera.center for camera in (*scene.train, *scene.test)]).reshape(-1, 3)
    if not len(known) or not len(centers):
        return
    distance, _ = cKDTree(known).query(centers)
    if distance.min() > SAME_PLACE * scene.extent:
        raise InputError(
            f"the model in {folder.path} was not trained on these data: none of their {len(centers)} cameras is where "
            f"one of cameras.json is ({len(known)}); give the data it was trained on with -s"
        )


def chosen_views(count: int, flags: RenderFlags) -> list[int]:
    """Return the indices that --l, --r, --sample_freq and --generate_num leave of `count` views."""
    first, stop = max(flags.l, 0), count if flags.r < 0 else min(flags.r, count)
    views = list(range(first, stop, max(flags.sample_freq, 1)))
    return views if flags.generate_num < 0 else views[: flags.generate_num]


def _wanted_splits(config: RenderConfig, scene: Scene) -> dict[str, tuple[Camera, ...]]:
    """Return the cameras of the sets to render.

    Raises:
        InputError: nothing is left to render.
    """
    skipped = {"train": config.render.skip_train, "test": config.render.skip_test}
    splits = {
        split: cameras
        for split, cameras in (("train", scene.train), ("test", scene.test))
        if not skipped[split] and chosen_views(len(cameras), config.render)
    }
    if splits:
        return splits
    hint = "choose other views (--skip_train, --skip_test, --l, --r, --generate_num)"
    if not scene.test and not skipped["test"]:
        hint = f"{config.model.model_path} was trained without test views: render the training views (no --skip_train)"
        hint += ", or train with --eval"
    raise InputError(f"there is no view to render: {scene.source} has {len(scene.train)} training and "
                     f"{len(scene.test)} test views; {hint}.")  # fmt: skip


def _render_split(
    config: RenderConfig, drawer: Drawer, cameras: Sequence[Camera], place: Path, ranks: Communicator
) -> int:
    """Render the chosen views of one set into its folder; return how many there are. All ranks."""
    indices, threads = chosen_views(len(cameras), config.render), threads_per_rank(config.pipeline.threads, ranks)
    pictures = Pictures(place.parent.name, cameras, indices, place)
    with ranks.all_or_none(InputError):
        if ranks.is_main and len(indices) == len(cameras):
            remove_stale(place, len(cameras))
    with _open_photos(config, cameras, threads) as photos:
        draw_pictures(pictures, drawer, config.render, ranks, threads=threads, photos=photos)
    return len(indices)


def _open_photos(config: RenderConfig, cameras: Sequence[Camera], threads: int) -> ImageStore:
    """Return the photos of some cameras, composited on the model's background."""
    return ImageStore(
        cameras,
        background=(float(config.model.white_background),) * 3,
        byte_budget=int(config.pipeline.image_cache_gb * (1 << 30)),
        num_threads=threads,
    )


def main(arguments: Sequence[str]) -> int:
    """Render what the command line asks for.

    Raises:
        InputError: see `render_model` and `render_path`.
    """
    config = parse_once(parse_render, arguments)
    with joined_world(device_type_of(config.pipeline.backend)) as ranks:
        if ranks.is_main and not config.render.quiet:
            for notice in config.notices:
                print(notice)
        if config.render.path:
            render_path(config, ranks)
        else:
            render_model(config, ranks)
    return 0
