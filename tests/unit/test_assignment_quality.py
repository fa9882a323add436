"""How good assignments are: against closed forms, METIS and contiguous ids; links, and assignments made again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import networkx as nx
import numpy as np
import pymetis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.assignment import blocks, kreg, smallworld
from icrf.errors import IcrfError
from icrf.protocol import Capacity, ClusterInfo, Fingerprint, MeasuredLink
from icrf.topology import HybridAdjacencyMatrix, build_topology
from icrf_mediator.assignment import ASSIGNMENTS, Hints, assign, link_costs, link_seconds
from icrf_mediator.assignment.crossing import Crossing


def clusters_of(*slots: int) -> list[ClusterInfo]:
    fingerprint = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
    return [ClusterInfo(f"c{i}", "x", Capacity(s, 4.0, 0.0, 0), fingerprint) for i, s in enumerate(slots)]


def relabelled(adjacency: HybridAdjacencyMatrix, seed: int) -> HybridAdjacencyMatrix:
    order = np.random.default_rng(seed).permutation(adjacency.num_nodes)
    senders, receivers = adjacency.edges()
    return HybridAdjacencyMatrix.from_edges(adjacency.num_nodes, np.stack([order[senders], order[receivers]], axis=1))


def circulant(num_nodes: int, k: int, seed: int) -> HybridAdjacencyMatrix:
    nodes = np.arange(num_nodes)
    steps = range(1, k // 2 + 1)
    edges = np.concatenate([np.stack([nodes, (nodes + step) % num_nodes], axis=1) for step in steps])
    return relabelled(HybridAdjacencyMatrix.from_edges(num_nodes, edges), seed)


def by_metis(adjacency: HybridAdjacencyMatrix, parts: int) -> int:
    """The least cut of METIS with at most one per mille over the ideal size."""
    graph = pymetis.CSRAdjacency(adjacency.indptr, adjacency.indices)
    options = pymetis.Options(ufactor=1)
    return min(pymetis.part_graph(parts, graph, recursive=r, options=options).edge_cuts for r in (True, False))


@pytest.mark.parametrize("k", [2, 4, 6, 8])
@pytest.mark.parametrize(("num_nodes", "num_clusters"), [(64, 2), (100, 3), (257, 4), (1003, 5), (5000, 8)])
def test_circulants_in_any_order_reach_the_closed_form(num_nodes: int, num_clusters: int, k: int) -> None:
    adjacency = circulant(num_nodes, k, seed=k)
    found = assign("locality", adjacency, clusters_of(*[4] * num_clusters), {})
    assert adjacency.cut_edges(found.clusters) == num_clusters * (k // 2) * (k // 2 + 1) // 2


@pytest.mark.parametrize("make", [kreg, smallworld, blocks])
@pytest.mark.parametrize(
    ("num_nodes", "parts"),
    [
        (1_000, 2),
        (1_000, 8),
        (5_000, 4),
        pytest.param(100_000, 4, marks=pytest.mark.slow),
        pytest.param(100_000, 8, marks=pytest.mark.slow),
    ],
)
def test_as_good_as_metis_and_never_worse_than_contiguous_ids(make, num_nodes: int, parts: int) -> None:  # type: ignore[no-untyped-def]
    adjacency = make(num_nodes)
    found = assign("locality", adjacency, clusters_of(*[4] * parts), {})
    cut = adjacency.cut_edges(found.clusters)
    sizes = np.bincount(found.clusters)
    assert sizes.max() - sizes.min() <= 1
    assert cut <= 1.05 * by_metis(adjacency, parts)
    assert cut <= adjacency.cut_edges(np.arange(num_nodes) * parts // num_nodes)


def test_unequal_capacities() -> None:
    adjacency = blocks(2_000)
    found = assign("locality", adjacency, clusters_of(4, 3, 2, 1), {})
    assert np.bincount(found.clusters).tolist() == [800, 600, 400, 200]
    graph = pymetis.CSRAdjacency(adjacency.indptr, adjacency.indices)
    reference = pymetis.part_graph(4, graph, tpwgts=[0.4, 0.3, 0.2, 0.1], options=pymetis.Options(ufactor=1))
    assert adjacency.cut_edges(found.clusters) <= 1.05 * reference.edge_cuts


def test_many_pins_on_a_graph_that_metis_divides() -> None:
    adjacency = blocks(1_000)
    pins = {node: {node % 3} for node in range(0, 1_000, 7)}
    found = assign("locality", adjacency, clusters_of(1, 1, 1), pins)
    assert all(found.clusters[node] in allowed for node, allowed in pins.items())
    assert sorted(Counter(found.clusters).values()) == [333, 333, 334]
    assert adjacency.cut_edges(found.clusters) < 0.6 * adjacency.cut_edges(np.arange(1_000) % 3)


_SCRIPT = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from benchmarks.assignment import SYSTEMS, blocks
print(hashlib.sha256(repr(SYSTEMS["icrf"](blocks(1_000))).encode()).hexdigest())
"""


def test_every_process_finds_the_same() -> None:
    outcomes = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _SCRIPT, *sys.path]
        outcomes.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outcomes) == 1 and len(outcomes.pop()) == 65


def test_of_equal_cuts_the_one_with_fewer_payloads_wins() -> None:
    # A hub between two halves that are alike: 0 sends to 1, 2 and 3, of which each alone may be with it.
    star = Crossing(HybridAdjacencyMatrix.from_edges(5, [(0, 1), (0, 2), (0, 3), (0, 4)], symmetric=False))
    assert (star.pairs((0, 0, 0, 1, 1)), star.pairs((0, 0, 1, 2, 1))) == (1, 2)


# ---------------------------------------------------------------- links


def test_what_links_cost() -> None:
    links = [
        MeasuredLink("a", "b", 1e6, 0.0),
        MeasuredLink("b", "a", 1e6, 0.0),
        MeasuredLink("b", "c", 1e6, 8.0),
        MeasuredLink("x", "a", 1.0, 9.0),
    ]
    # A megabyte takes 1 s from a to b, 5 s from b to c; a to c was not measured: the median, 3 s.
    assert link_costs(["a", "b", "c"], links, 1_000_000) == ((0, 100, 200), (100, 0, 400), (200, 400, 0))
    assert link_costs(["a", "b", "c"], [], 1_000_000) is None
    assert link_costs(["a", "b"], links, 1_000_000) is None
    assert [link_seconds(links, *way, 2_000_000) for way in (("b", "c"), ("c", "b"), ("a", "c"))] == [6.0, 0.0, 0.0]


def test_what_could_not_be_measured_counts_like_what_nobody_measured() -> None:
    failed = MeasuredLink("a", "c", 0.0, 0.0, error_json=IcrfError("P030", "away").to_json())
    links = [MeasuredLink("a", "b", 1e6, 0.0), MeasuredLink("b", "c", 1e6, 8.0)]
    assert link_costs(["a", "b", "c"], [*links, failed], 1_000_000) == link_costs(["a", "b", "c"], links, 1_000_000)
    assert link_costs(["a", "c"], [failed], 1_000_000) is None and link_seconds([failed], "a", "c", 1) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_noise_makes_no_difference_between_links(seed: int) -> None:
    """On a network whose links are alike, figures that are off by up to 40 per cent move no node."""
    noise = np.random.default_rng(seed)
    names = ["a", "b", "c", "d"]
    links = [
        MeasuredLink(one, other, 1e7 * noise.uniform(1.0, 1.4), 0.02 * noise.uniform(1.0, 1.4))
        for one in names
        for other in names
        if one != other
    ]
    assert link_costs(names, links, 4_000_000) is None
    # Nobody notices whether a small payload takes one millisecond or four.
    near = [MeasuredLink(link.source, link.target, 1e9, noise.uniform(0.001, 0.008)) for link in links]
    assert link_costs(names, near, 4_000) is None


def test_neighbouring_parts_live_where_the_link_is_good() -> None:
    # A line of four parts; a good link joins clusters 0 and 2, 2 and 1, 1 and 3.
    line = relabelled(build_topology("line", 400, {}), 1)
    far = 1_000
    costs = ((0, far, 100, far), (far, 0, 100, 100), (100, 100, 0, far), (far, 100, far, 0))
    found = assign("locality", line, clusters_of(1, 1, 1, 1), {}, Hints(costs=costs))
    assert Crossing(line, costs).cost(found.clusters) == 300
    blind = assign("locality", line, clusters_of(1, 1, 1, 1), {})
    assert Crossing(line, costs).cost(blind.clusters) > 300


def test_links_count_in_the_refinement_too() -> None:
    adjacency = blocks(400)
    costs = ((0, 100, 2_000), (100, 0, 2_000), (2_000, 2_000, 0))
    found = assign("locality", adjacency, clusters_of(2, 2, 1), {}, Hints(costs=costs))
    blind = assign("locality", adjacency, clusters_of(2, 2, 1), {})
    crossing = Crossing(adjacency, costs)
    assert crossing.cost(found.clusters) <= crossing.cost(blind.clusters)
    assert np.bincount(found.clusters).tolist() == np.bincount(blind.clusters).tolist()


# ---------------------------------------------------------------- again


def test_nothing_moves_without_need() -> None:
    adjacency = smallworld(300)
    clusters = clusters_of(2, 2, 1)
    before = assign("round_robin", adjacency, clusters, {}).clusters
    again = assign("locality", adjacency, clusters, {}, Hints(previous=before))
    assert again.clusters == before and again.explanation[0].startswith("stays: ")


def test_a_lost_cluster_gives_its_nodes_to_the_others_and_nobody_else_moves() -> None:
    adjacency = relabelled(build_topology("ring", 120, {}), 5)
    before = assign("locality", adjacency, clusters_of(1, 1, 1, 1), {}).clusters
    known = tuple(cluster if cluster < 3 else -1 for cluster in before)
    found = assign("locality", adjacency, clusters_of(1, 1, 1), {}, Hints(previous=known))
    moved = [node for node in range(120) if found.clusters[node] != before[node]]
    assert all(before[node] == 3 for node in moved) and len(moved) == 30
    assert np.bincount(found.clusters).tolist() == [40, 40, 40]
    assert adjacency.cut_edges(found.clusters) <= 8
    assert found.explanation[moved[0]].startswith("moved: its cluster is gone; ")


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32))
@settings(deadline=None, max_examples=80)
def test_as_few_nodes_move_as_shares_and_pins_allow(num_nodes: int, num_clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, num_nodes, (2 * num_nodes, 2))
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, pairs[pairs[:, 0] != pairs[:, 1]])
    clusters = clusters_of(*rng.integers(1, 5, num_clusters).tolist())
    previous = tuple(rng.integers(-1, num_clusters, num_nodes).tolist())
    found = np.array(assign("locality", adjacency, clusters, {}, Hints(previous=previous)).clusters)
    slots = np.array([cluster.capacity.num_slots for cluster in clusters])
    ideal = num_nodes * slots / slots.sum()
    sizes = np.bincount(found, minlength=num_clusters)
    assert (np.floor(ideal) <= sizes).all() and (sizes <= np.ceil(ideal)).all()
    counts = np.bincount([cluster for cluster in previous if cluster >= 0], minlength=num_clusters)
    too_many = np.maximum(0, counts - np.ceil(ideal)).sum() + previous.count(-1)
    too_few = np.maximum(0, np.floor(ideal) - counts).sum()
    assert (found != np.array(previous)).sum() == max(too_many, too_few)


def test_a_pin_that_is_new_moves_its_node() -> None:
    adjacency = build_topology("ring", 12, {})
    before = assign("locality", adjacency, clusters_of(1, 1, 1), {}).clusters
    found = assign("locality", adjacency, clusters_of(1, 1, 1), {0: {2}}, Hints(previous=before))
    assert found.clusters[0] == 2 and np.bincount(found.clusters).tolist() == [4, 4, 4]
    # One node makes room and one fills the gap, or one does both.
    assert sum(a != b for a, b in zip(found.clusters, before, strict=True)) == 2


def test_label_pins_may_leave_no_room_for_fair_shares() -> None:
    pins = {node: {0, 1} for node in range(6)}
    found = assign("locality", build_topology("ring", 6, {}), clusters_of(1, 1), pins, Hints(previous=(0,) * 6))
    assert np.bincount(found.clusters).tolist() == [3, 3]


@pytest.mark.parametrize("strategy", ["locality", "metis", "louvain"])
def test_nodes_follow_a_graph_that_has_changed(strategy: str) -> None:
    before = assign(strategy, circulant(60, 4, 1), clusters_of(1, 1, 1), {}).clusters
    adjacency = circulant(60, 4, 2)
    stays = assign(strategy, adjacency, clusters_of(1, 1, 1), {}, Hints(previous=before))
    follows = assign(strategy, adjacency, clusters_of(1, 1, 1), {}, Hints(previous=before, improve=True))
    assert stays.clusters == before
    assert adjacency.cut_edges(follows.clusters) < adjacency.cut_edges(before)
    assert np.bincount(follows.clusters).tolist() == [20, 20, 20]
    settled = assign(strategy, adjacency, clusters_of(1, 1, 1), {}, Hints(previous=follows.clusters, improve=True))
    assert settled.clusters == follows.clusters


@pytest.mark.parametrize("strategy", ["round_robin", "capacity", "random"])
def test_strategies_that_do_not_look_at_the_graph_move_what_shares_demand(strategy: str) -> None:
    adjacency = circulant(60, 4, 1)
    before = assign(strategy, adjacency, clusters_of(1, 1), {}).clusters
    hints = Hints(previous=before, improve=True)
    assert assign(strategy, circulant(60, 4, 2), clusters_of(1, 1), {}, hints).clusters == before
    found = assign(strategy, adjacency, clusters_of(1, 1, 1), {}, hints).clusters
    moved = [node for node in range(60) if found[node] != before[node]]
    assert len(moved) == 20 and {found[node] for node in moved} == {2}


def test_communities_stay_together_when_nodes_move() -> None:
    adjacency, communities = circulant(60, 4, 3), tuple(node % 3 for node in range(60))
    before = tuple(node % 3 for node in range(60))
    hints = Hints(previous=before, improve=True, communities=communities)
    assert assign("locality", adjacency, clusters_of(1, 1, 1), {}, hints).clusters == before


# ---------------------------------------------------------------- the other strategies


def test_random_follows_the_seed() -> None:
    ring = build_topology("ring", 40, {})
    first, same, other = (assign("random", ring, clusters_of(1, 1), {}, Hints(seed=s)).clusters for s in (1, 1, 2))
    assert first == same != other


def test_capacity_fills_one_cluster_after_the_other() -> None:
    assert assign("capacity", build_topology("ring", 8, {}), clusters_of(3, 1), {}).clusters == (0,) * 6 + (1,) * 2


@pytest.mark.parametrize("strategy", ["metis", "louvain"])
def test_communities_are_found(strategy: str) -> None:
    graph = nx.planted_partition_graph(4, 50, 0.3, 0.005, seed=2)
    adjacency = relabelled(HybridAdjacencyMatrix.from_edges(200, list(graph.edges())), 1)
    found = assign(strategy, adjacency, clusters_of(1, 1, 1, 1), {})
    assert np.bincount(found.clusters).tolist() == [50] * 4
    assert adjacency.cut_edges(found.clusters) < 0.4 * adjacency.cut_edges(np.arange(200) % 4)
    assert strategy in ASSIGNMENTS.names()


def test_louvain_of_a_graph_in_many_pieces() -> None:
    adjacency = HybridAdjacencyMatrix.from_edges(3_000, np.arange(600).reshape(-1, 2))
    found = assign("louvain", adjacency, clusters_of(1, 1), {})
    assert adjacency.cut_edges(found.clusters) <= 1
