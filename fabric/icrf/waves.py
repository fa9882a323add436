"""Nodes that become active in groups: so many more with every wave, on a timetable or when a metric says so. Pure."""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# What ``activation`` of the configuration may be, besides the name of a criterion.
ALL, WAVES = "all", "waves"

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*(?P<metric>[A-Za-z_]\w*)\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>{_NUMBER})\s*")


@dataclass(frozen=True)
class Condition:
    """What the metrics of a committed round are compared with: ``accuracy >= 0.6``."""

    metric: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Condition | None:
        """The condition that a text says; None where it says none."""
        found = _CONDITION.fullmatch(text)
        return found and cls(found["metric"], found["sign"], float(found["bound"]))

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics meet it; a round that has not measured the metric does not."""
        return self.metric in metrics and _COMPARISONS[self.sign](metrics[self.metric], self.bound)


class Waves:
    """How many nodes are active in which round.

    The first wave is there from round 1 on. The next one comes `period` rounds after the one before, or, with a
    condition, with the first round from then on whose predecessor met it.

    Args:
        size: nodes of a wave, at least 1.
        period: rounds from one wave to the next at the least, at least 1.
        condition: None for a mere timetable.
    """

    def __init__(self, size: int, period: int = 1, condition: Condition | None = None) -> None:
        self._size, self._period, self._condition = size, period, condition
        self._noted = 0
        # The first round of every wave that has come, where a condition decides.
        self._starts = [1]

    def note(self, number: int, metrics: Mapping[str, float]) -> None:
        """Round `number` was committed with these metrics; told again, after a restart or a restore, it is the same."""
        if self._condition is None or number <= self._noted:
            return
        self._noted = number
        if number + 1 - self._starts[-1] >= self._period and self._condition.holds(metrics):
            self._starts.append(number + 1)

    def active(self, number: int) -> int:
        """How many nodes are active in a round, if there are as many; all rounds before it have been noted."""
        if self._condition is None:
            return self._size * (1 + (number - 1) // self._period)
        return self._size * bisect_right(self._starts, number)
