"""Adjacency matrices and named topologies."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import ConfigError, TopologyError
from icrf.protocol import Graph
from icrf.topology import (
    TOPOLOGIES,
    HybridAdjacencyMatrix,
    build_topology,
    register_network_builder,
    register_topology,
    require_connected,
)


def test_dense_csr_and_graph_are_the_same_matrix() -> None:
    dense = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    matrix = HybridAdjacencyMatrix.from_dense(dense)
    assert matrix.num_nodes == 3 and matrix.num_edges == 3
    assert matrix.to_graph() == Graph(3, (0, 2, 2, 3), (1, 2, 0))
    assert HybridAdjacencyMatrix.from_graph(matrix.to_graph()) == matrix
    assert (matrix.to_dense() == dense).all()
    assert matrix.degree.tolist() == [2, 0, 1]
    assert matrix.out_neighbors(0).tolist() == [1, 2]
    assert matrix.in_neighbors(0).tolist() == [2]
    assert matrix.has_edge(0, 1) and not matrix.has_edge(1, 0) and not matrix.has_edge(0, 99)
    assert not matrix.is_symmetric() and matrix.one_way_edges() == [(0, 1)]


@given(st.integers(1, 12), st.data())
def test_every_question_agrees_with_the_dense_matrix(num_nodes: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=num_nodes**2, max_size=num_nodes**2))
    dense = np.array(bits, dtype=np.int8).reshape(num_nodes, num_nodes)
    np.fill_diagonal(dense, 0)
    matrix = HybridAdjacencyMatrix.from_dense(dense)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=num_nodes, max_size=num_nodes))
    assert (matrix.to_dense() == dense).all()
    assert matrix.is_symmetric() == bool((dense == dense.T).all())
    assert HybridAdjacencyMatrix.from_edges(num_nodes, np.argwhere(dense), symmetric=False) == matrix
    pairs = [(i, j) for i in range(num_nodes) for j in range(i) if dense[i, j] or dense[j, i]]
    assert matrix.cut_edges(owners) == sum(owners[i] != owners[j] for i, j in pairs)
    for i in range(num_nodes):
        assert matrix.out_neighbors(i).tolist() == np.flatnonzero(dense[i]).tolist()
        assert matrix.in_neighbors(i).tolist() == np.flatnonzero(dense[:, i]).tolist()
        assert [matrix.has_edge(i, j) for j in range(num_nodes)] == dense[i].astype(bool).tolist()


def test_the_arrays_cannot_be_written() -> None:
    matrix = build_topology("ring", 4, {})
    with pytest.raises(ValueError, match="read-only"):
        matrix.indices[0] = 3
    with pytest.raises(ValueError, match="read-only"):
        matrix.out_neighbors(0)[0] = 3


@pytest.mark.parametrize(
    ("dense", "code"),
    [
        (np.zeros((2, 3)), "T001"),
        (np.zeros(4), "T001"),
        (np.array([[0, 2], [1, 0]]), "T002"),
        (np.array([[0, np.nan], [1, 0]]), "T002"),
        (np.array([[1, 1], [1, 0]]), "T005"),
    ],
)
def test_bad_dense_matrices_are_refused(dense: np.ndarray, code: str) -> None:
    with pytest.raises(TopologyError) as caught:
        HybridAdjacencyMatrix.from_dense(dense)
    assert caught.value.code == code


def test_bad_edges_and_graphs_are_refused() -> None:
    for pairs, code in (([(0, 3)], "T010"), ([(-1, 0)], "T010"), ([(1, 1)], "T005")):
        with pytest.raises(TopologyError) as caught:
            HybridAdjacencyMatrix.from_edges(3, pairs)
        assert caught.value.code == code
    for graph in (Graph(2, (0, 1), (1,)), Graph(2, (0, 1, 1), (5,)), Graph(3, (0, 2, 2, 2), (2, 1))):
        with pytest.raises(TopologyError) as caught:
            HybridAdjacencyMatrix.from_graph(graph)
        assert caught.value.code == "T010"


def test_a_dense_matrix_of_too_many_nodes_is_refused() -> None:
    with pytest.raises(TopologyError) as caught:
        build_topology("ring", 20_001, {}).to_dense()
    assert caught.value.code == "T008"


def test_components_and_channels() -> None:
    matrix = HybridAdjacencyMatrix.from_edges(5, [(0, 3), (1, 4)])
    assert matrix.components() == [[0, 3], [1, 4], [2]]
    assert matrix.channel(0, 3, [0, 0, 0, 0, 1]) == "INTRA_CLUSTER"
    assert matrix.channel(1, 4, [0, 0, 0, 0, 1]) == "INTER_CLUSTER"
    with pytest.raises(TopologyError, match=r"T006 3 components: \{0,3\} \{1,4\} \{2\}"):
        require_connected(matrix)


@pytest.mark.parametrize(
    ("name", "num_nodes", "edges"),
    [
        ("star", 1, 0),
        ("star", 5, 4),
        ("ring", 1, 0),
        ("ring", 2, 1),
        ("ring", 3, 3),
        ("ring", 8, 8),
        ("line", 8, 7),
        ("mesh", 1, 0),
        ("mesh", 6, 15),
    ],
)
def test_built_in_topologies(name: str, num_nodes: int, edges: int) -> None:
    matrix = build_topology(name, num_nodes, {"seed": 0})
    assert matrix.num_edges == 2 * edges and matrix.is_symmetric() and len(matrix.components()) == 1


def test_the_hub_of_a_star_is_node_0() -> None:
    assert build_topology("star", 4, {}).degree.tolist() == [3, 1, 1, 1]


@pytest.mark.parametrize(("num_nodes", "k_value"), [(16, 4), (16, 5), (7, 6), (4, 3)])
def test_k_connected_gives_every_node_k_neighbours(num_nodes: int, k_value: int) -> None:
    assert set(build_topology("k_connected", num_nodes, {"k_value": k_value}).degree.tolist()) == {k_value}


@pytest.mark.parametrize(("num_nodes", "k_value"), [(5, 1), (4, 4), (4, 0)])
def test_k_connected_without_a_solution_is_refused(num_nodes: int, k_value: int) -> None:
    with pytest.raises(TopologyError) as caught:
        build_topology("k_connected", num_nodes, {"k_value": k_value})
    assert caught.value.code == "T011"


@pytest.mark.parametrize("num_nodes", range(2, 12))
def test_k_connected_is_the_harary_graph(num_nodes: int) -> None:
    for k_value in range(2, num_nodes):
        matrix = build_topology("k_connected", num_nodes, {"k_value": k_value})
        network = nx.from_numpy_array(matrix.to_dense())
        assert nx.node_connectivity(network) == k_value
        assert network.number_of_edges() == -(-num_nodes * k_value // 2)
        assert sorted(matrix.degree.tolist())[:-1] == [k_value] * (num_nodes - 1)


@pytest.mark.parametrize(
    ("name", "num_nodes", "keys", "allowed"),
    [
        ("k_connected", 5, {"k_value": 1}, "allowed: 2 to 4$"),
        ("k_connected", 5, {"k_value": 5}, "allowed: 2 to 4$"),
        ("k_connected", 2, {"k_value": 2}, "allowed: 1 to 1"),
        ("k_connected", 1, {"k_value": 1}, "allowed: two nodes or more"),
        ("random_regular", 5, {"k_value": 3, "seed": 1}, "allowed: 2 to 4, even$"),
        ("random_regular", 6, {"k_value": 6, "seed": 1}, "allowed: 2 to 5$"),
        ("random_regular", 1, {"k_value": 1, "seed": 1}, "allowed: two nodes or more$"),
        ("small_world", 2, {"k_value": 2, "seed": 1}, "allowed: three nodes or more$"),
        ("torus", 12, {"torus_rows": 5}, "allowed: 2, 3, 4, 6$"),
        ("torus", 7, {"torus_rows": 2}, "no number of rows divides 7: take another number_of_clients"),
    ],
)
def test_graphs_that_do_not_exist_say_which_would(
    name: str, num_nodes: int, keys: dict[str, int], allowed: str
) -> None:
    with pytest.raises(TopologyError, match=f"T011 .*{allowed}"):
        build_topology(name, num_nodes, keys)


def same_graph(matrix: HybridAdjacencyMatrix, network: nx.Graph) -> bool:
    found = nx.from_numpy_array(matrix.to_dense(), create_using=nx.DiGraph if network.is_directed() else nx.Graph)
    return nx.is_isomorphic(found, network)


def test_regular_families_are_those_of_the_books() -> None:
    assert same_graph(build_topology("torus", 12, {}), nx.grid_2d_graph(3, 4, periodic=True))
    assert same_graph(build_topology("torus", 12, {"torus_rows": 2}), nx.grid_2d_graph(2, 6, periodic=True))
    assert same_graph(build_topology("hypercube", 16, {}), nx.hypercube_graph(4))
    assert same_graph(build_topology("tree", 13, {"branching_factor": 3}), nx.balanced_tree(3, 2))
    assert build_topology("tree", 10, {}).degree.tolist() == [2, 3, 3, 3, 2, 1, 1, 1, 1, 1]
    directed = nx.DiGraph([(i, (i + step) % 6) for i in range(6) for step in (1, 2, 4)])
    assert same_graph(build_topology("exponential", 6, {}), directed)
    cycle = nx.DiGraph([(i, (i + 1) % 5) for i in range(5)])
    assert same_graph(build_topology("ring", 5, {"directed": True}), cycle)


@pytest.mark.parametrize(
    ("name", "num_nodes", "keys", "place"),
    [
        ("torus", 7, {}, "number_of_clients"),
        ("torus", 12, {"torus_rows": 5}, "torus_rows"),
        ("torus", 12, {"torus_rows": 12}, "torus_rows"),
        ("hypercube", 12, {}, "number_of_clients"),
        ("random_regular", 5, {"k_value": 3}, "k_value"),
        ("random_regular", 8, {"k_value": 1}, "topology 'random_regular'"),
        ("small_world", 8, {"k_value": 3}, "k_value"),
        ("small_world", 8, {"k_value": 8}, "k_value"),
        ("erdos_renyi", 40, {"edge_probability": 0.01}, "topology 'erdos_renyi'"),
        ("erdos_renyi", 40, {"edge_probability": 1e-300}, "topology 'erdos_renyi'"),
    ],
)
def test_graphs_that_do_not_exist_are_refused(name: str, num_nodes: int, keys: dict[str, Any], place: str) -> None:
    with pytest.raises(TopologyError) as caught:
        build_topology(name, num_nodes, {"seed": 0, **keys})
    assert (caught.value.code, caught.value.place) == ("T011", place)


@pytest.mark.parametrize(("num_nodes", "k_value"), [(2, 1), (5, 2), (5, 4), (6, 5), (8, 3), (9, 6), (40, 3), (40, 30)])
def test_random_regular_graphs_are_regular_simple_and_connected(num_nodes: int, k_value: int) -> None:
    for seed in range(10):
        matrix = build_topology("random_regular", num_nodes, {"k_value": k_value, "seed": seed})
        assert set(matrix.degree.tolist()) == {k_value} and matrix.is_symmetric()


def test_a_small_world_keeps_its_number_of_edges_and_rewires_the_share_it_is_told() -> None:
    ring = build_topology("k_connected", 500, {"k_value": 6})
    for probability in (0.0, 0.2, 1.0):
        keys = {"k_value": 6, "seed": 1, "rewire_probability": probability}
        matrix = build_topology("small_world", 500, keys)
        assert matrix.num_edges == ring.num_edges and matrix.is_symmetric()
        kept = int((matrix.to_dense() & ring.to_dense()).sum()) / ring.num_edges
        assert kept == pytest.approx(1 - probability, abs=0.05)


@pytest.mark.parametrize("directed", [False, True])
def test_erdos_renyi_has_every_edge_with_the_same_probability(directed: bool) -> None:
    counts = np.zeros((20, 20))
    for seed in range(300):
        keys = {"seed": seed, "edge_probability": 0.4, "directed": directed}
        matrix = build_topology("erdos_renyi", 20, keys)
        assert directed or matrix.is_symmetric()
        counts += matrix.to_dense()
    shares = counts[~np.eye(20, dtype=bool)] / 300
    assert shares.mean() == pytest.approx(0.4, abs=0.01) and abs(shares - 0.4).max() < 0.12
    assert build_topology("erdos_renyi", 9, {"seed": 0, "edge_probability": 1.0}) == build_topology("mesh", 9, {})


@pytest.mark.parametrize("name", ["random_regular", "small_world", "erdos_renyi"])
def test_random_graphs_are_those_of_their_seed(name: str) -> None:
    first, again, other = (build_topology(name, 30, {"k_value": 4, "seed": seed}) for seed in (1, 1, 2))
    assert first == again and first != other


PINNED = {
    "random_regular": [int(digit) for digit in "2745065617132304"],
    "small_world": [int(digit) for digit in "12670237013512453562346704570156"],
    "erdos_renyi": [int(digit) for digit in "345673473467012457012357034702012345"],
}


def test_random_graphs_do_not_change_between_releases() -> None:
    """A change of these numbers changes the bits of every run on a random graph."""
    found = {
        name: build_topology(name, 8, {"k_value": 2 + 2 * (name != "random_regular"), "seed": 7}).indices.tolist()
        for name in ("random_regular", "small_world", "erdos_renyi")
    }
    assert found == PINNED


def test_a_random_graph_of_too_many_edges_is_refused() -> None:
    for name, keys in (("erdos_renyi", {"edge_probability": 0.5}), ("random_regular", {"k_value": 1000})):
        with pytest.raises(TopologyError) as caught:
            build_topology(name, 20_000, {"seed": 0, **keys})
        assert caught.value.code == "T008"


@pytest.fixture
def forget():
    """Unregisters what a test registered."""
    before = dict(TOPOLOGIES._objects)
    yield
    TOPOLOGIES._objects.clear()
    TOPOLOGIES._objects.update(before)


def test_a_registered_builder_gets_its_parameters_by_name(forget: None) -> None:
    @register_topology("test_seeded")
    def seeded(num_nodes: int, seed: int, learning_rate: float, extra: int = 7) -> np.ndarray:
        assert (seed, learning_rate, extra) == (3, 0.1, 7)
        return np.ones((num_nodes, num_nodes), dtype=int) - np.eye(num_nodes, dtype=int)

    assert build_topology("test_seeded", 3, {"seed": 3, "learning_rate": 0.1}).num_edges == 6


def test_a_network_builder_returns_a_networkx_graph(forget: None) -> None:
    @register_network_builder("test_caveman")
    def caveman(num_nodes: int, k_value: int) -> nx.Graph:
        return nx.connected_caveman_graph(num_nodes // k_value, k_value)

    assert same_graph(build_topology("test_caveman", 12, {"k_value": 4}), nx.connected_caveman_graph(3, 4))

    @register_network_builder("test_named")
    def named(num_nodes: int) -> nx.Graph:
        return nx.DiGraph([("c", "a"), ("a", "b")])

    senders, receivers = build_topology("test_named", 3, {"node_ids": ("a", "b", "c")}).edges()
    assert list(zip(senders.tolist(), receivers.tolist(), strict=True)) == [(0, 1), (2, 0)]
    senders, receivers = build_topology("test_named", 3, {}).edges()
    assert list(zip(senders.tolist(), receivers.tolist(), strict=True)) == [(0, 1), (1, 2)]


def test_builders_that_cannot_be_called_or_return_nonsense(forget: None) -> None:
    @register_topology("test_unknown_parameter")
    def unknown(num_nodes: int, no_such_key: int) -> np.ndarray:
        raise AssertionError("never called")

    @register_topology("test_wrong_size")
    def wrong(num_nodes: int) -> np.ndarray:
        return np.zeros((2, 2))

    @register_topology("test_disconnected")
    def disconnected(num_nodes: int) -> HybridAdjacencyMatrix:
        return HybridAdjacencyMatrix.from_edges(num_nodes, [])

    for name, code in (
        ("test_unknown_parameter", "C017"),
        ("custom", "C016"),
        ("k_connected", "C016"),
        ("no_such_topology", "C010"),
    ):
        with pytest.raises(ConfigError) as config_error:
            build_topology(name, 3, {"seed": 1, "k_value": None})
        assert config_error.value.code == code
    for name, code in (("test_wrong_size", "T010"), ("test_disconnected", "T006")):
        with pytest.raises(TopologyError) as topology_error:
            build_topology(name, 100, {})
        assert topology_error.value.code == code
    assert len(str(topology_error.value)) < 300
    assert build_topology("test_disconnected", 3, {}, connected=False).num_edges == 0


def test_a_custom_topology_comes_from_its_file(tmp_path) -> None:
    (tmp_path / "ring.csv").write_text("0,1,1\n1,0,1\n1,1,0\n")
    parameters = {"adjacency_matrix_file_name": str(tmp_path / "ring.csv")}
    assert build_topology("custom", 3, parameters) == build_topology("ring", 3, {})
