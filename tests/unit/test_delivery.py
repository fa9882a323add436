"""Letters between two clusters over a network that loses, repeats and reorders, while both sides die and generations
change: every letter is applied exactly once and in order, or refused by its generation or attempt.

Two real topology managers carry it out. The test plays the network, and the mediator, which voids an attempt when one
of the two has lost what it held, and commits a round when all that was sent in it is acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

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
        # Edge -> texts in order: what rounds before the open one have sent, and what nodes have read for good.
        self.readable: dict[tuple[int, int], list[str]] = {}
        self.applied: dict[tuple[int, int], list[str]] = {}
        # What the nodes of a cluster have read in the open attempt: its repetition reads it again.
        self.reading: list[list[tuple[tuple[int, int], str]]] = [[], []]
        self.refused = 0

    def fresh(self, cluster: int) -> HybridTopologyManager:
        manager = HybridTopologyManager(CLUSTERS[cluster], InlineReferences())
        manager.link(activation(self.generation))
        manager.begin_round("run", self.generation, *self.position)
        return manager

    # ------------------------------------------------------------ nodes and gateways

    @rule(sender=st.integers(0, 3), other=st.integers(0, 1))
    def write(self, sender: int, other: int) -> None:
        to = other if HOME[sender] else 2 + other
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
        self.take(self.network[where] if again else self.network.pop(where))

    def take(self, found: Travelling) -> None:
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

    @rule(data=st.data())
    def good_times(self, data: st.DataObject) -> None:
        """All that was written arrives and is acknowledged, in any order, some of it twice, while nodes go on writing;
        then the round commits."""
        writing = data.draw(st.integers(0, 2))
        while self.network or any(manager.outbox("run", self.position) for manager in self.managers):
            if not self.network:
                self.send(0)
                self.send(1)
            under_way, self.network = data.draw(st.permutations(self.network)), []
            for found in under_way + under_way[: data.draw(st.integers(0, 2))]:
                self.take(found)
            if writing:
                writing -= 1
                self.write(writing, 0)
        self.commit()

    # ------------------------------------------------------------ the mediator

    @rule(cluster=st.integers(0, 1))
    def restart(self, cluster: int) -> None:
        """One side dies with all it held and comes back; the attempt is void, and the nodes write again."""
        self.read(cluster)
        self.keep(cluster)
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
        for cluster in (0, 1):
            self.read(cluster)
            self.keep(cluster)
        assert self.applied == self.readable
        for sender, to, text in self.to_write:
            self.readable.setdefault((sender, to), []).append(text)
        self.to_write = []
        self.begin(self.position[0] + 1, 1)

    def begin(self, round_number: int, attempt: int) -> None:
        self.position, self.reading = (round_number, attempt), [[], []]
        for manager in self.managers:
            manager.begin_round("run", self.generation, *self.position)
        for written in self.to_write:
            self.publish(*written)

    @rule(cluster=st.integers(0, 1))
    def read(self, cluster: int) -> None:
        """The nodes of a cluster read what is there."""
        for node in (n for n in range(4) if HOME[n] == cluster):
            for message in self.managers[cluster].sync("run", NODES[node], 0.0, self.position):
                self.reading[cluster].append(((NODES.index(message.sender_id), node), message.header))

    def keep(self, cluster: int) -> None:
        """What was read will not be read again."""
        for edge, text in self.reading[cluster]:
            self.applied.setdefault(edge, []).append(text)
        self.reading[cluster] = []


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
