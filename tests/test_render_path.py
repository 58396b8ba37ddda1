# SPDX-License-Identifier: Apache-2.0
"""render.py --path: which frames it writes, that they are the model's, on one process and several, and the video."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed.communicator import Communicator
from gaussian_renderer.rendering import render_view
from launch import video
from launch.cli import parse_render
from launch.render_path import render_path
from launch.render_views import main
from masksplat.ops import get_body
from rank_harness import run_ranks
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.path_files import read_path
from scene.ply import load_ply
from test_render_script import REFERENCE, write_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(generated_scene: Path, tmp_path: Path) -> Path:
    return write_model(generated_scene, tmp_path / "model", "--eval")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_frames_are_the_model_seen_from_the_listed_cameras(model: Path) -> None:
    flags = ("--path", "ellipse", "--path_frames", "5", "--path_width", "40", "--depth", "--alpha", "--quiet")
    assert main(["-m", str(model), *flags, *REFERENCE]) == 0
    place = model / "path" / "ours_30"
    assert set(listed(place)) - {"path.mp4"} == {"alpha", "cameras.json", "depth", "renders"}
    names = [f"{index:05d}.png" for index in range(5)]
    assert listed(place / "renders") == listed(place / "alpha") == names
    assert listed(place / "depth") == [*names, "scales.json"]
    scales = json.loads((place / "depth" / "scales.json").read_text())
    params = {name: torch.from_numpy(v) for name, v in load_ply(ModelFolder(model).point_cloud(30)).items()}
    for name, camera in zip(names, read_path(place / "cameras.json").cameras, strict=True):
        assert (camera.width, camera.height) == (40, 30)
        drawn = render_view(params, camera, sh_degree=1, background=torch.zeros(3), body=get_body("reference"))
        for kind, values in (("renders", drawn.rgb), ("alpha", drawn.alpha)):
            assert np.abs(pixels(place / kind / name) - values.double().numpy() * 255).max() < 0.51
        assert pixels(place / "renders" / name).std() > 5
        stored = pixels(place / "depth" / name) * scales[name]
        assert np.abs(stored - drawn.depth.double().numpy()).max() < 1e-3
    assert not (model / "train").exists() and not (model / "test").exists()


def test_a_file_gives_its_frames_and_a_smooth_path_through_them(model: Path) -> None:
    path = model / "mine.json"
    entries = json.loads((model / "cameras.json").read_text())[2:5]
    path.write_text(json.dumps(entries))
    main(["-m", str(model), "--path", str(path), "--quiet", *REFERENCE])
    place = model / "path" / "ours_30"
    assert len(listed(place / "renders")) == 3
    main(["-m", str(model), "--path", str(path), "--path_frames", "9", "--iteration", "7", "--quiet", *REFERENCE])
    written = json.loads((model / "path" / "ours_7" / "cameras.json").read_text())
    assert len(written) == len(listed(model / "path" / "ours_7" / "renders")) == 9
    assert np.allclose(written[0]["position"], entries[0]["position"])
    assert np.allclose(written[-1]["rotation"], entries[-1]["rotation"])


def test_an_earlier_path_is_gone(model: Path) -> None:
    main(["-m", str(model), "--path", "ellipse", "--path_frames", "4", "--depth", "--quiet", *REFERENCE])
    main(["-m", str(model), "--path", "interpolate", "--path_frames", "3", "--quiet", *REFERENCE])
    place = model / "path" / "ours_30"
    assert len(listed(place / "renders")) == 3 and listed(place / "depth") == []


def test_the_data_set_is_not_needed(model: Path, generated_scene: Path) -> None:
    """A model that came alone has the cameras of its folder; those of the data set are the training cameras."""
    config = parse_render(["-m", str(model), "--path", "ellipse"])
    assert config.model.source_path == generated_scene
    flags = ("--path", "ellipse", "--path_frames", "3", "--quiet", *REFERENCE)
    stored = json.loads((model / "config.json").read_text())
    stored["config"]["model"]["source_path"] = str(model / "not-here")
    (model / "config.json").write_text(json.dumps(stored))
    main(["-m", str(model), *flags])
    assert len(listed(model / "path" / "ours_30" / "renders")) == 3
    (model / "cameras.json").unlink()
    with pytest.raises(InputError, match="not-here"):
        main(["-m", str(model), *flags])


def _render(ranks: Communicator, model: str) -> int:
    flags = ("--path", "spiral", "--path_frames", "5", "--depth", "--quiet", "--threads", "1", "--backend", "cpu")
    folder = Path(model)
    entries = json.loads((folder / "cameras.json").read_text())
    (folder / f"few{ranks.rank}.json").write_text(json.dumps([entries[index] for index in (2, 3, 4, 5, 6)]))
    config = parse_render(["-m", model, *flags, "--path", str(folder / f"few{ranks.rank}.json")])
    return render_path(config, ranks)


def test_several_ranks_write_what_one_does(model: Path) -> None:
    files = {}
    for size in (1, 2, 3):
        assert run_ranks(_render, size, str(model)) == [5] * size
        place = model / "path" / "ours_30"
        found = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".mp4"]
        files[size] = {path.relative_to(place).as_posix(): path.read_bytes() for path in found}
    assert len(files[1]) == 5 + 5 + 1 + 1
    assert files[1] == files[2] == files[3]


def test_the_script_itself_under_torchrun(model: Path) -> None:
    """Two processes: the frames are shared out and the line about the video is printed once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc-per-node=2"]
    flags = ["-m", str(model), "--path", "ellipse", "--path_frames", "4", "--threads", "1", "--skip_train"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "render.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("--skip_train has no effect: with --path no view is drawn.") == 1
    assert done.stdout.count("4 path views in ") == 1
    assert done.stdout.count("path.mp4, 0.1 s at 30 frames/s") + done.stdout.count("pip install imageio-ffmpeg") == 1
    assert len(listed(model / "path" / "ours_30" / "renders")) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["elipse"], "elipse cannot be read: .*--path takes ellipse, spiral, interpolate, or a JSON file"),
        (["ellipse", "--path_frames", "0"], "--path_frames 0 is impossible: give a number of at least 1"),
        (["ellipse", "--path_fps", "0"], "--path_fps 0.0 is impossible"),
        (["ellipse", "--path_width", "-4"], "--path_width -4 is impossible"),
        (["spiral"], "a spiral is for cameras that look the same way"),
        (["ellipse", "--num_train_cameras", "2"], "an ellipse needs at least 3 training cameras, and there are 2"),
        (["interpolate", "--num_train_cameras", "1"], "at least 2 training cameras, and there are 1"),
        (["ellipse", "--iteration", "8"], "iteration 8 was not saved"),
    ],
)
def test_refusals(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(["-m", str(model), "--path", *flags, *REFERENCE])
    assert not (model / "path").exists()


def test_a_mistake_ends_the_script_with_status_2(model: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "submodules" / "masksplat")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "render.py"), "-m", str(model), "--path", str(model / "none.json")],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "none.json cannot be read" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_flags_that_belong_to_a_path_say_so_without_one(model: Path) -> None:
    assert parse_render(["-m", str(model), "--path_fps", "9"]).notices == (
        "--path_fps has no effect: without --path there is no path.",
    )
    assert parse_render(["-m", str(model), "--path", "ellipse", "--path_fps", "9"]).notices == ()


def test_without_the_package_a_line_says_how_to_get_a_video(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video, "PACKAGE", "a_package_that_nobody_has")
    assert main(["-m", str(model), "--path", "ellipse", "--path_frames", "2", *REFERENCE]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    place = model / "path" / "ours_30"
    assert last == (
        "no video: imageio-ffmpeg is missing (pip install imageio-ffmpeg, then the same command); the frames are in "
        f"{place / 'renders'}"
    )
    assert not (place / "path.mp4").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pipes of the package's reader
def test_a_video_is_h264_of_even_size_and_shows_the_frames(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed: no video to look at")
    colours = [(200, 40, 40), (40, 180, 60), (40, 60, 190)]
    names = [tmp_path / f"{index:05d}.png" for index in range(3)]
    for name, colour in zip(names, colours, strict=True):
        Image.new("RGB", (33, 27), colour).save(name)
    video.write_video(names, tmp_path / "v.mp4", 12.5)
    assert listed(tmp_path) == [name.name for name in names] + ["v.mp4"]
    reader = ffmpeg.read_frames(str(tmp_path / "v.mp4"))
    about = next(reader)
    assert (about["size"], about["fps"], about["codec"]) == ((34, 28), 12.5, "h264")
    assert about["pix_fmt"].startswith("yuv420p")
    frames = [np.frombuffer(frame, np.uint8).reshape(28, 34, 3) for frame in reader]
    assert len(frames) == 3
    for frame, colour in zip(frames, colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() < 12
    with pytest.raises(InputError, match=r"v\.mp4 cannot be written: .* The frames are in"):
        video.write_video(names, tmp_path / "missing" / "v.mp4", 10)
