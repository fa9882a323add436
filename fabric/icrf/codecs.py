"""What ``inter_cluster_codec`` may be, and what can be said of sizes beforehand.

``none`` and ``zstd`` change no value. A lossy codec is part of what a federation learns by, not of how it travels: it
changes what nodes are sent and what they contribute wherever they live, on one cluster like on many, and what crosses
is then packed without loss. So where nodes live still changes no bit.
"""

from __future__ import annotations

NONE, ZSTD, BF16, TOP_K = "none", "zstd", "bf16", "top_k"
LOSSY = (BF16, TOP_K)

# The form of packed arrays: elements per chunk, bytes of a checksum, and what a chunk takes beside its planes at most:
# its head, nine lengths, and 32 bytes for each plane that is all zeros.
CHUNK_ELEMENTS = 1 << 16
CHECKSUM_BYTES = 8
CHUNK_OVERHEAD_BYTES = 6 + 9 * (4 + 32)


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
