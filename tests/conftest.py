# SPDX-License-Identifier: Apache-2.0
"""Scenes for all tests. Real ones are looked for in the folder MASK_GRENDEL_DATA (default: ../shared/data)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from colmap_builder import build_model, write_binary, write_photos

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real scenes; whether it exists is for `tiny_fox` and `tiny_caliterra` to say."""
    return Path(os.environ.get("MASK_GRENDEL_DATA", REPOSITORY.parent / "shared" / "data"))


def _real_scene(root: Path, name: str) -> Path:
    if not (root / name / "sparse").is_dir():
        pytest.skip(f"no real scene {root / name}: set MASK_GRENDEL_DATA to the folder that holds it")
    return root / name


@pytest.fixture(scope="session")
def tiny_fox(data_root: Path) -> Path:
    """50 photos of 151x270 pixels with 4000 points; skips with a reason when it is not there."""
    return _real_scene(data_root, "tiny-fox")


@pytest.fixture(scope="session")
def tiny_caliterra(data_root: Path) -> Path:
    """75 aerial photos of 213x160 pixels with 4000 points; skips with a reason when it is not there."""
    return _real_scene(data_root, "tiny-caliterra")


@pytest.fixture(scope="session")
def generated_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COLMAP folder of 16 smooth photos of 64x48 pixels around 60 points; always there. Do not write into it."""
    source = tmp_path_factory.mktemp("generated")
    model = build_model(num_views=16, size=(64, 48), num_points=60)
    write_binary(source / "sparse" / "0", model)
    write_photos(source / "images", model)
    return source


@pytest.fixture(scope="session")
def any_scene(data_root: Path, request: pytest.FixtureRequest) -> Path:
    """tiny-fox, or the generated scene where the real one is not there."""
    real = data_root / "tiny-fox"
    return real if (real / "sparse").is_dir() else request.getfixturevalue("generated_scene")
