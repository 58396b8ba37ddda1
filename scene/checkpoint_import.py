# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 3DGS, MaskGaussian, LP-3DGS and Grendel-GS, read without running anything that is in them.

The files are pickles of (capture, iteration). torch reads them with weights_only=True, which knows tensors and plain
containers; the one thing more that they hold, a NumPy scalar, is read by the two small classes in here, so that not
even NumPy's own constructors can be reached. A capture has 12 items, or 13 with MaskGaussian's two mask logits.

Letters: N rows, K spherical-harmonics bases.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from scene.errors import InputError
from scene.gaussians import INITIAL_MASK_LOGIT, GaussianTable

OLDEST_SAFE_TORCH = (2, 10)  # older ones have a flaw in weights_only loading (CVE-2026-24747)
SCALAR_FORMATS = MappingProxyType({"f4": "f", "f8": "d", "i4": "i", "i8": "q"})
GRENDEL_FILE = re.compile(r"chkpnt_ws=(\d{1,6})_rk=(\d{1,6})\.pth")
ITEMS = ("xyz", "f_dc", "f_rest", "scaling", "rotation", "opacity")
MASK_ITEM = 7
"""Place of MaskGaussian's logits in a capture of 13 items."""


@dataclass(frozen=True, eq=False)
class Imported:
    """What a predecessor's checkpoint holds. Random states, view order and the balance of ranks are not in it.

    iteration: images done. extent: the scene's, world units. notices: what was different from what one would expect.
    """

    table: GaussianTable
    iteration: int
    extent: float
    notices: tuple[str, ...]


class ScalarKind:
    """Stands in for numpy.dtype while a checkpoint is read: only the name of a number's format."""

    def __init__(self, name: str, *flags: object) -> None:
        if name not in SCALAR_FORMATS:
            raise ValueError(f"a NumPy value of kind {str(name)[:20]!r}, which no checkpoint of 3DGS holds")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Sequence[object]) -> None:
        """Takes the byte order out of a dtype's state."""
        self.order = ">" if state[1] == ">" else "<"


def scalar_value(kind: ScalarKind, data: bytes) -> float:
    """Stands in for numpy's scalar(): the number in its bytes. Raises: ValueError."""
    if not isinstance(kind, ScalarKind) or not isinstance(data, bytes):
        raise ValueError("a NumPy value that is no number")
    try:
        return float(struct.unpack(kind.order + SCALAR_FORMATS[kind.name], data)[0])
    except struct.error as error:
        raise ValueError(f"a damaged NumPy number ({error})") from error


ALLOWED = (
    (ScalarKind, "numpy.dtype"),
    (scalar_value, "numpy.core.multiarray.scalar"),
    (scalar_value, "numpy._core.multiarray.scalar"),
)
"""What may be found in a checkpoint beside tensors and containers, under the names that NumPy 1 and 2 pickle."""


def import_file(path: Path) -> Imported:
    """Read chkpntN.pth of 3DGS, LP-3DGS (12 items) or MaskGaussian (13 items), or one of a Grendel-GS run of one GPU.

    Raises: InputError when it is missing, damaged, of another form, or holds anything that could run.
    """
    match = GRENDEL_FILE.fullmatch(path.name)
    if match is not None and int(match[1]) > 1:
        raise InputError(f"{path} is one of {match[1]} parts; give the folder {path.parent} to --start_checkpoint")
    return _joined([path], from_grendel=match is not None)


def is_grendel_folder(folder: Path) -> bool:
    """Whether a folder holds the per-rank files of Grendel-GS or mask-Grendel-GS."""
    return bool(_grendel_files(folder))


def import_grendel_folder(folder: Path) -> Imported:
    """Read and join all ranks' files of checkpoints/N of Grendel-GS or mask-Grendel-GS, Adam moments included.

    Raises: InputError when a rank's file is missing, or as `import_file`.
    """
    files = _grendel_files(folder)
    sizes = sorted({size for size, _ in files})
    if len(sizes) != 1:
        raise InputError(f"{folder} mixes the files of runs on {sizes} processes; leave those of one run in it")
    missing = [rank for rank in range(sizes[0]) if (sizes[0], rank) not in files]
    if missing:
        raise InputError(f"{folder} lacks the files of ranks {missing[:10]} of {sizes[0]}; copy them there, too")
    return _joined([files[sizes[0], rank] for rank in range(sizes[0])], from_grendel=True)


def _grendel_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files by (number of processes, rank)."""
    matches = ((GRENDEL_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def _joined(paths: Sequence[Path], *, from_grendel: bool) -> Imported:
    """The rows of all files as one table."""
    parts = [_read_part(path) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if (part.iteration, part.num_items) != (first.iteration, first.num_items):
            raise InputError(f"{path} is of another iteration or program than {paths[0]}; they are not of one run")
    params = _concatenated([part.params for part in parts])
    try:
        table = GaussianTable.from_arrays(params)
    except ValueError as error:
        raise InputError(f"{paths[0]} holds Gaussians of another form: {error}") from error
    table.exp_avg.update(_concatenated([part.exp_avg for part in parts]))
    table.exp_avg_sq.update(_concatenated([part.exp_avg_sq for part in parts]))
    table.statistics.update(_concatenated([part.statistics for part in parts]))
    table.num_updates = first.num_updates
    _require_finite(paths[0], table)
    # Grendel-GS stores the first image of the next step, the others the image that was last.
    iteration = first.iteration - 1 if from_grendel else first.iteration
    return Imported(table, iteration, first.extent, tuple(notice for part in parts for notice in part.notices))


@dataclass(frozen=True, eq=False)
class _Part:
    """One file."""

    params: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    statistics: dict[str, Tensor]
    num_updates: int
    iteration: int
    num_items: int
    extent: float
    notices: tuple[str, ...]


def _read_part(path: Path) -> _Part:
    """Read one file. Raises: InputError."""
    content = _load(path)
    try:
        capture, iteration = content
        return _part_of(path, capture, int(iteration))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is no checkpoint of 3DGS, MaskGaussian, LP-3DGS or Grendel-GS: its content has another form "
            f"({error})."
        ) from error


def _load(path: Path) -> Any:
    """The objects in a file: tensors, containers and numbers, nothing else. Raises: InputError."""
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_SAFE_TORCH:
        raise InputError(
            f"reading {path} needs torch 2.10 or newer, and this is {torch.__version__}: older ones can be attacked "
            "through such files. Upgrade torch, or start from one of mask-grendel's own checkpoints."
        )
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"the checkpoint {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch has no common type for what can be wrong with a file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the checkpoint {path} is damaged, or holds more than the tensors and numbers of a 3DGS checkpoint; "
            f"nothing in it was run. torch says: {reason}"
        ) from error


def _part_of(path: Path, capture: Sequence[Any], iteration: int) -> _Part:
    """A capture in our form."""
    num_items = len(capture)
    if num_items not in (12, 13):
        raise InputError(
            f"{path} holds {num_items} items; a checkpoint of 3DGS, LP-3DGS and Grendel-GS has 12, MaskGaussian's 13."
        )
    has_masks = num_items == 13
    raw = {name: _tensor(capture[k + 1]) for k, name in enumerate(ITEMS)}
    if has_masks:
        raw["mask"] = _tensor(capture[MASK_ITEM])
    sums, counts, optimizer, extent = capture[-4:]
    num_rows = len(raw["xyz"])
    states = {name: _adam_state(optimizer, name, raw[name]) for name in raw}
    steps = {name: step for name, (_, _, step) in states.items()}
    params = _in_our_form(raw)
    params["mask_logits"] = _mask_logits(raw.get("mask"), num_rows)
    exp_avg = _in_our_form({name: first for name, (first, _, _) in states.items()})
    exp_avg_sq = _in_our_form({name: second for name, (_, second, _) in states.items()})
    zeros = torch.zeros(num_rows)
    if has_masks:
        # The two logits' gradients are opposite: half their difference is the gradient of the one logit.
        exp_avg["mask_logits"] = (states["mask"][0][:, 0] - states["mask"][0][:, 1]) / 2
        exp_avg_sq["mask_logits"] = states["mask"][1].mean(dim=1)
    else:
        exp_avg["mask_logits"], exp_avg_sq["mask_logits"] = zeros, zeros.clone()
    notices: tuple[str, ...] = ()
    if len(set(steps.values())) > 1:
        notices = (f"{path}: Adam's step counters differ ({steps}); that of xyz is used for all.",)
    num_updates = steps["xyz"]
    if num_updates == 0 and bool(states["xyz"][0].any()):  # 3DGS's sparse Adam does not count
        num_updates = iteration
    statistics = {"grad_norm_sum": _column(sums, num_rows), "view_count": _column(counts, num_rows)}
    extent = float(extent)
    if iteration < 0 or not math.isfinite(extent):
        raise ValueError(f"iteration {iteration}, extent {extent}")
    return _Part(params, exp_avg, exp_avg_sq, statistics, num_updates, iteration, num_items, extent, notices)


def _tensor(value: Any) -> Tensor:
    """A dense float32 copy of a parameter. Raises: TypeError."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        raise TypeError(f"a {type(value).__name__} stands where a tensor of numbers should be")
    return value.detach().float().contiguous()


def _column(values: Any, num_rows: int) -> Tensor:
    """A statistic (N, 1) as (N,). Raises: ValueError."""
    column = _tensor(values).reshape(-1)
    if len(column) != num_rows:
        raise ValueError(f"a statistic of {len(column)} rows for {num_rows} Gaussians")
    return column


def _adam_state(optimizer: Mapping[str, Any], name: str, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both moments and the step counter of a parameter group, zeros before the first step. Raises: KeyError, ..."""
    groups = [group for group in optimizer["param_groups"] if group.get("name") == name]
    if len(groups) != 1 or len(groups[0]["params"]) != 1:
        raise ValueError(f"the optimizer has {len(groups)} groups named {name!r}")
    state = optimizer["state"].get(groups[0]["params"][0])
    if not state:
        return torch.zeros_like(like), torch.zeros_like(like), 0
    first, second = _tensor(state["exp_avg"]), _tensor(state["exp_avg_sq"])
    if first.shape != like.shape or second.shape != like.shape:
        raise ValueError(f"the moments of {name!r} have shape {tuple(first.shape)}, the values {tuple(like.shape)}")
    return first, second, int(state.get("step", 0))


def _in_our_form(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of 3DGS's names and shapes under ours: (N, 3), (N, 3), (N, K-1, 3), (N,), (N, 3), (N, 4)."""
    num_rows = len(raw["xyz"])
    return {
        "means": raw["xyz"],
        "sh0": raw["f_dc"].reshape(num_rows, 3),
        "shN": raw["f_rest"],
        "opacities": raw["opacity"].reshape(num_rows),
        "scales": raw["scaling"],
        "quats": raw["rotation"],
    }


def _mask_logits(two_logits: Tensor | None, num_rows: int) -> Tensor:
    """One logit of the keep probability, the difference of MaskGaussian's two; 9.0 where there are none."""
    if two_logits is None:
        return torch.full((num_rows,), INITIAL_MASK_LOGIT)
    if two_logits.shape != (num_rows, 2):
        raise ValueError(f"mask logits of shape {tuple(two_logits.shape)} for {num_rows} Gaussians")
    return two_logits[:, 0] - two_logits[:, 1]


def _concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of all parts, attribute by attribute."""
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _require_finite(path: Path, table: GaussianTable) -> None:
    """Raises: InputError when a value is not a finite number: nothing could be trained from it."""
    groups = {"": table.params, "first moments of ": table.exp_avg, "second moments of ": table.exp_avg_sq}
    groups["statistics "] = table.statistics
    for kind, tensors in groups.items():
        for name, values in tensors.items():
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"{path} holds values that are not finite numbers ({kind}{name}); train it again")
