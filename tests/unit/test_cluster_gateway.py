"""The gateway of a cluster: whom it gives room in the object store, and what it lets go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icrf.errors import IcrfError
from icrf.exchange import MODEL, PROBE
from icrf.ports import PayloadHeader
from icrf.protocol import DECENTRALIZED, Activate, NodeSpec, PeerAddress, TensorSpec
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.cluster_gateway import HybridClusterGateway
from icrf_agent.gateway_inproc import InProcessTransport, TransportHub
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.topology_manager import HybridTopologyManager

SIZE = 500_000
HERE, THERE = "here", "there"
HEADER = PayloadHeader("run", 1, 1, 1, MODEL, 1, THERE, HERE, "float32", SIZE)


class Counting(InlineReferences):
    """An object store that counts what room was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def allocate(self, num_elements: int, dtype: str) -> np.ndarray[Any, Any]:
        self.asked.append(num_elements)
        return super().allocate(num_elements, dtype)


@pytest.fixture
def store() -> Counting:
    return Counting()


@pytest.fixture
def peer(store: Counting) -> Iterator[InProcessTransport]:
    """The other cluster's transport; this cluster's gateway serves a run of two nodes with a large model."""
    yield from peer_of(store, SIZE)


@pytest.fixture
def small(store: Counting) -> Iterator[InProcessTransport]:
    """The same with a small model."""
    yield from peer_of(store, 1_000)


def peer_of(store: Counting, size: int) -> Iterator[InProcessTransport]:
    hub, manager = TransportHub(), HybridTopologyManager(HERE, store)
    activation = Activate(
        run_id="run",
        generation=1,
        federation="run",
        config_json="{}",
        flow=DECENTRALIZED,
        nodes=(NodeSpec("n0", "train"), NodeSpec("n1", "train")),
        graph=HybridAdjacencyMatrix.from_edges(2, [(0, 1), (1, 0)]).to_graph(),
        layout=(TensorSpec("w", (size,), "float32"),),
        clusters=(HERE, THERE),
        assignment=(0, 1),
        peers=(),
        num_slots=1,
    )
    manager.link(activation)
    manager.begin_round("run", 1, 1, 1)
    gateway = HybridClusterGateway(lambda: InProcessTransport(hub, HERE), manager, store)
    other = InProcessTransport(hub, THERE)
    yield other
    other.close()
    gateway.close()


def send(peer: InProcessTransport, header: PayloadHeader, size: int = SIZE) -> None:
    peer.send(header, np.ones(size, header.dtype), PeerAddress(HERE, ""), 5.0)


def test_what_is_welcome_lands_in_the_object_store(peer: InProcessTransport, store: Counting) -> None:
    send(peer, HEADER)
    assert store.asked == [SIZE]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run_id": "unknown"}, "P003"),
        ({"generation": 2}, "P003"),
        ({"sender": 0}, "P010"),
        ({"num_elements": SIZE * 2}, "W010"),
        ({"kind": "strange"}, "P001"),
    ],
)
def test_what_would_be_refused_gets_no_room(
    peer: InProcessTransport, store: Counting, changes: dict[str, Any], code: str
) -> None:
    header = replace(HEADER, **changes)
    with pytest.raises(IcrfError) as refused:
        send(peer, header, header.num_elements)
    assert refused.value.code == code and store.asked == []


def test_a_small_payload_is_put_when_it_is_complete(store: Counting, small: InProcessTransport) -> None:
    send(small, replace(HEADER, num_elements=1_000), 1_000)
    assert store.asked == []


def test_what_measures_a_line_gets_no_room(peer: InProcessTransport, store: Counting) -> None:
    send(peer, replace(HEADER, kind=PROBE, sender=-1, run_id=""))
    assert store.asked == []
