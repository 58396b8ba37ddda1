# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM of the cuda body, on the emulator and on a GPU: as near to float64 as the cpu body in float32."""

from __future__ import annotations

import pytest
import torch

from cuda_agreement import assert_as_good
from cuda_launchers import launchers, make_launcher
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.photometric import photometric
from masksplat.ops import get_body
from masksplat.types import PhotometricLoss

CPU, REFERENCE = get_body("cpu"), get_body("reference")


@pytest.fixture(params=launchers(is_reversed=True))
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return make_launcher(request.param)


def pair(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A target (uint8) and an image in float64 that resembles it."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    noise = 0.2 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return (target / 255.0 + noise).float().double(), target


def compare(launcher: Launcher, rgb: torch.Tensor, target: torch.Tensor, weight: float, **region) -> PhotometricLoss:
    """Terms and gradient against the reference in float64, beside the cpu body; returns what was found."""
    exact = REFERENCE.photometric(rgb, target, weight, **region)
    single = CPU.photometric(rgb.float(), target, weight, **region)
    found = photometric(launcher, rgb.float().to(launcher.device), target.to(launcher.device), weight, **region)
    assert found.l1.dtype == found.ssim.dtype == torch.float64 and found.l1.shape == found.ssim.shape == ()
    assert found.d_rgb.shape == rgb.shape and found.d_rgb.device == found.l1.device == launcher.device
    assert_as_good(found.l1, single.l1, exact.l1, "L1")
    assert_as_good(found.ssim, single.ssim, exact.ssim, "SSIM")
    assert_as_good(found.d_rgb, single.d_rgb, exact.d_rgb, "gradient")
    return found


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (21, 17), (16, 43), (70, 50)])
@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_terms_and_gradient(launcher: Launcher, size: tuple[int, int], weight: float) -> None:
    compare(launcher, *pair(*size), weight)


@pytest.mark.parametrize("region", [(0, 19, 0), (5, 19, 8), (5, 24, 16), (11, 13, 8)])
def test_strip(launcher: Launcher, region: tuple[int, int, int]) -> None:
    first, last, start = region
    compare(launcher, *pair(24, 45), 0.2, own_rows=(first, last), image_height=40, row_start=start)


def test_strips_with_halo_add_up_to_the_image(launcher: Launcher) -> None:
    height, cuts = 45, (0, 16, 19, 45)
    rgb, target = pair(height, 23)
    whole = compare(launcher, rgb, target, 0.2)
    sums, gradient = torch.zeros(2, dtype=torch.float64), torch.zeros_like(rgb)
    for first, last in zip(cuts, cuts[1:], strict=False):
        start, stop = max(0, first - 5), min(height, last + 5)
        part = compare(
            launcher, rgb[start:stop], target[start:stop], 0.2,
            own_rows=(first - start, last - start), image_height=height, row_start=start,
        )  # fmt: skip
        sums += torch.stack((part.l1, part.ssim)).cpu()
        gradient[start:stop] += part.d_rgb.cpu()
    torch.testing.assert_close(sums, torch.stack((whole.l1, whole.ssim)).cpu(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, whole.d_rgb.cpu().double(), rtol=1e-4, atol=1e-7)


def test_region_without_own_rows(launcher: Launcher) -> None:
    rgb, target = pair(24, 18)
    arguments = {"own_rows": (7, 7), "image_height": 40, "row_start": 8}
    loss = photometric(launcher, rgb.float().to(launcher.device), target.to(launcher.device), 0.2, **arguments)
    assert loss.l1.item() == loss.ssim.item() == 0 and not bool(loss.d_rgb.any())


def test_equal_images(launcher: Launcher) -> None:
    target = pair(20, 15)[1].to(launcher.device)
    loss = photometric(launcher, target * torch.tensor(1 / 255, dtype=torch.float32), target, 0.2)
    assert loss.l1.item() == 0 and loss.ssim.item() == pytest.approx(1, abs=1e-6)


def test_same_bits_twice(launcher: Launcher) -> None:
    """Also in whatever order the threads run: the reversed emulator gives the forward one's bits."""
    rgb, target = pair(50, 60)
    one, two = (photometric(launcher, rgb.float().to(launcher.device), target.to(launcher.device), 0.2) for _ in "ab")
    assert torch.equal(one.d_rgb, two.d_rgb) and torch.equal(one.l1, two.l1) and torch.equal(one.ssim, two.ssim)
    if launcher.device.type == "cpu":
        forward = photometric(make_launcher("emulated"), rgb.float(), target, 0.2)
        assert torch.equal(one.d_rgb, forward.d_rgb) and torch.equal(one.l1, forward.l1)


def test_refusals(launcher: Launcher) -> None:
    rgb, target = pair(4, 5)
    with pytest.raises(ValueError, match="float32"):
        photometric(launcher, rgb, target, 0.2)
    with pytest.raises(ValueError, match="uint8"):
        photometric(launcher, rgb.float(), target.float(), 0.2)
    with pytest.raises(ValueError, match="same shape"):
        photometric(launcher, rgb.float(), target[:3], 0.2)
