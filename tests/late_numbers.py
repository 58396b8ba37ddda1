# SPDX-License-Identifier: Apache-2.0
"""What a strategy says of a step, read at once; the training loop reads it late (`launch.late_steps`)."""

from __future__ import annotations

from strategies.base import LateNumber, Numbers


def read_now(numbers: Numbers) -> dict[str, float]:
    """Every number as a float. Waits for the device where one is late."""
    return {
        name: number.formula(float(number.source)) if isinstance(number, LateNumber) else number
        for name, number in numbers.items()
    }
