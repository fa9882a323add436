"""Where a host's time goes within an attempt: every second of its phases belongs to exactly one part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from icrf.protocol import EXCHANGING, HOST_PARTS
from icrf_agent.object_store import References

_NOTHING = ""


class HostMeter:
    """Adds up seconds by part, see :data:`icrf.protocol.HOST_PARTS`. It always runs: a change of part reads the clock
    once. For the one thread in which a host works.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._attempt = (0, 0)
        self._part, self._since_s = _NOTHING, 0.0
        self._seconds = dict.fromkeys(HOST_PARTS, 0.0)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of all phases of the attempt so far, by part."""
        return dict(self._seconds)

    @contextmanager
    def phase(self, attempt: tuple[int, int], part: str) -> Iterator[None]:
        """Inside, a phase runs; what nothing else is said of belongs to `part`. Another attempt begins at zero."""
        if attempt != self._attempt:
            self._attempt, self._seconds = attempt, dict.fromkeys(HOST_PARTS, 0.0)
        self.switch(part)
        try:
            yield
        finally:
            self.switch(_NOTHING)

    def doing(self, part: str) -> _Doing:
        """A context: inside, time belongs to `part` and not to what is around it. Between phases nothing is counted."""
        return _Doing(self, part)

    @property
    def running(self) -> bool:
        """Whether a phase runs."""
        return self._part != _NOTHING

    def switch(self, part: str) -> str:
        """Go on with another part; the one that ran."""
        now_s, before = self._clock(), self._part
        if before:
            self._seconds[before] += now_s - self._since_s
        self._part, self._since_s = part, now_s
        return before


class _Doing:
    """See :meth:`HostMeter.doing`. A class of its own because a generator takes several times as long, per node."""

    __slots__ = ("_meter", "_outer", "_part")

    def __init__(self, meter: HostMeter, part: str) -> None:
        self._meter, self._part, self._outer = meter, part, _NOTHING

    def __enter__(self) -> None:
        if self._meter.running:
            self._outer = self._meter.switch(self._part)

    def __exit__(self, *_: object) -> None:
        if self._outer:
            self._meter.switch(self._outer)


class MeteredReferences:
    """The cluster's object store, whose time is that of exchange."""

    def __init__(self, references: References, meter: HostMeter) -> None:
        self._references, self._meter = references, meter

    def put(self, array: np.ndarray[Any, Any], kind: str) -> Any:
        with self._meter.doing(EXCHANGING):
            return self._references.put(array, kind)

    def get(self, reference: Any) -> np.ndarray[Any, Any]:
        with self._meter.doing(EXCHANGING):
            return self._references.get(reference)
