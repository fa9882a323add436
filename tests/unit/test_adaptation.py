"""The built-in strategies by which graphs change, sketches, and the graphs of a run as the mediator knows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import IcrfError
from icrf.exchange import GATHERED, compile_exchange
from icrf.protocol import DECENTRALIZED, Graph, RoundReport, Rows
from icrf.seeds import stable_random_state
from icrf.topology import ADAPTERS, HybridAdjacencyMatrix, Sketcher, build_topology, changed_edges
from icrf_mediator.checks import check_graph
from icrf_mediator.graphs import Graphs

Matrix = np.ndarray


def strategy(name: str) -> Callable[..., Matrix]:
    found: Callable[..., Matrix] = ADAPTERS.get(name)
    return found


def dense(topology: str, num_nodes: int, **parameters: Any) -> Matrix:
    matrix = build_topology(topology, num_nodes, {"seed": 0, **parameters}).to_dense()
    matrix.setflags(write=False)
    return matrix


def connected(matrix: Matrix) -> bool:
    adjacency = HybridAdjacencyMatrix.from_dense(matrix)
    return adjacency.is_symmetric() and len(adjacency.components()) == 1


GRAPHS = st.builds(
    lambda size, p, seed: dense("erdos_renyi", size, edge_probability=p, seed=seed),
    st.integers(4, 24),
    st.floats(0.4, 1.0),
    st.integers(0, 99),
)


@given(GRAPHS, st.floats(0.01, 1.0), st.integers(0, 99))
def test_rewiring_keeps_every_degree_and_depends_on_its_arguments_alone(
    matrix: Matrix, share: float, seed: int
) -> None:
    found = [strategy("random_rewire")(matrix, stable_random_state(seed, "test"), share) for _ in range(2)]
    assert (found[0] == found[1]).all() and connected(found[0])
    assert (found[0].sum(axis=0) == matrix.sum(axis=0)).all()


def test_rewiring_moves_as_many_edges_as_it_is_told_to_and_leaves_a_mesh_alone() -> None:
    matrix, mesh = dense("k_connected", 60, k_value=6), dense("mesh", 6)
    random = stable_random_state(1, "test")
    moved = strategy("random_rewire")(matrix, random, 0.1)
    assert 0 < (np.triu(matrix) > moved).sum() <= 18
    assert (strategy("random_rewire")(mesh, random, 1.0) == mesh).all()


@given(GRAPHS, st.floats(0.01, 1.0), st.integers(0, 99))
def test_denser_graphs_only_gain_edges_and_sparser_ones_only_lose_some(matrix: Matrix, share: float, seed: int) -> None:
    num_edges = int(matrix.sum()) // 2
    more = strategy("densify")(matrix, stable_random_state(seed, "test"), share)
    less = strategy("sparsify")(matrix, stable_random_state(seed, "test"), share)
    assert (more >= matrix).all() and (less <= matrix).all() and connected(more) and connected(less)
    changed = int(np.ceil(share * num_edges))
    pairs = len(matrix) * (len(matrix) - 1) // 2
    assert more.sum() // 2 == min(pairs, num_edges + changed)
    assert less.sum() // 2 == max(len(matrix) - 1, num_edges - changed)


@given(GRAPHS, st.data())
def test_pruning_keeps_what_holds_the_graph_together_and_gives_edges_back(matrix: Matrix, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=len(matrix), max_size=len(matrix))
    available = np.array(data.draw(flags))
    found = strategy("prune_unavailable")(matrix, available)
    assert connected(found) and (found <= matrix).all()
    both = available[:, None] & available[None]
    assert (found[both] == matrix[both]).all()
    assert (np.triu(found).astype(bool) & ~both).sum() < len(matrix)
    assert (strategy("prune_unavailable")(matrix, np.ones(len(matrix), bool)) == matrix).all()


def test_similar_nodes_become_neighbours() -> None:
    """Two kinds of nodes, interleaved on a ring: one edge between the kinds is left, which the tree needs."""
    rng = np.random.RandomState(5)
    kinds = np.arange(10) % 2
    sketches = np.where(kinds[:, None], 1.0, -1.0) * np.linspace(1, 2, 64) + 0.1 * rng.randn(10, 64)
    ring = dense("ring", 10)
    found = strategy("cosine_similarity")(ring, sketches, np.ones(10, bool))
    assert connected(found) and found.sum() == ring.sum()
    assert found[np.ix_(kinds == 0, kinds == 1)].sum() == 1
    # Whoever has no direction is nearer to either kind than they are to each other.
    between = strategy("cosine_similarity")(ring, sketches, np.arange(10) != 3)
    kinds[3] = 2
    assert connected(between) and between[np.ix_(kinds == 0, kinds == 1)].sum() == 0


def test_without_any_direction_the_graph_stays() -> None:
    ring = dense("ring", 9)
    for available in (np.zeros(9, bool), np.ones(9, bool)):
        assert (strategy("cosine_similarity")(ring, np.zeros((9, 64)), available) == ring).all()


def test_sketches_are_linear_and_keep_angles() -> None:
    rng = np.random.RandomState(0)
    sketcher, size = Sketcher(7, 300_000), 300_000
    one, other = rng.randn(size), rng.randn(size)
    assert np.allclose(sketcher.of(one) - sketcher.of(other), sketcher.of(one - other))
    assert (Sketcher(7, size).of(one) == sketcher.of(one)).all() and (
        Sketcher(8, size).of(one) != sketcher.of(one)
    ).any()

    def cosine(a: Matrix, b: Matrix) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    near, far = one + 0.3 * other, -one + 0.3 * other
    assert cosine(sketcher.of(one), sketcher.of(near)) > 0.9 and cosine(sketcher.of(one), sketcher.of(far)) < -0.9
    assert abs(cosine(sketcher.of(one), sketcher.of(other))) < 0.5


def test_long_models_are_sketched_in_parts_that_add_up() -> None:
    size = (1 << 20) + 5
    sketcher = Sketcher(0, size)
    first, last = np.zeros(size, np.float32), np.zeros(size, np.float32)
    first[3], last[-1] = 2.0, 3.0
    assert np.abs(sketcher.of(first)).sum() == 2.0 and np.abs(sketcher.of(last)).sum() == 3.0


# ---------------------------------------------------------------- what crosses


def test_each_other_cluster_sends_the_rows_of_its_nodes_to_the_coordinator() -> None:
    ring = build_topology("ring", 7, {})
    assignment = (1, 0, 0, 2, 2, 2, 1)
    plan = compile_exchange(DECENTRALIZED, ring, ["train"] * 7, assignment, Rows(gathered=66))
    assert [(t.kind, t.sender, t.source, t.target) for t in plan.adaptation] == [
        (GATHERED, -1, 0, 1),
        (GATHERED, -1, 2, 1),
    ]
    assert plan.adaptation_bytes(1000, 4) == (2 + 3) * 66 * 4
    assert plan.inbound(1, GATHERED) == plan.adaptation
    assert compile_exchange(DECENTRALIZED, ring, ["train"] * 7, assignment).adaptation == ()


# ---------------------------------------------------------------- what the mediator knows


def graph_of(topology: str, num_nodes: int = 6, **parameters: Any) -> Graph:
    return build_topology(topology, num_nodes, parameters).to_graph()


def test_a_graph_is_in_force_from_the_round_after_its_decision_until_the_next() -> None:
    ring, line, mesh = graph_of("ring"), graph_of("line"), graph_of("mesh")
    graphs = Graphs(ring)
    graphs.decide(3, line)
    graphs.decide(5, mesh)
    assert [graphs.after(k) for k in range(7)] == [ring, ring, ring, line, line, mesh, mesh]
    assert [graphs.is_due(k) for k in (2, 3, 4)] == [False, True, True]
    graphs.forget(4)
    assert graphs.after(4) == line and graphs.after(9) == mesh
    assert graphs.differs(4, ring) and not graphs.differs(4, line) and not graphs.differs(4, None)


def test_one_question_is_one_generation_however_often_it_is_asked() -> None:
    graphs = Graphs(graph_of("ring"))
    graphs.decide(1, graph_of("mesh"))
    assert graphs.ask(1) and not graphs.ask(1) and graphs.between and graphs.is_due(1)
    graphs.linked()
    assert not graphs.between and not graphs.is_due(2)
    graphs.decide(3, graph_of("line"))
    assert graphs.ask(3)
    # Nodes that are set up anew have whatever was in force then, and what was on its way is void.
    graphs.set_up(2)
    assert not graphs.between and not graphs.is_due(2) and graphs.ask(3)


def report_of(graph: Graph | None) -> RoundReport:
    return RoundReport("run", 1, 1, 1, graph=graph)


CONFIG = {"mixing": "metropolis_hastings"}


@pytest.mark.parametrize(
    ("found", "decides", "match"),
    [
        (None, True, r"P001.*of cluster c1: none"),
        (graph_of("mesh"), False, r"P001.*a graph that nobody has asked for"),
        (replace(graph_of("ring"), weights=(0.1,) * 12), True, r"P001.*with weights"),
        (graph_of("ring", 5), True, r"T010.*5×5 for 6 nodes"),
        (Graph(6, (0, 1, 2, 3, 4, 5, 6), (1, 0, 3, 2, 5, 4)), True, r"T006"),
        (graph_of("ring", directed=True), True, r"T004"),
        (Graph(6, (0, 1, 2, 3, 4, 5, 6), (1, 0, 3, 2, 5, 9)), True, r"T010"),
    ],
)
def test_what_a_cluster_claims_to_have_decided_is_checked(found: Graph | None, decides: bool, match: str) -> None:
    with pytest.raises(IcrfError) as caught:
        check_graph("c1", report_of(found), decides, graph_of("ring"), CONFIG)
    assert re.search(match, str(caught.value))


def test_a_sound_decision_and_none_pass() -> None:
    check_graph("c1", report_of(graph_of("mesh")), True, graph_of("ring"), CONFIG)
    check_graph("c1", report_of(None), False, graph_of("ring"), CONFIG)


def test_changed_edges_are_counted_by_direction() -> None:
    ring, line = build_topology("ring", 6, {}), build_topology("line", 6, {})
    assert changed_edges(ring, line) == (0, 2) and changed_edges(line, ring) == (2, 0)
