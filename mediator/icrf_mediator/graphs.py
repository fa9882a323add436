"""The graphs of one run of peers: what rounds have ended with, and which of them the clusters have. Pure.

A graph counts from the round after the one that decided on it. Clusters get it when that round is about to be opened,
under a new generation; until all have said so nothing else is asked of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from icrf.errors import IcrfError, InternalError
from icrf.protocol import Graph

# No round has decided on what the clusters have, as far as this mediator knows.
_UNKNOWN = -1


class Graphs:
    """What is known of one run's graphs.

    Args:
        submitted: the graph that it starts with.

    Attributes:
        submitted: likewise.
    """

    def __init__(self, submitted: Graph) -> None:
        self.submitted = submitted
        # By the round that decided on them; those that nobody can go back to are forgotten.
        self._after: dict[int, Graph] = {0: submitted}
        self._linked, self._asked = 0, _UNKNOWN

    def after(self, number: int) -> Graph:
        """The graph in force once a round is committed."""
        return self._after[self._since(number)]

    def decide(self, number: int, graph: Graph) -> None:
        """The committed round `number` has ended with another graph."""
        self._after[number] = graph

    def differs(self, number: int, graph: Graph | None) -> bool:
        """Whether a round that was committed before has decided on another graph now."""
        return graph is not None and graph != self.after(number)

    def forget(self, before: int) -> None:
        """No round before this one will be gone back to."""
        since = self._since(before)
        self._after = {number: graph for number, graph in self._after.items() if number >= since}

    # ------------------------------------------------------------ what clusters have

    def is_due(self, number: int) -> bool:
        """Whether clusters must link their nodes anew before the round after `number`."""
        return self._since(number) != self._linked

    def ask(self, number: int) -> bool:
        """Clusters are asked for the graph after `number`; whether it takes a new generation, for the first time."""
        since = self._since(number)
        if self._asked == since:
            return False
        self._asked, self._linked = since, _UNKNOWN
        return True

    def linked(self) -> None:
        """All clusters have what was asked for."""
        self._linked, self._asked = self._asked, _UNKNOWN

    def set_up(self, number: int) -> None:
        """Clusters set up their nodes as they were after `number`."""
        self._linked, self._asked = self._since(number), _UNKNOWN

    def was_asked(self, number: int) -> None:
        """Out of the journal: clusters were asked for the graph that round `number` decided on; some may have it."""
        self._asked, self._linked = number, _UNKNOWN

    @property
    def between(self) -> bool:
        """Whether some clusters may have one graph and some the one before."""
        return self._asked != _UNKNOWN

    def _since(self, number: int) -> int:
        return max(decided for decided in self._after if decided <= number)


def graph_differs(number: int) -> IcrfError:
    """The error of a round that has decided otherwise when it was repeated."""
    return InternalError(
        "X002",
        f"round {number} did not repeat: it decided on another graph than before",
        hint="an adaptation strategy must draw randomness from random_state only, and keep nothing between rounds",
    )


def graph_row(graph: Graph) -> dict[str, Any]:
    """A graph for the journal."""
    return asdict(graph)


def graph_of(row: Mapping[str, Any]) -> Graph:
    """The inverse of :func:`graph_row`."""
    parts = dict(row)
    return Graph(parts.pop("num_nodes"), **{name: tuple(values) for name, values in parts.items()})
