"""Where a decision of the mediator can be interrupted for a test: before it is durable, durable but untold, or told.

See :mod:`icrf.failpoints` for how a place is chosen.
"""

from __future__ import annotations

from icrf import failpoints
from icrf.protocol import COMPLETED, Activate, Reserve, StartRound
from icrf_mediator.effects import Effects

BEFORE, DURABLE, TOLD = "before", "durable", "told"


def pass_by(effects: Effects, moment: str) -> None:
    """Die here if a test wants it."""
    for at, phase, number in _places(effects):
        if at == moment:
            failpoints.reached(phase, number)


def _places(effects: Effects) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []
    committed = {int(w.key[1]) for w in effects.writes if w.table == "commits"}
    for write in effects.writes:
        if write.table == "submissions":
            found.append((DURABLE, "submit", 0))
        elif write.table == "attempts":
            number = int(write.key[1])
            found.append((BEFORE, "aggregate", number) if number in committed else (DURABLE, "exchange", number))
        elif write.table == "commits":
            found.append((DURABLE, "commit", int(write.key[1])))
        elif write.table == "runs" and write.row["status"] == COMPLETED:
            found.append((BEFORE, "result", 0))
    for _, instruction in effects.sends:
        if isinstance(instruction, Reserve):
            found.append((TOLD, "reserve", 0))
        elif isinstance(instruction, Activate):
            found.append((TOLD, "activate", 0))
        elif isinstance(instruction, StartRound):
            found.append((TOLD, "train", instruction.round))
    return found
