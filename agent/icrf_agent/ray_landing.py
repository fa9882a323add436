"""Arrays in Ray's object store that are filled after they were put: a payload lands where its readers will find it.

Ray copies what it puts. A payload that came over the network would be in memory twice, and copied once more after its
last byte has come. So an array that nobody has written to is put first, and filled through another view of the same
shared memory. Ray's objects are immutable to whoever gets them, and stay so: the reference is given away only when the
payload is complete and verified. Ray neither spills nor moves an object while a process holds its memory, as the view
does (``IsObjectSpillable`` in Ray's ``local_object_manager``: only its one pin may be left).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray

# Below this the calls cost more than the copy.
LEAST_BYTES = 1 << 20

Array = np.ndarray[Any, Any]


class Landing:
    """An object of the store that may still be written to, by way of numpy's array interface."""

    def __init__(self, reference: Any, sealed: Array) -> None:
        self.reference = reference
        # As long as it is held the memory stays where it is.
        self._sealed = sealed
        interface = sealed.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def allocate(num_elements: int, dtype: str) -> Array:
    """A one-dimensional array to be filled and then put; it is in the object store already where that is possible.

    Raises:
        MemoryError: the object store has no room for it.
    """
    untouched = np.empty(num_elements, dtype)
    if untouched.nbytes < LEAST_BYTES:
        return untouched
    try:
        reference = ray.put(untouched)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise MemoryError(f"no room for {untouched.nbytes} bytes in the object store") from error
    sealed: Array = ray.get(reference)
    if not _is_writable(sealed):
        return untouched
    return np.asarray(Landing(reference, sealed))


def reference_of(array: Array) -> Any | None:
    """The reference of an array that :func:`allocate` has made in the object store; None for any other."""
    return array.base.reference if isinstance(array.base, Landing) else None


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
