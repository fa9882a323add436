"""Mixing matrices against the published spectrum of their graphs."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from icrf.errors import TopologyError
from icrf.topology import (
    HybridAdjacencyMatrix,
    build_topology,
    metropolis_hastings,
    mixing_row,
    mixing_rows,
    rounds_to_consensus,
    spectrum,
)


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
    assert [i.tolist() for i, _ in mixing_rows(weights)] == [[0, 1, 2, 3], [0, 1], [0, 2], [0, 3]]
    assert [i.tolist() for i, _ in mixing_rows(weights, [2])] == [[0, 2]]


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
    for rows in ([[0.5, 0.4], [0.4, 0.6]], [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]):
        with pytest.raises(TopologyError) as caught:
            spectrum(csr_matrix(np.array(rows)))
        assert caught.value.code == "T007"
