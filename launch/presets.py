# SPDX-License-Identifier: Apache-2.0
"""The paper's settings alpha, beta and gamma as values of the mask flags; the numbers live in `strategies.mask`."""

from __future__ import annotations

from typing import Any


def setting_values(setting: str) -> dict[str, Any]:
    """The mask flags that `--setting NAME` stands for, by flag name: lambda_mask, mask_from_iter, mask_until_iter.

    Raises:
        KeyError: there is no such setting (the command line offers only existing ones).
    """
    from strategies.mask import MASK_SETTINGS  # imported here: it loads torch, which --help need not wait for

    chosen = MASK_SETTINGS[setting]
    return {name: getattr(chosen, name) for name in ("lambda_mask", "mask_from_iter", "mask_until_iter")}
