"""Named references to payloads of one cluster: bytes, or references into the cluster's own object store.

Keys are ``{federation}/{node}/round_{r}`` with optional further parts. Values are never models or pickles: whoever
puts an array hands over a reference, and dropping the key frees the object.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class References(Protocol):
    """The cluster's own object store: arrays of payloads, of some kind of :mod:`icrf.exchange`, in, references out."""

    def put(self, array: np.ndarray[Any, Any], kind: str) -> Any: ...

    def get(self, reference: Any) -> np.ndarray[Any, Any]: ...


class GlobalObjectStore:
    """A flat table of keys; not thread-safe, its owner locks."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def put(self, key: str, value: Any) -> None:
        """Store a reference or bytes under `key`, replacing what was there."""
        self._values[key] = value

    def get(self, key: str) -> Any:
        """The value of `key`, or None."""
        return self._values.get(key)

    def delete(self, prefix: str) -> int:
        """Drop every key that equals `prefix` or lies below it; how many there were."""
        doomed = [k for k in self._values if k == prefix or k.startswith(prefix.rstrip("/") + "/")]
        for key in doomed:
            del self._values[key]
        return len(doomed)

    def discard(self, key: str) -> None:
        """Drop exactly this key, if it is there, without looking at the others."""
        self._values.pop(key, None)

    def keys(self, prefix: str = "") -> list[str]:
        """Keys that start with `prefix`, sorted."""
        return sorted(k for k in self._values if k.startswith(prefix))

    def size(self) -> int:
        """How many keys there are."""
        return len(self._values)


def object_key(federation: str, node: str, round_number: int) -> str:
    """``{federation}/{node}/round_{r}``."""
    return f"{federation}/{node}/round_{round_number}"
