# SPDX-License-Identifier: Apache-2.0
"""A trained model file as the start of a training: rows without any history."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from scene.checkpoint_import import Imported
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.ply import load_ply


def import_model(path: Path, iteration: int, sh_degree: int) -> Imported:
    """Read a ply that any trainer saved: its Gaussians with ids 0 .. N-1, no moments, masks that keep everything.

    Args: iteration: how many images the model shall count as trained with; the scene's extent is not known (NaN).
    sh_degree: what the rows get room for, 0 to 3; coefficients that the file does not have are 0.
    Raises: InputError when the file is missing, damaged, of another form, or empty.
    """
    arrays = load_ply(path)
    num_rows, num_found = arrays["shN"].shape[:2]
    if not num_rows:
        raise InputError(f"{path} holds no Gaussian; give the point_cloud.ply of a trained model")
    num_wanted = (sh_degree + 1) ** 2 - 1
    notices: tuple[str, ...] = ()
    if num_found < num_wanted:
        missing = np.zeros((num_rows, num_wanted - num_found, 3), np.float32)
        arrays = {**arrays, "shN": np.concatenate([arrays["shN"], missing], axis=1)}
        notices = (f"{path} has no spherical harmonics up to --sh_degree {sh_degree}: those that it lacks begin at 0.",)
    return Imported(GaussianTable.from_arrays(arrays), iteration, math.nan, notices)
