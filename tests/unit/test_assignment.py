"""Where nodes live: cuts, shares, pins, determinism."""

from __future__ import annotations

from collections import Counter

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import ConfigError, ConfigErrors
from icrf.protocol import Capacity, ClusterInfo, Fingerprint
from icrf.topology import HybridAdjacencyMatrix, build_topology
from icrf_mediator.assignment import ASSIGNMENTS, assign, resolve_pins


def cluster(name: str, slots: int = 4, *, alive: bool = True, **labels: str) -> ClusterInfo:
    fingerprint = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
    return ClusterInfo(name, "x", Capacity(slots, 4.0, 0.0, 0), fingerprint, labels, alive=alive)


def clusters_of(*slots: int) -> list[ClusterInfo]:
    return [cluster(f"c{i}", s) for i, s in enumerate(slots)]


def relabelled(adjacency: HybridAdjacencyMatrix, seed: int) -> HybridAdjacencyMatrix:
    order = np.random.default_rng(seed).permutation(adjacency.num_nodes)
    senders, receivers = adjacency.edges()
    return HybridAdjacencyMatrix.from_edges(
        adjacency.num_nodes, np.stack([order[senders], order[receivers]], axis=1), symmetric=False
    )


@pytest.mark.parametrize(
    ("name", "num_nodes", "k_value", "num_clusters", "cut"),
    [
        ("ring", 8, 0, 2, 2),
        ("ring", 16, 0, 3, 3),
        ("ring", 16, 0, 4, 4),
        ("ring", 33, 0, 8, 8),
        ("ring", 9, 0, 8, 8),
        ("k_connected", 16, 4, 2, 6),
        ("k_connected", 16, 4, 4, 12),
        ("k_connected", 64, 6, 4, 24),
    ],
)
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3, 4, 5])
def test_locality_reaches_the_closed_form_cut(
    name: str, num_nodes: int, k_value: int, num_clusters: int, cut: int, seed: int | None
) -> None:
    adjacency = build_topology(name, num_nodes, {"k_value": k_value})
    if seed is not None:
        adjacency = relabelled(adjacency, seed)
    found = assign("locality", adjacency, clusters_of(*[4] * num_clusters), {})
    sizes = np.bincount(found.clusters, minlength=num_clusters)
    assert adjacency.cut_edges(found.clusters) == cut
    assert sizes.max() - sizes.min() <= 1
    if seed is None:
        # In index order the contiguous placement is as good as any, and the one people expect.
        assert list(found.clusters) == sorted(found.clusters)


def test_communities_stay_together() -> None:
    blocks = nx.planted_partition_graph(4, 50, 0.3, 0.005, seed=2)
    adjacency = relabelled(HybridAdjacencyMatrix.from_edges(200, list(blocks.edges())), 1)
    between = sum(i // 50 != j // 50 for i, j in blocks.edges())
    assert adjacency.cut_edges(assign("locality", adjacency, clusters_of(1, 1, 1, 1), {}).clusters) == between


def test_ten_thousand_nodes() -> None:
    graph = nx.random_regular_graph(4, 10_000, seed=1)
    adjacency = HybridAdjacencyMatrix.from_edges(10_000, np.array(list(graph.edges())))
    clusters = clusters_of(4, 4, 2, 2)
    found = assign("locality", adjacency, clusters, {})
    dealt = assign("round_robin", adjacency, clusters, {})
    for size, share in zip(np.bincount(found.clusters), (3333, 3333, 1666, 1666), strict=True):
        assert share <= size <= share + 1
    assert adjacency.cut_edges(found.clusters) < 0.5 * adjacency.cut_edges(dealt.clusters)


@pytest.mark.parametrize("strategy", ASSIGNMENTS.names())
@pytest.mark.parametrize(
    ("slots", "num_nodes", "sizes"),
    [
        ((2, 2), 10, [5, 5]),
        ((2, 2), 11, [6, 5]),
        ((3, 1), 10, [8, 2]),
        ((1, 1, 1), 10, [4, 3, 3]),
        ((4, 0), 6, [6, 0]),
        ((0, 0), 6, [3, 3]),
        ((8, 8, 8), 2, [1, 1, 0]),
        ((5,), 7, [7]),
    ],
)
def test_shares_follow_the_slots(strategy: str, slots: tuple[int, ...], num_nodes: int, sizes: list[int]) -> None:
    # Without edges nothing speaks against the ideal shares.
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, [])
    found = assign(strategy, adjacency, clusters_of(*slots), {})
    assert np.bincount(found.clusters, minlength=len(slots)).tolist() == sizes


@pytest.mark.parametrize("strategy", ASSIGNMENTS.names())
def test_clusters_that_are_gone_get_nothing_new(strategy: str) -> None:
    clusters = [cluster("a"), cluster("b", alive=False), cluster("c")]
    found = assign(strategy, build_topology("ring", 8, {}), clusters, {3: {1}})
    assert Counter(found.clusters)[1] == 1 and found.clusters[3] == 1


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**32), st.sampled_from(ASSIGNMENTS.names()))
@settings(max_examples=60)
def test_pins_hold_and_shares_stay_fair_for_any_graph(
    num_nodes: int, num_clusters: int, seed: int, strategy: str
) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, num_nodes, (2 * num_nodes, 2))
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, pairs[pairs[:, 0] != pairs[:, 1]])
    slots = rng.integers(0, 5, num_clusters)
    clusters = clusters_of(*slots.tolist())
    pinned = rng.choice(num_nodes, rng.integers(0, num_nodes + 1), replace=False).tolist()
    pins = {
        node: frozenset(rng.choice(num_clusters, rng.integers(1, num_clusters + 1), replace=False).tolist())
        for node in pinned
    }
    found = assign(strategy, adjacency, clusters, pins)
    assert len(found.clusters) == len(found.explanation) == num_nodes
    assert all(found.clusters[node] in allowed for node, allowed in pins.items())
    assert all(found.explanation)
    assert assign(strategy, adjacency, clusters, pins) == found
    # Only pins may lift a cluster above its rounded-up share.
    weights = slots if slots.any() else np.ones(num_clusters, dtype=int)
    pinned_here = Counter(found.clusters[node] for node in pins)
    for index, size in Counter(found.clusters).items():
        assert size <= max(-(-num_nodes * weights[index] // weights.sum()), pinned_here[index])


def test_a_crowded_cluster_leaves_the_rest_to_the_others() -> None:
    pins = {node: {0} for node in range(6)}
    found = assign("locality", build_topology("ring", 10, {}), clusters_of(1, 1, 1), pins)
    assert np.bincount(found.clusters).tolist() == [6, 2, 2]


def test_pins_pull_their_neighbours() -> None:
    found = assign("locality", build_topology("ring", 8, {}), clusters_of(2, 2), {3: {1}})
    adjacency = build_topology("ring", 8, {})
    assert found.clusters[3] == 1 and adjacency.cut_edges(found.clusters) == 2
    assert found.explanation[3] == "pinned to c1"


def test_every_node_is_explained() -> None:
    found = assign("locality", build_topology("ring", 4, {}), clusters_of(1, 1), {0: {0}, 1: {0, 1}})
    assert found.explanation == (
        "pinned to c0",
        "c0 is one of 2 clusters that it may be on",
        "1 of its 2 neighbours are on c1",
        "1 of its 2 neighbours are on c1",
    )
    star = assign("locality", build_topology("star", 4, {}), clusters_of(1, 1), {})
    assert star.explanation[3] == "balance: none of its 1 neighbours fits on c1"


def test_round_robin_deals_in_turn() -> None:
    found = assign("round_robin", build_topology("ring", 6, {}), clusters_of(2, 2, 2), {})
    assert found.clusters == (0, 1, 2, 0, 1, 2)


def test_an_unknown_strategy() -> None:
    with pytest.raises(ConfigError) as caught:
        assign("localty", build_topology("ring", 4, {}), clusters_of(1), {})
    assert caught.value.code == "C010" and "locality" in str(caught.value)


def test_placement_by_name_and_by_label() -> None:
    clusters = [cluster("us", region="na", gpu="no"), cluster("eu", region="eu"), cluster("ca", region="na")]
    placement = {"n0": "eu", "n2": {"region": "na"}, "n3": {"region": "na", "gpu": "no"}}
    assert resolve_pins(placement, ["n0", "n1", "n2", "n3"], clusters) == {
        0: frozenset({1}),
        2: frozenset({0, 2}),
        3: frozenset({0}),
    }


def test_every_wrong_placement_is_reported() -> None:
    clusters = [cluster("eu-west", region="eu"), cluster("us-east")]
    placement = {"n0": "eu-wst", "n9": "eu-west", "n1": {"region": "moon"}}
    with pytest.raises(ConfigErrors) as caught:
        resolve_pins(placement, ["n0", "n1"], clusters)
    text = [str(error) for error in caught.value.errors]
    assert {error.code for error in caught.value.errors} == {"C014"}
    assert "cluster 'eu-wst' not in fabric" in text[0] and "Did you mean 'eu-west'?" in text[0]
    assert "node 'n9' does not exist" in text[1]
    assert "no cluster has the labels region=moon" in text[2] and "eu-west: region=eu" in text[2]


@settings(max_examples=60)
@given(st.data())
def test_any_pins_are_kept_and_all_nodes_placed(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    num_nodes = data.draw(st.integers(3, 12))
    chosen = data.draw(st.dictionaries(st.integers(0, num_nodes - 1), st.integers(0, len(slots) - 1)))
    pins = {node: frozenset({c}) for node, c in chosen.items()}
    for strategy in ("locality", "round_robin"):
        found = assign(strategy, build_topology("ring", num_nodes, {}), clusters_of(*slots), pins)
        assert len(found.clusters) == num_nodes
        assert all(found.clusters[node] == c for node, c in chosen.items())


def test_a_strategy_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("boom")

    monkeypatch.setitem(ASSIGNMENTS._objects, "test-broken", broken)
    with pytest.raises(
        ConfigError, match="C017 assignment_strategy: assignment 'test-broken' raised RuntimeError: boom"
    ):
        assign("test-broken", HybridAdjacencyMatrix.from_edges(2, [(0, 1)]), [], {})
