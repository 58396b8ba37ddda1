# SPDX-License-Identifier: Apache-2.0
"""How every numba kernel of this package is compiled."""

from __future__ import annotations

import numba as nb

kernel = nb.njit(nogil=True, cache=True, error_model="numpy")
"""Releases the GIL (threads.py), is cached on disk beside the sources, and divides without a test for zero.

Inner loops index whole arrays, `rows[s, 2]`: a view such as `rows[s]` costs two atomic reference counts each time.
"""

device = nb.njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
"""As `kernel`, for functions called in inner loops: a call passes every array as seven values and counts references."""
