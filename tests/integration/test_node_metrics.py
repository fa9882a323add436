"""What every node reported is kept beside the averages, and decides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icrf.client import Fabric
from icrf.federation.node import FederatedNode
from icrf.protocol import RoundResult
from icrf.spec import FederationConfig
from icrf.testing.inline import InlineFabric

RING: dict[str, Any] = {
    "federation_id": "by-node",
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "federated_learning_topology": "ring",
    "number_of_clients": 4,
    "federated_learning_rounds": 2,
    "evaluate_every": 2,
}
STAR = {
    **RING,
    "federated_learning_schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
}


class Talkative(FederatedNode):
    """Reports more than the loss, and more names than are kept."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        return {"loss": float(self.context.index), **{f"m{k:02d}": float(k) for k in range(20)}}


def finished(values: dict[str, Any], clusters: int, template: type | None = None) -> list[RoundResult]:
    templates = {"local:Node": template} if template else {}
    with InlineFabric(clusters, templates=templates) as inline:
        if template:
            values = {**values, "client_template": "local:Node"}
        run = Fabric(inline.port).submit(FederationConfig.from_mapping(values))
        return list(run.rounds())


@pytest.mark.parametrize("values", [STAR, RING], ids=["star", "ring"])
def test_nodes_are_kept_in_evaluated_rounds_and_averaged_in_all(values: dict[str, Any]) -> None:
    rounds = {clusters: finished(values, clusters) for clusters in (1, 3)}
    first, second = rounds[3]
    assert first.node_metrics == {} and "train_loss" in first.metrics
    assert set(second.node_metrics) == {f"client_{i}" for i in range(4)}
    assert all(set(found) == {"train_loss"} for found in second.node_metrics.values())
    losses = [found["train_loss"] for found in second.node_metrics.values()]
    assert min(losses) < second.metrics["train_loss"] < max(losses)
    assert rounds[1][1].node_metrics == second.node_metrics


def test_each_node_has_its_own_values_and_a_bounded_number_of_them() -> None:
    (_, second) = finished(RING, 2, Talkative)
    assert [second.node_metrics[f"client_{i}"]["train_loss"] for i in range(4)] == [0.0, 1.0, 2.0, 3.0]
    assert {len(found) for found in second.node_metrics.values()} == {16}
    assert len(second.metrics) > 16


def test_large_federations_have_the_averages_only() -> None:
    small = {"number_of_epochs": 0, "model_type": "mlp", "federated_learning_rounds": 1, "evaluate_every": 1}
    (only,) = finished({**STAR, **small, "number_of_clients": 256}, 1)
    assert only.node_metrics == {} and "train_loss" in only.metrics


def test_the_run_folder_has_a_line_of_nodes_per_evaluated_round(tmp_path: Path) -> None:
    with InlineFabric(2) as inline:
        run = Fabric(inline.port).submit(FederationConfig.from_mapping({**RING, "number_of_clients": 11}))
        run.save(tmp_path)
    (line,) = [json.loads(text) for text in (tmp_path / "nodes.jsonl").read_text().splitlines()]
    assert line["round"] == 2
    assert list(line["nodes"]) == [f"client_{i}" for i in range(11)]
    assert "node_metrics" not in (tmp_path / "rounds.jsonl").read_text()
