# SPDX-License-Identifier: Apache-2.0
"""Files of camera paths: ours and nerfstudio's are read as they are meant, anything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from posed_cameras import as_cameras, orbit
from scene.camera_paths import poses_of
from scene.cameras import Camera
from scene.errors import InputError
from scene.model_folder import ModelFolder
from scene.path_files import read_path


def nerfstudio_file(folder: Path, **changes: Any) -> Path:
    """A path of two frames: the first at (1, 2, 3) that looks along +x with z up, the second 4 units above it."""
    pose = np.eye(4)
    # columns: right, up, backward
    pose[:3, :3] = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]], float).T
    pose[:3, 3] = [1, 2, 3]
    higher = pose + np.outer([0, 0, 4, 0], [0, 0, 0, 1])
    frames = [{"camera_to_world": each.ravel().tolist(), "fov": fov} for each, fov in ((pose, 90.0), (higher, 60.0))]
    content = {"camera_type": "perspective", "render_height": 480, "render_width": 640, "fps": 24, "seconds": 1}
    path = folder / "camera_path.json"
    path.write_text(json.dumps({**content, "camera_path": frames, **changes}))
    return path


def test_cameras_json_comes_back(tmp_path: Path) -> None:
    cameras = as_cameras(orbit(count=5))
    named = [Camera(f"a/{i}.png", *list(vars(camera).values())[1:]) for i, camera in enumerate(cameras)]
    folder = ModelFolder(tmp_path)
    folder.write_cameras(named[2:], named[:2])
    found = read_path(folder.cameras)
    assert found.frames_per_second == 0
    assert np.allclose(poses_of(found.cameras).centers, poses_of(cameras).centers, atol=1e-12)
    assert np.allclose(poses_of(found.cameras).rotations, poses_of(cameras).rotations, atol=1e-12)
    first = found.cameras[0]
    assert (first.width, first.height, first.fx, first.fy, first.cx, first.cy) == (64, 48, 60, 61, 32, 24)


def test_nerfstudio_s_path_has_our_axes(tmp_path: Path) -> None:
    found = read_path(nerfstudio_file(tmp_path))
    first, second = found.cameras
    assert found.frames_per_second == 24 and (first.width, first.height) == (640, 480)
    assert first.fx == first.fy == pytest.approx(240)
    assert second.fy == pytest.approx(240 / math.tan(math.radians(30)))
    assert np.allclose(first.center, [1, 2, 3]) and np.allclose(second.center, [1, 2, 7])
    assert np.allclose(first.rotation, [[0, -1, 0], [0, 0, -1], [1, 0, 0]])  # right -y, down -z, forward +x


def test_nerfstudio_s_normalization_is_taken_back(tmp_path: Path) -> None:
    """A camera at x in the data set's world is at scale (R x + t), turned by R, in the path's."""
    turn, shift, scale = Rotation.from_rotvec([0.3, 1.0, -0.5]).as_matrix(), np.array([0.5, -2.0, 1.0]), 0.125
    plain = read_path(nerfstudio_file(tmp_path)).cameras
    moved = []
    for camera in plain:
        pose = np.eye(4)
        pose[:3, :3] = turn @ camera.rotation.T @ np.diag([1.0, -1.0, -1.0])
        pose[:3, 3] = scale * (turn @ camera.center + shift)
        moved.append({"camera_to_world": pose.ravel().tolist(), "fov": 90})
    path = nerfstudio_file(tmp_path, camera_path=moved)
    transform = {"transform": np.column_stack([turn, shift]).tolist(), "scale": scale}
    (tmp_path / "dataparser_transforms.json").write_text(json.dumps(transform))
    for camera, expected in zip(read_path(path).cameras, plain, strict=True):
        assert np.allclose(camera.center, expected.center) and np.allclose(camera.rotation, expected.rotation)
    (tmp_path / "dataparser_transforms.json").write_text('{"transform": [[1, 0], [0, 1]], "scale": 1}')
    with pytest.raises(InputError, match="dataparser_transforms.json is beside the path and cannot be used"):
        read_path(path)


def entry(**changes: Any) -> dict[str, Any]:
    """A good camera of cameras.json, with changes; None removes a field."""
    good = {"width": 8, "height": 6, "position": [0, 0, 0], "rotation": np.eye(3).tolist(), "fx": 9.0, "fy": 9.0}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("3", "holds no camera path"),
        ("{}", "holds no camera path. A path file is a list as in cameras.json"),
        ("[]", "holds no camera"),
        ([7], "camera 0 of .* cannot be used: it is no object"),
        ([entry(), entry(position=None)], "camera 1 of .* cannot be used: it has no 'position'"),
        ([entry(fx=None)], "it has no 'fx'"),
        ([entry(width=0)], "width = 0 is not a positive number"),
        ([entry(height="6")], "height = '6' is not a positive number"),
        ([entry(width=1 << 20)], "is no picture's"),
        ([entry(fy=math.nan)], "fy = nan is not a positive number"),
        ([entry(position=[1, 2])], "position is not of 3 finite numbers"),
        ([entry(position=[1, 2, math.inf])], "position is not of 3 finite numbers"),
        ([entry(position="here")], "position does not hold numbers"),
        ([entry(rotation=np.diag([1, 1, 2]).tolist())], "axes are not those of a rotation"),
        ([entry(rotation=np.diag([1, 1, -1]).tolist())], "axes are not those of a rotation"),
    ],
)
def test_what_is_no_path(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_path(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_type": "fisheye"}, "cameras of type 'fisheye'; only perspective"),
        ({"render_width": 0}, "no usable render_width and render_height"),
        ({"fps": -1}, "fps = -1"),
        ({"camera_path": []}, "holds no camera"),
        ({"camera_path": [{"fov": 50}]}, "camera 0 of .* it has no 'camera_to_world'"),
        ({"camera_path": [{"camera_to_world": np.eye(4).ravel().tolist()}]}, "it has no 'fov'"),
        ({"camera_path": [{"camera_to_world": np.eye(4).ravel().tolist(), "fov": 180}]}, "fov of 180.0 degrees"),
        ({"camera_path": [{"camera_to_world": np.eye(4).tolist(), "fov": 50}]}, "not of 16 finite numbers"),
    ],
)
def test_what_is_no_path_of_nerfstudio(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_path(nerfstudio_file(tmp_path, **changes))


def test_a_file_that_is_not_there_says_what_path_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="elipse cannot be read: .* --path takes ellipse, spiral, interpolate"):
        read_path(tmp_path / "elipse")
