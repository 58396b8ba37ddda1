# SPDX-License-Identifier: Apache-2.0
"""render.py: which pictures it writes, that they are the model's, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colmap_builder import build_model, write_binary, write_photos
from gaussian_renderer.rendering import render_view
from launch.cli import parse_train
from launch.config import RenderFlags, cfg_args_values, to_plain
from launch.drawing import Drawer, PictureWriter
from launch.render_views import chosen_views, main
from launch.world import torch_threads
from masksplat.ops import get_body
from scene.cameras import Camera
from scene.dataset import SceneOptions, load_scene
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.photo import read_photo
from scene.ply import load_ply, save_ply
from scene.points import initial_gaussians

REPO = Path(__file__).parent.parent
REFERENCE = ("--backend", "reference", "--threads", "1")


@pytest.fixture
def model(generated_scene: Path, tmp_path: Path) -> Path:
    """A model folder with two saved iterations: the scene's first Gaussians, and the same made larger."""
    return write_model(generated_scene, tmp_path / "model", "--eval")


def write_model(source: Path, path: Path, *flags: str) -> Path:
    """Write what train.py leaves for render.py."""
    config = parse_train(["-s", str(source), "-m", str(path), *flags])
    folder = ModelFolder.create(path)
    folder.write_config(to_plain(config), ["train.py"])
    folder.write_cfg_args(cfg_args_values(config.model))
    scene = load_scene(source, SceneOptions(eval=config.model.eval), progress=False)
    folder.write_cameras(scene.train, scene.test)
    params = {name: torch.from_numpy(values) for name, values in initial_gaussians(scene.points, 1).items()}
    params["opacities"] += 4.0
    params["scales"] -= 0.9
    for iteration in (7, 30):
        save_ply(folder.point_cloud(iteration), params)
        params["scales"] = params["scales"] + 0.5
    return path


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_pictures_are_the_rounded_render_in_the_order_of_the_data_set(model: Path, generated_scene: Path) -> None:
    assert main(["-m", str(model), "--skip_train", *REFERENCE]) == 0
    place = model / "test" / "ours_30"
    scene = load_scene(generated_scene, SceneOptions(eval=True), progress=False)
    assert len(scene.test) == 2
    params = {name: torch.from_numpy(v) for name, v in load_ply(ModelFolder(model).point_cloud(30)).items()}
    for index, camera in enumerate(scene.test):
        drawn = render_view(params, camera, sh_degree=1, background=torch.zeros(3), body=get_body("reference"))
        levels = np.floor(drawn.rgb.double().numpy() * 255 + 0.5).astype(np.uint8)
        written = _pixels(place / "renders" / f"{index:05d}.png")
        assert written.std() > 5
        # a tie of the rounding may go either way
        assert np.abs(written.astype(int) - levels).max() <= 1
        assert (written != levels).mean() < 0.001
        photo = read_photo(camera.image_path, (camera.width, camera.height), (0.0, 0.0, 0.0))
        assert np.array_equal(_pixels(place / "gt" / f"{index:05d}.png"), photo)
    assert sorted(path.name for path in (place / "renders").iterdir()) == ["00000.png", "00001.png"]
    assert not (model / "train").exists()


def test_an_older_iteration_and_both_sets(model: Path) -> None:
    main(["-m", str(model), "--iteration", "7", "--quiet", *REFERENCE])
    assert len(list((model / "train/ours_7/renders").glob("*.png"))) == 14
    assert len(list((model / "test/ours_7/gt").glob("*.png"))) == 2


def test_white_background_and_other_options_come_from_the_model_folder(generated_scene: Path, tmp_path: Path) -> None:
    model = write_model(generated_scene, tmp_path / "white", "--eval", "--white_background")
    main(["-m", str(model), "--skip_train", "--alpha", *REFERENCE])
    empty = _pixels(model / "test/ours_30/alpha/00000.png") == 0
    assert 0.05 < empty.mean() < 0.95
    assert (_pixels(model / "test/ours_30/renders/00000.png")[empty] == 255).all()


def test_depth_is_stored_with_its_scale(model: Path, generated_scene: Path) -> None:
    main(["-m", str(model), "--skip_train", "--depth", *REFERENCE])
    place = model / "test/ours_30/depth"
    scale = json.loads((place / "scales.json").read_text())["00001.png"]
    camera = load_scene(generated_scene, SceneOptions(eval=True), progress=False).test[1]
    params = {name: torch.from_numpy(v) for name, v in load_ply(ModelFolder(model).point_cloud(30)).items()}
    drawn = render_view(params, camera, sh_degree=1, background=torch.zeros(3), body=get_body("reference"))
    stored = _pixels(place / "00001.png").astype(np.float64) * scale
    assert stored.max() == pytest.approx(float(drawn.depth.max()), rel=1e-4)
    assert np.abs(stored - drawn.depth.numpy()).max() < 1e-3
    assert 2.5 < stored.max() < 6  # the scene is at a distance of 4


def test_fewer_views_keep_their_numbers_and_the_pictures_of_others(model: Path) -> None:
    main(["-m", str(model), "--skip_test", "--l", "3", "--r", "12", "--sample_freq", "4", *REFERENCE])
    main(["-m", str(model), "--skip_test", "--generate_num", "1", *REFERENCE])
    names = sorted(path.name for path in (model / "train/ours_30/renders").iterdir())
    assert names == ["00000.png", "00003.png", "00007.png", "00011.png"]


def test_pictures_of_an_earlier_larger_set_are_removed(model: Path) -> None:
    stale = model / "test/ours_30/renders/00002.png"
    stale.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(stale)
    main(["-m", str(model), "--skip_train", *REFERENCE])
    assert not stale.exists()


def test_the_rate_is_that_of_drawing_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither kernels that are compiled at the first view nor files that are written count."""
    draw, write, calls = Drawer.rgb, PictureWriter.write, []

    def slow_at_first(drawer: Drawer, camera: Camera) -> torch.Tensor:
        time.sleep(0.0 if calls else 1.0)
        calls.append(camera)
        return draw(drawer, camera)

    def slow(writer: PictureWriter, path: Path, pixels: torch.Tensor) -> None:
        time.sleep(0.25)
        write(writer, path, pixels)

    monkeypatch.setattr(Drawer, "rgb", slow_at_first)
    monkeypatch.setattr(PictureWriter, "write", slow)
    started = time.perf_counter()
    assert main(["-m", str(model), "--skip_train", "--backend", "cpu", "--threads", "1"]) == 0
    whole = time.perf_counter() - started
    (found,) = re.findall(r"^2 test views in .*, drawn in ([\d.]+) s \(([\d.]+) views/s", capsys.readouterr().out, re.M)
    assert len(calls) == 3
    assert float(found[0]) < whole - 1.9, "1 s of compiling and 1 s of writing"
    assert float(found[1]) > 0


def test_chosen_views() -> None:
    assert chosen_views(5, RenderFlags()) == [0, 1, 2, 3, 4]
    assert chosen_views(5, RenderFlags(l=1, r=9, sample_freq=2)) == [1, 3]
    assert chosen_views(5, RenderFlags(generate_num=0)) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iteration", "8"], "iteration 8 was not saved .* saved are 7, 30"),
        (["--skip_train", "--skip_test"], "no view to render: .* 14 training and 2 test views"),
        (["-s", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_refusals(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(["-m", str(model), *flags, *REFERENCE])


def test_data_of_another_scene_are_refused(model: Path, tmp_path: Path) -> None:
    """Before a picture of the right data is overwritten. The same data elsewhere are fine."""
    other = build_model(num_views=16, size=(64, 48), num_points=60)
    moved = replace(other, images=[replace(image, translation=[0.5, 0.5, 4.0]) for image in other.images])
    for name, scene in (("same", other), ("other", moved)):
        write_binary(tmp_path / name / "sparse" / "0", scene)
        write_photos(tmp_path / name / "images", scene)
    assert main(["-m", str(model), "-s", str(tmp_path / "same"), "--skip_train", *REFERENCE]) == 0
    with pytest.raises(InputError, match="was not trained on these data: none of their 16 cameras"):
        main(["-m", str(model), "-s", str(tmp_path / "other"), "--skip_train", *REFERENCE])


def test_a_model_without_test_views_says_how_to_get_some(generated_scene: Path, tmp_path: Path) -> None:
    model = write_model(generated_scene, tmp_path / "no-test")
    with pytest.raises(InputError, match="trained without test views.*--eval"):
        main(["-m", str(model), "--skip_train", *REFERENCE])


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="00000.png cannot be written"), PictureWriter(1) as writer:
        writer.write(tmp_path / "file" / "00000.png", torch.zeros(2, 2, 3, dtype=torch.uint8))


def test_the_script_itself_fails_without_a_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO / "submodules" / "masksplat")}
    done = subprocess.run(
        [sys.executable, str(REPO / "render.py"), "-m", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 2
    assert "nothing does not exist" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("backend", "expected"), [("reference", 2), ("cpu", 1)])
def test_torch_has_one_thread_beside_a_body_that_brings_its_own(model: Path, backend: str, expected: int) -> None:
    """Torch's threads spin while the kernels' compute: a quarter of the time of render.py."""
    with torch_threads(3):
        assert main(["-m", str(model), "--skip_train", "--quiet", "--threads", "2", "--backend", backend]) == 0
        assert torch.get_num_threads() == expected
