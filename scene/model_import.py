# SPDX-License-Identifier: Apache-2.0
"""A trained model file as the start of a training: rows without any history."""

from __future__ import annotations

import math
from pathlib import Path

from scene.checkpoint_import import Imported
from scene.errors import InputError
from scene.gaussians import GaussianTable
from scene.ply import load_ply


def import_model(path: Path, iteration: int) -> Imported:
    """Read a ply that any trainer saved: its Gaussians with ids 0 .. N-1, no moments, masks that keep everything.

    Args: iteration: how many images the model shall count as trained with. The scene's extent is not known (NaN).
    Raises: InputError when the file is missing, damaged, of another form, or empty.
    """
    table = GaussianTable.from_arrays(load_ply(path))
    if not len(table):
        raise InputError(f"{path} holds no Gaussian; give the point_cloud.ply of a trained model")
    return Imported(table, iteration, math.nan, ())
