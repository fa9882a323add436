"""What ``inter_cluster_codec`` may be, and how values are rounded.

``none`` and ``zstd`` change no value. A lossy codec is part of what a federation learns by, not of how it travels: it
changes what nodes are sent and what they contribute wherever they live, on one cluster like on many, and what crosses
is then packed without loss. So where nodes live still changes no bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NONE, ZSTD, BF16, TOP_K = "none", "zstd", "bf16", "top_k"
LOSSY = (BF16, TOP_K)

# The form of packed arrays: elements per chunk, bytes of a checksum, and what a chunk takes beside its planes at most:
# its head, nine lengths, and 32 bytes for each plane that is all zeros.
CHUNK_ELEMENTS = 1 << 16
CHECKSUM_BYTES = 8
CHUNK_OVERHEAD_BYTES = 6 + 9 * (4 + 32)

Array = np.ndarray[Any, Any]


def packed_bound(num_elements: int, word_bytes: int, *, nonzero: int | None = None) -> int:
    """The most bytes that :mod:`icrf.wire.packing` makes of an array.

    Args:
        word_bytes: bytes of an element of which any may differ from zero.
        nonzero: elements that may, if not all: then a bitmap of them is counted too.
    """
    chunks = -(-num_elements // CHUNK_ELEMENTS)
    data = num_elements * word_bytes
    if nonzero is not None:
        data = min(data, nonzero * word_bytes + -(-num_elements // 8))
    return data + CHECKSUM_BYTES + chunks * CHUNK_OVERHEAD_BYTES


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
