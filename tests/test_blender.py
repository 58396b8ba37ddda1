# SPDX-License-Identifier: Apache-2.0
"""NeRF-synthetic scenes: axes, field of view, split, points, transparency, and what is said about malformed files."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from launch.flag import spec_of
from launch.flag_groups import ModelConfig
from scene.cameras import Camera
from scene.dataset import DATASET_TYPES, Scene, SceneOptions, load_scene
from scene.errors import InputError
from scene.images import ImageStore, on_background
from scene.point_cloud import random_points
from transforms_builder import ANGLE, BALLS, COLORS, focal_of, project, ring, write_blender, write_cloud

SIZE = (48, 40)


def load(source: Path, notices: list[str] | None = None, **options: Any) -> Scene:
    return load_scene(source, SceneOptions(**options), notify=(notices or []).append, progress=False)


@pytest.fixture(scope="module")
def blender_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and three test photos; do not write into it."""
    return write_blender(tmp_path_factory.mktemp("blender"))


@pytest.fixture
def own_scene(tmp_path: Path, blender_scene: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(blender_scene, tmp_path / "scene"))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def pixels_of(camera: Camera, xyz: np.ndarray) -> np.ndarray:
    """Pixels (P, 2) of world points (P, 3), which must lie in front of the camera."""
    seen = camera.rotation @ xyz.T + camera.translation[:, None]
    assert (seen[2] > 0).all()
    image = camera.intrinsics @ seen
    return (image[:2] / image[2]).T


# Cameras


def test_points_project_where_blender_sees_them(blender_scene: Path) -> None:
    """The formula in Blender's axes and our camera agree to rounding; so do the position and a proper rotation."""
    scene = load(blender_scene, eval=True)
    focal = focal_of(ANGLE, SIZE[0])
    poses = [*ring(8), *ring(3, phase=0.3)]
    for camera, matrix in zip((*scene.train, *scene.test), poses, strict=True):
        expected = project(matrix, BALLS, SIZE, (focal, focal))
        np.testing.assert_allclose(pixels_of(camera, BALLS), expected, atol=1e-9)
        np.testing.assert_allclose(camera.center, matrix[:3, 3], atol=1e-12)
        np.testing.assert_allclose(camera.rotation @ camera.rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(camera.rotation) == pytest.approx(1)
        np.testing.assert_allclose(camera.rotation[2], -matrix[:3, 2], atol=1e-12)  # looks along Blender's -z
        np.testing.assert_allclose(camera.rotation[1], -matrix[:3, 1], atol=1e-12)  # y is down


def test_balls_are_in_the_photos_where_they_project_to(blender_scene: Path) -> None:
    """Ties pixels to poses: the pixel that a ball's centre falls into has the colour of the nearest ball there."""
    scene = load(blender_scene)
    checked = 0
    with ImageStore(scene.train) as photos:
        for index, camera in enumerate(scene.train):
            depth = (camera.rotation @ BALLS.T + camera.translation[:, None])[2]
            spots = pixels_of(camera, BALLS)
            for ball in range(len(BALLS)):
                others = [k for k in range(len(BALLS)) if k != ball and np.hypot(*(spots[k] - spots[ball])) < 8]
                if all(depth[k] > depth[ball] for k in others):
                    column, row = np.floor(spots[ball]).astype(int)
                    np.testing.assert_array_equal(photos.fetch(index)[row, column], COLORS[ball])
                    checked += 1
    assert checked > 20


@pytest.mark.parametrize("resolution", [-1, 1, 2, 30])
def test_the_field_of_view_stays_at_any_resolution(blender_scene: Path, resolution: int) -> None:
    for camera in load(blender_scene, resolution=resolution).train:
        assert 2 * math.atan(camera.width / 2 / camera.fx) == pytest.approx(ANGLE)
        assert 2 * math.atan(camera.height / 2 / camera.fy) == pytest.approx(
            2 * math.atan(40 / 48 * math.tan(ANGLE / 2))
        )
        assert (camera.cx, camera.cy) == (camera.width / 2, camera.height / 2)


def test_photos_of_different_sizes_are_legal(own_scene: Path) -> None:
    Image.new("RGBA", (30, 70)).save(own_scene / "train" / "r_2.png")
    cameras = load(own_scene).train
    assert (cameras[1].width, cameras[1].height, cameras[2].width, cameras[2].height) == (48, 40, 30, 70)
    assert cameras[2].fx == cameras[2].fy == pytest.approx(focal_of(ANGLE, 30))


def test_a_common_scale_of_the_axes_is_taken_out(own_scene: Path, blender_scene: Path) -> None:
    def stretch(values: dict[str, Any]) -> None:
        for frame in values["frames"]:
            matrix = np.array(frame["transform_matrix"])
            matrix[:3, :3] *= 0.01
            frame["transform_matrix"] = matrix.tolist()

    change(own_scene / "transforms_train.json", stretch)
    for one, other in zip(load(own_scene).train, load(blender_scene).train, strict=True):
        np.testing.assert_allclose(one.viewmat, other.viewmat, atol=1e-12)


# Names, split, type


def test_order_names_and_split_are_those_of_the_files(tmp_path: Path) -> None:
    source = write_blender(tmp_path, num_train=11, num_test=2)
    held_out = load(source, eval=True)
    assert [camera.name for camera in held_out.train] == [f"train/r_{number}.png" for number in range(11)]
    assert [camera.name for camera in held_out.test] == ["test/r_0.png", "test/r_1.png"]
    everything = load(source)
    assert everything.test == ()
    names = [camera.name for camera in everything.train]
    assert names == [camera.name for camera in (*held_out.train, *held_out.test)]
    few = load(source, eval=True, num_train_cameras=3, num_test_cameras=1)
    assert (len(few.train), len(few.test)) == (3, 1)
    centers = np.array([camera.center for camera in held_out.train])
    assert held_out.extent == pytest.approx(1.1 * np.linalg.norm(centers - centers.mean(0), axis=1).max())


def test_suffixes_may_be_given_or_left_out(own_scene: Path) -> None:
    Image.open(own_scene / "train" / "r_1.png").convert("RGB").save(own_scene / "train" / "r_1.jpg")
    (own_scene / "train" / "r_1.png").unlink()
    shutil.copy(own_scene / "train" / "r_2.png", own_scene / "train" / "r_2.5.png")

    def edit(values: dict[str, Any]) -> None:
        values["frames"][0]["file_path"] = "train/r_0.png"
        values["frames"][2]["file_path"] = "train\\r_2.5"

    change(own_scene / "transforms_train.json", edit)
    names = [camera.name for camera in load(own_scene).train[:4]]
    assert names == ["train/r_0.png", "train/r_1.jpg", "train/r_2.5.png", "train/r_3.png"]


def test_a_missing_test_file_matters_only_with_eval(own_scene: Path) -> None:
    (own_scene / "transforms_test.json").unlink()
    assert len(load(own_scene).train) == 8
    with pytest.raises(InputError, match="has no transforms_test.json.*without --eval"):
        load(own_scene, eval=True)


def test_test_views_that_train_are_named(own_scene: Path) -> None:
    shutil.copy(own_scene / "transforms_train.json", own_scene / "transforms_test.json")
    notices: list[str] = []
    load_scene(own_scene, SceneOptions(eval=True), notify=notices.append, progress=False)
    assert any("8 of 8 test views are training views" in notice for notice in notices)


def test_options_of_colmap_folders_are_said_to_be_idle(blender_scene: Path) -> None:
    notices: list[str] = []
    load_scene(blender_scene, SceneOptions(images="images_4", llffhold=3), notify=notices.append, progress=False)
    assert sum("has no effect" in notice for notice in notices) == 2


def test_the_flag_offers_what_the_reader_knows() -> None:
    assert spec_of(ModelConfig.__dataclass_fields__["dataset_type"]).choices == DATASET_TYPES


def test_types_are_found_or_asked_for(own_scene: Path, generated_scene: Path) -> None:
    shutil.copytree(generated_scene, own_scene, dirs_exist_ok=True)
    assert load(own_scene).train[0].name == "view000.png"  # COLMAP first, as in 3DGS
    assert load(own_scene, dataset_type="blender").train[0].name == "train/r_0.png"
    with pytest.raises(InputError, match="--dataset_type cats: use one of auto, colmap"):
        load(own_scene, dataset_type="cats")
    with pytest.raises(InputError, match="has no transforms_train.json, which --dataset_type blender reads"):
        load(generated_scene, dataset_type="blender")
    shutil.rmtree(own_scene / "sparse")
    with pytest.raises(InputError, match="no COLMAP model.*leave out --dataset_type colmap"):
        load(own_scene, dataset_type="colmap")


# Points


def test_random_points_are_those_of_3dgs(blender_scene: Path) -> None:
    """3DGS seeds NumPy with 0 and draws uniforms; its colours, within 1/255 of grey, are stored as bytes."""
    notices: list[str] = []
    points = load_scene(blender_scene, SceneOptions(), notify=notices.append, progress=False).points
    generator = np.random.RandomState(0)
    np.testing.assert_array_equal(points.xyz, (generator.random_sample((100_000, 3)) * 2.6 - 1.3).astype(np.float32))
    colors = (generator.random_sample((100_000, 3)) / 255 * 0.28209479177387814 + 0.5) * 255
    np.testing.assert_array_equal(points.rgb, colors.astype(np.uint8))
    assert points.xyz.min() >= -1.3
    assert points.xyz.max() <= 1.3
    assert notices == [f"{blender_scene} has no points3d.ply: training starts from 100,000 random points, as in 3DGS."]
    np.testing.assert_array_equal(random_points().xyz, points.xyz)


@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_points_are_read_from_the_ply(own_scene: Path, kind: str) -> None:
    xyz = write_cloud(own_scene / "points3d.ply", kind=kind)
    scene = load_scene(own_scene, SceneOptions(), notify=pytest.fail, progress=False)
    np.testing.assert_array_equal(scene.points.xyz, xyz.astype(np.float32))
    assert {tuple(color) for color in scene.points.rgb} <= {tuple(color) for color in COLORS}


def test_another_cloud_beside_the_file_needs_a_decision(own_scene: Path) -> None:
    xyz = write_cloud(own_scene / "fused.ply")
    with pytest.raises(InputError, match="not clear where to start.*--dataset_type matrixcity .* fused.ply"):
        load(own_scene)
    assert len(load(own_scene, dataset_type="blender").points.xyz) == 100_000
    city = load(own_scene, dataset_type="matrixcity")
    assert len(city.points.xyz) == len(xyz)
    np.testing.assert_allclose(city.train[0].viewmat, load(own_scene, dataset_type="blender").train[0].viewmat)


def test_clouds_that_cannot_be_used(own_scene: Path) -> None:
    path = own_scene / "points3d.ply"
    write_cloud(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"property uchar green", b"property uchar grass"))
    with pytest.raises(InputError, match="points3d.ply has no column green"):
        load(own_scene)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="points3d.ply is cut off"):
        load(own_scene)
    path.write_bytes(whole.replace(b"vertex 300", b"vertex 0"))
    with pytest.raises(InputError, match="points3d.ply holds no points"):
        load(own_scene)
    start = whole.index(b"end_header\n") + len(b"end_header\n")
    path.write_bytes(whole[:start] + np.array([np.nan], "<f4").tobytes() + whole[start + 4 :])
    with pytest.raises(InputError, match="point number 1 has the position .nan"):
        load(own_scene)


# Transparency


def expected_on(rgba: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * np.array(background) * (1 - alpha)


@pytest.mark.parametrize("background", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.1, 0.7, 0.4)])
def test_photos_are_put_on_the_background(blender_scene: Path, background: tuple[float, float, float]) -> None:
    cameras = load(blender_scene).train
    with ImageStore(cameras, background=background) as fixed, ImageStore(cameras, background=None) as kept:
        for index, camera in enumerate(cameras):
            expected = expected_on(np.asarray(Image.open(camera.image_path)), background)
            assert np.abs(fixed.fetch(index).numpy() - expected).max() <= 0.501
            found = on_background(kept.fetch(index), torch.tensor(background))
            assert (found.dtype, found.shape) == (torch.uint8, (40, 48, 3))
            assert np.abs(found.numpy() - expected).max() <= 1.001  # the kept colours are rounded, and their sum again
            rows = on_background(kept.fetch(index, 7, 19), torch.tensor(background))
            assert torch.equal(rows, found[7:19])


def test_photos_without_transparency_keep_their_bytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 9, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "rgb.png")
    for name in ("rgba.png", "rgb.png"):
        camera = Camera(name, tmp_path / name, 9, 12, 9.0, 9.0, 4.5, 6.0, np.eye(3), np.zeros(3))
        with ImageStore([camera], background=None) as store:
            assert np.array_equal(store.fetch(0), pixels[..., :3])
            assert torch.equal(on_background(store.fetch(0), torch.rand(3)), store.fetch(0))


def test_reduced_photos_keep_no_fringe_of_hidden_colours(tmp_path: Path) -> None:
    """Red, with green hidden where it is transparent: reducing must not mix it in, and no colour exceeds its alpha."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    inside = np.hypot(*np.mgrid[-31.5:32, -31.5:32]) < 20
    pixels[inside] = (200, 0, 0, 255)
    pixels[~inside] = (0, 255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    camera = Camera("disc.png", tmp_path / "disc.png", 16, 16, 20.0, 20.0, 8.0, 8.0, np.eye(3), np.zeros(3))
    with ImageStore([camera], background=None) as kept, ImageStore([camera]) as fixed:
        reduced = kept.fetch(0)
        assert reduced[..., 1].max() == 0
        assert (reduced[..., :3] <= reduced[..., 3:]).all()
        on_black = on_background(reduced, torch.zeros(3)).int()
        assert (on_black - fixed.fetch(0).int()).abs().max() <= 1


# Malformed files


def in_frame(key: str, value: Any, number: int = 3) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["frames"][number].update({key: value})


def set_entry(row: int, column: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["frames"][3]["transform_matrix"][row].__setitem__(column, value)


MIRROR = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1]]
SHEAR = [[1.0, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]
MALFORMED = [
    (lambda v: v.pop("frames"), 'no list of frames ."frames" is missing'),
    (lambda v: v.update(frames=[]), "no list of frames ."),
    (lambda v: v.update(frames={}), "no list of frames"),
    (lambda v: v["frames"].insert(2, "x"), "frame 2 is 'x' instead of an object"),
    (lambda v: v.pop("camera_angle_x"), "no camera_angle_x, the horizontal field of view"),
    (lambda v: v.update(camera_angle_x="wide"), "camera_angle_x is 'wide'; it must be a number"),
    (lambda v: v.update(camera_angle_x=50), "camera_angle_x is 50; it must be a number from 0.001 to 3.1 radians"),
    (lambda v: v.update(camera_angle_x=float("nan")), "camera_angle_x is nan"),
    (lambda v: v.update(camera_angle_x=True), "camera_angle_x is True"),
    (lambda v: v.update(k1=0.02), "k1 = 0.02 is lens distortion.*Undistort"),
    (lambda v: v.update(camera_model="OPENCV_FISHEYE"), "camera_model 'OPENCV_FISHEYE' is lens distortion"),
    (lambda v: v["frames"].append(v["frames"][0]), r"frame 8 .*means the photo of .*frame 0"),
    (lambda v: v["frames"].append({**v["frames"][1], "file_path": "train/../train/r_1"}), "lies outside"),
    (lambda v: v["frames"].append({**v["frames"][1], "file_path": "train/r_1.png"}), "frame 8 .*means the photo of"),
    (in_frame("file_path", None), "frame 3 has the file_path missing"),
    (in_frame("file_path", 5), "frame 3 has the file_path 5"),
    (in_frame("file_path", "./"), "frame 3 has the file_path './'"),
    (in_frame("file_path", "a\0b"), "which no file can have"),
    (in_frame("file_path", "a" * 5000), "which no file can have"),
    (
        in_frame("file_path", "train/r_99"),
        r"\(1\): train/r_99.png: the file does not exist.*out of transforms_train.json",
    ),
    (in_frame("transform_matrix", None), "frame 3 .*transform_matrix is missing instead of 4 rows"),
    (in_frame("transform_matrix", np.eye(3).tolist()), "is a list of 3 instead of 4 rows of 4 numbers"),
    (in_frame("transform_matrix", np.eye(4)[:, :3].tolist()), "is a list of 4 instead of 4 rows of 4 numbers"),
    (in_frame("transform_matrix", MIRROR), "mirrors the scene"),
    (in_frame("transform_matrix", SHEAR), "no rotation times a scale"),
    (in_frame("transform_matrix", np.zeros((4, 4)).tolist()), r"the last row of transform_matrix is \[0"),
    (in_frame("transform_matrix", np.diag([0.0, 0, 0, 1]).tolist()), "its determinant is zero"),
    (in_frame("transform_matrix", np.diag([1.0, 1, 0, 1]).tolist()), "its determinant is zero"),
    (set_entry(0, 0, float("nan")), "frame 3 .*transform_matrix holds nan"),
    (set_entry(1, 3, float("inf")), "transform_matrix holds inf"),
    (set_entry(1, 3, 10**400), "transform_matrix holds 1000"),
    (set_entry(2, 1, "0.5"), "transform_matrix holds '0.5'"),
    (set_entry(2, 1, None), "transform_matrix holds missing"),
    (set_entry(3, 0, 0.5), "the last row of transform_matrix"),
]


@pytest.mark.parametrize(("edit", "message"), MALFORMED)
def test_malformed_files_are_refused(own_scene: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    change(own_scene / "transforms_train.json", edit)
    with pytest.raises(InputError, match=message) as error:
        load(own_scene, dataset_type="blender")
    assert "transforms_train.json" in str(error.value)
    assert str(error.value).endswith((".", "?"))


def test_raw_matrixcity_files_get_the_command_that_converts_them(own_scene: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["frames"][0]["rot_mat"] = values["frames"][0].pop("transform_matrix")

    change(own_scene / "transforms_train.json", edit)
    with pytest.raises(InputError, match="rot_mat, the raw form of MatrixCity.*generate_split.py"):
        load(own_scene)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON file"),
        (b'{"frames": [', "is no JSON file"),
        (b"\xff\xfe\x00", "is no JSON file"),
        (b"[" * 100_000, "is no JSON file"),
        (b'{"frames": ' + b"9" * 10_000 + b"}", "is no JSON file"),
        (b"[1, 2]", "holds a list of 2 instead of an object"),
    ],
)
def test_files_that_are_no_transforms(own_scene: Path, content: bytes, message: str) -> None:
    for name in ("transforms_train.json", "transforms_test.json"):
        before = (own_scene / name).read_bytes()
        (own_scene / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} {message}"):
            load(own_scene, eval=True)
        (own_scene / name).write_bytes(before)


def test_all_bad_photos_are_listed_at_once(own_scene: Path) -> None:
    for number in range(3):
        (own_scene / "train" / f"r_{number}.png").unlink()
    (own_scene / "train" / "r_3.png").write_bytes(b"<html>")
    with pytest.raises(
        InputError, match=r"Photos of .*transforms_train.json cannot be used \(4\): train/r_0.png"
    ) as error:
        load(own_scene)
    assert "r_3.png: no image of a supported kind" in str(error.value)


def mutated(value: Any, generator: random.Random) -> Any:
    """A JSON value with something in it replaced, removed or repeated."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if generator.random() < 0.15 else {**rest, key: mutated(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.9:
        index = generator.randrange(len(value))
        replaced = (
            [] if generator.random() < 0.1 else [mutated(value[index], generator)] * generator.choice((1, 1, 1, 2))
        )
        return [*value[:index], *replaced, *value[index + 1 :]]
    return generator.choice([None, True, "", "x", -1, 0, 1e300, float("nan"), 10**30, [], [[]], {}, "../../etc", 3.0])


def test_random_damage_is_refused_or_harmless(own_scene: Path) -> None:
    path = own_scene / "transforms_train.json"
    whole = json.loads(path.read_text())
    generator = random.Random(7)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        values = whole
        for _ in range(generator.choice((1, 1, 2, 3))):
            values = mutated(values, generator)
        path.write_text(json.dumps(values))
        try:
            scene = load(own_scene, eval=True)
        except InputError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        for camera in scene.train:
            assert np.isfinite(camera.viewmat).all()
            assert np.isfinite(camera.intrinsics).all()
    assert outcomes[False] > 100
    assert outcomes[True] > 10


# Training


def losses(target: Path) -> list[float]:
    lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_train_py_trains_a_blender_scene(blender_scene: Path, tmp_path: Path) -> None:
    """From the folder alone, on white: the loss falls, and the test views are those of transforms_test.json."""
    flags = ("--iterations", "40", "--log_interval", "8", "--quiet", "--no-report", "--densify_from_iter", "1000")
    source, target = str(blender_scene), tmp_path / "m"
    assert train.main(["-s", source, "-m", str(target), "--eval", "-w", *flags, "--drop_initial_3dgs_p", "0.95"]) == 0
    found = losses(target)
    assert len(found) == 5
    assert found[-1] < 0.7 * found[0]
    names = [camera["img_name"] for camera in json.loads((target / "cameras.json").read_text())]
    assert names[:4] == ["test/r_0", "test/r_1", "test/r_2", "train/r_0"]
