# SPDX-License-Identifier: Apache-2.0
"""Real spherical harmonics of degree 0 to 3 in the order and with the signs of 3DGS.

Legend: N directions, K = (degree + 1)^2 bases.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DEGREE = 3

C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


def num_bases(degree: int) -> int:
    """Number of bases up to `degree`."""
    return (degree + 1) ** 2


def sh_bases(directions: Tensor, degree: int) -> Tensor:
    """Values of the bases in unit directions.

    Args:
        directions: (N, 3) unit vectors from the camera to the Gaussian, world axes.
        degree: 0 to 3.

    Returns:
        (N, K).

    Raises:
        ValueError: a degree outside 0 to 3.
    """
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"SH degree is {degree}; this package evaluates degrees 0 to {MAX_DEGREE}.")
    x, y, z = directions.unbind(-1)
    bases = [torch.full_like(x, C0)]
    if degree >= 1:
        bases += [-C1 * y, C1 * z, -C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        bases += [C2[0] * x * y, C2[1] * y * z, C2[2] * (2 * zz - xx - yy), C2[3] * x * z, C2[4] * (xx - yy)]
    if degree >= 3:
        bases += [
            C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            C3[4] * x * (4 * zz - xx - yy),
            C3[5] * z * (xx - yy),
            C3[6] * x * (xx - 3 * yy),
        ]
    return torch.stack(bases, dim=-1)


def sh_colors(directions: Tensor, sh0: Tensor, shN: Tensor, degree: int) -> Tensor:
    """(N, 3) colours max(0, SH + 1/2); the gradient is zero where the clamp acts. `sh0` (N, 3), `shN` (N, K - 1, 3).

    Raises:
        ValueError: `shN` holds fewer coefficients than `degree` needs.
    """
    needed = num_bases(degree) - 1
    if shN.shape[1] < needed:
        raise ValueError(f"SH degree {degree} needs {needed} higher coefficients, found {shN.shape[1]}.")
    coefficients = torch.cat((sh0[:, None], shN[:, :needed]), dim=1)
    color = torch.einsum("nk,nkc->nc", sh_bases(directions, degree), coefficients)
    return (color + 0.5).clamp(min=0.0)
