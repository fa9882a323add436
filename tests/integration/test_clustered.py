"""IFCA through the whole fabric: groups that are known are found, with the same bits on any number of clusters."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icrf import values
from icrf.client import Fabric, Result
from icrf.errors import ConfigError
from icrf.federation.node import FederatedNode
from icrf.learning.datasets import DATASETS, Dataset
from icrf.learning.models import register_model
from icrf.protocol import COMPLETED, STOP, RoundResult
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import fabrics_on_demand, follow, follow_until

CLUSTERED = {"schema": "ClusterFederatedLearning", "federated_learning_topology": "star", "federation_id": "groups"}
DIGITS = {
    **CLUSTERED,
    "number_of_models": 2,
    "number_of_clients": 7,
    "federated_learning_rounds": 3,
    "learning_rate": 0.1,
    "batch_size": 64,
    "client_template": "local:Counter",
}


# Every other node counts from one.
Counter = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "two_countings.py"))["Counter"]


# ---------------------------------------------------------------- two groups on a line through the origin

THETA = np.array([1.0, -2.0, 0.5])
NUM_SAMPLES = 60
_FEATURES = np.random.default_rng(5).normal(size=(NUM_SAMPLES, 3)).astype(np.float32)
_TARGETS = torch.from_numpy(_FEATURES.astype(np.float64) @ THETA)


class Linear(nn.Module):
    """One float64 vector w; the score of every class is w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(3, dtype=torch.float64))

    def forward(self, features: Any) -> Any:
        return (features @ self.w)[:, None].expand(-1, NUM_SAMPLES)


@register_model("test-linear")
def linear() -> nn.Module:
    return Linear()


@DATASETS.register("test-regression")
def regression(data_dir: str = "") -> Dataset:
    """The class of a sample is its number: the target is looked up by it."""
    numbers = np.arange(NUM_SAMPLES)
    return Dataset(_FEATURES, numbers, _FEATURES, numbers, NUM_SAMPLES, "test-regression")


class Regressor(FederatedNode):
    """Fits theta x at nodes of odd index, -theta x at the others."""

    def loss(self, scores: Any, labels: Any) -> Any:
        sign = 1.0 if self.context.index % 2 else -1.0
        return torch.square(scores[:, 0] - sign * _TARGETS[labels]).mean() / 2


class Teller(FederatedNode):
    """A server that says where a model is."""

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        return {f"w{k}": value for k, value in enumerate(self.context.model.flat.tolist())}


class Rounder(FederatedNode):
    """A server that leaves whole numbers in every model."""

    def aggregate(self, state: Any) -> Any:
        return np.round(state)


class Wordy(FederatedNode):
    """Its loss is a word."""

    def training_loss(self) -> Any:
        return "low"


class Lost(Counter):
    """One node cannot tell its models apart."""

    def training_loss(self) -> float:
        return float("nan") if self.id == "client_2" else super().training_loss()


@pytest.fixture(scope="module")
def fabrics() -> Iterator[Any]:
    """A fabric of so many clusters, started when it is asked for; it knows the node classes of this file."""
    templates = {f"local:{kind.__name__}": kind for kind in (Counter, Regressor, Teller, Rounder, Wordy, Lost)}
    with fabrics_on_demand(templates) as opened:
        yield opened


def run(fabric: InlineFabric, **keys: Any) -> Result:
    """A run that completes."""
    result = Fabric(fabric.port).submit(build_submission(FederationConfig.from_mapping(keys))).result()
    assert result.info.status == COMPLETED, result.info.error_json
    return result


def choices(found: RoundResult) -> dict[str, float]:
    """Which model each participant has trained."""
    return {name: metrics["model"] for name, metrics in found.node_metrics.items()}


def hashes(result: Result) -> list[str]:
    return [r.model_sha256 for r in result.rounds]


REGRESSION = {
    **CLUSTERED,
    "number_of_clients": 6,
    "federated_learning_rounds": 40,
    "local_steps": 10,
    "batch_size": 1_000_000,
    "learning_rate": 0.3,
    "model_type": "test-linear",
    "dataset_type": "test-regression",
    "client_template": "local:Regressor",
    "server_template": "local:Teller",
    "client_role": "train-eval",
}


@pytest.mark.parametrize("first", ["drawn", "loss"])
def test_each_model_reaches_the_optimum_of_its_group(fabrics: Any, first: str) -> None:
    result = run(fabrics(2), **REGRESSION, number_of_models=2, first_choice=first)
    last = result.metrics
    found = choices(result.rounds[-1])
    first_of_all = found["client_0"]  # node 1
    assert [found[f"client_{i}"] for i in range(6)] == [first_of_all, 1 - first_of_all] * 3
    for k in range(2):
        sign = 1.0 if k == first_of_all else -1.0
        place = [last[f"model_{k}_w{d}"] for d in range(3)]
        assert place == pytest.approx((sign * THETA).tolist(), abs=1e-9)
    state = result.state_dict()
    assert sorted(state) == ["model_0.w", "model_1.w"]
    assert result.load_model(1).w.tolist() == state["model_1.w"].tolist()
    with pytest.raises(ConfigError, match="C007"):
        result.load_model(2)


def test_one_model_for_both_groups_stays_between_them(fabrics: Any) -> None:
    plain = {**REGRESSION, "schema": "TraditionalFederatedLearning"}
    last = run(fabrics(2), **plain).metrics
    assert abs(np.array([last[f"w{d}"] for d in range(3)])).max() < 1.0
    apart = run(fabrics(2), **REGRESSION, number_of_models=2).metrics
    assert last["train_loss"] > 0.4 and apart["train_loss"] < 1e-12


def test_more_models_than_groups_leave_some_model_out(fabrics: Any) -> None:
    """Later rounds choose by loss alone: a model that suits nobody stays where it is, bit by bit."""
    result = run(fabrics(1), **REGRESSION, number_of_models=4)
    left_out = [k for k in range(4) if result.metrics[f"model_{k}_share"] == 0]
    assert left_out
    before, after = result.rounds[-2].metrics, result.rounds[-1].metrics
    assert before[f"model_{left_out[0]}_share"] == 0
    assert all(before[f"model_{left_out[0]}_w{d}"] == after[f"model_{left_out[0]}_w{d}"] for d in range(3))
    assert sum(result.metrics[f"model_{k}_share"] for k in range(4)) == pytest.approx(1.0)


@register_model("test-batch-norm")
def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


def test_each_model_has_the_running_statistics_of_its_group(fabrics: Any) -> None:
    """Every client makes the same number of steps of its own model: the counters tell what was averaged."""
    keys = {**DIGITS, "model_type": "test-batch-norm", "number_of_clients": 6, "batch_size": 1_000_000}
    result = run(fabrics(2), **keys, first_choice="loss", data_distribution_kind="iid")
    trained = [sum(r.metrics[f"model_{k}_share"] > 0 for r in result.rounds) for k in range(2)]
    state = result.state_dict()
    assert [int(state[f"model_{k}.1.num_batches_tracked"]) for k in range(2)] == trained
    assert not torch.equal(state["model_0.1.running_mean"], state["model_1.1.running_mean"])


def test_the_server_has_the_last_word_on_every_model(fabrics: Any) -> None:
    keys = {**REGRESSION, "federated_learning_rounds": 3, "server_template": "local:Rounder"}
    state = run(fabrics(2), **keys, number_of_models=2).state_dict()
    assert all(torch.equal(w, w.round()) and w.abs().sum() > 0 for w in state.values())


# ---------------------------------------------------------------- equal bits, and what they cost

VARIANTS: tuple[dict[str, Any], ...] = (
    {"data_distribution_kind": "dir"},
    {"aggregation_sample_scaling": False, "clip_norm": 0.5},
    {"client_fraction": 0.6, "federated_learning_rounds": 5},
    {"sampled_clients": 1, "federated_learning_rounds": 5, "first_choice": "loss"},
    {"number_of_models": 3, "aggregation_strategy": "FedProx", "mu": 0.1},
    {"model_type": "test-batch-norm"},
)


@pytest.mark.parametrize("keys", VARIANTS)
def test_every_round_has_the_same_bits_and_metrics_on_1_2_and_3_clusters(fabrics: Any, keys: dict[str, Any]) -> None:
    keys = {**DIGITS, **keys}
    one = run(fabrics(1), **keys)
    assert len(set(hashes(one))) == keys["federated_learning_rounds"]
    for clusters in (2, 3):
        many = run(fabrics(clusters), **keys)
        assert len(many.info.clusters) == clusters
        assert hashes(many) == hashes(one)
        assert [r.metrics for r in many.rounds] == [r.metrics for r in one.rounds]
        assert [r.node_metrics for r in many.rounds] == [r.node_metrics for r in one.rounds]
        assert many.state_dict().keys() == one.state_dict().keys()


@pytest.mark.parametrize("clusters", [2, 3])
@pytest.mark.parametrize("keys", [{}, {"client_fraction": 0.3, "federated_learning_rounds": 6}])
def test_the_bytes_are_those_of_the_plan(fabrics: Any, clusters: int, keys: dict[str, Any]) -> None:
    keys = {**DIGITS, "number_of_models": 3, **keys}
    plan = fabrics(clusters).port.plan(build_submission(FederationConfig.from_mapping(keys)))
    found = run(fabrics(clusters), **keys).info.bytes_inter_cluster
    assert found == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)
    if "client_fraction" not in keys:
        model = 4 * plan.num_parameters
        assert plan.bytes_inter_cluster_per_round == (3 * model + 3 * 2 * model + 3 * 8) * (clusters - 1)


# ---------------------------------------------------------------- accuracy, and what a node sees


def test_the_accuracy_is_that_of_the_models_which_the_clients_have_chosen(fabrics: Any) -> None:
    keys = {**DIGITS, "federated_learning_rounds": 10, "number_of_epochs": 2, "momentum": 0.9, "seed": 1}
    result = run(fabrics(2), **keys)
    last = result.metrics
    assert last["accuracy"] == result.info.accuracy > 0.9
    own = [metrics["accuracy"] for metrics in result.rounds[-1].node_metrics.values()]
    assert last["accuracy"] == pytest.approx(sum(own) / 7)
    assert last["model_0_share"] + last["model_1_share"] == 1.0
    # The server counts from nought: only one of the models suits its own data.
    of_the_server = sorted(last[f"model_{k}_accuracy"] for k in range(2))
    assert of_the_server[0] < 0.1 and of_the_server[1] > 0.9
    also = run(fabrics(2), **{**keys, "federated_learning_rounds": 2, "evaluate_clients": True}).metrics
    assert also["accuracy"] == also["test_accuracy"] and also["eval_accuracy"] > 0
    traditional = {**keys, "schema": "TraditionalFederatedLearning", "evaluate_clients": True}
    one_model = run(fabrics(2), **traditional).metrics
    assert one_model["test_accuracy"] < 0.6


def test_a_run_ends_when_the_chosen_models_reach_the_target(fabrics: Any) -> None:
    keys = {**DIGITS, "number_of_epochs": 2, "momentum": 0.9, "seed": 1}
    result = run(fabrics(2), **{**keys, "federated_learning_rounds": 20, "target_accuracy": 0.85})
    assert 1 < result.info.rounds_to_target == result.info.rounds_done < 20
    assert not any(name.startswith(("test_", "eval_")) for name in result.metrics)


def test_a_node_shows_the_model_that_it_has_chosen(fabrics: Any) -> None:
    fabric = fabrics(2)
    config = FederationConfig.from_mapping({**DIGITS, "federated_learning_rounds": 4, "seed": 1, "momentum": 0.9})
    run_id = fabric.port.submit(build_submission(config, keep=True)).run_id
    chosen = choices(follow_until(fabric, run_id, 4)[-1])
    nothing = values.encode([[], {}])
    shown = [values.decode(fabric.port.call_node(run_id, f"client_{i}", "pull_version", nothing)) for i in range(7)]
    fabric.port.advance(run_id, STOP)
    versions = [version["model"] for version in shown]
    for i in range(7):
        same = [j for j in range(7) if chosen[f"client_{j}"] == chosen[f"client_{i}"]]
        on_i = [j for j in range(7) if np.array_equal(versions[j]["output.bias"], versions[i]["output.bias"])]
        assert set(on_i) <= set(same)
    assert set(chosen.values()) == {0.0, 1.0}


@pytest.mark.parametrize(("template", "expected"), [("Wordy", "U002"), ("Lost", "")])
def test_a_loss_that_is_no_number(fabrics: Any, template: str, expected: str) -> None:
    """A word is an error that names its node; NaN is a loss like infinity: the first model."""
    config = FederationConfig.from_mapping({**DIGITS, "client_template": f"local:{template}"})
    info = fabrics(2).port.submit(build_submission(config))
    info, rounds = follow(fabrics(2), info.run_id)
    if expected:
        assert expected in info.error_json and "training_loss returned str" in info.error_json
    else:
        assert info.status == COMPLETED
        assert [choices(r)["client_2"] for r in rounds[1:]] == [0.0, 0.0]


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_models_that_are_lost_come_back_from_checkpoints(cluster: str) -> None:
    keys = {**DIGITS, "checkpoint_every": 2, "federated_learning_rounds": 6}
    pins = {"server": "local-1", "client_0": "local-2", "client_1": "local-1"}
    with InlineFabric(2, templates={"local:Counter": Counter}) as fabric:
        expected = run(fabric, **keys)
        config = FederationConfig.from_mapping({**keys, "federated_learning_rounds": 3, "placement": pins})
        run_id = fabric.port.submit(build_submission(config, keep=True)).run_id
        follow_until(fabric, run_id, 3)
        for slot in range(2):
            fabric.substrates[cluster].kill_host(run_id, slot)
        fabric.restart_mediator()
        fabric.port.advance(run_id, "run", 6)
        found = follow_until(fabric, run_id, 6)
    assert [r.model_sha256 for r in found] == hashes(expected)
    assert [r.metrics for r in found] == [r.metrics for r in expected.rounds]
    # Nodes keep nothing: a cluster without the server is set up again, and the run goes on.
    assert (found[-1].generation == 1) == (cluster == "local-2")


class Stubborn(Counter):
    """Whoever chose a model with a number wants it again: its losses depend on what it has chosen."""

    def training_loss(self) -> float:
        return super().training_loss() * (-1.0 if self.chosen_model else 1.0)


def test_a_choice_does_not_depend_on_what_a_host_remembers() -> None:
    def trained(killed: bool) -> list[str]:
        with InlineFabric(1, templates={"local:Counter": Stubborn}) as inline:
            run = Fabric(inline.port).submit(FederationConfig.from_mapping(DIGITS))
            rounds = {}
            for result in run.rounds():
                if killed and result.number == 1 and result.number not in rounds:
                    inline.substrates["local-1"].kill_host(run.id, 1)
                rounds[result.number] = result.model_sha256
            assert run.info().status == COMPLETED
            return list(rounds.values())

    assert trained(killed=True) == trained(killed=False)
