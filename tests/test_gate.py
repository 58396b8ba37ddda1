# SPDX-License-Identifier: Apache-2.0
"""Drawing behind a gate: factors on opacity and scale, their gradients, and what masks and factors have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gaussian_renderer.gate import FactoredGaussians, MaskedGaussians, gated
from kernel_scenes import PARAMETERS, parameters_of, random_scene, scalar_image, settings_for
from masksplat.ops import Body, get_body
from masksplat.types import AdamStep, Gaussians, Optimizer, Statistics, Views
from strategies.base import Gate

SIZE = (26, 20)
BACKGROUND = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
BODIES = ["cpu", "reference"]


def scene(dtype: torch.dtype = torch.float64) -> tuple[Gaussians, Views, torch.Tensor]:
    """Nine Gaussians, two views, and factors between 0.2 and 1 of which one is 0."""
    gaussians, views, _ = random_scene(9, SIZE, seed=4, num_views=2, sh_degree=1, log_scale=-1.2, dtype=dtype)
    factors = torch.linspace(0.2, 1.0, 9, dtype=dtype)
    factors[5] = 0
    return gaussians, views, factors


def weights(view: int) -> torch.Tensor:
    return torch.randn((SIZE[1], SIZE[0], 3), generator=torch.Generator().manual_seed(view), dtype=torch.float64)


def loss_of(body: Body, through: FactoredGaussians | MaskedGaussians, views: Views) -> float:
    """A linear function of the two images."""
    splats = through.project(body, views, torch.arange(9))
    frames = [body.rasterize(splats, view, SIZE, BACKGROUND).rgb for view in range(len(views))]
    return sum(float((weights(view) * rgb).sum()) for view, rgb in enumerate(frames))


def rows_gradient(
    body: Body, through: FactoredGaussians | MaskedGaussians, views: Views, dtype: torch.dtype = torch.float64
):
    """Packed splats, and the gradient of `loss_of` by their rows."""
    splats = through.project(body, views, torch.arange(9))
    d_rows = torch.zeros_like(splats.rows)
    for view in range(len(views)):
        frame = body.rasterize(splats, view, SIZE, BACKGROUND.to(dtype))
        body.rasterize_backward(splats, frame, weights(view).to(dtype), d_rows)
    return splats, d_rows


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("kind", ["opacity", "scale", "both"])
def test_gradients_are_those_of_finite_differences(name: str, kind: str) -> None:
    """By every raw number and every factor, in float64, far from the thresholds of compositing."""
    body, (gaussians, views, factors) = get_body(name, num_threads=1), scene()
    if kind != "opacity":
        factors[5] = 0.7  # a scale of 0 is a point of no return, and has no two-sided difference

    def through(raw: Gaussians, values: torch.Tensor) -> FactoredGaussians:
        gate = Gate(
            opacity_factor=values if kind != "scale" else None, scale_factor=values if kind != "opacity" else None
        )
        chosen = gated(raw, settings_for(1), gate)
        assert isinstance(chosen, FactoredGaussians)
        return chosen

    start = through(gaussians, factors)
    splats, d_rows = rows_gradient(body, start, views)
    for view in range(2):
        assert scalar_image(splats, view, SIZE, BACKGROUND.numpy()).margins.smallest() > 2e-5
    gradients, d_factors = start.backward(body, views, splats, d_rows)
    step = 1e-6
    for part, analytic in [*enumerate(gradients[:-1]), (6, d_factors)]:
        tensors = [*parameters_of(gaussians), factors]
        for place in range(tensors[part].numel()):
            if part == 6 and factors[place] == 0:
                continue
            found = []
            for shift in (step, -step):
                moved = [tensor.clone() for tensor in tensors]
                moved[part].view(-1)[place] += shift
                found.append(loss_of(body, through(Gaussians(*moved[:6]), moved[6]), views))
            numeric = (found[0] - found[1]) / (2 * step)
            assert float(analytic.reshape(-1)[place]) == pytest.approx(numeric, rel=2e-6, abs=2e-6), (
                (*PARAMETERS, "factors")[part],
                place,
            )
    if kind == "opacity":
        assert d_factors[5] == 0  # not drawn: nothing is known of it
    assert torch.count_nonzero(d_factors) >= 7


def updated(body: Body, gaussians: Gaussians, views: Views, gate: Gate | None):
    """(parameters, moments, statistics, gradient by the gate) after one update."""
    dtype = gaussians.means.dtype
    copies = Gaussians(*(tensor.clone() for tensor in parameters_of(gaussians)))
    moments = [tuple(torch.zeros_like(tensor) for tensor in parameters_of(copies)) for _ in range(2)]
    steps = tuple(AdamStep(0.01 * (k + 1), 0.9, 0.999, 1e-15, 1) for k in range(6))
    statistics = Statistics(torch.ones(9, dtype=dtype), torch.ones(9, dtype=dtype))
    through = gated(copies, settings_for(1), gate)
    splats, d_rows = rows_gradient(body, through, views, dtype)  # type: ignore[arg-type]
    d_gate = through.update(
        body,
        views,
        splats,
        d_rows,
        optimizer=Optimizer(*moments, steps),
        statistics=statistics,
        gradient_scale=0.5,
    )
    return [*parameters_of(copies), *moments[0], *moments[1], *statistics], d_gate


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_one_give_the_plain_step(name: str, dtype: torch.dtype) -> None:
    body, (gaussians, views, _) = get_body(name, num_threads=1), scene(dtype)
    ones = torch.ones(9, dtype=dtype)
    plain, d_mask = updated(body, gaussians, views, None)
    # The mask's gradient is that of the opacity times the opacity, where no pixel is capped (design.md, 3).
    factored, d_factor = updated(body, gaussians, views, Gate(opacity_factor=ones))
    both, d_both = updated(body, gaussians, views, Gate(opacity_factor=ones, scale_factor=ones))
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for one, other, third in zip(plain, factored, both, strict=True):
        scale = float(one.abs().max()) + 1e-12
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * scale)
        torch.testing.assert_close(third, one, rtol=tolerance, atol=tolerance * scale)
    assert d_mask.shape == d_factor.shape == (9,)
    torch.testing.assert_close(d_factor, d_mask, rtol=tolerance, atol=tolerance * float(d_mask.abs().max()))
    assert float((d_both - d_factor).abs().max()) > 1e-3  # the scales' part


def test_a_gate_chooses_how_gaussians_are_drawn() -> None:
    gaussians, _, factors = scene()
    settings = settings_for(1)
    for gate in (None, Gate(), Gate(mask=factors)):
        chosen = gated(gaussians, settings, gate)
        assert isinstance(chosen, MaskedGaussians)
        assert chosen.mask is (gate.mask if gate is not None else None)
    with pytest.raises(ValueError, match="a mask or factors"):
        gated(gaussians, settings, Gate(mask=factors, opacity_factor=factors))


@pytest.mark.parametrize("name", BODIES)
def test_factors_multiply_what_is_drawn(name: str) -> None:
    """The image behind factors is that of Gaussians whose raw numbers carry the factors."""
    body, (gaussians, views, factors) = get_body(name, num_threads=1), scene()
    factors[5] = 0.4
    carried = replace(
        gaussians,
        opacities=torch.logit(torch.sigmoid(gaussians.opacities) * factors),
        scales=gaussians.scales + torch.log(factors)[:, None],
    )
    seen = loss_of(body, gated(gaussians, settings_for(1), Gate(opacity_factor=factors, scale_factor=factors)), views)  # type: ignore[arg-type]
    assert seen == pytest.approx(loss_of(body, gated(carried, settings_for(1), None), views), rel=1e-12)  # type: ignore[arg-type]
    assert seen != pytest.approx(loss_of(body, gated(gaussians, settings_for(1), None), views), rel=1e-3)  # type: ignore[arg-type]
