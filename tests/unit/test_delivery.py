"""Letters between two clusters over a network that loses, repeats and reorders, while both sides die and generations
change: every letter is applied exactly once and in order, or refused by its generation or attempt.

Two real topology managers carry it out. The test plays the network, and the mediator, which voids an attempt when one
of the two has lost what it held, and commits a round when all that was sent in it is acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from icrf.errors import RoutingError
from icrf.exchange import MESSAGE
from icrf.federation.message import Message
from icrf.ports import PayloadHeader
from icrf.protocol import DECENTRALIZED, Activate, NodeSpec, PeerAddress, Relink, TensorSpec
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.topology_manager import HybridTopologyManager

# a0 and a1 are on A; b0 and b1 on B; everybody may write to everybody.
NODES = ("a0", "a1", "b0", "b1")
GRAPH = HybridAdjacencyMatrix.from_edges(4, [(i, j) for i in range(4) for j in range(4) if i != j]).to_graph()
CLUSTERS = ("A", "B")
HOME = (0, 0, 1, 1)


def activation(generation: int) -> Activate:
    return Activate(
        run_id="run",
        generation=generation,
        federation="fed",
        config_json="{}",
        flow=DECENTRALIZED,
        nodes=tuple(NodeSpec(name, "train") for name in NODES),
        graph=GRAPH,
        layout=(TensorSpec("w", (2,), "float32"),),
        clusters=CLUSTERS,
        assignment=HOME,
        coordinator=0,
        peers=tuple(PeerAddress(name, "") for name in CLUSTERS),
        num_slots=1,
    )


@dataclass(frozen=True)
class Travelling:
    """A bundle on its way from `source` to `target`, or back as the acknowledgement that it was taken."""

    header: PayloadHeader
    number: int
    bundle: bytes
    is_ack: bool = False

    @property
    def position(self) -> tuple[int, int]:
        return self.header.round, self.header.attempt


class Network(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.generation, self.position = 1, (1, 1)
        self.managers = [self.fresh(0), self.fresh(1)]
        self.network: list[Travelling] = []
        self.counter = 0
        self.to_write: list[tuple[int, int, str]] = []  # what the nodes send in the open round, in every attempt of it
        self.committed: dict[tuple[int, int], list[str]] = {}  # edge -> texts, in the order they were written
        self.applied: dict[tuple[int, int], list[str]] = {}
        self.refused = 0

    def fresh(self, cluster: int) -> HybridTopologyManager:
        manager = HybridTopologyManager(CLUSTERS[cluster], InlineReferences())
        manager.link(activation(self.generation))
        manager.begin_round("run", self.generation, *self.position)
        return manager

    # ------------------------------------------------------------ nodes and gateways

    @rule(sender=st.integers(0, 3), to=st.integers(0, 3))
    def write(self, sender: int, to: int) -> None:
        if HOME[sender] == HOME[to]:
            return
        self.counter += 1
        self.to_write.append((sender, to, f"letter {self.counter}"))
        self.publish(*self.to_write[-1])

    def publish(self, sender: int, to: int, text: str) -> None:
        message = Message(text, NODES[sender])
        self.managers[HOME[sender]].publish("run", message, NODES[to], self.position)

    @rule(cluster=st.integers(0, 1))
    def send(self, cluster: int) -> None:
        for target, (number, bundle) in self.managers[cluster].outbox("run", self.position).items():
            header = PayloadHeader(
                *("run", self.generation, *self.position, MESSAGE, -1),
                *(CLUSTERS[cluster], CLUSTERS[target], "uint8", len(bundle)),
            )
            self.network.append(Travelling(header, number, bundle))

    # ------------------------------------------------------------ network

    @precondition(lambda self: self.network)
    @rule(data=st.data(), again=st.booleans())
    def arrive(self, data: st.DataObject, again: bool) -> None:
        """Any of what is under way, whatever was sent before it; `again`: a copy stays under way."""
        where = data.draw(st.integers(0, len(self.network) - 1))
        found = self.network[where] if again else self.network.pop(where)
        header = found.header
        source, target = CLUSTERS.index(header.source), CLUSTERS.index(header.target)
        is_over = header.generation != self.generation or found.position < self.position
        if found.is_ack:
            # Its sender has forgotten an attempt that is over.
            self.managers[source].acknowledge("run", found.position, target, found.number)
            return
        try:
            self.managers[target].deliver_letters(header, found.bundle)
        except RoutingError as error:
            assert error.code == "P003" and is_over
            self.refused += 1
            return
        assert not is_over
        self.network.append(Travelling(header, found.number, b"", is_ack=True))

    @precondition(lambda self: self.network)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        del self.network[data.draw(st.integers(0, len(self.network) - 1))]

    # ------------------------------------------------------------ the mediator

    @rule(cluster=st.integers(0, 1))
    def restart(self, cluster: int) -> None:
        """One side dies with all it held and comes back; the attempt is void, and the nodes write again."""
        self.read(cluster)
        self.managers[cluster] = self.fresh(cluster)
        self.begin(self.position[0], self.position[1] + 1)

    @rule()
    def void(self) -> None:
        for manager in self.managers:
            manager.abort("run", *self.position)
        self.begin(self.position[0], self.position[1] + 1)

    @rule()
    def relink(self) -> None:
        """Between two attempts the nodes get another generation."""
        for manager in self.managers:
            manager.abort("run", *self.position)
        self.generation += 1
        for manager in self.managers:
            manager.relink(Relink(run_id="run", generation=self.generation, graph=GRAPH))
        self.begin(self.position[0], self.position[1] + 1)

    @precondition(lambda self: all(not manager.outbox("run", self.position) for manager in self.managers))
    @rule()
    def commit(self) -> None:
        for sender, to, text in self.to_write:
            self.committed.setdefault((sender, to), []).append(text)
        self.to_write = []
        self.begin(self.position[0] + 1, 1)
        for cluster in (0, 1):
            self.read(cluster)

    def begin(self, round_number: int, attempt: int) -> None:
        self.position = (round_number, attempt)
        for manager in self.managers:
            manager.begin_round("run", self.generation, *self.position)
        for written in self.to_write:
            self.publish(*written)

    def read(self, cluster: int) -> None:
        """The nodes of a cluster read what is there; what they have read is settled."""
        manager = self.managers[cluster]
        for node in (n for n in range(4) if HOME[n] == cluster):
            for message in manager.sync("run", NODES[node], 0.0, self.position):
                edge = (NODES.index(message.sender_id), node)
                self.applied.setdefault(edge, []).append(str(message.header))

    @invariant()
    def exactly_once_and_in_order(self) -> None:
        assert self.applied == self.committed


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
