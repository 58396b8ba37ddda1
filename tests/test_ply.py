# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scene.ply
from scene.errors import InputError
from scene.gaussians import attributes_for
from scene.ply import load_ply, model_columns, read_vertices, save_ply, save_point_cloud

COLUMNS_OF_3DGS = (
    ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    + [f"f_rest_{index}" for index in range(45)]
    + ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_params(num_rows: int, degree: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(degree)
    return {spec.name: torch.randn(num_rows, *spec.shape, generator=generator) for spec in attributes_for(degree)}


@st.composite
def any_params(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    num_rows, degree = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    block = draw(hnp.arrays(np.float32, (num_rows, 60), elements=finite))
    params, start = {}, 0
    for spec in attributes_for(degree):
        size = int(np.prod(spec.shape))
        params[spec.name] = torch.from_numpy(block[:, start : start + size].reshape(num_rows, *spec.shape).copy())
        start += size
    return params


@quick
@given(any_params())
def test_round_trip_is_exact_for_every_degree(tmp_path: Path, params: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.ply"
    assert save_ply(path, params) == len(params["means"])
    loaded = load_ply(path)
    assert set(loaded) == set(params) - {"mask_logits"}
    for name, values in loaded.items():
        assert values.dtype == np.float32
        assert values.shape == tuple(params[name].shape)
        assert values.tobytes() == params[name].numpy().tobytes(), name


def test_a_second_reader_finds_the_62_columns_of_3dgs(tmp_path: Path) -> None:
    params = random_params(7)
    save_ply(tmp_path / "model.ply", params)
    vertex = plyfile.PlyData.read(tmp_path / "model.ply")["vertex"]
    assert [p.name for p in vertex.properties] == COLUMNS_OF_3DGS == list(model_columns(3))
    assert len(COLUMNS_OF_3DGS) == 62
    assert {p.val_dtype for p in vertex.properties} == {"f4"}
    assert np.array_equal(np.stack([vertex["x"], vertex["y"], vertex["z"]], 1), params["means"].numpy())
    assert not any(vertex[name].any() for name in ("nx", "ny", "nz"))
    for basis in range(15):
        for channel in range(3):
            assert np.array_equal(vertex[f"f_rest_{channel * 15 + basis}"], params["shN"][:, basis, channel].numpy())
    assert np.array_equal(vertex["rot_0"], params["quats"][:, 0].numpy())
    assert np.array_equal(vertex["scale_2"], params["scales"][:, 2].numpy())
    assert np.array_equal(vertex["opacity"], params["opacities"].numpy())


@pytest.mark.parametrize(("degree", "num_columns"), [(0, 17), (1, 26), (2, 41), (3, 62)])
def test_number_of_columns(degree: int, num_columns: int) -> None:
    assert len(model_columns(degree)) == num_columns


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_files_of_a_second_writer_are_read(tmp_path: Path, byte_order: str) -> None:
    """Columns in another order and type, with extra ones, a comment and a second element."""
    rng = np.random.default_rng(1)
    names = [name for name in COLUMNS_OF_3DGS if not name.startswith("n") and "rest" not in name][::-1]
    vertices = np.zeros(5, [(name, "f8") for name in names] + [("red", "u1"), ("label", "i4")])
    for name in names:
        vertices[name] = rng.standard_normal(5).astype(np.float32)
    faces = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [plyfile.PlyElement.describe(vertices, "vertex"), plyfile.PlyElement.describe(faces, "face")]
    ply = plyfile.PlyData(elements, byte_order=byte_order, comments=["made elsewhere"])
    ply.write(tmp_path / "other.ply")
    loaded = load_ply(tmp_path / "other.ply")
    assert np.array_equal(loaded["means"], np.stack([vertices[axis] for axis in "xyz"], 1))
    assert np.array_equal(loaded["quats"][:, 3], vertices["rot_3"])
    assert loaded["shN"].shape == (5, 0, 3)


def test_keep_selects_rows_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.ply, "ROWS_PER_BLOCK", 4)
    params = random_params(23, 1)
    keep = torch.arange(23) % 3 != 1
    assert save_ply(tmp_path / "kept.ply", params, keep=keep) == int(keep.sum())
    loaded = load_ply(tmp_path / "kept.ply")
    for name, values in loaded.items():
        assert np.array_equal(values, params[name][keep].numpy())


def test_a_dropped_row_need_not_be_finite(tmp_path: Path) -> None:
    params = random_params(3, 0)
    params["scales"][1, 2] = torch.nan
    keep = torch.tensor([True, False, True])
    assert save_ply(tmp_path / "model.ply", params, keep=keep) == 2
    with pytest.raises(InputError, match=r"'scales' of Gaussian 1 is not a finite"):
        save_ply(tmp_path / "other.ply", params)
    assert not (tmp_path / "other.ply").exists()


def test_float64_values_beyond_float32_are_refused(tmp_path: Path) -> None:
    params = {name: values.double() for name, values in random_params(2, 0).items()}
    params["means"][0, 0] = 1e39
    with pytest.raises(InputError, match="'means' of Gaussian 0"):
        save_ply(tmp_path / "model.ply", params)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.ply"
    save_ply(path, random_params(3))
    old = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene.ply.os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*model\.ply: No space left"):
        save_ply(path, random_params(5))
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.ply"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        save_ply(tmp_path / "file" / "model.ply", random_params(1))
    (tmp_path / "folder.ply").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        save_ply(tmp_path / "folder.ply", random_params(1))


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "point_cloud" / "iteration_7" / "point_cloud.ply"
    save_ply(path, random_params(2, 0))
    assert len(load_ply(path)["means"]) == 2


def test_point_cloud_is_what_3dgs_expects(tmp_path: Path) -> None:
    xyz = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    rgb = np.arange(27, dtype=np.uint8).reshape(9, 3)
    save_point_cloud(tmp_path / "input.ply", xyz, rgb)
    vertex = plyfile.PlyData.read(tmp_path / "input.ply")["vertex"]
    assert [(p.name, p.val_dtype) for p in vertex.properties] == [
        ("x", "f4"), ("y", "f4"), ("z", "f4"), ("nx", "f4"), ("ny", "f4"), ("nz", "f4"),
        ("red", "u1"), ("green", "u1"), ("blue", "u1"),
    ]  # fmt: skip
    assert np.array_equal(np.stack([vertex[name] for name in ("red", "green", "blue")], 1), rgb)
    vertices = read_vertices(tmp_path / "input.ply")
    assert np.array_equal(np.stack([vertices[name] for name in "xyz"], 1), xyz)
    with pytest.raises(InputError, match="no column f_dc_0"):
        load_ply(tmp_path / "input.ply")


def model_bytes(tmp_path: Path) -> bytes:
    save_ply(tmp_path / "good.ply", random_params(4))
    return (tmp_path / "good.ply").read_bytes()


def text_of(good: bytes) -> bytes:
    """The same model as an ascii ply, as plyfile writes it."""
    data = plyfile.PlyData.read(io.BytesIO(good))
    data.text = True
    out = io.BytesIO()
    data.write(out)
    return out.getvalue()


HOSTILE = {
    "not a ply": (lambda good: b"PK\x03\x04" + good, "does not begin with 'ply'"),
    "empty": (lambda good: b"", "does not begin with 'ply'"),
    "cut header": (lambda good: good[:200], "no 'end_header'"),
    "endless header": (lambda good: b"ply\n" + b"comment x\n" * 100_000 + good[4:], "no 'end_header'"),
    "cut data": (lambda good: good[:-1], "cut off"),
    "huge count": (lambda good: good.replace(b"vertex 4", b"vertex 99999999999999999"), "cut off"),
    "overlong count": (lambda good: good.replace(b"vertex 4", b"vertex " + b"9" * 5000), "not understood"),
    "negative count": (lambda good: good.replace(b"vertex 4", b"vertex -4"), "not understood"),
    "no number": (lambda good: good.replace(b"vertex 4", b"vertex four"), "not understood"),
    "ascii": (lambda good: good.replace(b"binary_little_endian", b"ascii"), "cut off|line of 62 numbers"),
    "cut text": (lambda good: text_of(good)[:-400], "line of 62 numbers"),
    "text without lines": (lambda good: b"\n".join(text_of(good).split(b"\n")[:-3]), "only 2 lines are there"),
    "text with a word": (lambda good: text_of(good)[:-5] + b"nine\n", "line of 62 numbers"),
    "unknown format": (lambda good: good.replace(b"binary_little_endian", b"binary_middle"), "'format' line"),
    "no format": (lambda good: good.replace(b"format binary_little_endian 1.0\n", b""), "'format' line"),
    "no vertices": (lambda good: good.replace(b"element vertex", b"element face"), "no element 'vertex'"),
    "list": (lambda good: good.replace(b"float nz", b"list uchar int nz"), "'list'"),
    "unknown type": (lambda good: good.replace(b"float nz", b"half nz"), "'half'"),
    "column twice": (lambda good: good.replace(b"float nz", b"float nx"), "one twice"),
    "no rotation": (lambda good: good.replace(b"rot_2", b"tor_2"), "no column rot_2"),
    "44 coefficients": (lambda good: good.replace(b"f_rest_44", b"f_tser_44"), "44 f_rest columns"),
    "gap in coefficients": (lambda good: good.replace(b"f_rest_44", b"f_rest_99"), "no column f_rest_44"),
    "property first": (lambda good: good.replace(b"element vertex 4\n", b"", 1), "not understood"),
    "binary junk": (lambda good: good.replace(b"float nz", b"\xff\xfe\x00\x01"), "not understood"),
    "not a number": (lambda good: good[:-4] + np.float32(np.nan).tobytes(), "'quats' of Gaussian 3"),
    "infinite": (lambda good: good[:-4] + np.float32(np.inf).tobytes(), "'quats' of Gaussian 3"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_their_name_and_cause(tmp_path: Path, case: str) -> None:
    damage, cause = HOSTILE[case]
    path = tmp_path / "hostile.ply"
    path.write_bytes(damage(model_bytes(tmp_path)))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match=cause) as caught:
        load_ply(path)
    assert "hostile.ply" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_is_read_as_its_numbers(tmp_path: Path) -> None:
    """With a list of faces before the vertices, as some exporters write them."""
    good = model_bytes(tmp_path)
    text = text_of(good)
    faces = b"element face 2\nproperty list uchar int vertex_indices\n"
    text = text.replace(b"element vertex", faces + b"element vertex", 1).replace(
        b"end_header\n", b"end_header\n3 0 1 2\n4 0 1 2 3\n", 1
    )
    (tmp_path / "text.ply").write_bytes(text)
    found, expected = load_ply(tmp_path / "text.ply"), load_ply(tmp_path / "good.ply")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing\.ply"):
        load_ply(tmp_path / "nothing.ply")
    with pytest.raises(InputError, match="cannot read"):
        load_ply(tmp_path)


@quick
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_never_give_another_error(tmp_path: Path, place: int, junk: bytes) -> None:
    good = model_bytes(tmp_path)
    path = tmp_path / "damaged.ply"
    path.write_bytes(good[:place] + junk + good[place + len(junk) :])
    try:
        loaded = load_ply(path)
    except InputError:
        return
    assert all(np.isfinite(values).all() for values in loaded.values())


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    good = model_bytes(tmp_path)
    stop = good.index(b"end_header\n") + len(b"end_header\n")
    (tmp_path / "crlf.ply").write_bytes(good[:stop].replace(b"\n", b"\r\n") + good[stop:])
    assert np.array_equal(load_ply(tmp_path / "crlf.ply")["quats"], load_ply(tmp_path / "good.ply")["quats"])
