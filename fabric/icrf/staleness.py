"""What an update counts that comes some rounds late: pure functions, the same in the mediator and on hosts.

An update that comes `s` rounds late weighs ``(1 + s)^-alpha`` of what it would weigh in time, the polynomial of Xie,
Koyejo and Gupta (2019), "Asynchronous Federated Optimization", arXiv:1903.03934. Weights have to be integers for the
exact sums, so in a round with such updates everybody counts in parts of 1/1024. Rounds without any are as they would be
without this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icrf.protocol import LateUpdates, nodes_of

DROP, WEIGH = "drop", "weigh"
IN_TIME = 1024


def factor(staleness: int, exponent: float) -> int:
    """What an update counts that is `staleness` rounds old, in 1/1024, at least one.

    Args:
        exponent: alpha; 0: as much as one in time.
    """
    share: float = (1.0 + staleness) ** -exponent
    return max(1, round(IN_TIME * share))


def late_nodes(late: Sequence[LateUpdates]) -> dict[int, LateUpdates]:
    """Node index -> the update that it brings."""
    return {node: updates for updates in late for node in nodes_of(updates.nodes)}


def scaled(weight: int, node: int, late: Mapping[int, LateUpdates]) -> int:
    """What a node counts in a round to which the nodes of `late` bring older updates.

    Args:
        weight: what it counts otherwise.
    """
    if not late:
        return weight
    return weight * (late[node].factor if node in late else IN_TIME)
