"""Nodes that train together on a whole fabric without Ray: near the rounds of nodes that train one by one, with the
same bits on any number of clusters and slots, and after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import error_from_json
from icrf.federation.node import FederatedNode
from icrf.learning.training import LocalTrainer
from icrf.protocol import CENTRALIZED, DECENTRALIZED, HIERARCHICAL, RoundResult, RunInfo
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.round_driver import CLUSTER, RUN, RoundDriver, activation, restored
from icrf.testing.runs import follow
from icrf_agent.inline_substrate import InlineSubstrate
from icrf_agent.runtime import HostedRuntime

WIDTH = 3
STAR = {
    "federation_id": "together",
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 7,
    "federated_learning_rounds": 2,
    "number_of_epochs": 2,
    "data_distribution_kind": "dir",
    "model_type": "logistic",
}
RING = {"federated_learning_schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
KINDS: dict[str, dict[str, Any]] = {
    "FedAvg": {"clip_norm": 0.5, "evaluate_clients": True},
    "FedProx": {"aggregation_strategy": "FedProx", "mu": 0.1, "client_fraction": 0.7},
    "SCAFFOLD": {"aggregation_strategy": "SCAFFOLD", "momentum": 0.5},
    "FedNova": {"aggregation_strategy": "FedNova", "local_steps": 5},
    "DiLoCo": {"aggregation_strategy": "DiLoCo", "optimizer": "AdamW", "learning_rate": 0.003},
    "Median": {"aggregation_strategy": "Median"},
    "private": {"private_keys": ["*bias"]},
    "clustered": {"federated_learning_schema": "ClusterFederatedLearning", "number_of_models": 2, "model_type": "mlp"},
    "hierarchy": {
        "federated_learning_schema": "HierarchicalFederatedLearning",
        "federated_learning_topology": "hierarchy",
    },
    "ring": RING,
    "push sum": {**RING, "directed": True, "mixing": "push_sum", "private_keys": ["*bias"]},
}


def run(
    clusters: int, num_slots: int, templates: Mapping[str, type] | None = None, **keys: Any
) -> tuple[RunInfo, list[RoundResult]]:
    """A run that has ended, and its rounds."""
    config = FederationConfig.from_mapping({**STAR, **keys})
    with InlineFabric(clusters, num_slots=num_slots, templates=templates) as fabric:
        return follow(fabric, fabric.port.submit(build_submission(config)).run_id)


def completed(clusters: int, num_slots: int, **keys: Any) -> list[tuple[Any, ...]]:
    """Everything of the rounds that must not depend on where nodes live."""
    info, rounds = run(clusters, num_slots, **keys)
    assert (info.status, info.error_json) == ("COMPLETED", "")
    return [(r.model_sha256, r.consensus_sha256, r.participants, dict(r.metrics)) for r in rounds]


@pytest.mark.parametrize("kind", KINDS)
def test_any_placement_gives_the_same_bits_and_what_one_by_one_gives_nearly(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KINDS[kind]
    one_by_one = completed(1, 2, **keys)
    trained: list[int] = []
    train = LocalTrainer.train

    def counted(trainer: LocalTrainer, *arguments: Any, **keywords: Any) -> Any:
        trained.append(1)
        return train(trainer, *arguments, **keywords)

    monkeypatch.setattr(LocalTrainer, "train", counted)
    together = completed(1, 1, vectorize=WIDTH, **keys)
    assert trained == []
    assert completed(2, 2, vectorize=WIDTH, **keys) == together
    assert completed(3, 1, vectorize=WIDTH, **keys) == together
    assert [r[2] for r in together] == [r[2] for r in one_by_one]
    for found, wanted in zip(together, one_by_one, strict=True):
        assert found[3] == pytest.approx(wanted[3], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("flow", [CENTRALIZED, DECENTRALIZED, HIERARCHICAL])
def test_a_round_that_is_run_again_has_the_same_bits(flow: str) -> None:
    def hashes(kill: bool) -> dict[int, str]:
        async def main() -> dict[int, str]:
            substrate = InlineSubstrate()
            runtime = HostedRuntime(CLUSTER, substrate)
            await runtime.start()
            driver = RoundDriver(runtime, activation(flow, vectorize=4, model_type="logistic"))
            try:
                await driver.activate()
                await driver.round(1)
                checkpoint = await runtime.checkpoint(RUN, 1)
                if kill:
                    substrate.kill_host(RUN, 0)
                    error = await driver.fails(2)
                    assert await runtime.recover(RUN, error) == "restore"
                    await driver.activate(replace(restored(driver.request, 1), num_slots=1), checkpoint)
                await driver.round(2)
                await driver.round(3)
            finally:
                await runtime.close()
            return driver.hashes

        return asyncio.run(main())

    assert hashes(kill=True) == hashes(kill=False)


class Own(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        return {"loss": 0.0}


class OwnLoss(FederatedNode):
    def loss(self, scores: Any, labels: Any) -> Any:
        return 2.0 * super().loss(scores, labels)


class FirstTen(FederatedNode):
    """The built-in training on less data."""

    def build(self, **kwargs: Any) -> None:
        x, y = self.train_data
        self.context.train_data = x[:10].clone(), y[:10].clone()


@pytest.mark.parametrize(("template", "method"), [(Own, "train"), (OwnLoss, "loss")])
def test_nodes_that_train_in_their_own_way_are_refused_by_name(template: type, method: str) -> None:
    name = f"local:{template.__name__}"
    info, rounds = run(1, 2, {name: template}, client_template=name, vectorize=WIDTH)
    error = error_from_json(info.error_json)
    assert (info.status, rounds, error.code) == ("FAILED", [], "C008")
    assert f"vectorize {WIDTH} contradicts client_template {template.__name__}, which has its own {method}" in str(
        error
    )


def test_nodes_with_data_of_their_own_train_together_too() -> None:
    found = []
    for width in ("off", WIDTH):
        info, rounds = run(1, 2, {"local:F": FirstTen}, client_template="local:F", vectorize=width, batch_size=4)
        assert (info.status, info.error_json) == ("COMPLETED", "")
        found.append(dict(rounds[-1].metrics))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_what_a_model_raises_in_training_names_a_node() -> None:
    class Late(FederatedNode):
        def build(self, **kwargs: Any) -> None:
            x, y = self.train_data
            self.context.train_data = x[:, :5].clone(), y

    info, _ = run(1, 1, {"local:L": Late}, client_template="local:L", vectorize=WIDTH)
    error = error_from_json(info.error_json)
    assert (info.status, error.code) == ("FAILED", "U001")
    assert "client_" in error.place and "and 2 more on local-1, train" in error.place


def test_a_loss_that_is_no_number_is_refused_as_elsewhere() -> None:
    info, _ = run(1, 1, vectorize=WIDTH, learning_rate=1e6, optimizer="AdamW", weight_decay=1e5, number_of_epochs=9)
    error = error_from_json(info.error_json)
    assert (info.status, error.code) == ("FAILED", "W020")
    assert "client_" in error.place
