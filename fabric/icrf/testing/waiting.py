"""Waiting for what no event announces, such as a file that grows: looking again and again, up to a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

WAIT_S = 30.0
_POLL_S = 0.01

Found = TypeVar("Found")


def until(look: Callable[[], Found | None], timeout_s: float = WAIT_S) -> Found:
    """The first true value that `look` returns.

    Raises:
        TimeoutError: there was none within `timeout_s` seconds.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        _require_time_left(deadline_s, timeout_s)
        time.sleep(_POLL_S)
    return found


async def async_until(look: Callable[[], Found | None], timeout_s: float = WAIT_S) -> Found:
    """As :func:`until`, while the other tasks of the loop go on."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        _require_time_left(deadline_s, timeout_s)
        await asyncio.sleep(_POLL_S)
    return found


def _require_time_left(deadline_s: float, timeout_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise TimeoutError(f"did not come true within {timeout_s:g} s")
