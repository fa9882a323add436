"""How long a run took to get ready for its rounds. Pure."""

from __future__ import annotations

from icrf.protocol import ACTIVATING, RESERVING


class Preparing:
    """Seconds of planning, and of reserving and setting up, until they are asked for.

    What lies between, such as a place in the queue or a user who asks for one stage after the other, counts nowhere.
    """

    def __init__(self) -> None:
        self._plan_s = self._activate_s = 0.0
        self._began_s: float | None = None

    def planned(self, seconds: float) -> None:
        """Planning took so long."""
        self._plan_s += seconds

    def entered(self, status: str, now_s: float) -> None:
        """The run has entered a status."""
        if self._began_s is not None:
            self._activate_s += now_s - self._began_s
        self._began_s = now_s if status in (RESERVING, ACTIVATING) else None

    def take(self) -> tuple[float, float]:
        """Seconds of planning, and of reserving and setting up, since this was asked last."""
        found = self._plan_s, self._activate_s
        self._plan_s = self._activate_s = 0.0
        return found
