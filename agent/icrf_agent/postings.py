"""What is posted in a round, and the room of a run where that is kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from icrf.exchange import MERGED, MODEL, UPDATE
from icrf.ports import PayloadHeader
from icrf.protocol import Activate, nodes_that, shared_size
from icrf_agent.delivery import Delivery, Letter, Position
from icrf_agent.room import TopologyManager

# What one node sends its neighbours.
FROM_A_NODE = (MODEL, UPDATE, MERGED)


@dataclass(frozen=True)
class Posting:
    """What a host publishes in one phase: headers for many messages and one reference to their payload.

    Attributes:
        senders: the nodes that speak; row k of an update's array is that of ``senders[k]``.
        recipients: whom each sender addresses; None means each sender's own neighbours.
        weight: sum of sample counts behind a partial.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    kind: str
    senders: tuple[int, ...]
    reference: Any
    recipients: tuple[int, ...] | None = None
    weight: int = 0

    @property
    def position(self) -> Position:
        return self.round, self.attempt


@dataclass
class ClusterRoom:
    """A run on this cluster."""

    activation: Activate
    cluster: int
    topology: TopologyManager
    delivery: Delivery = field(default_factory=Delivery)
    postings: dict[tuple[Position, str], dict[tuple[int, ...], Posting]] = field(default_factory=dict)
    # Where the row of a node of this cluster is: what leaves for others is asked for node by node.
    places: dict[tuple[Position, str], dict[int, tuple[Posting, int]]] = field(default_factory=dict)
    arrived: dict[PayloadHeader, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        training = frozenset(nodes_that("train", self.activation.nodes))
        owned: dict[int, list[int]] = {}
        for node, cluster in enumerate(self.activation.assignment):
            owned.setdefault(cluster, []).append(node)
        self.members = {cluster: tuple(nodes) for cluster, nodes in owned.items()}
        self.participants = {c: tuple(n for n in nodes if n in training) for c, nodes in owned.items()}
        self.num_parameters = shared_size(self.activation.layout)

    @property
    def position(self) -> Position:
        """The newest attempt that was begun."""
        return self.delivery.position

    def post(self, position: Position, letter: Letter, recipients: Sequence[int]) -> None:
        """A letter to nodes here and elsewhere, which they get when the attempt is committed."""
        assignment = self.activation.assignment
        for cluster in sorted({assignment[n] for n in recipients}):
            there = [n for n in recipients if assignment[n] == cluster]
            if cluster == self.cluster:
                self.delivery.stage(position, letter, there)
            else:
                self.delivery.post(position, cluster, letter, there)

    def local(self, nodes: Collection[int]) -> list[int]:
        return [n for n in nodes if self.activation.assignment[n] == self.cluster]
