# SPDX-License-Identifier: Apache-2.0
"""Arguments of gsplat 1.5.3's `rasterization` of which masksplat has one value only: others are refused by name.

Refused, not ignored: an image drawn with another camera or another shutter than asked for would look right and be
wrong. This module knows names and values; nothing here draws.
"""

from __future__ import annotations

import enum
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

from masksplat.types import TILE

_UNDISTORT = "Undistort the photos (COLMAP's image_undistorter) and pass the intrinsics of what comes out."
_NO_RAYS = "Leave it out: projection and response are those of EWA splatting."
_ONE_POSE = "Leave it out, or render each row's pose as a camera of its own."


class _Only(NamedTuple):
    """The value that masksplat has, and what to do instead of asking for another."""

    value: Any
    advice: str


_SUPPORTED: Mapping[str, _Only] = {
    "tile_size": _Only(TILE, "Leave it out: images do not depend on it."),
    "sparse_grad": _Only(False, "Gradients are dense: call .to_sparse() on them where an optimizer wants that."),
    "distributed": _Only(
        False, "Pass all Gaussians and this process's cameras; to train on several GPUs run train.py with torchrun."
    ),
    "camera_model": _Only("pinhole", f"{_UNDISTORT} An orthographic camera has no counterpart."),
    "covars": _Only(None, "Pass quats and scales, with covariance = R diag(scales)^2 R^T."),
    "with_ut": _Only(False, _NO_RAYS),
    "with_eval3d": _Only(False, _NO_RAYS),
    "radial_coeffs": _Only(None, _UNDISTORT),
    "tangential_coeffs": _Only(None, _UNDISTORT),
    "thin_prism_coeffs": _Only(None, _UNDISTORT),
    "ftheta_coeffs": _Only(None, _UNDISTORT),
    "rolling_shutter": _Only("GLOBAL", _ONE_POSE),
    "viewmats_rs": _Only(None, _ONE_POSE),
}

RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "render_mode": RENDER_MODES,
    "rasterize_mode": ("classic", "antialiased"),
}


def check_gsplat_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what masksplat cannot do of the given arguments, by name; names that have no rule here are not looked at.

    Members of an enumeration, as gsplat's rolling_shutter is one, count as their name.

    Raises:
        ValueError: the argument, what was given, what is supported and what to do instead.
    """
    for name, given in arguments.items():
        value = given.name if isinstance(given, enum.Enum) else given
        if name in _SUPPORTED and not _is_same(value, _SUPPORTED[name].value):
            only = _SUPPORTED[name]
            raise ValueError(f"{name} is {_shown(value)}; masksplat supports {only.value!r} only. {only.advice}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{name} is {_shown(value)}; expected one of {', '.join(_CHOICES[name])}.")
        if name == "radius_clip" and not (isinstance(value, numbers.Real) and float(value) >= 0.0):
            raise ValueError(f"radius_clip is {_shown(value)}; expected a number of pixels, 0 or more (0: off).")
        if name == "channel_chunk" and not (isinstance(value, numbers.Integral) and int(value) >= 1):
            raise ValueError(f"channel_chunk is {_shown(value)}; expected an integer, 1 or more. It changes no image.")


def _is_same(value: Any, supported: Any) -> bool:
    """Whether it is the supported value; what is neither text nor a number (a tensor, for example) is only itself."""
    return value is supported or (isinstance(value, str | numbers.Number) and bool(value == supported))


def _shown(value: Any) -> str:
    """How a message calls a value: short ones as they are, others by their type."""
    is_short = value is None or isinstance(value, str | numbers.Number)
    return repr(value) if is_short else f"a {type(value).__name__}"
