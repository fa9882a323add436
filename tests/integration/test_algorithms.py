"""Every aggregation rule through the whole fabric: identities, equal bits, attacks, crashes, traffic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from icrf.errors import ConfigError, ConfigErrors
from icrf.federation.node import FederatedNode
from icrf.learning.aggregation import ClientUpdate, FedAvg, MeanAggregator, RoundFacts
from icrf.learning.datasets import load_dataset
from icrf.learning.models import register_model
from icrf.protocol import RoundResult, Rows, RunInfo
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, fabrics_on_demand, follow, follow_until

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star", "federation_id": "rules"}
DIGITS = {
    "number_of_clients": 7,
    "federated_learning_rounds": 3,
    "learning_rate": 0.1,
    "batch_size": 64,
    "data_distribution_kind": "dir",
}
MERGING: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"mu": 0.1},
    "SCAFFOLD": {"momentum": 0.5},
    "FedNova": {"momentum": 0.9},
    "FedAvgM": {},
    "FedAdagrad": {"server_learning_rate": 0.02},
    "FedAdam": {"server_learning_rate": 0.02, "clip_norm": 0.5},
    "FedYogi": {"server_learning_rate": 0.02},
    "DiLoCo": {"optimizer": "AdamW", "learning_rate": 0.003, "local_steps": 5},
}
ROBUST: dict[str, dict[str, Any]] = {
    "Median": {},
    "TrimmedMean": {"num_byzantine": 2},
    "Krum": {"num_byzantine": 2},
    "MultiKrum": {"num_byzantine": 1, "clip_norm": 0.5},
}
RULES = {**MERGING, **ROBUST}


@pytest.fixture(scope="module")
def fabrics() -> Iterator[Any]:
    """A fabric of so many clusters, started when it is asked for; it knows the node classes of this file."""
    templates = {f"local:{kind.__name__}": kind for kind in (SignFlipper, Broken)}
    with fabrics_on_demand(templates) as opened:
        yield opened


def run(fabric: InlineFabric, **keys: Any) -> tuple[RunInfo, list[RoundResult]]:
    """A run that completes, and its rounds."""
    return completed(fabric, build_submission(FederationConfig.from_mapping({**STAR, **keys})))


def hashes(rounds: list[RoundResult]) -> list[str]:
    return [r.model_sha256 for r in rounds]


# ---------------------------------------------------------------- equal bits, and what they are made of


@pytest.mark.parametrize(
    ("name", "scaling"), [*((name, True) for name in RULES), *((n, False) for n in ("FedAvg", "SCAFFOLD", "FedNova"))]
)
def test_every_round_has_the_same_bits_on_1_2_and_3_clusters(fabrics: Any, name: str, scaling: bool) -> None:
    keys = {**DIGITS, **RULES[name], "aggregation_strategy": name, "aggregation_sample_scaling": scaling}
    info, one = run(fabrics(1), **keys)
    assert len(set(hashes(one))) == 3 and [r.participants for r in one] == [7] * 3
    for clusters in (2, 3):
        found, many = run(fabrics(clusters), **keys)
        assert len(found.clusters) == clusters
        assert hashes(many) == hashes(one)
        assert found.model_sha256 == info.model_sha256
        assert [r.metrics for r in many] == [r.metrics for r in one]


SAMPLED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SCAFFOLD", {"sampled_clients": 1}),
    ("SCAFFOLD", {"client_fraction": 0.6, "aggregation_sample_scaling": False}),
    ("DiLoCo", {"sampled_clients": 2}),
    ("Krum", {"sampled_clients": 5, "num_byzantine": 1}),
)


@pytest.mark.parametrize(("name", "keys"), SAMPLED)
def test_rounds_of_some_of_the_clients_have_the_same_bits_too(fabrics: Any, name: str, keys: dict[str, Any]) -> None:
    """Whoever is not drawn keeps what it has, on a cluster that nobody was drawn from too."""
    keys = {**DIGITS, **RULES[name], "aggregation_strategy": name, **keys, "federated_learning_rounds": 5}
    _, one = run(fabrics(1), **keys)
    drawn = {r.participants_bitmap for r in one}
    assert {r.participants for r in one} == {keys.get("sampled_clients") or 4} and len(drawn) > 1
    for clusters in (2, 3):
        found, many = run(fabrics(clusters), **keys)
        assert hashes(many) == hashes(one)
        plan = fabrics(clusters).port.plan(build_submission(FederationConfig.from_mapping({**STAR, **keys})))
        assert found.bytes_inter_cluster == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)


def test_what_nodes_keep_and_rounds_without_a_cluster_contradict_each_other() -> None:
    keys = {**DIGITS, **RULES["SCAFFOLD"], "aggregation_strategy": "SCAFFOLD", "min_nodes": 3}
    with pytest.raises(ConfigError, match=r"C008.*min_nodes 3 contradicts aggregation_strategy SCAFFOLD"):
        build_submission(FederationConfig.from_mapping({**STAR, **keys}))


def test_a_robust_rule_needs_enough_of_those_that_are_drawn() -> None:
    keys = {**DIGITS, "aggregation_strategy": "Krum", "num_byzantine": 1, "sampled_clients": 4}
    with pytest.raises(ConfigErrors, match=r"C008.*4 participants in a round: Krum needs 5"):
        FederationConfig.from_mapping({**STAR, **keys})


def test_rules_differ_from_each_other(fabrics: Any) -> None:
    last = {
        name: run(fabrics(1), **{**DIGITS, **keys, "aggregation_strategy": name})[0].model_sha256
        for name, keys in RULES.items()
    }
    assert len(set(last.values())) == len(RULES)
    plain = run(fabrics(1), **DIGITS, aggregation_sample_scaling=False)[0].model_sha256
    assert plain not in last.values()


@pytest.mark.parametrize("name", ["FedAvg", "SCAFFOLD", "FedNova", "Krum"])
@pytest.mark.parametrize("clusters", [2, 3])
def test_the_bytes_are_those_of_the_plan(fabrics: Any, name: str, clusters: int) -> None:
    keys = {**DIGITS, **RULES[name], "aggregation_strategy": name}
    fabric = fabrics(clusters)
    plan = fabric.port.plan(build_submission(FederationConfig.from_mapping({**STAR, **keys})))
    info, _ = run(fabric, **keys)
    assert info.bytes_inter_cluster == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)
    model = 4 * plan.num_parameters
    remote = sum(1 for cluster in plan.assignment.values() if cluster != plan.assignment["server"])
    per_round = {
        "FedAvg": 3 * model * (clusters - 1),
        "SCAFFOLD": 6 * model * (clusters - 1),
        "FedNova": (3 * model + 8) * (clusters - 1),
        "Krum": model * (clusters - 1) + model * remote,
    }
    assert plan.bytes_inter_cluster_per_round == per_round[name]


# ---------------------------------------------------------------- identities


@register_model("test-softmax64")
def softmax64(input_shape: Any, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_classes).double())


FULL_BATCH = {
    **DIGITS,
    "model_type": "test-softmax64",
    "batch_size": 1_000_000,
    "learning_rate": 0.5,
    "federated_learning_rounds": 4,
}


def gradient_descent(rounds: int) -> float:
    """Test loss after full-batch steps over all data, float64."""
    from icrf.learning.models import build_model  # noqa: PLC0415
    from icrf.learning.rng import derive_seed  # noqa: PLC0415

    data = load_dataset("digits")
    module = build_model("test-softmax64", data.input_shape, data.num_classes, derive_seed(0, 0, 0, "model"))
    stepper = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(rounds):
        stepper.zero_grad()
        scores = module(torch.from_numpy(data.train_x).double())
        functional.cross_entropy(scores, torch.from_numpy(data.train_y)).backward()
        stepper.step()
    with torch.no_grad():
        scores = module(torch.from_numpy(data.test_x).double())
        return float(functional.cross_entropy(scores, torch.from_numpy(data.test_y)))


@pytest.mark.parametrize("name", ["FedAvg", "SCAFFOLD", "FedNova", "DiLoCo"])
def test_one_step_on_the_full_batch_is_gradient_descent(fabrics: Any, name: str) -> None:
    """FedSGD; SCAFFOLD with K = 1; DiLoCo with H = 1 and SGD at both ends is synchronous data-parallel SGD."""
    keys = {"DiLoCo": {"local_steps": 1, "server_learning_rate": 1.0, "server_momentum": 0.0}}.get(name, {})
    _, rounds = run(fabrics(2), **FULL_BATCH, **keys, aggregation_strategy=name)
    assert rounds[-1].metrics["loss"] == pytest.approx(gradient_descent(4), rel=1e-10)


@pytest.mark.parametrize(
    "keys",
    [
        {"aggregation_strategy": "FedAvgM", "server_momentum": 0.0},
        {"aggregation_strategy": "FedProx", "mu": 0},
        {"aggregation_strategy": "DiLoCo", "server_learning_rate": 1, "server_momentum": 0},
    ],
    ids=lambda keys: keys["aggregation_strategy"],
)
def test_rules_without_their_effect_are_fedavg_bit_by_bit(fabrics: Any, keys: dict[str, Any]) -> None:
    assert hashes(run(fabrics(2), **DIGITS, **keys)[1]) == hashes(run(fabrics(2), **DIGITS)[1])


def test_local_steps_are_those_of_the_epochs_they_replace(fabrics: Any) -> None:
    """Seven nodes of about 205 samples make four batches of 64 an epoch; as steps they are drawn alike."""
    iid = {**DIGITS, "data_distribution_kind": "iid"}
    epochs = run(fabrics(1), **iid, number_of_epochs=2)[1]
    assert hashes(run(fabrics(1), **iid, local_steps=8)[1]) == hashes(epochs)
    assert hashes(run(fabrics(1), **iid, local_steps=7)[1]) != hashes(epochs)


def test_the_inner_optimizer_of_diloco_outlives_the_round(fabrics: Any) -> None:
    """One node: with a neutral server, two rounds of one step are one round of two, in moments too."""
    keys = {
        **DIGITS,
        "number_of_clients": 1,
        "data_distribution_kind": "iid",
        "batch_size": 1_000_000,
        "optimizer": "AdamW",
        "learning_rate": 0.01,
        "model_type": "test-softmax64",
        "shuffle": False,
    }
    diloco = {**keys, "aggregation_strategy": "DiLoCo", "server_learning_rate": 1, "server_momentum": 0}
    often = run(fabrics(1), **{**diloco, "federated_learning_rounds": 6, "local_steps": 1})[1][-1].metrics
    rarely = run(fabrics(1), **{**diloco, "federated_learning_rounds": 2, "local_steps": 3})[1][-1].metrics
    assert often["loss"] == pytest.approx(rarely["loss"], rel=1e-10)
    afresh = {**keys, "federated_learning_rounds": 6, "local_steps": 1, "aggregation_strategy": "FedAvg"}
    assert run(fabrics(1), **afresh)[1][-1].metrics["loss"] != pytest.approx(often["loss"], rel=1e-3)


@pytest.mark.slow
def test_diloco_exchanges_a_twentieth_for_a_model_as_good(fabrics: Any) -> None:
    keys = {**DIGITS, **RULES["DiLoCo"], "aggregation_strategy": "DiLoCo", "number_of_clients": 4, "batch_size": 32}
    keys |= {"data_distribution_kind": "iid", "evaluate_every": 1000, "learning_rate": 0.001, "checkpoint_every": 0}
    often, one = run(fabrics(4), **{**keys, "local_steps": 1, "federated_learning_rounds": 400})
    rarely, twenty = run(fabrics(4), **{**keys, "local_steps": 20, "federated_learning_rounds": 20})
    # But for the width of round numbers in headers.
    assert often.bytes_inter_cluster == pytest.approx(20 * rarely.bytes_inter_cluster, rel=1e-4)
    assert one[-1].metrics["accuracy"] > 0.94
    assert twenty[-1].metrics["accuracy"] > one[-1].metrics["accuracy"] - 0.015


# ---------------------------------------------------------------- participants that send anything


class SignFlipper(FederatedNode):
    """Two of ten send their change backwards and ten times as large."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        before = self.context.model.snapshot()
        metrics = super().train(**kwargs)
        if self.id in ("client_3", "client_8"):
            self.context.model.load(before - 10 * (self.context.model.flat - before))
        return metrics


class Broken(FederatedNode):
    """One of the nodes sends what is no number."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        if self.id == "client_4":
            self.context.model.flat[7] = np.nan
        return {}


ATTACKED = {
    **DIGITS,
    "number_of_clients": 10,
    "data_distribution_kind": "iid",
    "federated_learning_rounds": 8,
    "number_of_epochs": 2,
    "batch_size": 16,
    "momentum": 0.9,
}


def test_robust_rules_learn_under_attack_where_the_mean_does_not(fabrics: Any) -> None:
    clean = run(fabrics(2), **ATTACKED)[1][-1].metrics["accuracy"]
    attacked = {**ATTACKED, "client_template": "local:SignFlipper"}
    assert clean > 0.9
    assert run(fabrics(2), **attacked)[1][-1].metrics["accuracy"] < 0.4
    for name in ("Median", "TrimmedMean", "Krum", "MultiKrum"):
        needed = {} if name == "Median" else {"num_byzantine": 2}
        found = run(fabrics(2), **attacked, **needed, aggregation_strategy=name)[1][-1].metrics["accuracy"]
        assert found > clean - (0.03 if name != "Krum" else 0.06), name


# ---------------------------------------------------------------- one's own rule, and refusals


class Cautious(MeanAggregator):
    """Half of the way; named as ``module:attr`` below."""

    def __init__(self, learning_rate: float) -> None:
        self.share = 0.5 if learning_rate else 0.0

    def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
        out[0][:] = previous[0] + self.share * (mean[0] - previous[0])


def test_a_rule_of_ones_own_is_named_by_its_path(fabrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_rules", sys.modules[__name__])
    name = "my_rules:Cautious"
    found = [hashes(run(fabrics(n), **DIGITS, aggregation_strategy=name)[1]) for n in (1, 2)]
    assert found[0] == found[1] != hashes(run(fabrics(1), **DIGITS)[1])


class Failing(MeanAggregator):
    """Divides by nothing."""

    def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
        out[0][:] = mean[0] / (facts.number - 1 // 0)


class Exiting(MeanAggregator):
    """Would end the process of its host."""

    def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
        sys.exit(0)


@pytest.mark.parametrize(("rule", "reason"), [("Failing", "ZeroDivisionError"), ("Exiting", "SystemExit")])
def test_a_rule_that_raises_is_named(fabrics: Any, monkeypatch: pytest.MonkeyPatch, rule: str, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "my_rules", sys.modules[__name__])
    config = FederationConfig.from_mapping({**STAR, **DIGITS, "aggregation_strategy": f"my_rules:{rule}"})
    info = fabrics(2).port.submit(build_submission(config))
    error = follow(fabrics(2), info.run_id)[0].error_json
    assert "U001" in error and reason in error and f"my_rules:{rule} on local-" in error


class Noisy(FedAvg):
    """Draws from the global generator, on the nodes and at the server."""

    def contribution(self, update: ClientUpdate) -> np.ndarray:
        update.out[:] = update.trained + 1e-3 * np.random.standard_normal(len(update.trained))
        return update.out

    def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
        out[0][:] = mean[0] + 1e-3 * np.random.standard_normal(len(mean[0]))


def test_a_rule_that_draws_gets_the_same_numbers_everywhere(fabrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_rules", sys.modules[__name__])
    found = []
    for clusters in (1, 2):
        np.random.seed(clusters)
        found.append(hashes(run(fabrics(clusters), **DIGITS, aggregation_strategy="my_rules:Noisy")[1]))
    assert found[0] == found[1]


def test_a_rule_of_other_rows_than_those_submitted_is_refused(fabrics: Any) -> None:
    keys = {**STAR, **DIGITS, "aggregation_strategy": "SCAFFOLD"}
    submission = build_submission(FederationConfig.from_mapping(keys))
    info = fabrics(2).port.submit(replace(submission, rows=replace(submission.rows, up=1, server=1)))
    assert "is not the one that was submitted" in follow(fabrics(2), info.run_id)[0].error_json


def test_non_finite_updates_of_a_robust_rule_name_their_node(fabrics: Any) -> None:
    keys = {**STAR, **DIGITS, "aggregation_strategy": "Median", "client_template": "local:Broken"}
    info = fabrics(2).port.submit(build_submission(FederationConfig.from_mapping(keys)))
    error = follow(fabrics(2), info.run_id)[0].error_json
    assert "W020" in error and "client_4 on local-" in error


class Swelling(MeanAggregator):
    """Keeps a row that soon leaves the range of its type."""

    rows = Rows(server=2)

    def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
        out[0][:] = mean[0]
        with np.errstate(over="ignore"):
            out[1][:] = (previous[1] + 1.0) * np.float32(1e30)


def test_what_a_rule_keeps_must_stay_finite(fabrics: Any) -> None:
    """A round that no checkpoint could bring back is not committed."""
    keys = {**STAR, **DIGITS, "aggregation_strategy": f"{__name__}:Swelling"}
    info = fabrics(2).port.submit(build_submission(FederationConfig.from_mapping(keys)))
    info, rounds = follow(fabrics(2), info.run_id)
    assert [r.number for r in rounds] == [1]
    assert "W020" in (error := info.error_json) and "Swelling keeps for" in error


# ---------------------------------------------------------------- crashes


@pytest.mark.parametrize("name", ["SCAFFOLD", "DiLoCo", "FedYogi"])
@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_state_that_is_lost_comes_back_from_checkpoints(name: str, cluster: str) -> None:
    """Whatever a rule keeps, at the server and at the nodes, is restored with the model: the hashes are the same."""
    keys = {**STAR, **DIGITS, **RULES[name], "aggregation_strategy": name, "checkpoint_every": 2}
    pins = {"server": "local-1", "client_0": "local-2", "client_1": "local-1"}
    with InlineFabric(2) as fabric:
        expected = run(fabric, **{**keys, "federated_learning_rounds": 6})[1]
        config = FederationConfig.from_mapping({**keys, "federated_learning_rounds": 3, "placement": pins})
        run_id = fabric.port.submit(build_submission(config, keep=True)).run_id
        assert len(follow_until(fabric, run_id, 3)) == 3
        for slot in range(2):
            fabric.substrates[cluster].kill_host(run_id, slot)
        fabric.port.advance(run_id, "run", 6)
        found = follow_until(fabric, run_id, 6)
    assert [r.model_sha256 for r in found] == hashes(expected)
    # FedYogi keeps its state at the server only: the other cluster's hosts are set up again, and go on.
    assert (found[-1].generation == 1) == (name == "FedYogi" and cluster == "local-2")


def test_a_new_mediator_knows_what_a_rule_moves_and_keeps() -> None:
    keys = {**STAR, **DIGITS, **RULES["SCAFFOLD"], "aggregation_strategy": "SCAFFOLD"}
    with InlineFabric(2) as fabric:
        expected = run(fabric, **{**keys, "federated_learning_rounds": 5})[1]
        run_id = fabric.port.submit(build_submission(FederationConfig.from_mapping(keys), keep=True)).run_id
        follow_until(fabric, run_id, 3)
        fabric.restart_mediator()
        fabric.port.advance(run_id, "run", 5)
        found = follow_until(fabric, run_id, 5)
    assert [r.model_sha256 for r in found] == hashes(expected)
