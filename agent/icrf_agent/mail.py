"""The letters of a cluster at the end of a round: committed, and not read yet. Plain.

They go where the nodes go that they are for. With them go the numbers that the nodes here have given to their letters,
so that later ones come behind them, wherever their writer lives by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from icrf_agent.delivery import Addressed, Letter


@dataclass(frozen=True)
class Mail:
    """Letters that wait, with all those of their recipients that have not read them, and the last number per sender."""

    letters: tuple[Addressed, ...] = ()
    numbers: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.letters or self.numbers)

    def __add__(self, other: Mail) -> Mail:
        highest = {s: max(self.numbers.get(s, 0), other.numbers.get(s, 0)) for s in {*self.numbers, *other.numbers}}
        return Mail(self.letters + other.letters, highest)

    def plain(self) -> dict[str, Any]:
        """As values of :mod:`icrf.values`."""
        letters = [[letter.sender, letter.sequence, list(to), letter.message] for letter, to in self.letters]
        return {"letters": letters, "numbers": sorted(map(list, self.numbers.items()))}

    @classmethod
    def of_plain(cls, found: Mapping[str, Any]) -> Mail:
        """The inverse of :meth:`plain`; KeyError, TypeError or ValueError if it is none."""
        letters = [(Letter(int(s), int(q), bytes(m)), tuple(map(int, to))) for s, q, to, m in found["letters"]]
        return cls(tuple(letters), {int(sender): int(number) for sender, number in found["numbers"]})


NO_MAIL = Mail()
