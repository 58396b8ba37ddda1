# SPDX-License-Identifier: Apache-2.0
"""Renders a flight through a trained model: what `render.py --path` does.

MODEL/path/ours_N/renders/00000.png     frames, 8-bit; alpha and depth as for views (`launch/drawing.py`)
MODEL/path/ours_N/cameras.json          the path, as in MODEL/cameras.json: edit it and give it to --path
MODEL/path/ours_N/path.mp4              with imageio-ffmpeg

Of an earlier path of the same iteration nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from distributed.communicator import Communicator
from launch.config import RenderConfig, pick
from launch.drawing import Pictures, draw_pictures, load_drawer, picture_name, remove_stale
from launch.video import can_write_video, write_video
from launch.world import leave_cores_to, threads_per_rank
from scene.camera_paths import cameras_at, ellipse, poses_of, resized, spiral
from scene.camera_splines import through, through_all
from scene.cameras import Camera
from scene.dataset import SceneOptions, load_scene
from scene.errors import InputError
from scene.model_folder import ModelFolder, camera_entry, write_text_atomically
from scene.path_files import CameraPath, read_path

NO_VIDEO = "no video: imageio-ffmpeg is missing (pip install imageio-ffmpeg, then the same command); the frames are in"


def render_path(config: RenderConfig, ranks: Communicator | None = None) -> int:
    """Render the camera path that the configuration asks for, and its video; return the number of frames.

    All ranks call it: each has the whole model and draws every W-th frame; rank 0 makes the video.

    Raises:
        InputError: the model, its cameras or the path file cannot be read, there is no path through the cameras, or a
            file cannot be written; PeerError on the ranks that had no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    is_shown = ranks.is_main and not config.render.quiet
    with ranks.all_or_none(InputError):
        folder = ModelFolder.open(config.model.model_path)
        iteration = folder.find_iteration(config.render.iteration)
        threads = threads_per_rank(config.pipeline.threads, ranks)
        leave_cores_to(config.pipeline.backend, threads)
        path = find_path(config, folder, print if is_shown else (lambda line: None))
        drawer = load_drawer(config, folder.point_cloud(iteration), threads, ranks.device)
    frames, place = path.cameras, folder.split_folder("path", iteration)
    if is_shown:
        size = f"{frames[0].width} x {frames[0].height} pixels"
        print(f"{len(drawer.params['means']):,} Gaussians of iteration {iteration:,}, {len(frames)} frames of {size}")
    with ranks.all_or_none(InputError):  # all ranks: nobody writes before what was there is gone
        if ranks.is_main:
            _clear(place)
            write_text_atomically(place / "cameras.json", _listed(frames))
    pictures = Pictures("path", frames, range(len(frames)), place)
    draw_pictures(pictures, drawer, config.render, ranks, threads=threads)
    with ranks.all_or_none(InputError):
        if ranks.is_main and can_write_video():
            names = [place / "renders" / picture_name(index) for index in range(len(frames))]
            write_video(names, place / "path.mp4", path.frames_per_second)
    if is_shown:
        video = place / "path.mp4"
        seconds = f"{len(frames) / path.frames_per_second:.1f} s at {path.frames_per_second:g} frames/s"
        print(f"{video}, {seconds}" if video.exists() else f"{NO_VIDEO} {place / 'renders'}")
    return len(frames)


def find_path(config: RenderConfig, folder: ModelFolder, notify: Callable[[str], None] = print) -> CameraPath:
    """Return the frames' cameras, all of one size, and the frames per second.

    `--path_frames` is the number of frames; those of a file are taken as they are unless it is given. `notify` receives
    a sentence for each thing that is done without having been asked for.

    Raises:
        InputError: see `render_path`.
    """
    flags = config.render
    count = flags.path_frames
    if flags.path not in ("ellipse", "spiral", "interpolate"):
        found = read_path(Path(flags.path).expanduser())
        cameras = _of_one_size(found.cameras, config)
        if "path_frames" in config.given:
            cameras = through(cameras, count)
        is_asked = "path_fps" in config.given or not found.frames_per_second
        return CameraPath(cameras, flags.path_fps if is_asked else found.frames_per_second)
    cameras = _of_one_size(_training_cameras(config, folder, notify), config)
    if flags.path == "interpolate":
        return CameraPath(through_all(cameras, count), flags.path_fps)
    make = ellipse if flags.path == "ellipse" else spiral
    return CameraPath(cameras_at(make(poses_of(cameras), count), cameras[0]), flags.path_fps)


def _training_cameras(config: RenderConfig, folder: ModelFolder, notify: Callable[[str], None]) -> Sequence[Camera]:
    """The training cameras of the data set; without the data set all cameras of the model folder, which has no photos.

    Raises:
        InputError: neither can be read.
    """
    if config.model.source_path.is_dir() or "source_path" in config.given or not folder.cameras.is_file():
        options = pick(SceneOptions, config.model)
        return load_scene(config.model.source_path, options, notify=notify, progress=False).train
    notify(f"{config.model.source_path} is not here: the path comes from all cameras in {folder.cameras}")
    return read_path(folder.cameras).cameras


def _of_one_size(cameras: Sequence[Camera], config: RenderConfig) -> tuple[Camera, ...]:
    """The cameras for pictures of the size that is asked for, or of the first one's."""
    if not cameras:
        raise InputError(f"{config.model.source_path} has no training camera to derive a path from: give a file.")
    first = resized(cameras[0], config.render.path_width, config.render.path_height)
    return tuple(resized(camera, first.width, first.height) for camera in cameras)


def _listed(frames: Sequence[Camera]) -> str:
    """The frames in the form of cameras.json."""
    return json.dumps([camera_entry(index, camera) for index, camera in enumerate(frames)])


def _clear(place: Path) -> None:
    """Make the folder, and remove the pictures and the video of another path in it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        remove_stale(place, 0)
        for name in ("path.mp4", "depth/scales.json"):
            (place / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error.strerror or error}. Change its permissions.") from error
