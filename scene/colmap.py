# SPDX-License-Identifier: Apache-2.0
"""Finds and reads a COLMAP sparse model, binary or text. Knows neither pixels nor train/test splits; writes nothing."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from scene.colmap_binary import read_cameras_binary, read_images_binary, read_points_binary
from scene.colmap_records import ColmapModel, check_model
from scene.colmap_text import read_cameras_text, read_images_text, read_points_text
from scene.errors import InputError

MODEL_FOLDERS = ("sparse/0", "sparse", "colmap/sparse/0")
MODEL_PARTS = ("cameras", "images", "points3D")
MODEL_SUFFIXES = ("bin", "txt")  # in the order of preference
PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"))


def find_model(source: Path) -> Path:
    """Returns the folder below `source` that holds a sparse model, or at least a part of one.

    A part is returned so that `read_model` names what is missing: whoever has it needs no second reconstruction.

    Raises:
        InputError: there is no such folder; the message says what to do with what was found instead.
    """
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise InputError(
            f"The scene folder {source} {what}. Set --source_path (-s) to a folder with images/ and sparse/0/."
        )
    folder = _model_folder(source) or _broken_model_folder(source)
    if folder is not None:
        return folder
    others = numbered_models(source / "sparse")
    if others:
        raise InputError(_advice_on_numbers(source / "sparse", others))
    raise InputError(
        f"{source} holds no COLMAP model (looked for cameras.bin and cameras.txt in {', '.join(MODEL_FOLDERS)}). "
        + _advice_without_model(source)
    )


def has_model(source: Path) -> bool:
    """Whether a folder below `source` holds a sparse model, as `find_model` looks for it."""
    return _model_folder(source) is not None


def _model_folder(source: Path) -> Path | None:
    return next((source / name for name in MODEL_FOLDERS if _has_cameras(source / name)), None)


def _has_cameras(folder: Path) -> bool:
    return any((folder / f"cameras.{suffix}").is_file() for suffix in MODEL_SUFFIXES)


def _broken_model_folder(source: Path) -> Path | None:
    """Returns the first folder for a model that holds any file of one."""
    return next((source / name for name in MODEL_FOLDERS if any(_found_parts(source / name).values())), None)


def _found_parts(folder: Path) -> dict[str, list[str]]:
    """Returns by suffix the names of the files of a model that are in the folder."""
    return {
        suffix: [f"{part}.{suffix}" for part in MODEL_PARTS if (folder / f"{part}.{suffix}").is_file()]
        for suffix in MODEL_SUFFIXES
    }


def numbered_models(parent: Path) -> list[Path]:
    """Returns the models in folders 0, 1, ... of `parent`, in this order.

    COLMAP's mapper writes several when it cannot join all photos.
    """
    folders = parent.glob("[0-9]*") if parent.is_dir() else []
    return sorted((path for path in folders if path.name.isdecimal() and _has_cameras(path)), key=lambda p: int(p.name))


def describe_models(models: Sequence[Path]) -> str:
    """Returns their names, with the number of images where a glance at the file tells it: "0 (38 images), 1"."""
    counts = [_count_images(model) for model in models]
    words = ["" if count is None else f" ({count} images)" for count in counts]
    return ", ".join(model.name + word for model, word in zip(models, words, strict=True))


def _count_images(model: Path) -> int | None:
    """Returns the count that an images.bin begins with."""
    path = model / "images.bin"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(8)
    return int.from_bytes(head, "little") if len(head) == 8 else None


def _advice_on_numbers(sparse: Path, models: Sequence[Path]) -> str:
    largest = max(models, key=lambda model: _count_images(model) or 0)
    move = f"mv {shlex.quote(str(largest))} {shlex.quote(str(sparse / '0'))}"
    return (
        f"{sparse / '0'}, where the COLMAP model is read, does not exist, but {sparse} holds "
        f"{describe_models(models)}. To use {largest.name}, rename it: `{move}`."
    )


def _advice_without_model(source: Path) -> str:
    if (source / "transforms_train.json").is_file():
        return "It has a transforms_train.json: leave out --dataset_type colmap to read that."
    if (source / "transforms.json").is_file():
        return (
            "Its transforms.json holds poses without a split: write them as transforms_train.json and "
            "transforms_test.json, or use a COLMAP model of the same images."
        )
    photos = next((folder for folder in (source / "images", source / "input", source) if has_photos(folder)), None)
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
    place = photos.relative_to(source)
    images = "" if place.name == "images" else f" Then train with --images {place} (there is no folder images/)."
    return (
        f"Make the poses with `{colmap}`, or without the colmap program by `pip install pycolmap` and "
        f"`python -c {shlex.quote(call)}`.{images}"
    )


def has_photos(folder: Path) -> bool:
    """Whether there are photos in the folder or one level below; a deeper search could walk through a whole disk."""
    paths = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    return any(path.suffix.lower() in PHOTO_SUFFIXES for path in paths)


def read_model(folder: Path) -> ColmapModel:
    """Returns the model in `folder`; binary files are preferred to text files.

    Raises:
        InputError: a file is missing, damaged, or of a kind that cannot be used; names file, place, cause and fix.
    """
    found = _found_parts(folder)
    suffix = max(MODEL_SUFFIXES, key=lambda suffix: len(found[suffix]))  # of equal ones the first
    paths = {name: folder / f"{name}.{suffix}" for name in MODEL_PARTS}
    missing = [path.name for path in paths.values() if path.name not in found[suffix]]
    if missing:
        there = ", ".join(name for names in found.values() for name in names) or "none of them is"
        raise InputError(
            f"The COLMAP model in {folder} lacks {', '.join(missing)} (there: {there}). All three of cameras, images "
            "and points3D must be there in one format (.bin or .txt): copy what is missing from where the model was "
            "made, or export the whole model from there again with `colmap model_converter`."
        )
    is_binary = suffix == "bin"
    cameras = (read_cameras_binary if is_binary else read_cameras_text)(paths["cameras"])
    images = (read_images_binary if is_binary else read_images_text)(paths["images"])
    check_model(folder, cameras, images)
    xyz, rgb = (read_points_binary if is_binary else read_points_text)(paths["points3D"])
    return ColmapModel(folder, cameras, images, xyz, rgb)
