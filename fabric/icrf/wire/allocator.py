"""The C allocator of a process that moves payloads."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Above the largest frame; and what may stay at the end of a heap, for frames that are on their way.
_LARGEST_KEPT_BYTES, _KEPT_BYTES = 4 << 20, 32 << 20
# Heaps that threads share. By default there are eight for a processor, and each keeps what it has.
_MOST_HEAPS = 2


def keep_freed_frames() -> bool:
    """Let the allocator use the memory of a frame again for the next one.

    By itself it gives blocks of a frame's size back to the system, and every frame is a few hundred page faults: a
    third of what receiving it costs. In return most of what frames took at the busiest moment may stay.

    Returns:
        Whether this C library can be told; others do as they do.
    """
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        wanted = (
            (_M_ARENA_MAX, _MOST_HEAPS),
            (_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES),
            (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        )
        return all(mallopt(name, value) for name, value in wanted)
    return False
