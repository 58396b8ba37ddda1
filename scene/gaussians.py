# SPDX-License-Identifier: Apache-2.0
"""The Gaussians that this rank owns: parameters, Adam moments, densification statistics and identities.

Every per-Gaussian attribute is one `AttributeSpec`; the table, the ply files and the optimizer read that list and know
nothing else about an attribute. The table knows nothing about rendering, schedules or ranks.

Letters: N rows of this rank, K spherical-harmonics bases, (degree + 1)^2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from masksplat.lazy import Behind, LazyRows
from masksplat.ops import Body
from scene.attribute_tensors import LAZY_ATTRIBUTE, AttributeTensors, Backlog
from scene.row_edit import RowEdit, TableEdit, ValueEdit

MAX_SH_DEGREE = 3
INITIAL_MASK_LOGIT = 9.0  # keep probability 0.99988, the margin of MaskGaussian's two logits [10, 1]
STATISTICS = ("grad_norm_sum", "view_count")
OPTIONAL_STATISTICS = ("importance",)
"""Further numbers of each Gaussian that a strategy may keep in the table for as long as it needs them."""


@dataclass(frozen=True)
class AttributeSpec:
    """One per-Gaussian attribute.

    shape: of one row. ply_columns: names of the row's numbers in C order; fewer than numbers: not written to ply files.
    learning_rate: the flag that holds it; learning_rate_factor: what the flag's value is multiplied with.
    """

    name: str
    shape: tuple[int, ...]
    ply_columns: tuple[str, ...]
    learning_rate: str
    learning_rate_factor: float = 1.0

    @property
    def is_in_ply(self) -> bool:
        """Whether ply files hold the attribute; one without numbers (shN at degree 0) counts as held."""
        return len(self.ply_columns) == math.prod(self.shape)


@functools.cache
def attributes_for(sh_degree: int) -> tuple[AttributeSpec, ...]:
    """The attributes of Gaussians with spherical harmonics up to `sh_degree` (0 to 3).

    means (3,) world units; sh0 (3,) and shN (K-1, 3) spherical-harmonics coefficients; opacities () logits;
    mask_logits () logits of the keep probability; scales (3,) log world units; quats (4,) wxyz, any length but 0.
    Raises: ValueError for another degree.
    """
    if not 0 <= sh_degree <= MAX_SH_DEGREE:
        raise ValueError(f"the SH degree must be 0, 1, 2 or 3, got {sh_degree}")
    num_higher = (sh_degree + 1) ** 2 - 1
    # The files hold all red coefficients first, then green, then blue; the table holds (basis, channel).
    f_rest = tuple(f"f_rest_{channel * num_higher + basis}" for basis in range(num_higher) for channel in range(3))
    return (
        AttributeSpec("means", (3,), ("x", "y", "z"), "position_lr_init"),
        AttributeSpec("sh0", (3,), ("f_dc_0", "f_dc_1", "f_dc_2"), "feature_lr"),
        AttributeSpec("shN", (num_higher, 3), f_rest, "feature_lr", 1 / 20),
        AttributeSpec("opacities", (), ("opacity",), "opacity_lr"),
        # The paper's two logits move in opposite directions under Adam: one logit at twice the rate is the same.
        AttributeSpec("mask_logits", (), (), "mask_lr", 2.0),
        AttributeSpec("scales", (3,), ("scale_0", "scale_1", "scale_2"), "scaling_lr"),
        AttributeSpec("quats", (4,), ("rot_0", "rot_1", "rot_2", "rot_3"), "rotation_lr"),
    )


ATTRIBUTES = attributes_for(MAX_SH_DEGREE)


class StoredRows(NamedTuple):
    """A table's tensors as a training step takes them; rows of LAZY_ATTRIBUTE may be behind, as `lazy` knows."""

    params: Mapping[str, Tensor]
    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    lazy: LazyRows | None


@dataclass(eq=False)
class GaussianTable:
    """This rank's rows of every attribute, and what the optimizer and the density control remember of them.

    params, exp_avg, exp_avg_sq: attribute name -> (N, *shape), contiguous, of one dtype and device.
    statistics: "grad_norm_sum" (sum over views of the norm of the NDC position gradient) and "view_count", each (N,);
    on all ranks or on none also OPTIONAL_STATISTICS.
    ids: (N,) int64 >= 0, unique over all ranks. num_updates: Adam updates completed so far, common to all attributes;
    edits leave it alone, and the training step adds 1 after it has updated every attribute. A step may leave rows of
    shN that it does not draw for later (`scene.attribute_tensors`): they are updated before anybody else sees them.
    behind: how such rows lay when the checkpoint was written that these rows come from, its `held`.
    """

    params: MutableMapping[str, Tensor]
    exp_avg: MutableMapping[str, Tensor]
    exp_avg_sq: MutableMapping[str, Tensor]
    statistics: dict[str, Tensor]
    ids: Tensor
    num_updates: int = 0
    behind: InitVar[Behind | None] = None

    def __post_init__(self, behind: Behind | None) -> None:
        """Guard the tensors whose updates may be behind."""
        self._backlog = Backlog(behind)
        groups = (self.params, self.exp_avg, self.exp_avg_sq)
        self._guarded = [AttributeTensors(tensors, self._backlog) for tensors in groups]
        self.params, self.exp_avg, self.exp_avg_sq = self._guarded

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray | Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ids: Tensor | None = None,
    ) -> GaussianTable:
        """A table with these raw parameters (copied), zero moments and zero statistics.

        Args: arrays: attribute name -> (N, *shape); without "mask_logits" every logit is 9.0.
        ids: (N,) int64; by default 0 .. N-1.
        Raises: ValueError when an attribute is missing, unknown or of another shape.
        """
        specs = attributes_for(_sh_degree_of(arrays))
        unknown = sorted(set(arrays) - {spec.name for spec in specs})
        if unknown:
            raise ValueError(f"unknown attributes {unknown}; known are {[spec.name for spec in specs]}")
        num_rows = len(arrays["means"]) if "means" in arrays else 0
        params = {spec.name: _parameter(spec, arrays, num_rows, dtype, torch.device(device)) for spec in specs}
        if ids is None:
            ids = torch.arange(num_rows, dtype=torch.int64)
        if ids.shape != (num_rows,) or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 of shape ({num_rows},), got {ids.dtype} of shape {tuple(ids.shape)}")
        return cls(
            params=params,
            exp_avg={name: torch.zeros_like(values) for name, values in params.items()},
            exp_avg_sq={name: torch.zeros_like(values) for name, values in params.items()},
            statistics={name: torch.zeros_like(params["opacities"]) for name in STATISTICS},
            ids=ids.to(device).clone(),
        )

    @classmethod
    def empty(cls, sh_degree: int, *, dtype: torch.dtype = torch.float32) -> GaussianTable:
        """A table without rows."""
        specs = attributes_for(sh_degree)
        return cls.from_arrays({spec.name: np.empty((0, *spec.shape)) for spec in specs}, dtype=dtype)

    def to(self, device: torch.device) -> GaussianTable:
        """The same rows on a device; what is there already is not copied."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: values.to(device) for name, values in tensors.items()}

        return GaussianTable(
            params=moved(self.params),
            exp_avg=moved(self.exp_avg),
            exp_avg_sq=moved(self.exp_avg_sq),
            statistics=moved(self.statistics),
            ids=self.ids.to(device),
            num_updates=self.num_updates,
            behind=self._backlog.held,
        )

    def for_step(self, body: Body) -> StoredRows:
        """The tensors as they lie in memory, for a step that draws with `body` and updates what it draws."""
        params, exp_avg, exp_avg_sq = self._stored()
        if self._backlog.rows is None:
            name = LAZY_ATTRIBUTE
            self._backlog.begin(body.lazy_rows(params[name], exp_avg[name], exp_avg_sq[name], self.num_updates))
        return StoredRows(params, exp_avg, exp_avg_sq, self._backlog.rows)

    def for_dense_step(self) -> StoredRows:
        """The tensors for a step that updates every row itself."""
        self._backlog.end(LAZY_ATTRIBUTE)
        params, exp_avg, exp_avg_sq = self._stored()
        return StoredRows(params, exp_avg, exp_avg_sq, None)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A block in which the table is only looked at: its looks leave no trace in the bits of later steps."""
        self._backlog.hold()
        try:
            yield
        finally:
            self._backlog.fall_back()

    @property
    def held(self) -> Behind | None:
        """How rows lie that are behind, for a checkpoint, within `undisturbed`; None where a look leaves no trace."""
        return self._backlog.held

    def _stored(self) -> list[Mapping[str, Tensor]]:
        """Parameters and moments as they lie in memory."""
        return [tensors.stored() for tensors in self._guarded]

    @property
    def lazy_bytes(self) -> int:
        """Bytes of a row besides the table's tensors: which updates it has had, where single rows can be behind."""
        rows = self._backlog.rows
        return rows.updates.element_size() // rows.block if rows is not None else 0

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where all tensors lie; rows that are behind stay so. What was recorded on them fits while it is the same."""
        groups = (*self._stored(), self.statistics)
        return (self.ids.data_ptr(), *(values.data_ptr() for group in groups for values in group.values()))

    def rewind(self, count: int) -> None:
        """Forget the last `count` updates, which changed nothing because a buffer of the body had been too small."""
        self.num_updates -= count
        self._backlog.rewind(count)

    def __len__(self) -> int:
        """The number of rows, N."""
        return len(self.ids)

    @property
    def sh_degree(self) -> int:
        """The highest degree of spherical harmonics that the rows have room for."""
        return math.isqrt(self._stored()[0]["shN"].shape[1] + 1) - 1

    @property
    def attributes(self) -> tuple[AttributeSpec, ...]:
        """The attributes of this table."""
        return attributes_for(self.sh_degree)

    def apply(self, edit: TableEdit) -> None:
        """Carry out an edit by replacing tensors: the old ones are never written to.

        Raises: ValueError, before anything is changed, for an edit that does not fit the table.
        """
        if isinstance(edit, ValueEdit):
            self._apply_values(edit)
        else:
            self._apply_rows(edit)

    def _apply_values(self, edit: ValueEdit) -> None:
        """Replace one attribute and zero its moments."""
        current = self.params.get(edit.name)
        if current is None or current.shape != edit.values.shape:
            found = None if current is None else tuple(current.shape)
            raise ValueError(f"new values {tuple(edit.values.shape)} for {edit.name!r} do not fit the table's {found}")
        self.params[edit.name] = edit.values.to(current).contiguous().clone()
        self.exp_avg[edit.name] = torch.zeros_like(current)
        self.exp_avg_sq[edit.name] = torch.zeros_like(current)

    def _apply_rows(self, edit: RowEdit) -> None:
        """Check the edit, then replace tensor after tensor: a second copy of the whole table never exists."""
        if len(edit) and not 0 <= int(edit.source.min()) <= int(edit.source.max()) < len(self):  # host sync
            raise ValueError(f"the edit copies rows {int(edit.source.min())}..{int(edit.source.max())} of {len(self)}")
        for name, override in edit.overrides.items():
            if name not in self.params:
                raise ValueError(f"the edit overrides the unknown attribute {name!r}")
            expected = (len(override.rows), *self.params[name].shape[1:])
            if tuple(override.values.shape) != expected:
                raise ValueError(f"the edit's {name!r} must have shape {expected}, got {tuple(override.values.shape)}")
        move = _zeros if edit.resets_statistics else _moved
        for name in self.params:
            self.params[name] = edit.preview(name, self.params[name])
            self.exp_avg[name] = _moved(self.exp_avg[name], edit)
            self.exp_avg_sq[name] = _moved(self.exp_avg_sq[name], edit)
        for name in self.statistics:
            self.statistics[name] = move(self.statistics[name], edit)
        self.ids = edit.ids.clone()


def _sh_degree_of(arrays: Mapping[str, np.ndarray | Tensor]) -> int:
    """The degree that the shape of shN, (N, K-1, 3), means."""
    if "shN" not in arrays or len(arrays["shN"].shape) != 3:
        found = tuple(arrays["shN"].shape) if "shN" in arrays else "nothing"
        raise ValueError(f"attribute 'shN' must have shape (N, K-1, 3), got {found}")
    num_bases = arrays["shN"].shape[1] + 1
    degree = math.isqrt(num_bases) - 1
    if (degree + 1) ** 2 != num_bases or degree > MAX_SH_DEGREE:
        raise ValueError(f"'shN' has {num_bases - 1} bases; SH degrees 0 to 3 have 0, 3, 8 or 15")
    return degree


def _parameter(
    spec: AttributeSpec,
    arrays: Mapping[str, np.ndarray | Tensor],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A contiguous copy of one attribute, checked."""
    shape = (num_rows, *spec.shape)
    if spec.name not in arrays and spec.name == "mask_logits":
        return torch.full(shape, INITIAL_MASK_LOGIT, dtype=dtype, device=device)
    if spec.name not in arrays:
        raise ValueError(f"attribute {spec.name!r} is missing; got {sorted(arrays)}")
    values = torch.as_tensor(arrays[spec.name])
    if tuple(values.shape) != shape:
        raise ValueError(f"attribute {spec.name!r} must have shape {shape}, got {tuple(values.shape)}")
    return torch.empty(shape, dtype=dtype, device=device).copy_(values)


def _moved(values: Tensor, edit: RowEdit) -> Tensor:
    """Copied rows, with zeros where rows are new."""
    result = values.index_select(0, edit.source)
    result[edit.is_new] = 0
    return result


def _zeros(values: Tensor, edit: RowEdit) -> Tensor:
    """Zeros for every row after the edit."""
    return values.new_zeros((len(edit), *values.shape[1:]))
