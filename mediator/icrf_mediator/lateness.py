"""What clusters that were late still owe: updates of earlier rounds, which they bring to a later one. Pure.

A cluster that misses the deadline of a round is busy with it: its nodes that were chosen for the round bring their
update of it to the next round that the cluster takes part in, in the place of whatever the cluster would have done
there. All of this follows from what the journal says about earlier rounds, so a repeated round has the same late
updates as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icrf.protocol import LateUpdates, bitmap
from icrf.staleness import DROP, WEIGH, factor


@dataclass(frozen=True)
class Debt:
    """What one cluster owes: the update of `round` of its `nodes`, ascending."""

    round: int
    nodes: tuple[int, ...]


Debts = Mapping[str, Debt]


class Lateness:
    """The policy of one federation, and who was late in which round.

    Args:
        config: its configuration; the keys ``late_updates``, ``staleness_exponent`` and ``max_staleness`` are read.
        num_nodes: of the whole federation.
        cluster_of: where a node lives.
        taking_part: the nodes of a committed round, given what was owed before it.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_nodes: int,
        cluster_of: Callable[[int], str],
        taking_part: Callable[[int], Collection[int]],
    ) -> None:
        self.weighs = config.get("late_updates", DROP) == WEIGH
        self._exponent = float(config.get("staleness_exponent") or 0.0)
        self._most = int(config.get("max_staleness") or 1)
        self._num_nodes, self._cluster_of, self._taking_part = num_nodes, cluster_of, taking_part
        self._missed: dict[int, frozenset[int]] = {}
        # What was owed before each round up to the newest that was asked for; nothing where there is no entry.
        self._before: dict[int, Debts] = {}
        self._known = 1

    def missed(self, number: int) -> frozenset[int]:
        """The nodes that were chosen for a round and whose clusters were late in it."""
        return self._missed.get(number, frozenset())

    def note(self, number: int, nodes: Iterable[int]) -> None:
        """These nodes' clusters were late in a round, which is not committed yet."""
        if nodes := frozenset(nodes):
            self._missed[number] = self.missed(number) | nodes

    def before(self, number: int) -> Debts:
        """Cluster -> what it owes when a round begins; all rounds before are committed."""
        while self.weighs and self._known < number:
            found = self._owed_after(self._known)
            self._known += 1
            # One round more, and it would be too old: the cluster starts afresh.
            found = {c: debt for c, debt in found.items() if self._known - debt.round <= self._most}
            if found:
                self._before[self._known] = found
        return self._before.get(number, {})

    def given_up(self, number: int) -> Debts:
        """What was owed after a committed round and is too old for the next one."""
        if not self.weighs:
            return {}
        before = self.before(number + 1)
        return {c: debt for c, debt in self._owed_after(number).items() if before.get(c) != debt}

    def late(self, number: int, nodes: Collection[int]) -> tuple[LateUpdates, ...]:
        """What those of a round's participants that owe something bring to it."""
        by_round: dict[int, list[int]] = {}
        for debt in self.before(number).values():
            by_round.setdefault(debt.round, []).extend(node for node in debt.nodes if node in nodes)
        return tuple(
            LateUpdates(earlier, bitmap(by_round[earlier], self._num_nodes), factor(number - earlier, self._exponent))
            for earlier in sorted(by_round)
            if by_round[earlier]
        )

    def kept(self, number: int, nodes: Collection[int]) -> tuple[int, ...]:
        """Rounds whose updates are still owed after one with these participants."""
        return tuple(sorted({debt.round for debt in self._after(number, nodes).values()})) if self.weighs else ()

    def _owed_after(self, number: int) -> Debts:
        """What is owed after a committed round. Most rounds have nobody late, and who took part need not be asked."""
        if not (self.before(number) or self.missed(number)):
            return {}
        return self._after(number, self._taking_part(number))

    def _after(self, number: int, nodes: Collection[int]) -> Debts:
        found = {c: debt for c, debt in self.before(number).items() if not any(node in nodes for node in debt.nodes)}
        missed: dict[str, list[int]] = {}
        for node in sorted(self.missed(number)):
            missed.setdefault(self._cluster_of(node), []).append(node)
        for cluster, nodes_there in missed.items():
            found.setdefault(cluster, Debt(number, tuple(nodes_there)))
        return found
