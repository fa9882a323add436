"""The supervisor of a federation: who is there, the topology of those, and an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf import FederationSupervisor, StarFederatedLearningSchema
from icrf.client import Fabric, Run
from icrf.errors import RunError
from icrf.federation.supervisor import Roster, Sighting
from icrf.protocol import COMPLETED, IDLE
from icrf.spec import FederationConfig
from icrf.testing.clocks import MovedClock
from icrf.testing.inline import InlineFabric
from icrf.testing.waiting import until
from icrf.topology import HybridAdjacencyMatrix

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PLACEMENT = {"server": "local-1", "client_0": "local-1", "client_1": "local-1", "client_2": "local-2"}
NOTHING = Sighting((), (), below=False)


def config(**keys: Any) -> FederationConfig:
    data = {"federation_id": "fed", "number_of_clients": 3, "batch_size": 64, "placement": PLACEMENT, **STAR, **keys}
    return FederationConfig.from_mapping(data)


# ---------------------------------------------------------------- who is there


def test_a_roster_tells_what_has_changed() -> None:
    graph = HybridAdjacencyMatrix.from_edges(4, [(0, 1), (1, 2), (2, 3), (3, 0)])
    roster = Roster(["a", "b", "c", "d"], {1, 2, 3}, 2, graph)
    assert roster.seen(["d", "c", "b", "a"]) == NOTHING
    assert roster.topology == graph
    assert roster.seen(["d", "c", "a"]) == Sighting(("b",), (), below=False)
    # a - d - c: the ring has become a line.
    assert roster.there == ("a", "c", "d")
    assert roster.topology.to_dense().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert roster.seen(["b", "a"]) == Sighting(("c", "d"), ("b",), below=True)
    assert roster.seen(["a", "b", "c", "d"]) == Sighting((), ("c", "d"), below=False)
    assert roster.topology == graph


@given(
    st.sets(st.integers(0, 5)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda e: e[0] != e[1]))
)
def test_the_topology_keeps_every_edge_between_those_that_are_there(
    there: set[int], edges: set[tuple[int, int]]
) -> None:
    roster = Roster("abcdef", range(6), 1, HybridAdjacencyMatrix.from_edges(6, edges, symmetric=False))
    roster.seen(["abcdef"[i] for i in there])
    senders, receivers = roster.topology.edges()
    found = {(roster.there[i], roster.there[j]) for i, j in zip(senders, receivers, strict=True)}
    assert found == {("abcdef"[i], "abcdef"[j]) for i, j in edges if i in there and j in there}


# ---------------------------------------------------------------- on a fabric


@pytest.fixture
def inline() -> Iterator[InlineFabric]:
    with InlineFabric(2) as fabric:
        yield fabric


def rested(run: Run) -> None:
    """Wait until a kept run has done its rounds."""
    for event in run.events():
        if event.status == IDLE and run.info().status == IDLE:
            return


def test_lost_nodes_leave_the_topology_and_come_back(inline: InlineFabric) -> None:
    run = Fabric(inline.port).submit(config(federated_learning_rounds=1, min_nodes=2), keep=True)
    rested(run)
    told: list[Sighting] = []
    supervisor = FederationSupervisor(run, on_change=told.append)
    assert (supervisor.ping(), supervisor.nodes) == (NOTHING, ("server", "client_0", "client_1", "client_2"))
    inline.stop_agent("local-2")
    lost = Sighting(("client_2",), (), below=False)
    assert (supervisor.ping(), supervisor.nodes) == (lost, ("server", "client_0", "client_1"))
    assert supervisor.topology == HybridAdjacencyMatrix.from_edges(3, [(0, 1), (0, 2)])
    inline.start_agent("local-2")
    back = Sighting((), ("client_2",), below=False)
    assert supervisor.ping() == back
    assert told == [lost, back]
    assert not supervisor.ended


def test_lost_nodes_are_back_when_they_have_moved() -> None:
    clock = MovedClock()
    with InlineFabric(2, clock=clock) as fabric:
        keys = {"placement": {}, "on_cluster_loss": "reassign", "federated_learning_rounds": 1}
        run = Fabric(fabric.port).submit(config(**keys), keep=True)
        rested(run)
        supervisor = FederationSupervisor(run, min_nodes=1)
        assert supervisor.ping() == NOTHING
        fabric.stop_agent("local-2")
        lost = supervisor.ping().lost
        clock.ahead_s += 3.0
        until(lambda: run.info().clusters == ("local-1",))
        assert lost and supervisor.ping() == Sighting((), lost, below=False)


def test_below_min_nodes_the_federation_ends_in_order_with_its_model(inline: InlineFabric) -> None:
    federation = StarFederatedLearningSchema(
        roles=["train"] * 3, config=config(federated_learning_rounds=2), fabric=Fabric(inline.port)
    )
    with pytest.raises(RunError, match="F005"):
        FederationSupervisor(federation)
    federation.train(blocking=True)
    assert federation.run is not None
    trained = federation.run.committed_rounds()[-1].model_sha256
    with FederationSupervisor(federation, interval_s=0.01) as supervisor:
        inline.stop_agent("local-2")
        info = federation.run.wait()
    assert (info.status, info.model_sha256, info.rounds_done) == (COMPLETED, trained, 2)
    assert supervisor.ended
    assert federation.run.model()


def test_a_supervisor_that_is_closed_looks_no_more(inline: InlineFabric) -> None:
    run = Fabric(inline.port).submit(config(federated_learning_rounds=1), keep=True)
    rested(run)
    supervisor = FederationSupervisor(run, interval_s=0.01).start()
    supervisor.close()
    supervisor.close()
    inline.stop_agent("local-2")
    assert not supervisor.ended
    assert not [t for t in threading.enumerate() if t.name == "icrf-supervisor"]


def test_a_supervisor_notices_that_the_run_has_ended(inline: InlineFabric) -> None:
    run = Fabric(inline.port).submit(config(federated_learning_rounds=1))
    run.wait()
    supervisor = FederationSupervisor(run)
    assert supervisor.ping() == NOTHING
    assert supervisor.ended
