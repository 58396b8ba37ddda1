# SPDX-License-Identifier: Apache-2.0
"""How Gaussians become images and images become gradients: project -> rasterize -> loss, and the mirror of it."""
