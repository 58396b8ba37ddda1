# SPDX-License-Identifier: Apache-2.0
"""COLMAP readers: against models that pycolmap wrote, against damage, and what their messages say."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colmap_builder import CameraRow, Model, build_model, write_binary, write_photos, write_text
from scene.cameras import rotation_from_quaternion
from scene.colmap import find_model, read_model
from scene.colmap_records import ColmapModel
from scene.errors import InputError

WRITERS = {"bin": write_binary, "txt": write_text}


def assert_equals_pycolmap(model: ColmapModel, folder: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap writes the models that the readers are compared with")
    expected = pycolmap.Reconstruction(str(folder))
    assert len(model.images) == expected.num_reg_images() > 0
    for image in model.images:
        twin = expected.image(image.image_id)
        pose = twin.cam_from_world()
        camera, twin_camera = model.cameras[image.camera_id], twin.camera
        assert (image.name, image.camera_id) == (twin.name, twin.camera_id)
        np.testing.assert_allclose(rotation_from_quaternion(image.quaternion), pose.rotation.matrix(), atol=1e-12)
        np.testing.assert_allclose(image.translation, pose.translation, rtol=1e-14)
        assert (camera.width, camera.height) == (twin_camera.width, twin_camera.height)
        np.testing.assert_allclose(
            [camera.fx, camera.fy, camera.cx, camera.cy],
            [
                twin_camera.focal_length_x,
                twin_camera.focal_length_y,
                twin_camera.principal_point_x,
                twin_camera.principal_point_y,
            ],
            rtol=1e-14,
        )
    points = list(expected.points3D.values())
    order, twin_order = np.lexsort(model.xyz.T), np.lexsort(np.array([p.xyz for p in points]).T)
    assert len(points) == len(model.xyz) > 0
    np.testing.assert_allclose(model.xyz[order], np.array([p.xyz for p in points])[twin_order], rtol=1e-14)
    np.testing.assert_array_equal(model.rgb[order], np.array([p.color for p in points])[twin_order])


SYNTHETIC = {"PINHOLE": [1280.0, 1275.5, 500.0, 390.25], "SIMPLE_PINHOLE": [1280.0, 500.0, 390.25]}


@pytest.fixture(scope="module", params=SYNTHETIC)
def synthetic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap makes the synthetic model")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_points3D = 80
    options.camera_model_id = pycolmap.CameraModelId.__members__[request.param]
    options.camera_params = SYNTHETIC[request.param]
    model = pycolmap.synthesize_dataset(options)
    source = tmp_path_factory.mktemp("synthetic")
    for kind, write in (("bin", model.write_binary), ("txt", model.write_text)):
        (source / kind).mkdir()
        write(str(source / kind))
    return source


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_reads_what_pycolmap_wrote(synthetic: Path, kind: str) -> None:
    assert_equals_pycolmap(read_model(synthetic / kind), synthetic / kind)


def test_reads_real_models_as_pycolmap(tiny_fox: Path, tiny_caliterra: Path) -> None:
    for source in (tiny_fox, tiny_caliterra):
        assert_equals_pycolmap(read_model(find_model(source)), source / "sparse" / "0")


def test_real_model_as_text_equals_binary(tiny_fox: Path, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap converts the model to text")
    pycolmap.Reconstruction(str(tiny_fox / "sparse" / "0")).write_text(str(tmp_path))
    binary, text = read_model(tiny_fox / "sparse" / "0"), read_model(tmp_path)
    assert [image.name for image in text.images] == [image.name for image in binary.images]
    order, text_order = np.lexsort(binary.xyz.T), np.lexsort(text.xyz.T)
    np.testing.assert_allclose(text.xyz[text_order], binary.xyz[order], rtol=1e-12)
    np.testing.assert_array_equal(text.rgb[text_order], binary.rgb[order])
    for image, twin in zip(text.images, binary.images, strict=True):
        np.testing.assert_allclose(image.quaternion, twin.quaternion, atol=1e-12)


@pytest.mark.parametrize("kind", WRITERS)
def test_values_and_names_survive(tmp_path: Path, kind: str) -> None:
    model = build_model(num_views=3)
    model.cameras.append(CameraRow(7, "SIMPLE_PINHOLE", 100, 80, [90.0, 48.0, 41.0]))
    model.images[1].camera_id = 7
    model.images[0].name = "left/day 1/Bild ä.png"
    model.images[2].name = "right\\0001.png"
    model.images[1].quaternion = [2.0, 0.0, 0.0, 2.0]
    model.images[1].keypoints = []
    WRITERS[kind](tmp_path, model)
    read = read_model(tmp_path)
    assert [image.name for image in read.images] == ["left/day 1/Bild ä.png", "view001.png", "right/0001.png"]
    simple = read.cameras[7]
    assert (simple.fx, simple.fy, simple.cx, simple.cy) == (90.0, 90.0, 48.0, 41.0)
    np.testing.assert_allclose(read.images[1].quaternion, [np.sqrt(0.5), 0, 0, np.sqrt(0.5)])
    np.testing.assert_array_equal(read.xyz, [point.xyz for point in model.points])
    np.testing.assert_array_equal(read.rgb, [point.rgb for point in model.points])


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0"])
def test_model_is_found(tmp_path: Path, place: str) -> None:
    write_binary(tmp_path / place, build_model())
    assert find_model(tmp_path) == tmp_path / place


def test_binary_is_preferred_and_text_is_the_fallback(tmp_path: Path) -> None:
    write_text(tmp_path, build_model(num_points=7))
    assert len(read_model(tmp_path).xyz) == 7
    write_binary(tmp_path, build_model(num_points=9))
    assert len(read_model(tmp_path).xyz) == 9


def test_folders_without_a_model_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist.*--source_path"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no photos either"):
        find_model(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.JPG").touch()
    with pytest.raises(InputError, match=r"colmap automatic_reconstructor --workspace_path .*pycolmap") as error:
        find_model(tmp_path)
    assert f"--image_path {tmp_path / 'images'}" in str(error.value)
    assert "--images ." not in str(error.value)
    (tmp_path / "images").rename(tmp_path / "photos of mine")
    with pytest.raises(InputError, match=r"--images \.") as error:
        find_model(tmp_path / "photos of mine")
    assert f"--workspace_path '{tmp_path / 'photos of mine'}'" in str(error.value)
    (tmp_path / "transforms.json").write_text("{}")
    with pytest.raises(InputError, match="write them as transforms_train.json and transforms_test.json"):
        find_model(tmp_path)
    (tmp_path / "transforms_train.json").write_text("{}")
    with pytest.raises(InputError, match="leave out --dataset_type colmap"):
        find_model(tmp_path)


def test_photos_of_convert_py_are_found(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.jpg").touch()
    with pytest.raises(InputError, match="Then train with --images input ") as error:
        find_model(tmp_path)
    assert f"--image_path {tmp_path / 'input'} " in str(error.value)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0"])
def test_what_a_broken_model_lacks_is_named(tmp_path: Path, kind: str, part: str, place: str) -> None:
    """No second reconstruction is advised, which would write another model into the same folder."""
    model = build_model()
    WRITERS[kind](tmp_path / place, model)
    write_photos(tmp_path / "images", model)
    (tmp_path / place / f"{part}.{kind}").unlink()
    there = ", ".join(f"{name}.{kind}" for name in ("cameras", "images", "points3D") if name != part)
    message = rf"^The COLMAP model in {tmp_path / place} lacks {part}.{kind} \(there: {there}\)\. "
    with pytest.raises(InputError, match=message) as error:
        read_model(find_model(tmp_path))
    assert "automatic_reconstructor" not in str(error.value)


def test_a_whole_text_model_is_read_beside_parts_of_a_binary_one(tmp_path: Path) -> None:
    write_binary(tmp_path, build_model(num_points=9))
    write_text(tmp_path, build_model(num_points=7))
    (tmp_path / "points3D.bin").unlink()
    assert len(read_model(tmp_path).xyz) == 7


def test_a_model_under_another_number_is_named_with_the_command_that_moves_it(tmp_path: Path) -> None:
    write_photos(tmp_path / "images", build_model(num_views=2))
    write_binary(tmp_path / "sparse" / "1", build_model(num_views=5))
    with pytest.raises(InputError, match=r"sparse/0, .* does not exist, but .*/sparse holds 1 \(5 images\)") as error:
        find_model(tmp_path)
    assert f"`mv {tmp_path / 'sparse' / '1'} {tmp_path / 'sparse' / '0'}`" in str(error.value)
    assert "automatic_reconstructor" not in str(error.value)
    write_text(tmp_path / "sparse" / "10", build_model(num_views=6))
    write_binary(tmp_path / "sparse" / "2", build_model(num_views=7))
    with pytest.raises(InputError, match=r"1 \(5 images\), 2 \(7 images\), 10\. To use 2, rename it"):
        find_model(tmp_path)


NO_DISTORTION = [
    ("SIMPLE_RADIAL", 3, 1),
    ("RADIAL", 3, 2),
    ("OPENCV", 4, 4),
    ("FULL_OPENCV", 4, 8),
    ("FOV", 4, 1),
    ("SIMPLE_DIVISION", 3, 1),
    ("DIVISION", 4, 1),
]
INTRINSICS = {3: [60.0, 31.0, 25.0], 4: [60.0, 61.0, 31.0, 25.0]}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("name", "intrinsics", "others"), NO_DISTORTION)
def test_distortion_of_exactly_zero_is_a_pinhole(
    tmp_path: Path, kind: str, name: str, intrinsics: int, others: int
) -> None:
    model = build_model()
    model.cameras[0] = CameraRow(1, name, 64, 48, [*INTRINSICS[intrinsics], *[0.0] * others])
    WRITERS[kind](tmp_path, model)
    camera = read_model(tmp_path).cameras[1]
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (60.0, 60.0 if intrinsics == 3 else 61.0, 31.0, 25.0)
    for position in range(others):
        distortion = [0.0] * others
        distortion[position] = 1e-12
        model.cameras[0] = CameraRow(1, name, 64, 48, [*INTRINSICS[intrinsics], *distortion])
        WRITERS[kind](tmp_path, model)
        with pytest.raises(InputError, match=f"{name} is not supported"):
            read_model(tmp_path)


@pytest.mark.parametrize(("name", "intrinsics", "others"), NO_DISTORTION)
def test_pycolmap_projects_zero_distortion_as_a_pinhole(name: str, intrinsics: int, others: int) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap knows what the models mean")
    params = [*INTRINSICS[intrinsics], *[0.0] * others]
    theirs = pycolmap.Camera(model=name, width=64, height=48, params=params)
    plain = pycolmap.Camera(
        model="SIMPLE_PINHOLE" if intrinsics == 3 else "PINHOLE", width=64, height=48, params=params[:intrinsics]
    )
    for ray in np.random.default_rng(0).uniform((-0.6, -0.6, 1), (0.6, 0.6, 3), (50, 3)):
        np.testing.assert_allclose(theirs.img_from_cam(ray), plain.img_from_cam(ray), atol=1e-9)


@pytest.mark.parametrize(("name", "others"), [("RADIAL_FISHEYE", 2), ("THIN_PRISM_FISHEYE", 8)])
def test_a_fisheye_is_no_pinhole_without_distortion(tmp_path: Path, name: str, others: int) -> None:
    model = build_model()
    model.cameras[0] = CameraRow(1, name, 64, 48, [*INTRINSICS[3 if others == 2 else 4], *[0.0] * others])
    write_binary(tmp_path, model)
    with pytest.raises(InputError, match=f"{name} is not supported"):
        read_model(tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_lens_distortion_is_refused_with_both_remedies(tmp_path: Path, kind: str) -> None:
    model = build_model()
    model.cameras[0] = CameraRow(1, "OPENCV", 64, 48, [60.0, 60.0, 32.0, 24.0, 0.1, 0.0, 0.0, 0.0])
    folder = tmp_path / "scene" / "sparse" / "0"
    WRITERS[kind](folder, model)
    with pytest.raises(InputError, match="OPENCV is not supported") as error:
        read_model(folder)
    text = str(error.value)
    images, output = tmp_path / "scene" / "images", tmp_path / "scene_undistorted"
    assert f"colmap image_undistorter --image_path {images} --input_path {folder} --output_path {output}`" in text
    assert f'pycolmap.undistort_images("{output}", "{folder}", "{images}")' in text


def change(model: Model, **changes: object) -> None:
    for path, value in changes.items():
        kind, _, name = path.partition("_")
        target = {"camera": model.cameras, "image": model.images, "point": model.points}[kind][
            1 if kind != "camera" else 0
        ]
        setattr(target, name, value)


DAMAGES: dict[str, tuple[Callable[[Model], None], str]] = {
    "zero focal": (lambda m: change(m, camera_params=[0.0, 9.0, 1.0, 1.0]), "focal length fx = 0"),
    "negative focal": (lambda m: change(m, camera_params=[9.0, -9.0, 1.0, 1.0]), "focal length fy = -9"),
    "nan focal": (lambda m: change(m, camera_params=[9.0, float("nan"), 1.0, 1.0]), "focal length fy = nan"),
    "inf focal": (lambda m: change(m, camera_params=[float("inf"), 9.0, 1.0, 1.0]), "focal length fx = inf"),
    "nan center": (lambda m: change(m, camera_params=[9.0, 9.0, float("nan"), 1.0]), "principal point cx = nan"),
    "far center": (lambda m: change(m, camera_params=[9.0, 9.0, 1.0, -1e4]), "principal point cy = -10000"),
    "zero width": (lambda m: change(m, camera_width=0), "impossible size 0x48"),
    "zero quaternion": (
        lambda m: change(m, image_quaternion=[0.0] * 4),
        "image 2 has a rotation quaternion of length 0",
    ),
    "nan quaternion": (lambda m: change(m, image_quaternion=[1.0, float("nan"), 0.0, 0.0]), "quaternion of length nan"),
    "inf translation": (lambda m: change(m, image_translation=[0.0, float("inf"), 0.0]), "translation .*inf"),
    "unknown camera": (lambda m: change(m, image_camera_id=12), "'view001.png' refers to camera 12"),
    "duplicate id": (lambda m: change(m, image_image_id=1), "image id 1 was used at"),
    "duplicate name": (lambda m: change(m, image_name="./view000.png"), "name 'view000.png' was used at"),
    "duplicate camera": (lambda m: m.cameras.append(m.cameras[0]), "camera id 1 appears twice"),
    "nan point": (lambda m: change(m, point_xyz=[0.0, float("nan"), 0.0]), "point number 2 has the position .*nan"),
    "inf point": (lambda m: change(m, point_xyz=[0.0, 0.0, float("-inf")]), "position .*inf"),
    "absurd point": (lambda m: change(m, point_xyz=[1e300, 0.0, 0.0]), "absurdly far away"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", DAMAGES)
def test_impossible_values_are_refused_with_their_place(tmp_path: Path, kind: str, name: str) -> None:
    model = build_model(num_views=3)
    damage, message = DAMAGES[name]
    damage(model)
    WRITERS[kind](tmp_path, model)
    with pytest.raises(InputError, match=message) as error:
        read_model(tmp_path)
    assert f".{kind}" in str(error.value)
    if not name.endswith("point"):
        assert (", byte " if kind == "bin" else ", line ") in str(error.value)


BAD_NAMES = ["../a.png", "a/../../b.png", "/etc/passwd", "C:\\x.png", "..\\a.png", "a\x01b.png", "a\x7f.png", "x" * 300]
BAD_NAMES += ["a/" * 2500 + "b.png", "..", ".", "./"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    model = build_model()
    model.images[0].name = name
    WRITERS[kind](tmp_path, model)
    with pytest.raises(InputError, match="image name"):
        read_model(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    write_binary(tmp_path, build_model())
    path = tmp_path / "images.bin"
    path.write_bytes(path.read_bytes().replace(b"view001", b"view\xff\xfe1"))
    with pytest.raises(InputError, match=r"images.bin, byte \d+: an image name is not UTF-8"):
        read_model(tmp_path)


@pytest.mark.parametrize("file", ["cameras", "images", "points3D"])
def test_every_truncation_is_refused(tmp_path: Path, file: str) -> None:
    write_binary(tmp_path, build_model(num_views=3, num_points=5))
    path = tmp_path / f"{file}.bin"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            InputError, match=rf"{file}.bin, byte \d+: (the file ends within|\d+ \w+ are|.* has no end)"
        ):
            read_model(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="1 bytes follow"):
        read_model(tmp_path)


@pytest.mark.parametrize("file", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("count", [0, 7, 10**9, 2**61, 2**64 - 1])
def test_false_counts_cost_no_memory(tmp_path: Path, file: str, count: int) -> None:
    write_binary(tmp_path, build_model(num_views=3, num_points=5))
    path = tmp_path / f"{file}.bin"
    path.write_bytes(struct.pack("<Q", count) + path.read_bytes()[8:])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"{file}.bin, byte \d+"):
            read_model(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


TEXT_DAMAGES = [
    ("cameras", "1 PINHOLE 64", r"line 1: expected 'CAMERA_ID"),
    ("cameras", "1 PINHOLE 64 48 1 2 3", "line 1: PINHOLE has 4 parameters, found 3"),
    ("cameras", "1 PINHOLE sixty 48 1 2 3 4", "line 1: expected whole numbers, found '1 sixty 48'"),
    ("cameras", "1 ROUND 64 48 1 2 3 4", "camera model ROUND is not supported"),
    ("images", "1 1 0 0 0 0 0 4 1", "line 1: expected 'IMAGE_ID QW"),
    ("images", "1 1 0 0 zero 0 0 4 1 a.png\n", "line 1: expected numbers"),
    ("images", "1 1 0 0 0 0 0 4 1 a.png\n2 1 0 0 0 0 0 4 1 b.png\n", "line 2: expected the keypoints"),
    ("images", "1 1 0 0 0 0 0 4 1 a.png\n1 2 three\n", "line 2: expected numbers"),
    ("points3D", "1 0 0 0 1 2 3", "line 1: expected 'POINT3D_ID"),
    ("points3D", "1 0 0 0 1 2 256 0.5", r"line 1: the colour \[1, 2, 256\] is outside 0..255"),
    ("points3D", "1 0 0 0 1 2 -3 0.5", "outside 0..255"),
    ("points3D", "1 0 x 0 1 2 3 0.5", "line 1: expected numbers"),
]


@pytest.mark.parametrize(("file", "text", "message"), TEXT_DAMAGES)
def test_malformed_lines_are_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    write_text(tmp_path, build_model())
    (tmp_path / f"{file}.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_model(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_text(tmp_path, build_model())
    (tmp_path / "cameras.txt").write_bytes(b"# fine\n1 PINHOLE \xff\n")
    with pytest.raises(InputError, match="cameras.txt, line 2: the line is not UTF-8"):
        read_model(tmp_path)


def test_text_of_other_programs_is_read(tmp_path: Path) -> None:
    """Windows line ends, a byte order mark, blank lines, and no keypoint line at the very end."""
    write_text(tmp_path, build_model(num_views=2))
    text = (tmp_path / "images.txt").read_text().splitlines()
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", *text[:-1]]).encode())
    assert [image.name for image in read_model(tmp_path).images] == ["view000.png", "view001.png"]


def assert_usable_or_refused(folder: Path) -> None:
    """What a damaged model may do: raise InputError, or give numbers that a trainer can live with."""
    try:
        model = read_model(folder)
    except InputError:
        return
    for camera in model.cameras.values():
        assert camera.width > 0
        assert camera.height > 0
        assert min(camera.fx, camera.fy) > 0
        assert np.isfinite([camera.fx, camera.fy, camera.cx, camera.cy]).all()
    for image in model.images:
        assert abs(np.linalg.norm(image.quaternion) - 1) < 1e-9
        assert np.isfinite(image.translation).all()
        assert ".." not in Path(image.name).parts
        assert image.camera_id in model.cameras
    assert len({image.name for image in model.images}) == len(model.images)
    assert np.isfinite(model.xyz.astype(np.float32)).all()
    assert model.rgb.shape == model.xyz.shape


@pytest.fixture(scope="module", params=list(WRITERS))
def mutable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    good, bad = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("bad")
    WRITERS[request.param](good, build_model(num_views=3, num_points=6))
    return good, bad, request.param


NASTY = [
    b"nan",
    b"inf",
    b"-1",
    b"1e400",
    b"9" * 400,
    b"\0",
    b"\n",
    b"\xff",
    b" ",
    b"#",
    b"../",
    b"99999999999999999999",
]
NASTY += [struct.pack("<d", v) for v in (float("nan"), float("inf"), 0.0, 1e300, -1.0)]
NASTY += [struct.pack("<Q", v) for v in (0, 1, 2**31, 2**63, 2**64 - 1)]


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_models_never_escape(mutable: tuple[Path, Path, str], data: st.DataObject) -> None:
    good, bad, kind = mutable
    for name in ("cameras", "images", "points3D"):
        shutil.copyfile(good / f"{name}.{kind}", bad / f"{name}.{kind}")
    path = bad / f"{data.draw(st.sampled_from(['cameras', 'images', 'points3D']))}.{kind}"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        how = data.draw(st.sampled_from(["flip", "overwrite", "insert", "cut", "delete"]))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "overwrite":
            piece = data.draw(st.sampled_from(NASTY))
            content[at : at + len(piece)] = piece
        elif how == "insert":
            content[at:at] = data.draw(st.one_of(st.sampled_from(NASTY), st.binary(max_size=9)))
        elif how == "cut":
            del content[at:]
        else:
            del content[at : at + data.draw(st.integers(1, 40))]
    path.write_bytes(content)
    assert_usable_or_refused(bad)
