# SPDX-License-Identifier: Apache-2.0
"""Errors that say that memory, a GPU's or the machine's, did not suffice: how to know them and what they tell."""

from __future__ import annotations

import re

import torch

from scene.errors import InputError

OUT_OF_MEMORY_SIGNS = ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA error: out of memory", "can't allocate memory")
"""What the driver's errors (through cuda.core), torch's and those of torch's CPU allocator say."""

UNITS = {"bytes": 1} | {f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGTPE", 1)}
FOREIGN = 0.1
"""Share of a GPU's memory from which on what others hold is worth a word."""

GENERAL_WAYS = (
    "(1) a lower --resolution; (2) less memory for photos: a smaller --image_cache_gb, or on a GPU "
    "--preload_dataset_to_gpu_threshold 0; (3) end other programs that use this memory, or take a machine with more"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the GPU's or the machine's, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, InputError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


def shortage_text(error: BaseException) -> str:
    """A sentence: whose memory did not suffice, how much was wanted, how much was free, what others hold of it.

    An error that says more than numbers (`masksplat.cuda.capacity`) speaks for itself.
    """
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) and is_of_gpu(error):
        return message
    wanted = _bytes_in(message, r"(?:[Tt]ried|[Uu]nable) to allocate (?:about )?([\d.]+) ?(\w+)")
    if not is_of_gpu(error):
        parts = [f"{gigabytes(wanted)} more were wanted" if wanted else "the machine gives no more"]
        return "memory of the machine did not suffice: " + ", ".join(parts)
    total = _bytes_in(message, r"total capacity of ([\d.]+) (\w+)")
    free = _bytes_in(message, r"of which ([\d.]+) (\w+) is free")
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
    parts = [f"{gigabytes(wanted)} more were wanted"] if wanted else []
    parts += [f"{gigabytes(free)} of {gigabytes(total)} were free"] if free is not None and total else []
    parts += [f"other programs hold {gigabytes(others)}"] if (others := _foreign_bytes(free, total)) else []
    return "memory of the GPU did not suffice" + (": " if parts else "") + ", ".join(parts)


def is_of_gpu(error: BaseException) -> bool:
    """Whether an error that `is_out_of_memory` is about what a GPU does, not about the machine's memory."""
    text = str(error)
    if isinstance(error, MemoryError):
        return bool(text) and "allocate" not in text  # Python's own says nothing, numpy's "Unable to allocate"
    return "can't allocate memory" not in text


def _bytes_in(message: str, pattern: str) -> int | None:
    found = re.search(pattern, message)
    return int(float(found[1]) * UNITS.get(found[2].rstrip("."), 1)) if found else None


def gigabytes(count: int | None) -> str:
    """A number of bytes in words."""
    return f"{(count or 0) / 1e9:.2f} GB"


def _foreign_bytes(free: int | None, total: int | None) -> int:
    """What other programs hold, when it is much."""
    if free is None or not total or not torch.cuda.is_initialized():
        return 0
    others = total - free - torch.cuda.memory_reserved()
    return others if others > FOREIGN * total else 0
