"""What the nodes of a host send and receive by."""

from __future__ import annotations

import time
from collections.abc import Sequence

from icrf.errors import RoutingError, RunError
from icrf.federation.message import Message
from icrf.protocol import Activate, Graph
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.delivery import Outgoing
from icrf_agent.room import TopologyManager
from icrf_agent.topology_manager import HybridTopologyManager

# A call of the topology manager takes as long for hundreds of letters as for one.
_FULL_LETTERS, _FULL_BYTES = 1024, 4 << 20
# A waiting node occupies a thread of the topology manager, which others need too: it asks again and again instead.
_WAIT_SLICE_S = 0.2


class HostMailbox:
    """A node's way to its neighbours: through the cluster's topology manager.

    In a round, what nodes publish leaves the host in batches, at the latest with the end of the phase: nobody can read
    it before the round's barrier.

    Attributes:
        position: the attempt that the host works on; None between rounds.
        open: whether the nodes are set up; other clusters may not be before.
        used: whether any of them has sent something.
    """

    def __init__(self, manager: HybridTopologyManager, activation: Activate) -> None:
        self._manager, self._run_id = manager, activation.run_id
        self._ids, self._graph = [node.id for node in activation.nodes], activation.graph
        self._room: TopologyManager | None = None
        self._letters: list[Outgoing] = []
        self._bytes = 0
        self.position: tuple[int, int] | None = None
        self.open = self.used = False

    def relink(self, graph: Graph) -> None:
        """The nodes are linked otherwise from now on."""
        self._graph, self._room = graph, None

    def enter(self, position: tuple[int, int] | None) -> None:
        """Work on an attempt, or on none: what was published in another one goes nowhere."""
        if position != self.position:
            self.position = position
            self._letters, self._bytes = [], 0

    def flush(self) -> None:
        """Hand over what was published in this attempt.

        Raises:
            RoutingError: P003 if the attempt is over.
        """
        if self._letters and self.position is not None:
            letters, self._letters, self._bytes = self._letters, [], 0
            self._manager.post(self._run_id, self.position, letters)

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int:
        if not self.open:
            raise RunError(
                "F005",
                f"{message.sender_id} cannot send before all nodes are set up",
                place=message.sender_id,
                hint="send in train, not in build",
            )
        self.used = True
        if self.position is None:
            return self._manager.publish(self._run_id, message, to)
        try:
            sender, recipients = self._linked().address(message, to)
        except RoutingError:
            # Refused by whoever counts that.
            return self._manager.publish(self._run_id, message, to, self.position)
        self._keep((sender, tuple(recipients), message.encode()))
        return len(recipients)

    def sync(self, node_id: str, wait_s: float) -> list[Message]:
        deadline_s = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            found = self._manager.sync(self._run_id, node_id, min(left_s, _WAIT_SLICE_S), self.position)
            if found or left_s <= 0.0:
                return found

    def get_neighbors(self, node_id: str) -> list[str]:
        return self._linked().get_neighbors(node_id)

    def _keep(self, letter: Outgoing) -> None:
        self._letters.append(letter)
        self._bytes += len(letter[2])
        if len(self._letters) >= _FULL_LETTERS or self._bytes >= _FULL_BYTES:
            self.flush()

    def _linked(self) -> TopologyManager:
        """Who may talk to whom; most federations never ask."""
        if self._room is None:
            self._room = TopologyManager()
            self._room.link_nodes(self._ids, HybridAdjacencyMatrix.from_graph(self._graph))
        return self._room
