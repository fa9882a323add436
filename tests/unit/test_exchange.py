"""The compiled exchange plan: what crosses between clusters, in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import ConfigError, RoutingError
from icrf.exchange import CONSENSUS, MODEL, PARTIAL, UPDATE, Transfer, compile_exchange
from icrf.protocol import CENTRALIZED, DECENTRALIZED
from icrf.topology import HybridAdjacencyMatrix, build_topology


def star_roles(num_clients: int) -> list[str]:
    return ["aggregate-test"] + ["train-eval"] * num_clients


def test_a_star_sends_one_model_and_one_partial_per_remote_cluster() -> None:
    plan = compile_exchange(CENTRALIZED, build_topology("star", 7, {}), star_roles(6), [0, 0, 0, 1, 1, 2, 2])
    assert plan.coordinator == 0
    assert plan.participants == (1, 2, 3, 4, 5, 6)
    assert plan.transfers == (
        Transfer(MODEL, 0, 0, 1, (3, 4)),
        Transfer(MODEL, 0, 0, 2, (5, 6)),
        Transfer(PARTIAL, -1, 1, 0, (0,)),
        Transfer(PARTIAL, -1, 2, 0, (0,)),
    )
    assert plan.evaluation == () and plan.evaluation_bytes(100) == 0
    # 3 R |w|: a model of 4 bytes a parameter down, a partial of 8 bytes up.
    assert plan.payload_bytes(100) == 3 * 2 * 400
    assert plan.links(100) == {(0, 1): 400, (0, 2): 400, (1, 0): 800, (2, 0): 800}


def test_questions_by_cluster() -> None:
    plan = compile_exchange(CENTRALIZED, build_topology("star", 7, {}), star_roles(6), [2, 0, 0, 1, 1, 2, 2])
    assert plan.coordinator == 2
    assert [t.target for t in plan.outbound(2, MODEL)] == [0, 1]
    assert [t.source for t in plan.inbound(2, PARTIAL)] == [0, 1]
    assert plan.inbound(0, MODEL) == (Transfer(MODEL, 0, 2, 0, (1, 2)),)
    assert plan.outbound(0, MODEL) == () and plan.inbound(9, MODEL) == ()
    assert plan.local_nodes(2) == (0, 5, 6) and plan.local_participants(2) == (5, 6)
    assert plan.local_nodes(9) == ()


def test_clusters_without_participants_get_nothing() -> None:
    roles = ["aggregate", "train", "eval", "train-aggregator"]
    plan = compile_exchange(CENTRALIZED, build_topology("star", 4, {}), roles, [0, 0, 1, 2])
    assert plan.participants == (1, 3)
    assert [(t.kind, t.source, t.target) for t in plan.transfers] == [(MODEL, 0, 2), (PARTIAL, 2, 0)]


def test_an_aggregator_may_train_itself() -> None:
    plan = compile_exchange(CENTRALIZED, build_topology("star", 2, {}), ["train-aggregate", "train"], [0, 1])
    assert plan.participants == (0, 1) and len(plan.transfers) == 2


@pytest.mark.parametrize("roles", [["train"] * 3, ["aggregate", "train", "aggregate-train"]])
def test_a_centralized_flow_has_exactly_one_aggregator(roles: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"C008 nodes: \d nodes aggregate"):
        compile_exchange(CENTRALIZED, build_topology("star", 3, {}), roles, [0, 0, 0])


def test_a_participant_without_the_edges_is_named() -> None:
    line = build_topology("line", 4, {})
    with pytest.raises(RoutingError, match=r"P011 no edge 2->0, 3->0, 0->2, 0->3;"):
        compile_exchange(CENTRALIZED, line, star_roles(3), [0, 0, 0, 0])
    one_way = HybridAdjacencyMatrix.from_edges(2, [(0, 1)], symmetric=False)
    with pytest.raises(RoutingError, match="P011 no edge 1->0;"):
        compile_exchange(CENTRALIZED, one_way, star_roles(1), [0, 1])


def test_lists_of_different_length_and_unknown_flows() -> None:
    with pytest.raises(ConfigError) as caught:
        compile_exchange(CENTRALIZED, build_topology("star", 3, {}), star_roles(2), [0, 0])
    assert caught.value.code == "C008"
    with pytest.raises(ConfigError) as caught:
        compile_exchange("sideways", build_topology("star", 3, {}), star_roles(2), [0, 0, 0])
    assert caught.value.code == "C010"


def test_a_ring_sends_the_updates_of_its_border_nodes() -> None:
    plan = compile_exchange(DECENTRALIZED, build_topology("ring", 8, {}), ["train-eval"] * 8, [0] * 4 + [1] * 4)
    assert plan.transfers == (
        Transfer(UPDATE, 0, 0, 1, (7,)),
        Transfer(UPDATE, 3, 0, 1, (4,)),
        Transfer(UPDATE, 4, 1, 0, (3,)),
        Transfer(UPDATE, 7, 1, 0, (0,)),
    )
    assert plan.evaluation == (Transfer(CONSENSUS, -1, 1, 0, ()),)
    assert plan.inbound(0, CONSENSUS) == plan.outbound(1, CONSENSUS) == plan.evaluation
    assert plan.payload_bytes(10) == 160 and plan.evaluation_bytes(10) == 80


def test_one_payload_serves_all_neighbours_on_a_cluster() -> None:
    plan = compile_exchange(DECENTRALIZED, build_topology("mesh", 6, {}), ["train"] * 6, [1, 1, 0, 0, 0, 2])
    assert plan.coordinator == 1
    assert plan.outbound(1, UPDATE)[0] == Transfer(UPDATE, 0, 1, 0, (2, 3, 4))
    assert len(plan.transfers) == 6 * 2
    assert [(t.source, t.target) for t in plan.evaluation] == [(0, 1), (2, 1)]


def test_on_one_cluster_nothing_crosses() -> None:
    for flow, roles in ((CENTRALIZED, star_roles(3)), (DECENTRALIZED, ["train"] * 4)):
        plan = compile_exchange(flow, build_topology("star", 4, {}), roles, [0] * 4)
        assert plan.transfers == plan.evaluation == ()
        assert plan.payload_bytes(10**9) == 0 and plan.links(10**9) == {}


@given(st.integers(2, 12), st.integers(0, 2**32))
def test_updates_reach_every_remote_neighbour_once(num_nodes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 2, (num_nodes, num_nodes))
    np.fill_diagonal(dense, 0)
    owners = rng.integers(0, 3, num_nodes).tolist()
    plan = compile_exchange(DECENTRALIZED, HybridAdjacencyMatrix.from_dense(dense), ["train"] * num_nodes, owners)
    expected = {(i, j) for i, j in np.argwhere(dense).tolist() if owners[i] != owners[j]}
    reached = [(t.sender, r) for t in plan.transfers for r in t.recipients]
    assert set(reached) == expected and len(reached) == len(expected)
    keys = [(t.sender, t.target) for t in plan.transfers]
    assert keys == sorted(set(keys))
    assert all(owners[t.sender] == t.source and {owners[r] for r in t.recipients} == {t.target} for t in plan.transfers)
    assert sum(plan.links(7).values()) == plan.payload_bytes(7)


def test_a_large_graph_compiles() -> None:
    ring = build_topology("k_connected", 100_000, {"k_value": 4})
    plan = compile_exchange(DECENTRALIZED, ring, ["train"] * 100_000, (np.arange(100_000) // 12_500).tolist())
    assert len(plan.transfers) == 8 * 4
