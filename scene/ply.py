# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of the ply files of the 3DGS ecosystem.

A model file holds one vertex per Gaussian, little-endian float32: x y z, nx ny nz (zeros), f_dc_*, f_rest_*, opacity,
scale_*, rot_*; 62 columns at SH degree 3. The numbers are the raw parameters: log scales, logit opacities. Files are
read with distrust: the header is bounded, and sizes are checked against the file before anything is allocated.

Letters: N vertices, K spherical-harmonics bases.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from distributed.communicator import Communicator
from scene.errors import InputError
from scene.gaussians import AttributeSpec, attributes_for

NORMAL_COLUMNS = ("nx", "ny", "nz")
MAX_HEADER_BYTES = 1 << 16
DAMAGED = "The file is damaged, or of a training that diverged; use an earlier one."
DIVERGED = "The training has diverged, and nothing was written: lower the learning rates."
ROWS_PER_BLOCK = 1 << 16  # bounds the memory that a save needs beside the table
_SCALAR_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_BYTE_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


def model_columns(sh_degree: int) -> tuple[str, ...]:
    """The columns of a model file in file order: 62 for degree 3; 41, 26 and 17 for 2, 1 and 0."""
    num_rest = 3 * ((sh_degree + 1) ** 2 - 1)
    return (
        ("x", "y", "z", *NORMAL_COLUMNS, "f_dc_0", "f_dc_1", "f_dc_2")
        + tuple(f"f_rest_{index}" for index in range(num_rest))
        + ("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
    )


def save_ply(
    path: Path, params: Mapping[str, Tensor], *, keep: Tensor | None = None, ranks: Communicator | None = None
) -> int:
    """Write the rows where `keep` holds (all without it) as a model file; return how many were written.

    Args: params: attribute name -> (N, *shape) raw parameters (mask logits are not written); keep: (N,) bool; ranks:
    the world whose rows make one file, rank 0's first. All ranks call it, rank 0 writes and has one block of rows of
    one other rank in memory at a time.
    The file appears under its name only when it is complete and on disk.
    Raises: InputError when a value is not a finite float32, or the file cannot be written; PeerError on those of
    several ranks that have no error of their own.
    """
    ranks = ranks if ranks is not None else Communicator()
    specs = attributes_for(math.isqrt(params["shN"].shape[1] + 1) - 1)
    columns = model_columns(math.isqrt(params["shN"].shape[1] + 1) - 1)
    rows = np.arange(len(params["means"])) if keep is None else keep.cpu().numpy().nonzero()[0]
    arrays = {spec.name: params[spec.name].detach().cpu().numpy() for spec in specs if spec.is_in_ply}
    with ranks.all_or_none(InputError):
        for name, values in arrays.items():
            _require_finite(path, name, values, rows, DIVERGED)
    counts = [row[0] for row in ranks.gather_counts([len(rows)])]  # all ranks
    header = _header([(column, "float") for column in columns], sum(counts))
    blocks = _blocks_of_ranks(ranks, counts, lambda part: _model_block(arrays, specs, columns, rows[part]))
    failure: InputError | None = None
    if ranks.is_main:
        try:
            _write_atomically(path, lambda file: file.writelines(itertools.chain([header], blocks)))
        except InputError as error:
            failure = error
    for _ in blocks:  # who does not write, or could not, still takes part
        pass
    ranks.raise_together(failure)
    return sum(counts)


def load_ply(path: Path) -> dict[str, np.ndarray]:
    """The raw parameters of a model file: attribute name -> (N, *shape) float32, without mask logits.

    Columns are found by name in any order and of any scalar type; other columns are ignored. The number of f_rest
    columns (0, 9, 24 or 45) gives the SH degree.
    Raises: InputError for a file that is missing, cut off, no ply, without a column, or with a value that is not
    finite.
    """
    vertices = read_vertices(path)
    names = vertices.dtype.names or ()
    specs = attributes_for(_sh_degree_of(path, names))
    missing = [column for spec in specs for column in spec.ply_columns if column not in names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing[:5])}, so it is no 3D Gaussian Splatting model "
            "(a point cloud, or a compressed format?). Give a point_cloud.ply as 3DGS writes it."
        )
    arrays = {spec.name: _read_attribute(vertices, spec) for spec in specs if spec.is_in_ply}
    for name, values in arrays.items():
        _require_finite(path, name, values, np.arange(len(values)), DAMAGED)
    return arrays


def save_point_cloud(path: Path, xyz: np.ndarray, rgb: np.ndarray) -> None:
    """Write points as x y z nx ny nz (float32) and red green blue (uint8), the input.ply of 3DGS.

    Args: xyz: (N, 3) world units; rgb: (N, 3) uint8.
    Raises: InputError when the file cannot be written.
    """
    columns = [(name, "float") for name in ("x", "y", "z", *NORMAL_COLUMNS)]
    columns += [(name, "uchar") for name in ("red", "green", "blue")]
    vertices = np.zeros(len(xyz), dtype=[(name, "<" + _SCALAR_TYPES[kind]) for name, kind in columns])
    for axis in range(3):
        vertices["xyz"[axis]] = xyz[:, axis]
        vertices[("red", "green", "blue")[axis]] = rgb[:, axis]
    _write_atomically(path, lambda file: file.write(_header(columns, len(vertices)) + vertices.tobytes()))


def read_vertices(path: Path) -> np.ndarray:
    """The vertex element of a ply as a structured array (N,); of a binary one through a memory map.

    Raises: InputError when the file is missing, no ply, or shorter than its header promises.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(MAX_HEADER_BYTES)
            num_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
    layout = _parse_header(path, head)
    if layout.is_text:
        return _text_vertices(path, layout)
    needed = layout.offset + layout.count * layout.dtype.itemsize
    if num_bytes < needed:
        raise InputError(
            f"{path} is cut off: its header promises {layout.count} vertices ({needed} bytes), but the file has only "
            f"{num_bytes} bytes. Copy or save it again."
        )
    if layout.count == 0:
        return np.empty(0, layout.dtype)
    return np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.offset, shape=(layout.count,))


def _text_vertices(path: Path, layout: _Layout) -> np.ndarray:
    """The vertices of an ascii ply, a line each."""
    names = layout.dtype.names or ()
    with Path(path).open("rb") as file:
        file.seek(layout.offset)
        lines = list(itertools.islice(file, layout.lines_before, layout.lines_before + layout.count))
    if len(lines) < layout.count:
        raise InputError(
            f"{path} is cut off: its header promises {layout.count} vertices, but only {len(lines)} lines are there. "
            "Copy or save it again."
        )
    vertices = np.empty(layout.count, layout.dtype)
    try:
        rows = np.loadtxt(lines, ndmin=2) if lines else np.empty((0, len(names)))
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as not finite
            for name, column in zip(names, rows.T, strict=True):
                vertices[name] = column
    except ValueError as error:
        raise InputError(
            f"{path}: not every vertex is a line of {len(names)} numbers ({error}). Copy or save it again."
        ) from error
    return vertices


@dataclass(frozen=True)
class _Layout:
    """Where and how the vertices of a file lie. offset: where they begin; of a text, where the data begin.

    lines_before: lines of a text between that and the vertices.
    """

    offset: int
    count: int
    dtype: np.dtype
    is_text: bool = False
    lines_before: int = 0


@dataclass(frozen=True)
class _Element:
    """One element of a header: its name, count, and (name, scalar type or "list") of its properties."""

    name: str
    count: int
    properties: list[tuple[str, str]]


def _parse_header(path: Path, head: bytes) -> _Layout:
    """The layout of the vertices; every line that is not understood is an error."""
    lines, offset = _header_lines(path, head)
    is_text = ["format", "ascii", "1.0"] in lines
    byte_order = "<" if is_text else _byte_order(path, lines)
    elements = _elements(path, lines)
    vertex_index = next((index for index, element in enumerate(elements) if element.name == "vertex"), None)
    if vertex_index is None:
        raise InputError(f"{path} has no element 'vertex'; it holds no points. Give a point_cloud.ply.")
    vertex = elements[vertex_index]
    if is_text:
        lines_before = sum(element.count for element in elements[:vertex_index])
        return _Layout(offset, vertex.count, _dtype(path, vertex, byte_order), True, lines_before)
    for element in elements[:vertex_index]:
        offset += element.count * _dtype(path, element, byte_order).itemsize
    return _Layout(offset, vertex.count, _dtype(path, vertex, byte_order))


def _header_lines(path: Path, head: bytes) -> tuple[list[list[str]], int]:
    """The header's lines as words, without the first and the last, and the offset of the data."""
    if not head.startswith((b"ply\n", b"ply\r\n")):
        raise InputError(f"{path} is no ply file: it does not begin with 'ply'. Give a point_cloud.ply.")
    lines: list[list[str]] = []
    start = 0
    while (stop := head.find(b"\n", start)) >= 0:
        words = head[start:stop].decode("ascii", errors="replace").split()
        start = stop + 1
        if words == ["end_header"]:
            return lines[1:], start
        lines.append(words)
    raise InputError(
        f"{path} has no 'end_header' line within its first {MAX_HEADER_BYTES} bytes: the file is cut off or damaged. "
        "Copy or save it again."
    )


def _byte_order(path: Path, lines: list[list[str]]) -> str:
    """'<' or '>' from the format line."""
    formats = [words[1:] for words in lines if words[:1] == ["format"]]
    if len(formats) == 1 and len(formats[0]) == 2 and formats[0][0] in _BYTE_ORDERS:
        return _BYTE_ORDERS[formats[0][0]]
    raise InputError(f"{path} has no valid 'format' line in its header. Save it again as binary_little_endian.")


def _elements(path: Path, lines: list[list[str]]) -> list[_Element]:
    """The elements of a header in file order."""
    elements: list[_Element] = []
    for words in lines:
        if not words or words[0] in ("format", "comment", "obj_info"):
            continue
        is_count = len(words) == 3 and words[2].isascii() and words[2].isdigit() and len(words[2]) <= 18
        if words[0] == "element" and is_count:
            elements.append(_Element(words[1], int(words[2]), []))
        elif words[0] == "property" and elements and len(words) == 3:
            elements[-1].properties.append((words[2], words[1]))
        elif words[0] == "property" and elements and len(words) == 5 and words[1] == "list":
            elements[-1].properties.append((words[4], "list"))
        else:
            raise InputError(
                f"{path}: the header line {' '.join(words)[:80]!r} is not understood. Save the file again."
            )
    return elements


def _dtype(path: Path, element: _Element, byte_order: str) -> np.dtype:
    """The record of one element's rows."""
    names = [name for name, _ in element.properties]
    if not names or len(set(names)) != len(names):
        raise InputError(f"{path}: element {element.name!r} has no properties, or one twice. Save the file again.")
    for name, kind in element.properties:
        if kind not in _SCALAR_TYPES:
            raise InputError(
                f"{path}: property {name!r} of element {element.name!r} has the type {kind!r}, which is not read here. "
                "Save the vertices with plain number columns."
            )
    return np.dtype([(name, byte_order + _SCALAR_TYPES[kind]) for name, kind in element.properties])


def _sh_degree_of(path: Path, names: tuple[str, ...]) -> int:
    """The SH degree that the number of f_rest columns means."""
    num_rest = sum(name.startswith("f_rest_") for name in names)
    degrees = {3 * ((degree + 1) ** 2 - 1): degree for degree in range(4)}
    if num_rest not in degrees:
        raise InputError(
            f"{path} has {num_rest} f_rest columns; SH degrees 0 to 3 have 0, 9, 24 or 45. "
            "Give a model of such a degree."
        )
    return degrees[num_rest]


def _read_attribute(vertices: np.ndarray, spec: AttributeSpec) -> np.ndarray:
    """One attribute as (N, *shape) float32."""
    values = np.empty((len(vertices), len(spec.ply_columns)), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as not finite
        for index, column in enumerate(spec.ply_columns):
            values[:, index] = vertices[column]
    return values.reshape(len(vertices), *spec.shape)


def _require_finite(path: Path, name: str, values: np.ndarray, rows: np.ndarray, advice: str) -> None:
    """Raise InputError with this advice when a value of the rows is not finite as float32."""
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        flat = values[block].reshape(len(block), -1)
        # `not <=` is True for NaN as well; what rounds up to infinity is beyond the largest float32.
        is_bad = ~(np.abs(flat) <= np.finfo(np.float32).max).all(axis=1)
        if is_bad.any():
            raise InputError(
                f"{path}: attribute {name!r} of Gaussian {block[is_bad][0]} is not a finite float32 number "
                f"({is_bad.sum()} such rows in its block). {advice}"
            )


def _header(columns: list[tuple[str, str]], count: int) -> bytes:
    """The header of a little-endian file with one vertex element."""
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property {kind} {name}" for name, kind in columns]
    return ("\n".join([*lines, "end_header"]) + "\n").encode("ascii")


def _model_block(
    arrays: Mapping[str, np.ndarray], specs: tuple[AttributeSpec, ...], columns: tuple[str, ...], rows: np.ndarray
) -> np.ndarray:
    """The rows' records, (len(rows), len(columns)) little-endian float32; normals are zero."""
    place = {column: index for index, column in enumerate(columns)}
    block = np.zeros((len(rows), len(columns)), "<f4")
    for spec in specs:
        if spec.is_in_ply:
            places = [place[column] for column in spec.ply_columns]
            block[:, places] = arrays[spec.name][rows].reshape(len(rows), len(places))
    return block


def _blocks_of_ranks(
    ranks: Communicator, counts: Sequence[int], block_of: Callable[[slice], np.ndarray]
) -> Iterator[bytes]:
    """The records of all ranks' rows, rank after rank, at rank 0; the other ranks yield nothing of use. All ranks."""
    for source, count in enumerate(counts):
        for start in range(0, count, ROWS_PER_BLOCK):
            size = min(ROWS_PER_BLOCK, count - start)
            # A block of no rows has the right columns, too.
            block = block_of(slice(start, start + size) if ranks.rank == source else slice(0, 0))
            if source != 0:
                sent = [size if ranks.rank == source and target == 0 else 0 for target in range(ranks.size)]
                received = [size if ranks.is_main and rank == source else 0 for rank in range(ranks.size)]
                block = ranks.all_to_all_rows(torch.from_numpy(block), sent, received).numpy()  # all ranks
            yield block.tobytes() if ranks.is_main else b""


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name beside `path`, put it on disk, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}. Check the free space and the permissions of its folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a rename survives a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
