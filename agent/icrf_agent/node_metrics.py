"""What each node of a host reported in a round, kept beside the averages: for display only, in no hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from icrf.protocol import NodeSpec, StartRound

# A row of the journal holds every node's values of a round; beyond these numbers there are only the averages.
MAX_NODES = 256
MAX_METRICS = 16

ByNode = dict[str, dict[str, float]]


class NodeMetrics:
    """Collects what nodes report in the rounds that are evaluated.

    Attributes:
        train_loss: what each node reported as that in the newest attempt, evaluated or not and however many they are.
            Decisions are made on it: what an earlier round has left, a host that was restarted would not have.

    Args:
        nodes: all nodes of the federation; with more than `MAX_NODES` nothing else is kept.
    """

    def __init__(self, nodes: Iterable[NodeSpec]) -> None:
        self._names = [node.id for node in nodes]
        self._wanted = len(self._names) <= MAX_NODES
        self._found: ByNode = {}
        self._of = (0, 0)
        self.train_loss: dict[int, float] = {}

    def add(self, start: StartRound, index: int, values: Mapping[str, float]) -> None:
        """Keep the finite values of a node; what an earlier attempt has left is gone."""
        if self._of != (start.round, start.attempt):
            self._of, self._found, self.train_loss = (start.round, start.attempt), {}, {}
        if "train_loss" in values:
            self.train_loss[index] = values["train_loss"]
        if not (self._wanted and start.evaluate):
            return
        found = self._found.setdefault(self._names[index], {})
        found.update(list(values.items())[: MAX_METRICS - len(found)])

    def take(self, start: StartRound) -> ByNode:
        """What was kept in this attempt, if its round is evaluated; nothing is left."""
        found, self._found = self._found, {}
        return found if self._of == (start.round, start.attempt) else {}
