"""How lossy codecs round, and which values they keep: the same on every processor."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def to_bfloat16(values: Array) -> Array:
    """The values rounded to bfloat16, eight significant bits, ties to even; of the same shape and type.

    What is not finite stays as it is.
    """
    bits = values.astype(np.float32).view(np.uint32)
    bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    bits &= np.uint32(0xFFFF0000)
    rounded = bits.view(np.float32).astype(values.dtype, copy=False)
    np.copyto(rounded, values, where=~np.isfinite(values))
    return rounded


def largest(values: Array, count: int) -> Array:
    """Which `count` of the values are largest in magnitude, as a mask; of equal ones those that come first.

    Args:
        values: finite, one-dimensional, `count` or more.
    """
    magnitudes = np.abs(values)
    # Which of equal values a partition puts first differs between processors; the value at the border does not.
    border = np.partition(magnitudes, len(values) - count)[len(values) - count]
    chosen: Array = magnitudes > border
    ties = np.flatnonzero(magnitudes == border)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return chosen
