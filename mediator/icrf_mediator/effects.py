"""What a decision of the mediator's core asks the outside world to do.

The core only decides: it returns :class:`Effects` and the shell (``service.py``) carries them out in a fixed order:
first the writes, durably and in one transaction, then instructions, events and answers. So an acknowledgement
never precedes what it acknowledges.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from icrf.ports import Write
from icrf.protocol import CallDone, Instruction, RunEvent


@dataclass(frozen=True)
class Now:
    """The time as the shell sees it: `monotonic_s` decides, `wall_s` is shown."""

    monotonic_s: float
    wall_s: float


@dataclass
class Effects:
    """Collected by one decision.

    Attributes:
        writes: durable facts, applied before anything else.
        sends: (cluster, instruction) in order.
        events: items of runs' event streams.
        answers: outcomes of node calls, by call id.
        deletes: (run, beginning of names) of artifacts that are no longer needed.
        dropped: clusters whose connection is to be closed after the sends.
    """

    writes: list[Write] = field(default_factory=list)
    sends: list[tuple[str, Instruction]] = field(default_factory=list)
    events: list[RunEvent] = field(default_factory=list)
    answers: list[CallDone] = field(default_factory=list)
    deletes: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def send(self, cluster: str, instruction: Instruction) -> None:
        """Queue an instruction for a cluster's agent."""
        self.sends.append((cluster, instruction))
