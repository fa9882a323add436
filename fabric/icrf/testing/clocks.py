"""Clocks that a test moves, for whatever takes an :class:`icrf.ports.Clock`."""

from __future__ import annotations

from icrf.daemon import MonotonicClock


class StandingClock:
    """Time that stands still until a test moves it.

    Attributes:
        time_s: what it shows, in seconds, as either kind of time.
    """

    def __init__(self) -> None:
        self.time_s = 1000.0

    def monotonic_s(self) -> float:
        """What it shows."""
        return self.time_s

    def wall_s(self) -> float:
        """What it shows."""
        return self.time_s


class MovedClock(MonotonicClock):
    """The machine's time and what a test has added to it.

    Attributes:
        ahead_s: seconds that it is ahead.
    """

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic_s(self) -> float:
        """The machine's seconds, and those it is ahead."""
        return super().monotonic_s() + self.ahead_s
