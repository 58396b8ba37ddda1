# SPDX-License-Identifier: Apache-2.0
"""Finds and reads a COLMAP sparse model, binary or text. Knows neither pixels nor train/test splits; writes nothing."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

from scene.colmap_binary import read_cameras_binary, read_images_binary, read_points_binary
from scene.colmap_records import ColmapModel, check_model
from scene.colmap_text import read_cameras_text, read_images_text, read_points_text
from scene.errors import InputError

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0")
PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"))


def find_model(source: Path) -> Path:
    """Returns the folder below `source` that holds a sparse model.

    Raises:
        InputError: there is no such folder; the message says what to do with what was found instead.
    """
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise InputError(
            f"The scene folder {source} {what}. Set --source_path (-s) to a folder with images/ and sparse/0/."
        )
    folder = _model_folder(source)
    if folder is not None:
        return folder
    raise InputError(
        f"{source} holds no COLMAP model (looked for cameras.bin and cameras.txt in {', '.join(MODEL_FOLDERS)}). "
        + _advice_without_model(source)
    )


def has_model(source: Path) -> bool:
    """Whether a folder below `source` holds a sparse model, as `find_model` looks for it."""
    return _model_folder(source) is not None


def _model_folder(source: Path) -> Path | None:
    for name in MODEL_FOLDERS:
        folder = source / name
        if any((folder / f"cameras.{suffix}").is_file() for suffix in ("bin", "txt")):
            return folder
    return None


def _advice_without_model(source: Path) -> str:
    if (source / "transforms_train.json").is_file():
        return "It has a transforms_train.json: leave out --dataset_type colmap to read that."
    if (source / "transforms.json").is_file():
        return (
            "Its transforms.json holds poses without a split: write them as transforms_train.json and "
            "transforms_test.json, or use a COLMAP model of the same images."
        )
    photos = next((folder for folder in (source / "images", source) if _has_photos(folder)), None)
    if photos is None:
        return "It has no photos either: put them into its folder images/ first."
    return f"It has photos without camera poses. {_reconstruction_advice(source, photos)}"


def _reconstruction_advice(source: Path, photos: Path) -> str:
    """Returns the two commands, with and without the colmap program, that make a pinhole model from photos."""
    colmap = (
        f"colmap automatic_reconstructor --workspace_path {shlex.quote(str(source))} --image_path "
        f"{shlex.quote(str(photos))} --camera_model PINHOLE --dense 0"
    )
    call = (
        "import pathlib, pycolmap as p; "
        f"w, i = pathlib.Path({json.dumps(str(source))}), {json.dumps(str(photos))}; "
        'd = w / "database.db"; o = p.ImageReaderOptions(); o.camera_model = "PINHOLE"; '
        "p.extract_features(d, i, reader_options=o); p.match_exhaustive(d); "
        's = w / "sparse"; s.mkdir(exist_ok=True); p.incremental_mapping(d, i, s)'
    )
    images = "" if photos.name == "images" else " Then train with --images . (the photos are not in a folder images/)."
    return (
        f"Make the poses with `{colmap}`, or without the colmap program by `pip install pycolmap` and "
        f"`python -c {shlex.quote(call)}`.{images}"
    )


def _has_photos(folder: Path) -> bool:
    """Whether there are photos in the folder or one level below; a deeper search could walk through a whole disk."""
    paths = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    return any(path.suffix.lower() in PHOTO_SUFFIXES for path in paths)


def read_model(folder: Path) -> ColmapModel:
    """Returns the model in `folder`; binary files are preferred to text files.

    Raises:
        InputError: a file is missing, damaged, or of a kind that cannot be used; names file, place, cause and fix.
    """
    suffix = "bin" if (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file() else "txt"
    paths = {name: folder / f"{name}.{suffix}" for name in ("cameras", "images", "points3D")}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"The COLMAP model in {folder} lacks {', '.join(missing)}. All three of cameras, images and points3D must "
            "be there in one format (.bin or .txt): export the model again with `colmap model_converter`."
        )
    is_binary = suffix == "bin"
    cameras = (read_cameras_binary if is_binary else read_cameras_text)(paths["cameras"])
    images = (read_images_binary if is_binary else read_images_text)(paths["images"])
    check_model(folder, cameras, images)
    xyz, rgb = (read_points_binary if is_binary else read_points_text)(paths["points3D"])
    return ColmapModel(folder, cameras, images, xyz, rgb)
