"""Who takes part in each round of one run, and whether it may go on without some clusters. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from icrf.errors import RunError
from icrf.participation import Participation
from icrf.protocol import CENTRALIZED, HIERARCHICAL, Submission, bitmap, nodes_of
from icrf_mediator.lateness import Lateness


class Quorum:
    """The rule of a federation, and what was decided against it because clusters were late or lost.

    A decision is in the journal before anybody hears of it, and holds for every further attempt of its round.

    Attributes:
        lateness: what clusters that were late still owe, where late updates count.

    Args:
        submission: the federation.
        config: its configuration.
        cluster_of: where a node lives.
        coordinator: the cluster that no round can do without.
    """

    def __init__(
        self, submission: Submission, config: Mapping[str, Any], cluster_of: Callable[[int], str], coordinator: str
    ) -> None:
        self._rule = Participation(submission, config)
        self._num_nodes = len(submission.nodes)
        self._cluster_of, self._coordinator = cluster_of, coordinator
        # Peers mix with all of their neighbours: there the absence of a cluster is none of participants only.
        self._least: int | None = config.get("min_nodes") if submission.flow == CENTRALIZED else None
        self._flow = submission.flow
        self._decided: dict[int, bytes] = {}
        # Who may take part, by the first round for which it holds.
        self._members: dict[int, tuple[int, ...]] = {}
        self.lateness = Lateness(
            config, self._num_nodes, cluster_of, lambda number: frozenset(self.nodes(self.chosen(number)))
        )

    def move(self, cluster_of: Callable[[int], str], coordinator: str) -> None:
        """From now on nodes live elsewhere; not where late updates count, as clusters owe them."""
        self._cluster_of, self._coordinator = cluster_of, coordinator

    @property
    def exists(self) -> bool:
        """Whether a round is valid with fewer nodes than were chosen."""
        return self._least is not None

    def chosen(self, number: int) -> bytes:
        """Bitmap of the participants of a round as decided, or else by the rule; empty: all that train."""
        return self._decided.get(number) or self._wanted(number)

    def _wanted(self, number: int) -> bytes:
        """The participants of a round by the rule; a cluster that owes an update brings that instead."""
        members = self.members(number)
        drawn = self._rule.of_round(number, members)
        owed = {c: set(debt.nodes).intersection(members) for c, debt in self.lateness.before(number).items()}
        owed = {cluster: nodes for cluster, nodes in owed.items() if nodes}
        if not owed:
            return drawn
        busy = {node for node in self.nodes(drawn) if self._cluster_of(node) in owed}
        nodes = sorted(set(self.nodes(drawn)).difference(busy).union(*owed.values()))
        return b"" if tuple(nodes) == self._rule.clients else bitmap(nodes, self._num_nodes)

    def note(self, number: int, metrics: Mapping[str, float]) -> None:
        """A round was committed with these metrics: who is active next may depend on them."""
        self._rule.note(number, metrics)

    def members(self, number: int) -> tuple[int, ...]:
        """The nodes out of which the participants of a round are chosen."""
        since = max((first for first in self._members if first <= number), default=0)
        return self._members.get(since, self._rule.clients)

    def change(self, first: int, nodes: tuple[int, ...]) -> None:
        """From round `first` on, these may take part."""
        self._members[first] = nodes

    def require_possible(self, nodes: tuple[int, ...]) -> None:
        """Raise F005 unless rounds can go on with these members."""
        problem = ""
        if self._flow == HIERARCHICAL:
            problem = "every member of a group takes part in its rounds"
        elif self._flow != CENTRALIZED:
            problem = "peers mix with all of their neighbours"
        elif not self._rule.draws:
            problem = "its sampler or criterion was asked for the nodes that it was submitted with"
        elif not set(nodes) <= set(self._rule.clients):
            problem = "a node without the role train cannot take part"
        elif self._rule.fewest(nodes) < (self._least or 1):
            problem = f"{self._rule.fewest(nodes)} nodes would take part in a round, {self._least or 1} must"
        if problem:
            raise RunError("F005", f"the nodes cannot be changed: {problem}", place="nodes")

    def count(self, participants: bytes) -> int:
        """How many nodes a bitmap stands for."""
        return len(self.nodes(participants))

    def is_decided(self, number: int) -> bool:
        """Whether the participants of a round were decided, so that a change of the members comes too late for it."""
        return number in self._decided

    def decide(self, number: int, participants: bytes, late: Iterable[int] = ()) -> None:
        """From now on these are the participants of a round; it goes on without the nodes `late`, who owe it then."""
        self._decided[number] = participants
        self.lateness.note(number, late)

    def owing(self, number: int, participants: bytes, late: Collection[str]) -> frozenset[int]:
        """The chosen nodes of a round that these participants leave out because their clusters are late."""
        if not self.lateness.weighs:
            return frozenset()
        out = set(self.nodes(self.chosen(number))).difference(self.nodes(participants))
        return frozenset(node for node in out if self._cluster_of(node) in late)

    def without(self, number: int, gone: Collection[str], *, fixed: bool = False) -> bytes | None:
        """The participants of a round that leaves out the clusters `gone`; None if it cannot.

        Args:
            fixed: the round was committed before, so its participants are what they were.
        """
        chosen = self.chosen(number)
        if not gone:
            return chosen
        if self._least is None or self._coordinator in gone:
            return None
        nodes = self.nodes(chosen)
        left = [node for node in nodes if self._cluster_of(node) not in gone]
        if len(left) == len(nodes):
            return chosen
        return None if fixed or len(left) < self._least else bitmap(left, self._num_nodes)

    def nodes(self, participants: bytes) -> tuple[int, ...]:
        """The nodes that a bitmap of participants stands for, ascending."""
        return nodes_of(participants) if participants else self._rule.clients
