"""Where the chunks of a payload go: an array that may take a moment to be made."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Chunks of about 1 MiB that wait for an array; with more of them their sender waits.
MOST_WAITING = 16


class Destination:
    """An array to be filled while it may still be being made.

    Args:
        array: one-dimensional; or what will have it.
    """

    def __init__(self, array: Array | Future[Array]) -> None:
        self._made: Future[Array]
        if isinstance(array, Future):
            self._made = array
        else:
            self._made = Future()
            self._made.set_result(array)
        self._waiting: list[tuple[int, memoryview]] = []
        self._bytes: memoryview | None = None

    def write(self, start: int, data: memoryview) -> None:
        """Put bytes where they belong, at the latest when the array is asked for; raises what making it has raised."""
        if self._bytes is None and not self._made.done() and len(self._waiting) < MOST_WAITING:
            self._waiting.append((start, data))
            return
        self._opened()[start : start + data.nbytes] = data

    def array(self) -> Array:
        """The array with all that was written; waits until it is made."""
        self._opened()
        return self._made.result()

    def abandon(self) -> None:
        """Nobody wants the array any more."""
        self._made.cancel()
        self._waiting.clear()

    def _opened(self) -> memoryview:
        if self._bytes is None:
            self._bytes = self._made.result().view(np.uint8).data
            for start, data in self._waiting:
                self._bytes[start : start + data.nbytes] = data
            self._waiting.clear()
        return self._bytes
