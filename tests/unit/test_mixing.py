"""Mixing matrices against the published spectrum of their graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from icrf.errors import ConfigError, IcrfError, TopologyError
from icrf.topology import (
    MIXINGS,
    Gossip,
    HybridAdjacencyMatrix,
    build_topology,
    check_mixing,
    metropolis_hastings,
    mixing_matrix,
    mixing_row,
    register_mixing,
    require_consensus,
    rounds_to_consensus,
    spectrum,
    weigh,
)
from icrf.topology.mixing import FROM_GRAPH


def graph(name: str, num_nodes: int) -> HybridAdjacencyMatrix:
    if name.startswith("torus"):
        side = math.isqrt(num_nodes)
        cells = nx.convert_node_labels_to_integers(nx.grid_2d_graph(side, side, periodic=True))
        return HybridAdjacencyMatrix.from_edges(num_nodes, list(cells.edges()))
    if name == "circulant":
        return build_topology("k_connected", num_nodes, {"k_value": 4})
    return build_topology(name, num_nodes, {})


@pytest.mark.parametrize(
    ("name", "num_nodes", "slem", "rounds"),
    [
        ("mesh", 7, 0.0, 1),
        ("ring", 8, 0.804738, 64),
        ("ring", 16, 0.949253, 266),
        ("ring", 25, 0.979055, 653),
        ("ring", 32, 0.987190, 1072),
        ("line", 16, 0.987190, 1072),
        ("circulant", 16, 0.852395, 87),
        # 0.6**27 is 1.02e-6: one round more than the 27 that a rounded logarithm suggests.
        ("torus", 16, 0.6, 28),
        ("torus", 25, 0.723607, 43),
        ("star", 8, 0.875, 104),
        ("star", 16, 0.9375, 215),
    ],
)
def test_published_spectrum_and_rounds(name: str, num_nodes: int, slem: float, rounds: int) -> None:
    found, kind = spectrum(metropolis_hastings(graph(name, num_nodes)))
    assert found == pytest.approx(slem, abs=1e-6) and kind == "exact"
    assert rounds_to_consensus(found) == rounds


@pytest.mark.parametrize("slem", [1.0, 1.5, -1.0, math.nan])
def test_without_a_gap_consensus_never_comes(slem: float) -> None:
    assert rounds_to_consensus(slem) == -1


def test_weights_are_symmetric_and_doubly_stochastic() -> None:
    weights = metropolis_hastings(graph("star", 4))
    third = 1 / 4
    expected = [[1 - 3 * third, third, third, third], [third, 0.75, 0, 0], [third, 0, 0.75, 0], [third, 0, 0, 0.75]]
    assert weights.dtype == np.float64
    assert weights.toarray() == pytest.approx(np.array(expected), abs=1e-15)
    for name, num_nodes in (("ring", 9), ("line", 6), ("star", 11), ("mesh", 5), ("ring", 2), ("ring", 1)):
        weights = metropolis_hastings(graph(name, num_nodes))
        assert abs(weights.sum(axis=0) - 1).max() < 1e-15 * num_nodes
        assert (weights != weights.T).nnz == 0
        assert weights.has_sorted_indices


def test_a_row_names_the_neighbours_and_the_node_itself() -> None:
    weights = metropolis_hastings(graph("star", 4))
    indices, values = mixing_row(weights, 2)
    assert indices.tolist() == [0, 2] and values.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("name", ["star", "line", "ring"])
def test_mixing_preserves_the_mean_where_plain_averaging_does_not(name: str) -> None:
    adjacency = graph(name, 16)
    states = np.random.default_rng(0).normal(size=(16, 5))
    mixed = metropolis_hastings(adjacency) @ states
    assert abs(mixed.mean(axis=0) - states.mean(axis=0)).max() < 1e-12
    plain = (adjacency.to_dense() + np.eye(16)) / (adjacency.degree[:, None] + 1)
    drift = abs((plain @ states).mean(axis=0) - states.mean(axis=0)).max()
    assert (drift < 1e-12) == (name == "ring")


@pytest.mark.parametrize(("name", "num_nodes"), [("ring", 16), ("line", 16), ("star", 8), ("torus", 25)])
def test_the_second_eigenvector_shrinks_by_the_slem_every_round(name: str, num_nodes: int) -> None:
    weights = metropolis_hastings(graph(name, num_nodes))
    slem, _ = spectrum(weights)
    values, vectors = np.linalg.eigh(weights.toarray())
    state = vectors[:, -2 if abs(values[-2]) >= abs(values[0]) else 0]
    for _ in range(50):
        before, state = state, weights @ state
        assert np.linalg.norm(state) / np.linalg.norm(before) == pytest.approx(slem, abs=1e-9)


def test_from_a_random_start_the_rate_is_the_slem() -> None:
    weights = metropolis_hastings(graph("ring", 16))
    state = np.random.default_rng(1).normal(size=16)
    errors = []
    for _ in range(151):
        errors.append(np.linalg.norm(state - state.mean()))
        state = weights @ state
    rate = math.exp(np.polyfit(np.arange(50, 151), np.log(errors[50:]), 1)[0])
    assert rate == pytest.approx(spectrum(weights)[0], rel=0.01)


def test_large_graphs_have_a_closed_form_or_an_estimate() -> None:
    ring = graph("ring", 2_500)
    relabelled = np.random.default_rng(0).permutation(2_500)
    senders, receivers = ring.edges()
    pairs = np.stack([relabelled[senders], relabelled[receivers]], axis=1)
    expected = (1 + 2 * math.cos(2 * math.pi / 2_500)) / 3
    for adjacency in (ring, HybridAdjacencyMatrix.from_edges(2_500, pairs)):
        assert spectrum(metropolis_hastings(adjacency)) == (pytest.approx(expected, abs=1e-12), "closed-form")
    slem, kind = spectrum(metropolis_hastings(graph("circulant", 3_001)))
    angle = 2 * math.pi / 3_001
    assert slem == pytest.approx((1 + 2 * math.cos(angle) + 2 * math.cos(2 * angle)) / 5, abs=1e-12)
    assert kind == "closed-form"
    assert spectrum(metropolis_hastings(graph("mesh", 2_001))) == (0.0, "closed-form")
    assert spectrum(metropolis_hastings(graph("star", 2_500))) == (pytest.approx(1 - 1 / 2_500, abs=1e-9), "estimate")


def test_an_estimate_is_the_same_every_time() -> None:
    cells = nx.random_regular_graph(4, 2_200, seed=3)
    weights = metropolis_hastings(HybridAdjacencyMatrix.from_edges(2_200, list(cells.edges())))
    first = spectrum(weights)
    assert first == spectrum(weights) and first[1] == "estimate"
    values = np.linalg.eigvalsh(weights.toarray())
    assert first[0] == pytest.approx(max(values[-2], -values[0]), abs=1e-6)


def test_a_disconnected_graph_never_agrees() -> None:
    weights = metropolis_hastings(HybridAdjacencyMatrix.from_edges(4, [(0, 1), (2, 3)]))
    assert spectrum(weights) == (1.0, "exact")


def test_what_is_no_mixing_matrix_is_refused() -> None:
    directed = HybridAdjacencyMatrix.from_edges(3, [(0, 1), (1, 2)], symmetric=False)
    with pytest.raises(TopologyError) as caught:
        metropolis_hastings(directed)
    assert caught.value.code == "T004"
    assert "push_sum" in caught.value.hint
    for refuse in (spectrum, check_mixing, require_consensus):
        with pytest.raises(TopologyError) as caught:
            refuse(csr_matrix(np.array([[0.5, 0.4], [0.4, 0.6]])))
        assert caught.value.code == "T007" and "row 0 sums to 0.9" in caught.value.message


# ---------------------------------------------------------------- the other rules


def directed_graph(num_nodes: int, seed: int = 0) -> HybridAdjacencyMatrix:
    return build_topology("erdos_renyi", num_nodes, {"seed": seed, "directed": True})


def test_lazy_metropolis_has_no_negative_eigenvalue_and_keeps_half() -> None:
    weights = FROM_GRAPH["lazy_metropolis"](graph("star", 5)).toarray()
    assert weights[0].tolist() == [0.5] + [0.125] * 4 and weights[1, 1] == 0.875
    assert np.linalg.eigvalsh(weights).min() >= -1e-15


def test_max_degree_gives_every_edge_the_same_weight() -> None:
    weights = FROM_GRAPH["max_degree"](graph("star", 4)).toarray()
    assert set(weights[weights > 0].tolist()) == {0.25, 0.75}
    assert (weights == weights.T).all()


def test_uniform_is_the_plain_average_of_the_neighbourhood() -> None:
    weights = FROM_GRAPH["uniform"](graph("star", 4)).toarray()
    assert weights[0].tolist() == [0.25] * 4 and weights[1].tolist() == [0.5, 0.5, 0, 0]


def test_push_sum_sends_equal_shares_along_edges_in_their_direction() -> None:
    edges = HybridAdjacencyMatrix.from_edges(3, [(0, 1), (0, 2), (1, 2), (2, 0)], symmetric=False)
    weights = FROM_GRAPH["push_sum"](edges).toarray()
    third = 1 / 3
    assert weights.tolist() == [[third, 0, 0.5], [third, 0.5, 0], [third, 0.5, 0.5]]


def test_sample_weighted_balances_each_edge() -> None:
    samples = np.array([10, 20, 30, 40, 50])
    weights = MIXINGS.get("sample_weighted")(graph("line", 5), samples).toarray()
    flow = samples[:, None] * weights
    assert flow == pytest.approx(flow.T) and weights.sum(axis=1) == pytest.approx(np.ones(5))
    with pytest.raises(ConfigError) as caught:
        MIXINGS.get("sample_weighted")(graph("line", 5), samples - 10)
    assert caught.value.code == "C008"


@pytest.fixture
def forget() -> Iterator[None]:
    """Unregisters what a test registered."""
    before = dict(MIXINGS._objects)
    yield
    MIXINGS._objects.clear()
    MIXINGS._objects.update(before)


def test_a_rule_of_ones_own_travels_with_the_graph(forget: None) -> None:
    @register_mixing("test_rule")
    def rule(adjacency: HybridAdjacencyMatrix, learning_rate: float) -> np.ndarray:
        dense = adjacency.to_dense() * learning_rate
        return dense + np.diag(1 - dense.sum(axis=1))

    adjacency = graph("ring", 5)
    sent = weigh(adjacency, "test_rule", {"learning_rate": 0.25})
    assert set(sent.weights) == {0.25} and set(sent.self_weights) == {0.5}
    assert mixing_matrix(sent, "whatever").toarray() == pytest.approx(rule(adjacency, 0.25))
    assert weigh(adjacency, "metropolis_hastings", {}) == adjacency.to_graph()
    with pytest.raises(ConfigError, match="C010"):
        mixing_matrix(adjacency.to_graph(), "test_rule")


@pytest.mark.parametrize(
    ("matrix", "code", "said"),
    [
        ([[0.5, 0.25, 0.25], [0.5, 0.5, 0], [0.5, 0, 0.5]], "T013", r"W\[0,2\]=0.25, W\[2,0\]=0.5"),
        ([[1.5, -0.5, 0], [0, 1, 0], [0, 0, 1]], "T013", "negative"),
        ([[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]], "T013", "not finite"),
        ([[1, 0], [0, 1]], "T010", r"shape \(2, 2\) for 3 nodes"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_refused(forget: None, matrix: Any, code: str, said: str) -> None:
    MIXINGS.add("test_bad", lambda: np.array(matrix))
    with pytest.raises(TopologyError, match=said) as caught:
        weigh(graph("line", 3), "test_bad", {})
    assert caught.value.code == code


# ---------------------------------------------------------------- the checker


CYCLE = np.roll(np.eye(4), 1, axis=0)
LEADER = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("matrix", "facts"),
    [
        (CYCLE, {"aperiodic": False, "strongly_connected": True, "doubly_stochastic": True, "limit": "none"}),
        ((CYCLE + np.eye(4)) / 2, {"aperiodic": True, "symmetric": False, "limit": "mean"}),
        (np.eye(3), {"connected": False, "aperiodic": True, "limit": "none", "slem": 1.0}),
        (LEADER, {"strongly_connected": False, "connected": True, "limit": "weighted mean", "push_sum": False}),
        (LEADER.T, {"strongly_connected": False, "push_sum": True, "limit": "none", "rounds_to_consensus": -1}),
    ],
)
def test_the_checker_tells(matrix: np.ndarray, facts: dict[str, Any]) -> None:
    report = check_mixing(csr_matrix(matrix))
    assert {name: getattr(report, name) for name in facts} == facts
    assert bool(report.problem) == (report.limit == "none")
    assert report.spectral_gap == 1 - report.slem


@pytest.mark.parametrize("num_nodes", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("seed", range(4))
def test_structure_and_spectrum_agree_with_brute_force(num_nodes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = (random.random((num_nodes, num_nodes)) < 1.5 / num_nodes) * random.random((num_nodes, num_nodes))
    matrix[matrix.sum(axis=1) == 0, random.integers(num_nodes)] = 1.0
    matrix /= matrix.sum(axis=1, keepdims=True)
    report = check_mixing(csr_matrix(matrix))
    far = np.linalg.matrix_power(matrix, 4096)
    agrees = bool(np.ptp(far, axis=0).max() < 1e-9 and np.ptp(far @ matrix, axis=0).max() < 1e-9)
    assert (report.limit != "none") == agrees
    if agrees:
        assert report.slem == pytest.approx(np.sort(np.abs(np.linalg.eigvals(matrix)))[-2], abs=1e-6)
    labels = nx.from_numpy_array(matrix, create_using=nx.DiGraph)
    assert report.strongly_connected == nx.is_strongly_connected(labels)
    if report.strongly_connected:
        assert report.aperiodic == nx.is_aperiodic(labels)


@pytest.mark.parametrize(
    ("matrix", "said", "may_be_allowed"),
    [
        (CYCLE, "periodic", True),
        (np.eye(3), "3 groups of nodes never hear from each other", True),
        (LEADER.T, "push-sum needs a strongly connected graph: 2 nodes send their mass away", False),
    ],
)
def test_what_never_agrees_is_refused_unless_told_otherwise(
    matrix: np.ndarray, said: str, may_be_allowed: bool
) -> None:
    with pytest.raises(TopologyError, match=said) as caught:
        require_consensus(csr_matrix(matrix), place="here")
    assert (caught.value.code, caught.value.place) == ("T012", "here")
    assert ("allow_no_consensus: true" in caught.value.hint) == may_be_allowed
    if may_be_allowed:
        require_consensus(csr_matrix(matrix), allow_no_consensus=True)
    else:
        with pytest.raises(IcrfError, match="T012"):
            require_consensus(csr_matrix(matrix), allow_no_consensus=True)
    require_consensus(csr_matrix(LEADER))


def test_spectra_of_directed_graphs() -> None:
    for num_nodes, kind in ((12, "exact"), (2_500, "closed-form")):
        ring = build_topology("ring", num_nodes, {"directed": True})
        found = spectrum(FROM_GRAPH["push_sum"](ring))
        assert found == (pytest.approx(math.cos(math.pi / num_nodes), abs=1e-12), kind)
    weights = FROM_GRAPH["push_sum"](directed_graph(1_100))
    slem, kind = spectrum(weights)
    assert kind == "estimate"
    state = np.random.default_rng(0).normal(size=1_100)
    state -= state.mean()
    norms = [np.linalg.norm(state)]
    for _ in range(20):
        state = weights @ state
        norms.append(np.linalg.norm(state))
    assert (norms[20] / norms[10]) ** (1 / 10) == pytest.approx(slem, rel=0.05)


# ---------------------------------------------------------------- push-sum


def test_masses_are_a_function_of_the_round_alone() -> None:
    weights = FROM_GRAPH["push_sum"](directed_graph(40))
    steady, mass = Gossip(weights), np.ones(40)
    for number in range(60):
        assert steady.mass(number) == pytest.approx(mass, rel=1e-12)
        for first in (number + 7, number, max(number - 1, 0)):
            fresh = Gossip(weights)
            fresh.mass(first)
            assert (fresh.mass(number) == steady.mass(number)).all()
            assert (fresh.mass(max(number - 1, 0)) == Gossip(weights).mass(max(number - 1, 0))).all()
        mass = weights @ mass
    assert (steady.mass(10**9) == Gossip(weights).mass(10**9)).all()


def test_push_sum_is_not_used_where_rows_sum_to_1_anyway() -> None:
    assert not Gossip(FROM_GRAPH["push_sum"](build_topology("exponential", 16, {}))).push_sum
    assert Gossip(FROM_GRAPH["push_sum"](graph("star", 5))).push_sum
