# SPDX-License-Identifier: Apache-2.0
"""Makes a video of numbered pictures, by the ffmpeg that the optional package imageio-ffmpeg brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scene.errors import InputError

PACKAGE = "imageio_ffmpeg"
QUALITY = "17"  # x264's constant rate factor: no visible loss
COLOURS = (
    "scale=in_range=full:out_range=tv:out_color_matrix=bt709,"
    "setparams=color_primaries=bt709:color_trc=iec61966-2-1:colorspace=bt709:range=tv"
)
"""ffmpeg's filter from sRGB pixels to what players assume of a video, and says so in the file."""


def can_write_video() -> bool:
    """Whether imageio-ffmpeg is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def write_video(pictures: Sequence[Path], path: Path, frames_per_second: float) -> None:
    """Write 8-bit RGB pictures of equal size as a video that every player and browser shows.

    H.264 with yuv420p, which has even sizes only: an odd width or height gets its last column or row twice. The file
    appears when it is complete.

    Args:
        pictures: at least one, in their order.
        path: the .mp4 to write; its folder exists.

    Raises:
        InputError: a picture cannot be read, or ffmpeg cannot write the file.
    """
    import imageio_ffmpeg  # imported here: an optional package

    unfinished = path.with_name(f".{path.stem}.partial{path.suffix}")
    height, width = _even(_read(pictures[0])).shape[:2]
    frames = imageio_ffmpeg.write_frames(
        str(unfinished),
        (width, height),
        fps=frames_per_second,
        codec="libx264",
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        macro_block_size=1,
        quality=None,
        ffmpeg_log_level="error",
        output_params=["-crf", QUALITY, "-vf", COLOURS, "-movflags", "+faststart"],
    )
    try:
        frames.send(None)
        for picture in pictures:
            frames.send(np.ascontiguousarray(_even(_read(picture))))
        frames.close()
        found, _ = imageio_ffmpeg.count_frames_and_secs(str(unfinished))  # a full disk shows only here
        if found != len(pictures):
            raise OSError(f"ffmpeg ended after {found} of {len(pictures)} frames")
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        frames.close()
        unfinished.unlink(missing_ok=True)
        *_, cause = str(error).split("\n\n")[-1].strip().splitlines() or [repr(error)]  # ffmpeg's log ends with it
        raise InputError(f"{path} cannot be written: {cause}. The frames are in {pictures[0].parent}.") from error


def _read(picture: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def _even(pixels: np.ndarray) -> np.ndarray:
    """The picture with its last row or column repeated where its size is odd."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
