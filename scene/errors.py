# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user's input is at fault", shared by everything that reads files or flags."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Input that cannot be used: the message says what was found, where (file), and how to fix it.

    The scripts print the message as one paragraph on stderr and exit with status 2, without a traceback.
    """


def list_problems(headline: str, problems: Sequence[str], fix: str) -> InputError:
    """Returns one error for many problems: the headline with their count, the first ten, and how to fix them."""
    shown = "; ".join(problems[:10])
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return InputError(f"{headline} ({len(problems)}): {shown}{more}. {fix}")
