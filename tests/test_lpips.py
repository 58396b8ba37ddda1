# SPDX-License-Identifier: Apache-2.0
"""LPIPS: the loader trusts nothing but the known bytes; the distance has known values where weights are installed."""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gaussian_renderer import lpips
from scene.errors import InputError

needs_weights = pytest.mark.skipif(lpips.find_weights() is None, reason="LPIPS weights absent: run `make lpips`")


def _pair(height: int = 96, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth coloured pattern and the same pattern with stripes, made of integers only (equal on all machines)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    first = torch.stack([(x * 2) % 256, (y * 2 + x) % 256, (x + 3 * y) // 2 % 256], dim=-1).to(torch.uint8)
    second = torch.where(((x + y) % 8 < 2)[..., None], 255 - first, first)
    return first, second


def _write_weights(folder: Path, content: bytes) -> str:
    (folder / "vgg16.ckpt").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@needs_weights
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equal_images_have_distance_zero(net: str) -> None:
    image, _ = _pair()
    assert lpips.load_lpips(net)(image, image) == 0.0


@needs_weights
@pytest.mark.parametrize(("net", "expected"), [("vgg", 0.696937), ("alex", 0.612268)])
def test_pinned_values(net: str, expected: float) -> None:
    """Values of this code when it was written; a change of a layer, a weight or the input range moves them."""
    first, second = _pair()
    distance = lpips.load_lpips(net)
    assert distance(first, second) == pytest.approx(expected, rel=1e-4)
    assert distance(second, first) == pytest.approx(expected, rel=1e-4)
    assert distance(first / 255.0, second / 255.0) == pytest.approx(expected, rel=1e-4)


@needs_weights
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_distance_agrees_with_a_second_implementation(net: str) -> None:
    """The networks once more, from their published layer tables and NumPy weights in their original layout."""
    folder = lpips.find_weights()
    backbone = lpips.BACKBONES[net]
    arrays = lpips._read_weights(folder / backbone.file_name, backbone.sha256)
    vgg = [64, 64, "T", "M", 128, 128, "T", "M"] + [256] * 3 + ["T", "M"] + [512] * 3 + ["T", "M"] + [512] * 3 + ["T"]
    alex = [(4, 2), "T", "M", (1, 2), "T", "M", (1, 1), "T", (1, 1), "T", (1, 1), "T"]

    def features(image: torch.Tensor) -> list[np.ndarray]:
        x = (image.double() / 255 - torch.tensor([-0.030, -0.088, -0.188])) / torch.tensor([0.458, 0.448, 0.450])
        x, index, taps = x.permute(2, 0, 1)[None], 0, []
        for entry in vgg if net == "vgg" else alex:
            if entry == "M":
                x = torch.nn.MaxPool2d(2 if net == "vgg" else 3, 2)(x)
            elif entry == "T":
                taps.append(torch.nn.functional.normalize(x, dim=1, eps=1e-10)[0].numpy())
            else:
                stride, padding = entry if net == "alex" else (1, 1)
                layer = arrays[backbone.scope][f"Conv_{index}"]
                kernel = torch.from_numpy(np.einsum("hwio->oihw", layer["kernel"]).astype(np.float64))
                bias = torch.from_numpy(layer["bias"].astype(np.float64))
                x, index = torch.relu(torch.conv2d(x, kernel, bias, stride, padding)), index + 1
        return taps

    first, second = _pair()
    expected = sum(
        float(np.einsum("chw,c->hw", (a - b) ** 2, arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].ravel()).mean())
        for i, (a, b) in enumerate(zip(features(first), features(second), strict=True))
    )
    assert lpips.load_lpips(net)(first, second) == pytest.approx(expected, rel=1e-4)


@needs_weights
def test_a_tampered_file_is_refused(tmp_path: Path) -> None:
    content = bytearray((lpips.find_weights() / "alexnet.ckpt").read_bytes())
    content[5000] ^= 1
    (tmp_path / "alexnet.ckpt").write_bytes(content)
    with pytest.raises(InputError, match="is not the known LPIPS weight file and was not opened"):
        lpips.load_lpips("alex", folder=tmp_path)


def test_a_foreign_file_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    _write_weights(tmp_path, pickle.dumps(_Bomb(marker)))
    with pytest.raises(InputError, match="make lpips"):
        lpips.load_lpips("vgg", folder=tmp_path)
    assert not marker.exists()


def test_the_unpickler_refuses_other_names_even_if_the_hash_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    digest = _write_weights(tmp_path, pickle.dumps(_Bomb(marker)))
    monkeypatch.setitem(lpips.BACKBONES, "vgg", replace(lpips.BACKBONES["vgg"], sha256=digest))
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        lpips.load_lpips("vgg", folder=tmp_path)
    assert not marker.exists()


class _Bomb:
    """An object whose unpickling creates a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_missing_file_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vgg16.ckpt.*make lpips"):
        lpips.load_lpips("vgg", folder=tmp_path)


def test_an_absent_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "PACKAGE", "no_such_package_as_this")
    with pytest.raises(lpips.WeightsMissingError, match="make lpips"):
        lpips.load_lpips("vgg")


def test_unknown_backbone() -> None:
    with pytest.raises(InputError, match="squeeze"):
        lpips.load_lpips("squeeze")
