# SPDX-License-Identifier: Apache-2.0
"""The cpu body: numba kernels with explicit SIMD, parallel over tiles and rows on plain threads."""
