"""Graphs that change between rounds: decided once, in force everywhere, the same bits on any number of clusters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest

from icrf.errors import ConfigError, ConfigErrors, IcrfError, error_from_json
from icrf.federation.node import FederatedNode
from icrf.protocol import COMPLETED, FAILED, RoundResult, Submission
from icrf.run_folder import round_line
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, follow
from icrf.topology import ADAPTERS, TopologyAdaptationStrategy
from icrf.update import merkle_root
from icrf_agent import host_tools

NUM_NODES = 8
RING = np.roll(np.eye(NUM_NODES, dtype=np.int8), 1, axis=1) + np.roll(np.eye(NUM_NODES, dtype=np.int8), -1, axis=1)
# Gateway frames carry headers; the plan counts payloads only.
HEADERS = 1.02


def submission_of(strategy: str, *, keep: bool = False, code_path: str = "", **keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": NUM_NODES,
        "federated_learning_rounds": 5,
        "data_distribution_kind": "dir",
        "topology_adaptation_strategy": strategy,
        "adaptation_share": 0.5,
        "adaptation_period": 2,
        "learning_rate": 0.1,
        "batch_size": 64,
        "model_type": "logistic",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data), keep=keep, code_path=code_path)


def failure_of(fabric: InlineFabric, submission: Submission) -> IcrfError:
    info, _ = follow(fabric, fabric.port.submit(submission).run_id)
    assert info.status == FAILED
    return error_from_json(info.error_json)


def hashes(rounds: list[RoundResult]) -> list[tuple[str, str]]:
    return [(r.model_sha256, r.consensus_sha256) for r in rounds]


def changes(rounds: list[RoundResult]) -> list[tuple[int, int]]:
    return [(r.edges_added, r.edges_removed) for r in rounds]


@pytest.fixture(scope="module")
def fabrics() -> Iterator[dict[int, InlineFabric]]:
    with InlineFabric(1) as one, InlineFabric(2) as two, InlineFabric(3) as three:
        yield {1: one, 2: two, 3: three}


@pytest.fixture
def adapter() -> Iterator[Any]:
    """Registers a strategy as ``mine``."""
    yield ADAPTERS.register("mine")
    ADAPTERS._objects.pop("mine", None)


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("strategy", ["cosine_similarity", "random_rewire"])
def test_a_graph_that_changes_in_mid_run_gives_the_same_bits_on_any_number_of_clusters(
    fabrics: dict[int, InlineFabric], strategy: str
) -> None:
    info, expected = completed(fabrics[1], submission_of(strategy))
    _, static = completed(fabrics[1], submission_of("static"))
    assert hashes(expected)[:2] == hashes(static)[:2] and hashes(expected)[2] != hashes(static)[2]
    assert [bool(added) for added, _ in changes(expected)][:3] == [False, True, False]
    assert [r.generation for r in expected][:3] == [1, 1, 2]
    for clusters in (2, 3):
        found_info, found = completed(fabrics[clusters], submission_of(strategy))
        assert hashes(found) == hashes(expected) and changes(found) == changes(expected)
        assert (found_info.model_sha256, len(found_info.clusters)) == (info.model_sha256, clusters)


def farthest_weights(node_weights: np.ndarray) -> np.ndarray:
    """The ring, and an edge from each node to the one with the most different model."""
    distances = np.linalg.norm(node_weights[:, None].astype(np.float64) - node_weights[None], axis=2)
    found = RING.copy()
    found[np.arange(NUM_NODES), distances.argmax(axis=1)] = 1
    return found | found.T


@pytest.mark.parametrize("strategy", ["cosine_similarity", f"{__name__}:farthest_weights"])
def test_a_decision_does_not_depend_on_how_many_nodes_are_active(
    fabrics: dict[int, InlineFabric], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"momentum": 0.9, "keep_optimizer_state": True, "private_keys": ["*bias"], "adaptation_period": 1}
    _, expected = completed(fabrics[1], submission_of(strategy, **keys))
    assert any(added for added, _ in changes(expected)) and len({r.consensus_sha256 for r in expected}) == 5
    # Every row leaves its host by itself then.
    monkeypatch.setattr(host_tools, "POSTING_BYTES", 1)
    for clusters in (1, 2):
        _, few = completed(fabrics[clusters], submission_of(strategy, **keys, resident_nodes=1))
        assert hashes(few) == hashes(expected) and changes(few) == changes(expected)


def test_rewiring_moves_edges_and_a_line_of_a_round_says_how_many(fabrics: dict[int, InlineFabric]) -> None:
    _, rounds = completed(fabrics[2], submission_of("random_rewire", adaptation_period=1))
    assert all(added == removed > 0 for added, removed in changes(rounds))
    assert [r.generation for r in rounds] == [1, 2, 3, 4, 5]
    line = round_line(rounds[0])
    assert (line["generation"], line["edges_added"]) == (1, rounds[0].edges_added)


class Writer(FederatedNode):
    """Writes to its neighbours in every round, and counts what it gets."""

    def train(self) -> dict[str, float]:
        letters = len(self.sync())
        self.send("greeting", {"round": self.round})
        return {**super().train(), "letters": float(letters)}


@pytest.mark.parametrize("clusters", [1, 2])
def test_letters_on_their_way_arrive_though_the_graph_changes(fabrics: dict[int, InlineFabric], clusters: int) -> None:
    submission = submission_of("random_rewire", adaptation_period=1, client_template=f"{__name__}:Writer")
    _, rounds = completed(fabrics[clusters], submission)
    assert [r.generation for r in rounds] == [1, 2, 3, 4, 5]
    # Rewiring leaves every node its two neighbours.
    assert [r.metrics["train_letters"] for r in rounds] == [0.0, 2.0, 2.0, 2.0, 2.0]


def test_graphs_become_denser_and_sparser_and_a_graph_at_its_end_needs_no_new_generation(
    fabrics: dict[int, InlineFabric],
) -> None:
    _, denser = completed(fabrics[2], submission_of("densify", adaptation_period=1))
    assert sum(added for added, _ in changes(denser)) == NUM_NODES * (NUM_NODES - 1) - 2 * NUM_NODES
    _, sparser = completed(fabrics[2], submission_of("sparsify", adaptation_period=1))
    assert changes(sparser) == [(0, 2), (0, 0), (0, 0), (0, 0), (0, 0)]
    assert [r.generation for r in sparser] == [1, 2, 2, 2, 2]


def test_nodes_that_do_not_train_lose_their_edges_until_they_do(fabrics: dict[int, InlineFabric]) -> None:
    submission = submission_of(
        "prune_unavailable", adaptation_period=1, client_fraction=0.5, federated_learning_topology="mesh"
    )
    _, one = completed(fabrics[1], submission)
    _, three = completed(fabrics[3], submission)
    assert hashes(one) == hashes(three)
    # Of 56 directed edges those among four nodes that trained are left, and four more to hold the others.
    assert changes(one)[0] == (0, 56 - 12 - 8)
    assert all(added == removed for added, removed in changes(one)[1:]) and any(added for added, _ in changes(one)[1:])


# ---------------------------------------------------------------- bytes


def same(adjacency_matrix: np.ndarray) -> np.ndarray:
    return adjacency_matrix


def same_by_sketches(adjacency_matrix: np.ndarray, sketches: np.ndarray) -> np.ndarray:
    return adjacency_matrix


def same_by_weights(adjacency_matrix: np.ndarray, node_weights: np.ndarray) -> np.ndarray:
    return adjacency_matrix


def test_nothing_is_gathered_that_no_parameter_names_and_the_plan_knows_the_bytes(
    fabrics: dict[int, InlineFabric],
) -> None:
    per_adaptation = []
    for function in (same, same_by_sketches, same_by_weights):
        submission = submission_of(f"{__name__}:{function.__name__}", model_type="mlp")
        plan = fabrics[3].port.plan(submission)
        info, _ = completed(fabrics[3], submission)
        total = plan.bytes_inter_cluster_total
        assert total <= info.bytes_inter_cluster <= total * HEADERS
        per_adaptation.append(plan.bytes_inter_cluster_per_adaptation)
        assert (plan.adaptation, plan.adaptation_period) == (f"{__name__}:{function.__name__}", 2)
    elsewhere = sum(cluster != plan.assignment["client_0"] for cluster in plan.assignment.values())
    assert per_adaptation == [0, elsewhere * 4 * (2 + 64), elsewhere * 4 * (2 + plan.num_parameters)]
    assert fabrics[3].port.plan(submission_of("static")).adaptation == ""


# ---------------------------------------------------------------- a strategy of one's own


def test_a_strategy_of_ones_own_is_asked_once_with_the_states_of_all_nodes(
    fabrics: dict[int, InlineFabric], adapter: Any
) -> None:
    asked: list[tuple[np.ndarray, np.ndarray, str]] = []

    @adapter
    class FarthestApart(TopologyAdaptationStrategy):
        """The two nodes whose models differ most become neighbours."""

        def adapt(self, adjacency_matrix: np.ndarray, node_weights: np.ndarray) -> np.ndarray:
            assert not adjacency_matrix.flags.writeable and not node_weights.flags.writeable
            asked.append(
                (adjacency_matrix, node_weights, merkle_root([hashlib.sha256(w).digest() for w in node_weights]))
            )
            distance = np.abs(node_weights[:, None] - node_weights[None]).sum(axis=2, dtype=np.float64)
            i, j = np.unravel_index(np.argmax(np.where(adjacency_matrix, 0.0, distance)), distance.shape)
            following = adjacency_matrix.copy()
            following[i, j] = following[j, i] = 1
            return following

    _, expected = completed(fabrics[1], submission_of("mine"))
    assert len(asked) == 2 and changes(expected) == [(0, 0), (2, 0), (0, 0), (2, 0), (0, 0)]
    assert (asked[0][0] == RING).all() and asked[1][0].sum() == RING.sum() + 2
    # The hash of a round is that of its states: these are what was handed over, bit by bit.
    assert [root for *_, root in asked] == [expected[1].model_sha256, expected[3].model_sha256]
    asked.clear()
    _, found = completed(fabrics[3], submission_of("mine"))
    assert hashes(found) == hashes(expected) and len(asked) == 2


def test_all_facts_can_be_asked_for_by_name(fabrics: dict[int, InlineFabric], adapter: Any) -> None:
    seen: list[dict[str, Any]] = []

    @adapter
    class Curious:
        def __init__(self, adaptation_period: int) -> None:
            self.period = adaptation_period

        def adapt(
            self,
            initial_matrix: np.ndarray,
            metrics: dict[str, np.ndarray],
            available: np.ndarray,
            sketches: np.ndarray,
            round_number: int,
            random_state: np.random.RandomState,
            node_ids: tuple[str, ...],
            number_of_clients: int,
        ) -> networkx.Graph:
            loss, draw = metrics["train_loss"].tolist(), int(random_state.randint(1 << 30))
            seen.append({"available": available.tolist(), "loss": loss, "round": round_number, "draw": draw})
            assert sketches.shape == (number_of_clients, 64) and (initial_matrix == RING).all()
            assert self.period == 2 and node_ids[3] == "client_3"
            return networkx.relabel_nodes(networkx.complete_graph(number_of_clients), dict(enumerate(node_ids)))

    submission = submission_of("mine", client_fraction=0.5)
    _, rounds = completed(fabrics[1], submission)
    assert changes(rounds)[1] == (56 - 16, 0) and [fact["round"] for fact in seen] == [2, 4]
    trained = [i in rounds[1].participant_nodes for i in range(NUM_NODES)]
    assert seen[0]["available"] == trained and sum(trained) == 4
    assert [np.isfinite(loss) for loss in seen[0]["loss"]] == trained
    assert seen[0]["draw"] != seen[1]["draw"]
    first, seen[:] = json.dumps(seen), []
    completed(fabrics[3], submission)
    assert json.dumps(seen) == first


class Seldom(FederatedNode):
    """Tells its loss in every second round."""

    def train(self) -> dict[str, float]:
        metrics = super().train()
        return metrics if self.round % 2 else {}


def test_a_loss_that_was_not_told_in_the_round_is_not_that_of_an_earlier_one(
    fabrics: dict[int, InlineFabric], adapter: Any
) -> None:
    told: list[list[bool]] = []

    @adapter
    def losses(adjacency_matrix: np.ndarray, metrics: dict[str, np.ndarray], available: np.ndarray) -> np.ndarray:
        told.append(np.isfinite(metrics["train_loss"]).tolist())
        assert available.all()
        return adjacency_matrix

    completed(fabrics[1], submission_of("mine", adaptation_period=1, client_template=f"{__name__}:Seldom"))
    assert told == [[number % 2 == 1] * NUM_NODES for number in range(1, 6)]


def test_a_strategy_is_a_file_beside_the_configuration(
    fabrics: dict[int, InlineFabric], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wider_rings.py").write_text(
        "import numpy as np\n"
        "def wider(adjacency_matrix, round_number):\n"
        "    step = np.roll(np.eye(len(adjacency_matrix), dtype=int), 1 + 2 * (round_number // 2 % 2), axis=1)\n"
        "    return step + step.T\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    submission = submission_of("wider_rings:wider", code_path=str(tmp_path))
    _, rounds = completed(fabrics[2], submission)
    assert changes(rounds) == [(0, 0), (16, 16), (0, 0), (16, 16), (0, 0)]


def edges(*pairs: tuple[int, int]) -> np.ndarray:
    matrix = np.zeros((NUM_NODES, NUM_NODES))
    for i, j in pairs:
        matrix[i, j] = matrix[j, i] = 1
    return matrix


@pytest.mark.parametrize(
    ("answer", "code", "place"),
    [
        (np.ones((2, 3)), "T001", ""),
        (0.5 * RING, "T002", "A[0,1]"),
        (RING + np.eye(NUM_NODES), "T005", ""),
        (edges(*((i, i + 1) for i in range(6))), "T006", ""),
        (np.triu(RING), "T004", ""),
        (1 - np.eye(NUM_NODES - 1), "T010", ""),
    ],
)
def test_a_matrix_that_peers_cannot_use_is_refused_by_the_name_of_its_strategy(
    fabrics: dict[int, InlineFabric], adapter: Any, answer: Any, code: str, place: str
) -> None:
    adapter(lambda: answer)
    error = failure_of(fabrics[2], submission_of("mine"))
    assert error.code == code, error
    assert error.place.startswith("topology_adaptation_strategy 'mine' after round 2") and error.place.endswith(place)
    assert error.allowed and "local-1" in str(error)


def test_an_answer_that_is_no_matrix_is_refused(fabrics: dict[int, InlineFabric], adapter: Any) -> None:
    adapter(lambda: None)
    error = failure_of(fabrics[2], submission_of("mine"))
    assert (error.code, error.place) == ("C018", "topology_adaptation_strategy")
    assert "adapter 'mine' returned NoneType" in error.message and "networkx" in error.allowed


def test_a_graph_of_several_components_may_be_allowed(fabrics: dict[int, InlineFabric], adapter: Any) -> None:
    adapter(lambda: edges(*((i, i + 1) for i in range(6))))
    _, rounds = completed(fabrics[2], submission_of("mine", allow_no_consensus=True))
    assert changes(rounds)[1] == (0, 4)


def test_what_a_strategy_raises_is_its_own(fabrics: dict[int, InlineFabric], adapter: Any) -> None:
    @adapter
    def writes(adjacency_matrix: np.ndarray) -> None:
        adjacency_matrix[0, 1] = 0

    error = failure_of(fabrics[2], submission_of("mine"))
    assert error.code == "U001" and "read-only" in error.message and "mine on local-1, after round 2" in error.place


def test_a_strategy_that_cannot_be_called_is_refused_before_anything_starts(adapter: Any) -> None:
    adapter(lambda adjacency_matrix, colour: adjacency_matrix)
    with pytest.raises(ConfigError, match=r"C017.*colour.*node_weights"):
        submission_of("mine")
    with pytest.raises(ConfigError, match=r"C017 topology_adaptation_strategy.*'math:pi' is a float"):
        submission_of("math:pi")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"},
            "C008 .*topology_adaptation_strategy 'densify' contradicts.*whose graph is given",
        ),
        (
            {"mixing": "push_sum"},
            "C012 .*mixing: 'push_sum' is not built yet.*with topology_adaptation_strategy densify",
        ),
        ({"topology_adaptation_strategy": "densfy"}, "C010.*densify"),
        ({"topology_adaptation_strategy": "affinity"}, "C012"),
        ({"adaptation_period": 0}, "C007"),
        ({"number_of_clients": 20_001}, "C008 .*number_of_clients 20001 > 20000"),
        ({"topology_adaptation_strategy": "cosine_similarity", "number_of_clients": 5_001}, "C008.*5001 > 5000"),
    ],
)
def test_a_configuration_that_cannot_work_says_so(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigErrors, match=match):
        submission_of(**{"strategy": keys.get("topology_adaptation_strategy", "densify"), **keys})


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("strategy", ["cosine_similarity", "random_rewire"])
@pytest.mark.parametrize("what", ["mediator", "agent", "host"])
def test_after_a_crash_the_graphs_and_the_bits_are_the_same(
    fabrics: dict[int, InlineFabric], strategy: str, what: str
) -> None:
    keys = {"federated_learning_rounds": 8, "checkpoint_every": 3, "adaptation_period": 1}
    submission = submission_of(strategy, **keys)
    expected_info, expected = completed(fabrics[1], submission)
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(submission).run_id
        for event in fabric.port.watch(run_id):
            if event.round and event.round.number == 5:
                break
        if what == "mediator":
            fabric.restart_mediator()
        elif what == "agent":
            fabric.stop_agent("local-2")
            fabric.start_agent("local-2")
        else:
            fabric.substrates["local-2"].kill_host(run_id, 0)
        info, rounds = follow(fabric, run_id)
    assert info.status == COMPLETED, info.error_json
    assert info.model_sha256 == expected_info.model_sha256
    assert hashes(rounds) == hashes(expected) and changes(rounds) == changes(expected)


def test_a_strategy_that_decides_otherwise_when_it_is_asked_again_ends_the_run(adapter: Any) -> None:
    asked: list[int] = []

    @adapter
    def moody(adjacency_matrix: np.ndarray, round_number: int) -> np.ndarray:
        asked.append(round_number)
        return np.roll(edges(*((i, i + 1) for i in range(7))), len(asked), axis=(0, 1))

    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(submission_of("mine", keep=True, checkpoint_every=0)).run_id
        for event in fabric.port.watch(run_id):
            if event.status == "IDLE":
                break
        fabric.stop_agent("local-2")
        fabric.start_agent("local-2")
        fabric.port.advance(run_id, "run", 6)
        info, _ = follow(fabric, run_id)
    assert asked[:3] == [2, 4, 2]
    error = error_from_json(info.error_json)
    assert error.code == "X002" and "round 2 did not repeat: it decided on another graph" in error.message
