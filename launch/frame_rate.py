# SPDX-License-Identifier: Apache-2.0
"""How fast a trained model is drawn: frames per second over its test views, one after another, nothing written.

    python -m launch.frame_rate MODEL

The views are drawn once to warm up and then again and again for at least two seconds; the best round counts, since
whatever else the machine does only makes rounds slower. Written to MODEL/frame_rate.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from launch.cli import parse_render
from launch.config import pick
from launch.drawing import Drawer, load_drawer
from launch.machine import available_cores
from launch.run import run_main
from launch.world import device_type_of, leave_cores_to
from scene.cameras import Camera
from scene.dataset import SceneOptions, load_scene
from scene.model_folder import ModelFolder, write_json_atomically

FILE_NAME = "frame_rate.json"
LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class FrameRate:
    """Of the saved model of `iteration`, over `num_views` views; device: "cpu" or the GPU's name."""

    iteration: int
    frames_per_second: float
    num_views: int
    num_gaussians: int
    device: str


def measure_frame_rate(model: Path, flags: Sequence[str] = ()) -> FrameRate:
    """Draw the test views of a model (the training views without any) and return how fast that went.

    Args: flags: of render.py, for example --iteration or --threads.
    Raises: InputError when the model or its data set cannot be read.
    """
    config = parse_render(["-m", str(model), *flags])
    folder = ModelFolder.open(model)
    iteration = folder.find_iteration(config.render.iteration)
    device = torch.device(device_type_of(config.pipeline.backend))
    threads = config.pipeline.threads or available_cores()
    leave_cores_to(config.pipeline.backend, threads)
    drawer = load_drawer(config, folder.point_cloud(iteration), threads, device)
    scene = load_scene(config.model.source_path, pick(SceneOptions, config.model), progress=False)
    views = scene.test or scene.train
    _round_seconds(drawer, views)
    seconds, best = 0.0, float("inf")
    while seconds < LEAST_SECONDS:
        last = _round_seconds(drawer, views)
        seconds, best = seconds + last, min(best, last)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return FrameRate(iteration, len(views) / best, len(views), len(drawer.params["means"]), name)


def _round_seconds(drawer: Drawer, views: Sequence[Camera]) -> float:
    """Seconds that every view drawn once took."""
    start = time.perf_counter()
    for camera in views:
        image = drawer.rgb(camera)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def main(arguments: Sequence[str]) -> int:
    """Measure the model that the command line names, write the file and say the number."""
    parser = argparse.ArgumentParser(prog="python -m launch.frame_rate", description="Frames per second of a model.")
    parser.add_argument("model_path", type=Path, metavar="MODEL", help="folder of a trained model")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores [0]")
    options = parser.parse_args(arguments)
    found = measure_frame_rate(options.model_path, ("--threads", str(options.threads)))
    write_json_atomically(options.model_path / FILE_NAME, asdict(found))
    print(f"{found.frames_per_second:.1f} frames/s, {found.num_gaussians:,} Gaussians, {found.device}")
    return 0


if __name__ == "__main__":
    run_main(main)
