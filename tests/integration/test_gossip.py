"""Peers that train nothing agree at the rate that the eigenvalues of their mixing matrix give, on any clusters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from icrf import values
from icrf.client import Fabric
from icrf.errors import RunError
from icrf.federation.node import FederatedNode
from icrf.learning.models import MODELS
from icrf.learning.partition import PARTITIONERS
from icrf.protocol import COMPLETED, MixingReport
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import follow, follow_until
from icrf.topology import mixing_matrix

WIDTH = 10
# What nodes start from, shape (num_nodes, WIDTH); set by a test before it runs nodes in this process.
STARTS = np.empty((0, WIDTH))


class Constant(torch.nn.Module):
    """A model that is a vector of float64, whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.state.expand(len(batch), WIDTH)


class Watched(FederatedNode):
    """Starts from its row of STARTS and remembers its state after every round."""

    def build(self, **kwargs: Any) -> None:
        self.history: list[list[float]] = []

    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.round == 1:
            self.context.model.load(STARTS[self.context.index])
        return {"loss": 0.0}

    def aggregate(self, state: np.ndarray) -> np.ndarray:
        self.history.append(state.tolist())
        return state

    def past(self) -> list[list[float]]:
        return self.history

    def samples(self) -> int:
        return self.num_samples


@pytest.fixture(autouse=True)
def constant_model() -> Iterator[None]:
    MODELS.add("constant", Constant)
    yield
    del MODELS._objects["constant"]


class Gossiped:
    """A run of pure gossip: states of all rounds, shape (rounds + 1, num_nodes, WIDTH), and what the fabric said."""

    def __init__(self, starts: np.ndarray, rounds: int, *, clusters: int = 1, **keys: Any) -> None:
        global STARTS
        STARTS = starts
        config = FederationConfig.from_mapping(
            {
                "federation_id": "gossip",
                "schema": "DecentralizedFederatedLearning",
                "number_of_clients": len(starts),
                "federated_learning_rounds": rounds,
                "number_of_epochs": 0,
                "model_type": "constant",
                "client_template": "local:Watched",
                "evaluate_every": rounds,
                "checkpoint_every": 0,
                **keys,
            }
        )
        submission = build_submission(config, keep=True)
        self.weights = mixing_matrix(submission.graph, config.mixing)
        templates = {f"local:{kind.__name__}": kind for kind in (Watched, Stepping, Collecting, Remembering)}
        with InlineFabric(clusters, templates=templates) as fabric:
            plan = fabric.port.plan(submission)
            run_id = fabric.port.submit(submission).run_id
            follow_until(fabric, run_id, rounds)

            def ask(method: str) -> list[Any]:
                nothing = values.encode([[], {}])
                answers = [fabric.port.call_node(run_id, node.id, method, nothing) for node in submission.nodes]
                return [values.decode(answer) for answer in answers]

            pasts, self.num_samples = ask("past"), ask("samples")
            fabric.port.finish(run_id)
            info, self.rounds = follow(fabric, run_id)
            assert info.status == COMPLETED, info.error_json
            stored = b"".join(fabric.port.fetch(run_id, "model.safetensors"))
        self.consensus = np.concatenate([part.ravel() for _, part in sorted(load(stored).items())])
        assert plan.mixing is not None
        self.report: MixingReport = plan.mixing
        states = np.array(pasts).transpose(1, 0, 2)
        self.states = np.concatenate([starts[None], states]) if starts.size else states

    @property
    def hashes(self) -> list[tuple[str, str]]:
        return [(r.model_sha256, r.consensus_sha256) for r in self.rounds]


def second_eigenvector(num_nodes: int, **keys: Any) -> np.ndarray:
    """Starts that shrink by the eigenvalue in every round, whatever else is in the graph."""
    probe = build_submission(
        FederationConfig.from_mapping(
            {
                "federation_id": "probe",
                "schema": "DecentralizedFederatedLearning",
                "number_of_clients": num_nodes,
                "model_type": "constant",
                **keys,
            }
        )
    )
    weights = mixing_matrix(probe.graph, "metropolis_hastings").toarray()
    found, vectors = np.linalg.eigh(weights)
    vector = vectors[:, -2 if abs(found[-2]) >= abs(found[0]) else 0]
    return np.outer(vector, np.arange(1.0, WIDTH + 1))


def spread(states: np.ndarray) -> float:
    return float(np.linalg.norm(states - states.mean(axis=0)))


def ring_slem(num_nodes: int) -> float:
    return (1 + 2 * math.cos(2 * math.pi / num_nodes)) / 3


def write_star(folder: Path, num_nodes: int) -> str:
    rows = [[int((i == 0) != (j == 0)) for j in range(num_nodes)] for i in range(num_nodes)]
    path = folder / "star.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("num_nodes", "slem", "keys"),
    [
        (7, 0.0, {"federated_learning_topology": "mesh"}),
        (8, ring_slem(8), {"federated_learning_topology": "ring"}),
        (16, ring_slem(16), {"federated_learning_topology": "ring"}),
        (25, ring_slem(25), {"federated_learning_topology": "ring"}),
        (32, ring_slem(32), {"federated_learning_topology": "ring"}),
        (16, 0.987190, {"federated_learning_topology": "line"}),
        (16, 0.852395, {"federated_learning_topology": "k_connected", "k_value": 4}),
        (16, 0.6, {"federated_learning_topology": "torus"}),
        (16, 0.6, {"federated_learning_topology": "hypercube"}),
        (25, 0.723607, {"federated_learning_topology": "torus"}),
        (8, 0.875, {"federated_learning_topology": "custom"}),
        (16, 0.9375, {"federated_learning_topology": "custom"}),
    ],
)
def test_disagreement_shrinks_by_the_second_eigenvalue_in_every_round(
    tmp_path: Path, num_nodes: int, slem: float, keys: dict[str, Any]
) -> None:
    if keys["federated_learning_topology"] == "custom":
        keys = {**keys, "adjacency_matrix_file_name": write_star(tmp_path, num_nodes)}
    run = Gossiped(second_eigenvector(num_nodes, **keys), 10, clusters=2, **keys)
    assert run.report.slem == pytest.approx(slem, abs=1e-6)
    if slem == 0:
        assert spread(run.states[1]) < 1e-12
        return
    distances = [spread(states) for states in run.states]
    for before, after in itertools.pairwise(distances):
        assert after / before == pytest.approx(run.report.slem, abs=1e-9)


def test_from_a_random_start_the_rate_of_later_rounds_is_the_second_eigenvalue() -> None:
    starts = np.random.default_rng(1).normal(size=(16, WIDTH))
    run = Gossiped(starts, 150, federated_learning_topology="ring")
    logs = np.log([spread(states) for states in run.states[50:]])
    assert math.exp(np.polyfit(np.arange(len(logs)), logs, 1)[0]) == pytest.approx(ring_slem(16), rel=0.01)


# ---------------------------------------------------------------- what is kept


def one_way(folder: Path) -> str:
    """A ring of six with two shortcuts, all in one direction: out-degrees differ."""
    edges = {(i, (i + 1) % 6) for i in range(6)} | {(0, 3), (0, 4), (2, 5)}
    path = folder / "one-way.csv"
    path.write_text("\n".join(",".join(str(int((i, j) in edges)) for j in range(6)) for i in range(6)))
    return str(path)


@pytest.fixture
def directed(tmp_path: Path) -> dict[str, Any]:
    return {
        "federated_learning_topology": "custom",
        "adjacency_matrix_file_name": one_way(tmp_path),
        "directed": True,
        "mixing": "push_sum",
    }


def test_push_sum_finds_the_mean_on_a_directed_graph_with_the_same_bits_on_any_clusters(
    directed: dict[str, Any],
) -> None:
    starts = np.random.default_rng(2).normal(size=(6, WIDTH))
    one = Gossiped(starts, 60, clusters=1, **directed)
    assert one.report.push_sum and one.report.limit == "mean" and not one.report.doubly_stochastic
    assert abs(one.states[-1] - starts.mean(axis=0)).max() < 1e-12
    assert abs(one.states[1].mean(axis=0) - starts.mean(axis=0)).max() > 1e-3  # the plain mean is not what is kept
    for clusters in (2, 3):
        assert Gossiped(starts, 60, clusters=clusters, **directed).hashes == one.hashes


def test_push_sum_keeps_the_mean_weighted_by_mass_in_every_round(directed: dict[str, Any]) -> None:
    starts = np.random.default_rng(3).normal(size=(6, WIDTH))
    run = Gossiped(starts, 12, clusters=2, **directed)
    mass = np.ones(6)
    for states in run.states[1:]:
        mass = run.weights @ mass
        assert abs((mass[:, None] * states).mean(axis=0) - starts.mean(axis=0)).max() < 1e-12
    assert abs(run.states[-1] - starts.mean(axis=0)).max() > 1e-6
    # The grid of exact sums is coarser than float64.
    assert run.consensus == pytest.approx(starts.mean(axis=0), abs=1e-9)


def test_with_push_sum_every_step_counts_the_same(directed: dict[str, Any]) -> None:
    starts = np.random.default_rng(8).normal(size=(6, WIDTH))
    run = Gossiped(starts, 12, clusters=2, client_template="local:Stepping", **directed)
    # Steps of 1, 2, ..., 6 move the kept mean by 3.5 a round, although the masses differ.
    assert run.consensus == pytest.approx(starts.mean(axis=0) + 12 * 3.5, abs=1e-7)


@pytest.mark.parametrize("mixing", ["metropolis_hastings", "lazy_metropolis", "max_degree", "push_sum"])
def test_the_mean_is_kept_by_what_says_so(tmp_path: Path, mixing: str) -> None:
    starts = np.random.default_rng(4).normal(size=(5, WIDTH))
    run = Gossiped(starts, 80, federated_learning_topology="tree", mixing=mixing)
    assert run.report.limit == "mean"
    assert abs(run.states[-1].mean(axis=0) - starts.mean(axis=0)).max() < 1e-7
    if mixing != "push_sum":
        assert abs(run.states.mean(axis=1) - starts.mean(axis=0)).max() < 1e-12


def test_plain_averages_lead_elsewhere_and_the_checker_says_where() -> None:
    starts = np.random.default_rng(5).normal(size=(6, WIDTH))
    run = Gossiped(starts, 300, federated_learning_topology="line", mixing="uniform")
    assert (run.report.limit, run.report.row_stochastic, run.report.column_stochastic) == ("weighted mean", True, False)
    shares = np.array([2, 3, 3, 3, 3, 2]) / 16
    assert abs(run.states[-1] - shares @ starts).max() < 1e-9
    assert abs(starts.mean(axis=0) - shares @ starts).max() > 1e-3


def test_sample_weighted_mixing_leads_to_the_mean_of_all_samples() -> None:
    starts = np.random.default_rng(6).normal(size=(6, WIDTH))
    keys = {"federated_learning_topology": "ring", "data_distribution_kind": "dir"}
    run = Gossiped(starts, 250, mixing="sample_weighted", clusters=2, **keys)
    assert run.report.limit == "weighted mean" and len(set(run.num_samples)) > 3
    shares = np.array(run.num_samples) / sum(run.num_samples)
    for states in run.states:
        assert abs(shares @ states - shares @ starts).max() < 1e-12
    assert abs(run.states[-1] - shares @ starts).max() < 1e-6


def test_samples_that_were_not_dealt_are_refused_where_they_are_weights() -> None:
    keys = {"federated_learning_topology": "ring", "client_template": "local:Collecting"}
    with pytest.raises(RunError, match="W030"):
        Gossiped(np.zeros((4, WIDTH)), 1, mixing="sample_weighted", **keys)


def test_a_matrix_of_ones_own_is_what_nodes_mix_by(tmp_path: Path) -> None:
    weights = np.array([[0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.25], [0, 0, 0.5, 0.5]])
    (tmp_path / "weights.csv").write_text("\n".join(",".join(map(str, row)) for row in weights.tolist()))
    starts = np.random.default_rng(7).normal(size=(4, WIDTH))
    keys = {"mixing": "custom", "mixing_matrix_file_name": str(tmp_path / "weights.csv")}
    run = Gossiped(starts, 3, clusters=2, federated_learning_topology="line", **keys)
    assert run.states[3] == pytest.approx(np.linalg.matrix_power(weights, 3) @ starts, abs=1e-14)
    assert run.report.slem == pytest.approx(np.sort(np.abs(np.linalg.eigvals(weights)))[-2], abs=1e-12)


# ---------------------------------------------------------------- with training


def sorted_by_label(labels: np.ndarray, num_parts: int, seed: int, beta: float) -> list[np.ndarray]:
    return np.array_split(np.argsort(labels, kind="stable"), num_parts)


class Logistic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch.flatten(1))


class Stepping(Watched):
    """Every round moves it by as much as its number says."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        super().train(**kwargs)
        self.context.model.load(self.context.model.flat + 1.0 + self.context.index)
        return {"loss": 0.0}


class Collecting(Watched):
    """Gives away a sample that it was dealt."""

    def build(self, **kwargs: Any) -> None:
        features, labels = self.train_data
        self.context.train_data = (features[1:], labels[1:])


class Remembering(Watched):
    """Trains as usual and remembers its states."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        return FederatedNode.train(self, **kwargs)


@pytest.fixture
def label_sorted() -> Iterator[dict[str, Any]]:
    PARTITIONERS.add("sorted_by_label", sorted_by_label)
    MODELS.add("logistic_test", Logistic)
    yield {"data_distribution_kind": "sorted_by_label", "model_type": "logistic_test", "number_of_epochs": 1}
    del PARTITIONERS._objects["sorted_by_label"]
    del MODELS._objects["logistic_test"]


def test_d_psgd_disagrees_the_less_the_larger_the_spectral_gap(label_sorted: dict[str, Any]) -> None:
    """Lian et al. 2017: with different data, the distance to consensus and the loss follow the gap."""
    graphs: list[dict[str, Any]] = [
        {"federated_learning_topology": "mesh"},
        {"federated_learning_topology": "torus"},
        {"federated_learning_topology": "k_connected", "k_value": 4},
        {"federated_learning_topology": "ring"},
    ]
    keys = {**label_sorted, "client_template": "local:Remembering", "batch_size": 1000, "learning_rate": 0.5}
    runs = [Gossiped(np.empty((16, 0)), 25, **keys, **graph) for graph in graphs]
    gaps = [run.report.spectral_gap for run in runs]
    distances = [spread(run.states[-1]) for run in runs]
    assert gaps == sorted(gaps, reverse=True) and distances == sorted(distances)
    assert distances[0] < 1e-5 < distances[1] < distances[3] / 2
    losses = [run.rounds[-1].metrics["loss"] for run in runs]
    assert losses[0] < losses[3]


def test_with_equal_data_the_graph_hardly_matters(label_sorted: dict[str, Any]) -> None:
    keys = {**label_sorted, "data_distribution_kind": "iid", "client_template": "local:Remembering"}
    accuracies = []
    for topology in ("mesh", "ring"):
        run = Gossiped(np.empty((16, 0)), 25, federated_learning_topology=topology, learning_rate=0.5, **keys)
        accuracies.append(run.rounds[-1].metrics["accuracy"])
    assert accuracies[0] > 0.9 and abs(accuracies[0] - accuracies[1]) <= 0.01


def test_d_psgd_on_the_complete_graph_is_fedavg(label_sorted: dict[str, Any]) -> None:
    """Equal weights, one full batch a round: W = 1/n makes every peer the server's model."""
    keys = {**label_sorted, "batch_size": 1000, "learning_rate": 0.2, "shuffle": False, "number_of_clients": 3}
    models = []
    for schema, topology in (("DecentralizedFederatedLearning", "mesh"), ("TraditionalFederatedLearning", "star")):
        data = {"federation_id": "id4", "schema": schema, "federated_learning_topology": topology, **keys}
        with InlineFabric(2) as fabric:
            result = Fabric(fabric.port).submit(FederationConfig.from_mapping(data)).result()
        models.append(result.state_dict())
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], rtol=0, atol=1e-6)
        assert float(tensor.abs().max()) > 0.05
