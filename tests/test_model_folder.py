# SPDX-License-Identifier: Apache-2.0
"""The model folder: cfg_args without execution, config.json, cameras.json against formulas, file names."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cli import parse_train
from launch.config import cfg_args_values, to_plain
from scene.cameras import Camera, rotation_from_quaternion
from scene.errors import InputError
from scene.model_folder import ModelFolder, default_model_path, parse_namespace

needs_permissions = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")


def make_camera(name: str, seed: int, width: int = 64, height: int = 48) -> Camera:
    random = np.random.default_rng(seed)
    rotation = rotation_from_quaternion(random.normal(size=4))
    translation = random.normal(size=3)
    return Camera(name, Path("photos") / name, width, height, 70.5, 71.25, 30.0, 20.0, rotation, translation)


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_0-9]{0,10}", fullmatch=True).map("x_".__add__), literals))
def test_cfg_args_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    folder = ModelFolder(tmp_path_factory.mktemp("model"))
    folder.write_cfg_args(values)
    assert folder.read_cfg_args() == values


def test_cfg_args_are_what_argparse_prints(tmp_path: Path) -> None:
    """Old tools expect the text of an argparse.Namespace, with every entry that 3DGS reads."""
    model = parse_train(["-s", str(tmp_path / "it's here"), "-m", str(tmp_path), "--eval"], {}).model
    folder = ModelFolder(tmp_path)
    folder.write_cfg_args(cfg_args_values(model))
    assert folder.cfg_args.read_text() == repr(argparse.Namespace(**cfg_args_values(model)))
    assert set(folder.read_cfg_args()) == {
        *("sh_degree", "source_path", "model_path", "images", "resolution", "white_background", "data_device", "eval"),
        *("depths", "train_test_exp"),
    }


@pytest.mark.parametrize(
    "text",
    [
        "Namespace(a=__import__('pathlib').Path('MARK').touch())",
        "__import__('pathlib').Path('MARK').touch()",
        "Namespace(**{'a': __import__('pathlib').Path('MARK').touch()})",
        "Namespace(__import__('pathlib').Path('MARK').touch())",
        "Namespace(a=[x for x in ().__class__.__base__.__subclasses__()])",
        "Namespace(a=open('MARK', 'w'))",
        "argparse.Namespace(a=1)",
        "Namespace(a=1).a",
        "Namespace(a=PosixPath('x'))",
        "{'a': 1}",
        "Namespace(a=1",
        "Namespace(a=1, a=2)",
        "",
        "\0",
        "Namespace(a=" + "(" * 300 + ")" * 300 + ")",
        "Namespace(a=" + "-" * 100_000 + "1)",
        "Namespace(a=9**9**9)",
    ],
)
def test_hostile_cfg_args_are_refused_without_being_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg_args").write_text(text)
    with pytest.raises(InputError, match="cannot be read as cfg_args.*Nothing in it was executed"):
        ModelFolder(tmp_path).read_cfg_args()
    assert not (tmp_path / "MARK").exists()


@given(st.text(max_size=60) | st.text(max_size=30).map("Namespace(a={})".format))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse_namespace(text, Path("cfg_args")), dict)


def test_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    folder.cfg_args.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not text"):
        folder.read_cfg_args()
    folder.cfg_args.write_bytes(b" " * (1 << 21))
    with pytest.raises(InputError, match="larger than"):
        folder.read_cfg_args()


def test_config_round_trip_and_versions(tmp_path: Path) -> None:
    folder, config = ModelFolder(tmp_path), parse_train(["-s", "data", "--mask_lr", "0.02"], {})
    folder.write_config(to_plain(config), ["train.py", "-s", "data"])
    content = folder.read_config()
    assert content["config"] == to_plain(config)
    assert content["command"] == ["train.py", "-s", "data"]
    assert folder.stored_options()["mask_lr"] == 0.02
    for damage, sentence in (
        ({"version": 2}, "has version 2"),
        ({"version": "1"}, "has version '1'"),
        ({"schema": "other"}, "is not a configuration of mask-grendel"),
        ({"config": []}, "holds no object"),
    ):
        folder.config.write_text(json.dumps({**content, **damage}))
        with pytest.raises(InputError, match=sentence):
            folder.stored_options()
    folder.config.write_text("{")
    with pytest.raises(InputError, match="is not readable JSON"):
        folder.read_config()


def test_cameras_json_follows_the_formulas_of_3dgs(tmp_path: Path) -> None:
    """Entry = inverse of the 4x4 world-to-camera matrix; test cameras first; ids count through."""
    train = [make_camera("a/0001.jpg", 1), make_camera("b.v2.png", 2, 80, 60)]
    test = [make_camera("a/0002.jpg", 3)]
    folder = ModelFolder(tmp_path)
    folder.write_cameras(train, test)
    entries = json.loads(folder.cameras.read_text())
    assert [entry["img_name"] for entry in entries] == ["a/0002", "a/0001", "b.v2"]
    assert [entry["id"] for entry in entries] == [0, 1, 2]
    for entry, camera in zip(entries, [*test, *train], strict=True):
        assert list(entry) == ["id", "img_name", "width", "height", "position", "rotation", "fy", "fx"]
        camera_to_world = np.linalg.inv(camera.viewmat)
        np.testing.assert_allclose(entry["position"], camera_to_world[:3, 3], atol=1e-12)
        np.testing.assert_allclose(entry["rotation"], camera_to_world[:3, :3], atol=1e-12)
        assert (entry["width"], entry["height"]) == (camera.width, camera.height)
        assert (entry["fx"], entry["fy"]) == (camera.fx, camera.fy)


def test_layout(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    found = {
        folder.point_cloud(7000),
        folder.renders("test", 7000),
        folder.ground_truth("train", 30_000),
        folder.results("test"),
        folder.per_view("test"),
        folder.results("train"),
    }
    assert {str(path.relative_to(tmp_path)) for path in found} == {
        "point_cloud/iteration_7000/point_cloud.ply",
        "test/ours_7000/renders",
        "train/ours_30000/gt",
        "results.json",
        "per_view.json",
        "results_train.json",
    }


def test_iterations_are_found_by_number(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    with pytest.raises(InputError, match=r"no iteration_N/point_cloud\.ply"):
        folder.find_iteration()
    for iteration in (7000, 30_000, 900):
        folder.point_cloud(iteration).parent.mkdir(parents=True)
        folder.point_cloud(iteration).touch()
    for stray in ("iteration_99999", "iteration_x", "iteration_-5", "iteration_", "iteration_1e9"):
        (tmp_path / "point_cloud" / stray).mkdir()
    assert folder.saved_iterations() == (900, 7000, 30_000)
    assert (folder.find_iteration(), folder.find_iteration(7000)) == (30_000, 7000)
    with pytest.raises(InputError, match="iteration 8000 was not saved.*900, 7000, 30000"):
        folder.find_iteration(8000)
    folder.renders("test", 7000).mkdir(parents=True)
    assert folder.rendered_iterations("test") == (7000,)
    assert folder.rendered_iterations("train") == ()


def test_parts_of_grendel_are_named(tmp_path: Path) -> None:
    part = tmp_path / "point_cloud" / "iteration_30000" / "point_cloud_rk0_ws4.ply"
    part.parent.mkdir(parents=True)
    part.touch()
    with pytest.raises(InputError, match=r"point_cloud_rk0_ws4\.ply is one part of a model of Grendel-GS"):
        ModelFolder(tmp_path).find_iteration()


def test_create_makes_parents_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = ModelFolder.create(tmp_path / "a" / "b")
    assert list(folder.path.iterdir()) == []
    assert ModelFolder.create(folder.path) == folder


def test_unwritable_folders_name_cause_and_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"cannot be written: .*Choose another folder with -m"):
            ModelFolder.create(path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        ModelFolder.open(tmp_path / "file")


@needs_permissions
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            ModelFolder.create(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    folder.cfg_args.mkdir()
    with pytest.raises(InputError, match="cfg_args cannot be written"):
        folder.write_cfg_args({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["cfg_args"]


@pytest.mark.parametrize(
    ("job", "name"), [("12345678901", "1234567890"), ("../../etc", ".._.._etc"), ("a b/c", "a_b_c")]
)
def test_default_model_path_stays_in_output(job: str, name: str) -> None:
    assert default_model_path(job) == Path("output") / name


def test_default_model_path_is_random_without_a_job() -> None:
    names = {default_model_path(job).name for job in ("", "..", "", "...")}
    assert len(names) == 4
    assert all(len(name) == 10 for name in names)
