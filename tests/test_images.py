# SPDX-License-Identifier: Apache-2.0
"""Pixels on demand: every kind of image file, damaged files, the byte budget, and threads."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colmap_builder import smooth_pixels
from scene.cameras import Camera
from scene.dataset import SceneOptions, load_scene
from scene.errors import InputError
from scene.images import ImageStore, check_all_pixels
from scene.photo import check_photo, read_photo, read_size

WIDTH, HEIGHT = 23, 17


def make_camera(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Camera:
    return Camera(path.name, path, width, height, 20.0, 20.0, width / 2, height / 2, np.eye(3), np.zeros(3))


def write_numbered(folder: Path, number: int) -> list[Camera]:
    cameras = []
    for index in range(number):
        path = folder / f"{index:03d}.png"
        Image.fromarray(smooth_pixels(WIDTH, HEIGHT, index)).save(path)
        cameras.append(make_camera(path))
    return cameras


def read(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), background: tuple[float, float, float] = (0, 0, 0)):
    with ImageStore([make_camera(path, *size)], background=background) as store:
        return store.fetch(0).numpy().copy()


RGB = smooth_pixels(WIDTH, HEIGHT, 3)
GRAY = RGB[..., 0].copy()
ALPHA = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).round().astype(np.uint8)


def composited(background: tuple[float, float, float]) -> np.ndarray:
    alpha = ALPHA[..., None] / 255
    return np.rint(RGB * alpha + 255 * np.array(background) * (1 - alpha))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".ppm"])
def test_rgb_files_give_their_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    np.testing.assert_array_equal(read(path), RGB)
    assert read_size(path) == (WIDTH, HEIGHT)


def test_jpeg_and_webp(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - RGB).max() <= 4
    Image.fromarray(RGB).save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read(tmp_path / "a.webp"), RGB)


def test_gray_kinds(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    Image.fromarray(GRAY > 127).save(tmp_path / "bits.png")
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    expected = np.repeat(GRAY[..., None], 3, axis=2)
    for name in ("gray.png", "deep.png", "deep.tif"):
        np.testing.assert_array_equal(read(tmp_path / name), expected, err_msg=name)
    np.testing.assert_array_equal(read(tmp_path / "bits.png"), (expected > 127) * 255)


def test_sixteen_bit_rgb_keeps_the_upper_byte(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(make_png(RGB.astype(">u2") * 257, depth=16))
    np.testing.assert_array_equal(read(path), RGB)


def test_cmyk_and_palette(tmp_path: Path) -> None:
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read(tmp_path / "cmyk.jpg").astype(int) - [0, 255, 255]).max() <= 2
    palette = Image.fromarray(RGB).quantize(64)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("background", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.2, 0.5, 0.9)])
def test_alpha_is_composited_on_the_background(tmp_path: Path, background: tuple[float, float, float]) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    found = read(tmp_path / "rgba.png", background=background)
    assert np.abs(found - composited(background)).max() <= 1
    Image.fromarray(np.dstack([GRAY, ALPHA])).save(tmp_path / "la.png")
    found = read(tmp_path / "la.png", background=background)
    assert np.abs(found[..., 0] - composited_gray(background[0])).max() <= 1


def composited_gray(background: float) -> np.ndarray:
    return np.rint(GRAY * (ALPHA / 255) + 255 * background * (1 - ALPHA / 255))


def test_transparent_palette_is_composited(tmp_path: Path) -> None:
    palette = Image.fromarray(np.repeat([[0], [1]], [9, 8], axis=0).repeat(WIDTH, axis=1).astype(np.uint8), "P")
    palette.putpalette([200, 10, 10, 10, 200, 10])
    palette.save(tmp_path / "p.png", transparency=1)
    found = read(tmp_path / "p.png", background=(0.0, 0.0, 1.0))
    np.testing.assert_array_equal(found[0, 0], [200, 10, 10])
    np.testing.assert_array_equal(found[-1, 0], [0, 0, 255])


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "turned.png"), RGB)


@pytest.mark.parametrize("size", [(11, 8), (6, 4), (46, 34)])
def test_resize_is_that_of_pillow(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read(tmp_path / "a.png", size), np.asarray(Image.fromarray(RGB).resize(size, Image.Resampling.BICUBIC))
    )


def make_png(pixels: np.ndarray, depth: int = 8, interlaced: bool = False, num_rows: int | None = None) -> bytes:
    """Returns a PNG of RGB `pixels`; with `num_rows`, its stream ends after so many rows but is closed properly."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if len(row)]
    raw = b"".join(b"\0" + row.tobytes() for row in rows[:num_rows])
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, 1), (3, 2), (8, 8), (9, 1)])
def test_png_rows_are_counted(tmp_path: Path, interlaced: bool, shape: tuple[int, int]) -> None:
    """Pillow fills what is missing with black and says nothing; whole files must pass, one row less must not."""
    pixels = smooth_pixels(shape[1], shape[0], 1)
    path = tmp_path / "a.png"
    path.write_bytes(make_png(pixels, interlaced=interlaced))
    np.testing.assert_array_equal(read_photo(path, shape[::-1], (0, 0, 0)), pixels)
    path.write_bytes(make_png(pixels, interlaced=interlaced, num_rows=-1))
    with pytest.raises(InputError, match=r"a.png: the image is truncated: \d+ of \d+ bytes"):
        read_photo(path, shape[::-1], (0, 0, 0))


def damaged_files(folder: Path) -> dict[str, Path]:
    """Returns files that must not be accepted, by kind."""
    jpeg, png = io.BytesIO(), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(noise).save(jpeg, "JPEG")
    Image.fromarray(noise).save(png, "PNG")
    half_png = png.getvalue()[: len(png.getvalue()) // 2]
    contents = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html>not found</html>",
        "half-jpeg": jpeg.getvalue()[: len(jpeg.getvalue()) * 2 // 3],
        "half-png": half_png,
        "short-png": make_png(RGB, num_rows=5),
        "flipped-png": png.getvalue()[:60] + bytes([png.getvalue()[60] ^ 255]) + png.getvalue()[61:],
        "bomb": make_png(np.zeros((1, 1, 3), np.uint8)).replace(
            struct.pack(">II", 1, 1), struct.pack(">II", 60_000, 60_000)
        ),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 23 17\n%%EndComments\n",
    }
    paths = {}
    for kind, content in contents.items():
        paths[kind] = folder / f"{kind}.png"
        paths[kind].write_bytes(content)
    Image.fromarray(GRAY.astype(np.float32)).save(folder / "float.tif")
    paths["float"] = folder / "float.tif"
    paths["missing"] = folder / "missing.png"
    paths["folder"] = folder / "folder.png"
    paths["folder"].mkdir()
    return paths


DAMAGED = ["empty", "html", "half-jpeg", "half-png", "short-png", "flipped-png", "bomb", "postscript", "float"]
DAMAGED += ["missing", "folder"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = damaged_files(tmp_path)[kind]
    with ImageStore([make_camera(path)]) as store:
        for _ in range(2):  # the second time, too
            with pytest.raises(InputError, match=f"cannot be used: {path}: ") as error:
                store.fetch(0)
        assert str(error.value).count("\n") == 0
        assert "colmap image_deleter" in str(error.value)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_check_finds_what_reading_finds(tmp_path: Path, kind: str) -> None:
    path = damaged_files(tmp_path)[kind]
    with pytest.raises(InputError) as reading:
        read_photo(path, (WIDTH, HEIGHT), (0, 0, 0))
    with pytest.raises(InputError) as checking:
        check_photo(path)
    assert str(checking.value) == str(reading.value)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_check_reads_every_block_of_a_jpeg(tmp_path: Path, progressive: bool, mode: str) -> None:
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (160, 240, 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(path, progressive=progressive)
    whole = path.read_bytes()
    check_photo(path)
    for share in (0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match="truncated"):
            check_photo(path)


def test_a_check_of_all_lists_the_damaged(tmp_path: Path) -> None:
    good = write_numbered(tmp_path, 3)
    check_all_pixels(good, num_threads=2, progress=False)
    bad = [make_camera(path) for path in damaged_files(tmp_path).values()]
    with pytest.raises(InputError, match=r"Images cannot be used \(11\): ") as error:
        check_all_pixels([good[0], *bad, *good[1:]], num_threads=2, progress=False)
    assert "colmap image_deleter" in str(error.value)


def test_preload_lists_all_damaged_files(tmp_path: Path) -> None:
    good = write_numbered(tmp_path, 3)
    bad = [make_camera(path) for path in damaged_files(tmp_path).values()]
    with ImageStore([good[0], *bad, *good[1:]]) as store:
        with pytest.raises(InputError, match=r"Images cannot be used \(11\): ") as error:
            store.preload(progress=False)
        assert sum(str(camera.image_path) in str(error.value) for camera in bad) == 10
        assert "and 1 more." in str(error.value)
        np.testing.assert_array_equal(store.fetch(0), smooth_pixels(WIDTH, HEIGHT, 0))


def test_rows_are_slices_of_the_image(tmp_path: Path) -> None:
    with ImageStore(write_numbered(tmp_path, 2)) as store:
        whole = store.fetch(1)
        assert (whole.dtype, whole.shape) == (torch.uint8, (HEIGHT, WIDTH, 3))
        for start, stop in ((0, HEIGHT), (3, 11), (16, 17), (5, 5), (17, 17)):
            rows = store.fetch(1, start, stop)
            assert rows.is_contiguous()
            assert torch.equal(rows, whole[start:stop])
        for start, stop in ((-1, 3), (4, 3), (0, HEIGHT + 1)):
            with pytest.raises(IndexError, match="17 rows"):
                store.fetch(1, start, stop)
        for index in (-1, 2):
            with pytest.raises(IndexError):
                store.fetch(index)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded, in order; reading itself goes on as ever."""
    names: list[str] = []

    def record(path: Path, size: tuple[int, int], background: tuple[float, float, float]) -> np.ndarray:
        names.append(path.name)
        return read_photo(path, size, background)

    monkeypatch.setattr("scene.images.read_photo", record)
    return names


ONE = 3 * WIDTH * HEIGHT


def test_images_used_longest_ago_are_dropped(tmp_path: Path, decoded: list[str]) -> None:
    with ImageStore(write_numbered(tmp_path, 4), byte_budget=2 * ONE) as store:
        for index in (0, 1, 0, 2, 0, 1, 1, 2):
            np.testing.assert_array_equal(store.fetch(index), smooth_pixels(WIDTH, HEIGHT, index))
    assert decoded == ["000.png", "001.png", "002.png", "001.png", "002.png"]


def test_a_budget_below_one_image_still_serves(tmp_path: Path, decoded: list[str]) -> None:
    with ImageStore(write_numbered(tmp_path, 2), byte_budget=ONE - 1) as store:
        store.prefetch([0, 1])
        store.preload(progress=False)
        assert decoded == []
        for index in (0, 0, 1):
            np.testing.assert_array_equal(store.fetch(index), smooth_pixels(WIDTH, HEIGHT, index))
    assert decoded == ["000.png", "000.png", "001.png"]


def test_preload_fills_the_budget_and_fetch_finds_it(tmp_path: Path, decoded: list[str]) -> None:
    with ImageStore(write_numbered(tmp_path, 5), byte_budget=3 * ONE + 5) as store:
        store.preload(progress=False)
        assert sorted(decoded) == ["000.png", "001.png", "002.png"]
        for index in (2, 1, 0):
            store.fetch(index)
        assert len(decoded) == 3


def test_prefetch_returns_before_the_images_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def wait_and_read(path: Path, size: tuple[int, int], background: tuple[float, float, float]) -> np.ndarray:
        assert gate.wait(30)
        return read_photo(path, size, background)

    monkeypatch.setattr("scene.images.read_photo", wait_and_read)
    with ImageStore(write_numbered(tmp_path, 3), num_threads=1) as store:
        store.prefetch([0, 1, 2, 1])  # would never return if it waited for the gate
        gate.set()
        for index in range(3):
            np.testing.assert_array_equal(store.fetch(index), smooth_pixels(WIDTH, HEIGHT, index))


def test_prefetched_images_are_decoded_once(tmp_path: Path, decoded: list[str]) -> None:
    with ImageStore(write_numbered(tmp_path, 4)) as store:
        for _ in range(5):
            store.prefetch([0, 1, 2, 3])
            for index in (3, 1, 0, 2):
                store.fetch(index)
    assert sorted(decoded) == [f"{index:03d}.png" for index in range(4)]


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("num_images_held", [0, 1, 3, 100])
def test_many_threads_get_the_right_bytes(tmp_path: Path, num_threads: int, num_images_held: int) -> None:
    cameras = write_numbered(tmp_path, 8)
    wrong: list[int] = []
    with ImageStore(cameras, byte_budget=num_images_held * ONE, num_threads=num_threads) as store:

        def work(seed: int) -> None:
            generator = np.random.default_rng(seed)
            for index in generator.integers(0, 8, 40).tolist():
                store.prefetch(generator.integers(0, 8, 3).tolist())
                if not np.array_equal(store.fetch(index, 2, 9), smooth_pixels(WIDTH, HEIGHT, index)[2:9]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert wrong == []


def test_a_closed_store_refuses(tmp_path: Path) -> None:
    store = ImageStore(write_numbered(tmp_path, 1))
    store.fetch(0)
    store.close()
    store.close()
    with pytest.raises(RuntimeError):
        store.fetch(0)


def test_photos_of_a_scene_are_those_of_pillow(any_scene: Path) -> None:
    scene = load_scene(any_scene, SceneOptions(eval=True), progress=False)
    with ImageStore(scene.test) as store:
        store.preload(progress=True)
        assert len(store) == len(scene.test) > 0
        for index, camera in enumerate(scene.test):
            with Image.open(camera.image_path) as image:
                np.testing.assert_array_equal(store.fetch(index), np.asarray(image.convert("RGB")))
