"""Strategies and communities move nodes between clusters, and no bit of a model."""

from __future__ import annotations

from typing import Any

import pytest

from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

CONFIG = {
    "federation_id": "placed",
    "federated_learning_topology": "ring",
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "number_of_clients": 8,
    "federated_learning_rounds": 2,
    "number_of_epochs": 1,
    "dataset_type": "digits",
    "model_type": "logistic",
    "data_distribution_kind": "pathological",
}


def outcome(clusters: int, **keys: Any) -> tuple[str, dict[str, str], int]:
    """Hash of the model, where nodes lived, and the bytes that crossed."""
    with InlineFabric(clusters, num_slots=2) as fabric:
        submission = build_submission(FederationConfig.from_mapping({**CONFIG, **keys}))
        plan = fabric.port.plan(submission)
        run = fabric.port.submit(submission)
        for _ in fabric.port.watch(run.run_id):
            pass
        info = fabric.port.get(run.run_id)
    assert (info.status, info.error_json) == ("COMPLETED", "")
    return info.model_sha256, plan.assignment, info.bytes_inter_cluster


def test_communities_and_strategies_change_no_bit() -> None:
    model, alone, nothing = outcome(1)
    assert nothing == 0 and len(set(alone.values())) == 1
    found = [
        outcome(2),
        outcome(2, do_cluster=True),
        outcome(3, do_cluster=True),
        outcome(2, assignment_strategy="random"),
    ]
    assert {each[0] for each in found} == {model}
    assert found[0][1] != found[1][1] and found[0][2] < found[3][2]


@pytest.mark.parametrize("strategy", ["metis", "louvain", "capacity"])
def test_every_strategy_runs(strategy: str) -> None:
    assert outcome(2, assignment_strategy=strategy, federated_learning_rounds=1)[2] > 0
