# SPDX-License-Identifier: Apache-2.0
"""How every numba kernel of this package is compiled, and cached on disk beside the sources.

numba checks a cached kernel against its own file only, but kernels inline functions of other files. Each one is
therefore stamped with the sources of the whole package: after any change all of them are compiled again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as nb

PACKAGE = Path(__file__).resolve().parent.parent


def package_stamp(package: Path = PACKAGE) -> str:
    """Hash of every Python source below `package`."""
    digest = hashlib.sha256()
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


_STAMP = package_stamp()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        # The GIL is released (threads.py), and division has no test for zero.
        dispatcher = nb.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        index = dispatcher._cache._cache_file
        index._source_stamp = (index._source_stamp, _STAMP)
        return dispatcher

    return decorate


kernel = _compiled()
"""For functions that Python calls.

Inner loops index whole arrays, `rows[s, 2]`: a view such as `rows[s]` costs two atomic reference counts each time. Best
is a kernel that makes its scratch arrays and leaves all loops to a `device` function.
"""

device = _compiled(forceinline=True, _nrt=False)
"""For functions called in inner loops: a real call passes every array as seven values and counts references.

Compiled without numba's runtime, so that nothing here counts references at all: numba takes the pairs of counts out of
straight code only, and around a branch each array costs two atomic operations. Such a function can make no array, and
must return none: its caller would give back a reference that nobody took.
"""

allocating = _compiled(forceinline=True)
"""For functions that make arrays for a kernel, outside its loops."""
