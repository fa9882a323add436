"""Arrays in Ray's object store that are filled after they were put: a payload lands where its readers will find it.

Ray copies what it puts. A payload that came over the network would be in memory twice, and copied once more after its
last byte has come. So an object that nobody has written to is put first, and filled through another view of the same
shared memory. Ray's objects are immutable to whoever gets them, and so is this one: the reference is given away only
when the payload is complete and verified.

Under memory pressure Ray may have begun to write an object to disk before it was filled: it spares what a process
holds, but there is a moment between the put and the first look at it. So an object begins with a seal that is written
last. What was written to disk before that comes back without its seal, and counts as lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

# What comes before the array, which starts where any element type may.
HEAD_BYTES, SEAL_BYTES = 64, 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Landed:
    """The reference of an object that was filled after it was put.

    Attributes:
        seal: what it begins with if it is whole.
        dtype: of the array in it.
    """

    reference: Any
    seal: bytes
    dtype: str


class Landing:
    """An object of the store that may still be written to, by way of numpy's array interface."""

    def __init__(self, reference: Any, sealed: Array) -> None:
        self.reference = reference
        # As long as it is held the memory stays where it is.
        self._sealed = sealed
        interface = sealed.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


class Room:
    """The object store, as far as arrays may be filled in it."""

    def __init__(self) -> None:
        self._is_mapped = True

    def allocate(self, num_elements: int, dtype: str) -> Array:
        """A one-dimensional array to be filled and then put; in the object store already where that is possible.

        Raises:
            MemoryError: the object store has no room for it.
        """
        num_bytes = num_elements * np.dtype(dtype).itemsize
        if not self._is_mapped:
            return np.empty(num_elements, dtype)
        try:
            reference = ray.put(np.empty(HEAD_BYTES + num_bytes, np.uint8))
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise MemoryError(f"no room for {num_bytes} bytes in the object store") from error
        sealed: Array = ray.get(reference)
        if not _is_writable(sealed):
            self._is_mapped = False
            return np.empty(num_elements, dtype)
        return np.asarray(Landing(reference, sealed))[HEAD_BYTES:].view(dtype)


def landed(array: Array) -> Landed | None:
    """Seal an array that was allocated in the object store and is complete; None for any other, and for parts."""
    whole = array.base
    if not isinstance(whole, np.ndarray) or not isinstance(whole.base, Landing):
        return None
    if array.nbytes != whole.nbytes - HEAD_BYTES:
        return None
    seal = os.urandom(SEAL_BYTES)
    whole[:SEAL_BYTES] = np.frombuffer(seal, np.uint8)
    return Landed(whole.base.reference, seal, array.dtype.name)


def opened(found: Landed, whole: Array) -> Array | None:
    """The array in an object that was got; None if the object is not what it was when it was sealed."""
    if whole[:SEAL_BYTES].tobytes() != found.seal:
        return None
    return whole[HEAD_BYTES:].view(found.dtype)


def _is_writable(sealed: Array) -> bool:
    """Whether this process has the memory mapped for writing: nobody promises that it has."""
    start = int(sealed.__array_interface__["data"][0])
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        bounds, modes, *_ = line.split(maxsplit=2)
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= start and start + sealed.nbytes <= high:
            return modes.startswith("rw-s")
    return False
