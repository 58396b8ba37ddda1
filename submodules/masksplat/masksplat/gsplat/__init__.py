# SPDX-License-Identifier: Apache-2.0
"""The gsplat body: gsplat's projection, harmonics and rasterizer behind the ops of masksplat."""
