# SPDX-License-Identifier: Apache-2.0
"""Pictures for documents: which views, what stands where, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import figures
from scene.errors import InputError


def write_model(folder: Path, psnr: dict[str, float]) -> None:
    """A model folder with rendered views of 6x4 pixels; the render is 20 brighter than the photo, which is flat."""
    for place in ("renders", "gt"):
        (folder / "test" / "ours_30" / place).mkdir(parents=True)
    for level, name in enumerate(psnr):
        photo = np.full((4, 6, 3), 10 * level, np.uint8)
        Image.fromarray(photo).save(folder / "test" / "ours_30" / "gt" / name)
        Image.fromarray(photo + np.uint8(20)).save(folder / "test" / "ours_30" / "renders" / name)
    (folder / "per_view.json").write_text(json.dumps({"ours_30": {"PSNR": psnr}}), encoding="utf-8")


PSNR = {"00000.png": 30.0, "00001.png": 25.0, "00002.png": 35.0, "00003.png": 31.0, "00004.png": 29.0}


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["00001.png"]),
        (2, ["00001.png", "00002.png"]),
        (3, ["00001.png", "00000.png", "00002.png"]),
        (9, ["00001.png", "00004.png", "00000.png", "00003.png", "00002.png"]),
    ],
)
def test_views_go_from_the_worst_to_the_best(count: int, names: list[str]) -> None:
    assert figures.choose_views(PSNR, count) == names


def test_difference_is_amplified_and_clipped() -> None:
    photo, render = np.zeros((1, 2, 3), np.uint8), np.array([[[0, 10, 100], [3, 0, 255]]], np.uint8)
    row = figures.comparison(photo, render)
    assert row.shape == (1, 6 + 2 * figures.GAP, 3)
    assert row[0, -2:].tolist() == [[0, 40, 255], [12, 0, 255]]
    assert np.array_equal(figures.comparison(render, photo)[0, -2:], row[0, -2:])


def test_sheet_shows_photo_render_difference_in_rows(tmp_path: Path) -> None:
    write_model(tmp_path, PSNR)
    sheet = figures.comparison_sheet(tmp_path, 2)
    assert sheet.shape == (4 + figures.GAP + 4, 18 + 2 * figures.GAP, 3)
    columns = (0, 6 + figures.GAP, 12 + 2 * figures.GAP)
    assert [int(sheet[0, x, 0]) for x in columns] == [10, 30, 80]
    assert [int(sheet[-1, x, 0]) for x in columns] == [20, 40, 80]


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"render.py"):
        figures.comparison_sheet(tmp_path, 1)
    write_model(tmp_path, PSNR)
    (tmp_path / "test" / "ours_30" / "gt" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"00001.png cannot be read"):
        figures.comparison_sheet(tmp_path, 1)
    (tmp_path / "per_view.json").unlink()
    with pytest.raises(InputError, match=r"metrics.py"):
        figures.comparison_sheet(tmp_path, 1)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model", PSNR)
    assert figures.main([str(tmp_path / "model"), "-o", str(tmp_path / "new" / "picture.png"), "--views", "1"]) == 0
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.size == (18 + 2 * figures.GAP, 4)
    assert "picture.png" in capsys.readouterr().out
    with pytest.raises(InputError, match="--views is 0"):
        figures.main([str(tmp_path / "model"), "-o", "x.png", "--views", "0"])
