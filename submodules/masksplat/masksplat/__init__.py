# SPDX-License-Identifier: Apache-2.0
"""masksplat: masked 3D Gaussian rasterization, usable on its own.

`rasterization` mirrors gsplat's call and adds differentiable per-Gaussian `masks`; `masksplat.ops` holds the
forward/backward pairs a trainer calls. The package knows nothing about datasets, strategies or ranks.
"""

from masksplat.rasterization import rasterization

__all__ = ["rasterization"]
