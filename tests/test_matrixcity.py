# SPDX-License-Identifier: Apache-2.0
"""MatrixCity's scenes: lenses of files and frames, photos in several folders, split, cloud, malformed files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import train
from scene.cameras import Camera
from scene.dataset import Scene, SceneOptions, load_scene
from scene.errors import InputError
from transforms_builder import BALLS, draw, focal_of, project, ring, write_city, write_cloud, write_json

SIZE = (48, 40)


def load(source: Path, **options: Any) -> Scene:
    return load_scene(source, SceneOptions(**options), notify=pytest.fail, progress=False)


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with four training photos and one test photo each; do not write into it."""
    return write_city(tmp_path_factory.mktemp("city"))


@pytest.fixture
def own_city(tmp_path: Path, city: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(city.parent.parent, tmp_path / "city")) / "pose" / "block_A"


def pixels_of(camera: Camera, xyz: np.ndarray) -> np.ndarray:
    seen = camera.rotation @ xyz.T + camera.translation[:, None]
    assert (seen[2] > 0).all()
    image = camera.intrinsics @ seen
    return (image[:2] / image[2]).T


def one_view(folder: Path, size: tuple[int, int], lens: dict[str, Any], **of_file: Any) -> Camera:
    """The camera of a scene with one frame, whose photo has `size` pixels."""
    folder.mkdir()
    matrix = ring(1)[0]
    Image.fromarray(draw(matrix, size, (60.0, 60.0))).save(folder / "a.png")
    frame = {"file_path": "a.png", "transform_matrix": matrix.tolist(), **lens}
    write_json(folder / "transforms_train.json", [frame], **of_file)
    write_cloud(folder / "points.ply")
    return load(folder, dataset_type="matrixcity").train[0]


# Lenses and poses


def test_every_frame_has_its_own_lens(city: Path) -> None:
    scene = load(city)
    for index, (camera, matrix) in enumerate(zip(scene.train, ring(8), strict=True)):
        focal = (65.0, 67.0) if index < 4 else (70.0, 72.0)
        assert (camera.fx, camera.fy) == focal
        np.testing.assert_allclose(pixels_of(camera, BALLS), project(matrix, BALLS, SIZE, focal), atol=1e-9)
        np.testing.assert_allclose(camera.center, matrix[:3, 3], atol=1e-12)


def test_lenses_of_a_whole_file(tmp_path: Path) -> None:
    """As MatrixCity's generate_split.py writes them: angle and focal length agree, at the size of the renders."""
    angle = 0.9
    focal = focal_of(angle, 96)
    values = {"camera_angle_x": angle, "fl_x": focal, "fl_y": focal, "cx": 48.0, "cy": 40.0, "w": 96.0, "h": 80.0}
    camera = one_view(tmp_path / "half", SIZE, {}, **values, k1=0, p1=0)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx((focal / 2, focal / 2, 24.0, 20.0))
    assert 2 * math.atan(camera.width / 2 / camera.fx) == pytest.approx(angle)


@pytest.mark.parametrize(
    ("lens", "of_file", "expected"),
    [
        ({"fl_x": 50.0}, {}, (50.0, 50.0, 24.0, 20.0)),
        ({"fl_x": 50.0, "fl_y": 52.0, "cx": 20.0, "cy": 22.0}, {}, (50.0, 52.0, 20.0, 22.0)),
        ({}, {"fl_x": 50.0, "fl_y": 52.0, "cx": 20.0}, (50.0, 52.0, 20.0, 20.0)),
        ({"fl_x": 100.0, "cx": 40.0}, {"w": 96, "h": 80}, (50.0, 50.0, 20.0, 20.0)),
        ({"camera_angle_x": 1.0}, {"camera_angle_x": 0.5}, (focal_of(1.0, 48),) * 2 + (24.0, 20.0)),
        ({"fl_x": 50.0}, {"camera_angle_x": 0.5, "cx": 3.0}, (50.0, 50.0, 24.0, 20.0)),
        (
            {},
            {"camera_angle_x": 1.0, "fl_x": 9.0, "fl_y": 18.0},
            (focal_of(1.0, 48), 2 * focal_of(1.0, 48), 24.0, 20.0),
        ),
    ],
)
def test_which_number_of_a_lens_counts(
    tmp_path: Path, lens: dict[str, Any], of_file: dict[str, Any], expected: tuple[float, ...]
) -> None:
    """A frame's lens comes before the file's; an angle before pixels; pixels are those of w x h if that is said."""
    camera = one_view(tmp_path / "scene", SIZE, lens, **of_file)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx(expected)


def test_lenses_shrink_with_the_photo(city: Path) -> None:
    for camera, whole in zip(load(city, resolution=2).train, load(city).train, strict=True):
        assert (camera.width, camera.height, camera.cx, camera.cy) == (24, 20, 12.0, 10.0)
        np.testing.assert_allclose(pixels_of(camera, BALLS), pixels_of(whole, BALLS) / 2, atol=1e-9)


def test_photos_of_different_sizes_are_legal(own_city: Path) -> None:
    path = own_city.parent.parent / "train" / "block_2" / "0001.png"
    Image.new("RGB", (20, 90)).save(path)
    camera = load(own_city).train[5]
    assert (camera.width, camera.height, camera.fx, camera.cx, camera.cy) == (20, 90, 70.0, 10.0, 45.0)


# Paths, split, cloud


def test_photos_of_several_folders_keep_names_that_differ(city: Path) -> None:
    scene = load(city)
    names = [camera.name for camera in (*scene.train, *scene.test)]
    expected = [f"train/block_{block}/{number:04d}.png" for block in (1, 2) for number in range(4)]
    assert names == [*expected, "test/block_1/0000.png", "test/block_2/0000.png"]
    assert all(camera.image_path.is_file() for camera in scene.train)


def test_the_files_are_the_split_whatever_eval_says(city: Path) -> None:
    for is_held_out in (False, True):
        scene = load(city, eval=is_held_out)
        assert (len(scene.train), len(scene.test)) == (8, 2)
    assert len(load(city, eval=True, num_test_cameras=1).test) == 1


def test_paths_from_the_current_folder_and_from_the_root(own_city: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grendel-GS looks from the current folder; absolute paths are as good."""
    root = own_city.parent.parent
    values = json.loads((own_city / "transforms_train.json").read_text())
    for index, frame in enumerate(values["frames"]):
        frame["file_path"] = frame["file_path"].replace("../..", str(root) if index % 2 else root.name)
    (own_city / "transforms_train.json").write_text(json.dumps(values))
    monkeypatch.chdir(root.parent)
    assert [camera.name for camera in load(own_city).train][:2] == ["train/block_1/0000.png", "train/block_1/0001.png"]
    monkeypatch.chdir(root)
    with pytest.raises(InputError, match=r"cannot be used \(4\): .*the file does not exist"):
        load(own_city)


def test_a_missing_test_file_matters_only_with_eval(own_city: Path) -> None:
    (own_city / "transforms_test.json").unlink()
    scene = load(own_city)
    assert [camera.name for camera in scene.train][::4] == ["block_1/0000.png", "block_2/0000.png"]
    with pytest.raises(InputError, match="has no transforms_test.json.*without --eval"):
        load(own_city, eval=True)


def test_the_one_cloud_of_the_folder_is_the_start(own_city: Path) -> None:
    xyz = write_cloud(own_city / "points.ply", number=77)
    np.testing.assert_array_equal(load(own_city).points.xyz, xyz.astype(np.float32))
    write_cloud(own_city / "other.ply")
    with pytest.raises(InputError, match="several clouds .other.ply, points.ply.*leave only that one"):
        load(own_city)
    for path in own_city.glob("*.ply"):
        path.unlink()
    with pytest.raises(InputError, match="has no [*].ply.*--dataset_type blender"):
        load(own_city)


# Malformed files


def in_frame(key: str, value: Any, number: int = 3) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["frames"][number].update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (in_frame("fl_x", None), r"frame 3 .*neither the frame nor transforms_train.json has camera_angle_x"),
        (in_frame("fl_x", 0), "frame 3 .*fl_x is 0; it must be a number from 0.01"),
        (in_frame("fl_x", float("nan")), "fl_x is nan"),
        (in_frame("fl_y", "60"), "fl_y is '60'"),
        (in_frame("cx", float("inf")), "cx is inf"),
        (in_frame("cx", 400.0), r"\(1\): train/block_1/0003.png: its principal point \(400, 20\) is far outside"),
        (in_frame("w", 0), "w is 0; it must be a number from 1"),
        (in_frame("w", 480.0), r"\(1\): .*0003.png: the image has 48x40 pixels, its camera 480x40"),
        (in_frame("k2", -0.1), "frame 3 .*k2 = -0.1 is lens distortion"),
        (in_frame("k2", "none"), "frame 3 .*k2 = 'none' is lens distortion"),
        (lambda values: values.update(p2=1e-3), "p2 = 0.001 is lens distortion"),
        (in_frame("file_path", "../../train/block_9/0003.png"), r"\(1\): train/block_9/0003.png: the file does not"),
        (in_frame("file_path", "../../train/block_1/../block_1/0002.png"), "frame 3 .*means the photo of .*frame 2"),
    ],
)
def test_malformed_lenses_and_paths(own_city: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    path = own_city / "transforms_train.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as error:
        load(own_city)
    assert "transforms_train.json" in str(error.value)


# Training


def test_train_py_trains_a_city(city: Path, tmp_path: Path) -> None:
    """Two blocks with different lenses, from the folder alone: the loss falls and the test views are measured."""
    flags = ("--iterations", "40", "--log_interval", "8", "--quiet", "--no-report", "--test_iterations", "40")
    assert train.main(["-s", str(city), "-m", str(tmp_path / "m"), *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses[-1] < 0.8 * losses[0]
    assert any(record.get("split") == "test" for record in records)
