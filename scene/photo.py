# SPDX-License-Identifier: Apache-2.0
"""Reads one image file into RGB or RGBA bytes, or refuses it with a reason. Knows neither cameras nor caches.

Pixels are taken as they are stored: an EXIF orientation is ignored, as COLMAP ignores it.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from scene.errors import InputError

# Formats that photos come in; leaves out those of Pillow's readers that start other programs.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7 passes: first column, first row, column step, row step.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATE_BYTES = 1 << 20


def read_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) in pixels from the file's header, without decoding pixels.

    Raises:
        InputError: the file is missing or no image.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.size
    except _DAMAGE as error:
        raise InputError(f"{path}: {_reason(error)}") from error


def read_photo(path: Path, size: tuple[int, int], background: tuple[float, float, float] | None) -> np.ndarray:
    """Returns the image as (height, width, 3 or 4) uint8 at `size` = (width, height) pixels.

    Alpha is composited on `background` (RGB in 0..1), then the image is resized with Pillow's bicubic filter, as in
    3DGS. With None, an image that is transparent somewhere keeps its alpha as fourth channel, and its colours are
    multiplied with it (which is what resizing needs); images without transparency have three channels in any case.
    Grey, palette, CMYK and 16-bit grey images (of which the upper 8 bits count) are converted.

    Raises:
        InputError: the file is missing, truncated, damaged, or of a kind that has no 8-bit RGB form.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.format == "PNG":
                _check_png_pixels(data)
            if background is None and image.has_transparency_data:
                return _premultiplied(image.convert("RGBA"), size)
            rgb = _to_rgb(image, background or (0.0, 0.0, 0.0))
            return np.array(rgb if rgb.size == size else rgb.resize(size))
    except _DAMAGE as error:
        raise InputError(f"{path}: {_reason(error)}") from error


def check_photo(path: Path) -> None:
    """Decodes all of a file at the smallest size that its format offers; JPEGs cost a fraction of `read_photo`.

    Raises:
        InputError: as `read_photo`.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.format == "PNG":
                _check_png_pixels(data)
            image.draft(None, (1, 1))  # JPEG: every block is read, an eighth of each side computed
            image.load()
            _to_rgb(image.crop((0, 0, 1, 1)), (0.0, 0.0, 0.0))  # refuses what has no 8-bit form
    except _DAMAGE as error:
        raise InputError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image of a supported kind ({', '.join(_FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _to_rgb(image: Image.Image, background: tuple[float, float, float]) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(f"its pixels are 32-bit numbers (mode {image.mode}), convert it to 8 bits a channel")
    if image.has_transparency_data:
        return _composite(image.convert("RGBA"), background)
    return image.convert("RGB")


def _composite(image: Image.Image, background: tuple[float, float, float]) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    alpha = pixels[..., 3:] / np.float32(255)
    behind = np.array(background, np.float32) * np.float32(255)
    mixed = pixels[..., :3] * alpha + behind * (1 - alpha)
    return Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8))


def _premultiplied(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Returns (height, width, 4) uint8, colours times alpha, or the three colours where no pixel is transparent."""
    pixels = np.asarray(image)
    alpha = pixels[..., 3]
    if alpha.min() == 255:
        return np.array(image.convert("RGB").resize(size))
    colors = np.rint(pixels[..., :3] * (alpha[..., None] / np.float32(255))).astype(np.uint8)
    parts = [Image.fromarray(part).resize(size) for part in (colors, alpha)]
    # The filter overshoots at edges; no colour may exceed its alpha.
    kept = np.asarray(parts[1])[..., None]
    return np.concatenate([np.minimum(np.asarray(parts[0]), kept), kept], axis=2)


def _check_png_pixels(data: bytes) -> None:
    """Raises InputError when a PNG holds fewer pixel bytes than its header says: Pillow would fill up with black."""
    expected = _png_bytes(data)
    inflater, found = zlib.decompressobj(), 0
    for chunk in _png_chunks(data, b"IDAT"):
        found += len(inflater.decompress(chunk, _INFLATE_BYTES))
        while inflater.unconsumed_tail and found < expected:
            found += len(inflater.decompress(inflater.unconsumed_tail, _INFLATE_BYTES))
    found += len(inflater.flush())
    if found < expected:
        raise InputError(f"the image is truncated: {found} of {expected} bytes of pixels are there")


def _png_bytes(data: bytes) -> int:
    """Returns how many bytes the pixels of a PNG inflate to, filter bytes included."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _PNG_CHANNELS.get(color, 1)
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for column, row, column_step, row_step in passes:
        columns = max(0, -(-(width - column) // column_step))
        rows = max(0, -(-(height - row) // row_step))
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total


def _png_chunks(data: bytes, kind: bytes) -> list[bytes]:
    chunks, offset = [], len(_PNG_SIGNATURE)
    while offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        if name == kind:
            chunks.append(data[offset + 8 : offset + 8 + length])
        offset += 12 + length
    return chunks
