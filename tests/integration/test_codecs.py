"""``inter_cluster_codec`` on a whole fabric without Ray: whatever it does to values, placement changes no bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from icrf.protocol import RoundResult
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, facts

NUM_CLIENTS = 6
STAR = {"federated_learning_schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PEERS = {
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "federated_learning_topology": "ring",
}


def configured(codec: str, **more: Any) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": "codecs",
            **STAR,
            "number_of_clients": NUM_CLIENTS,
            "federated_learning_rounds": 4,
            "number_of_epochs": 1,
            "dataset_type": "digits",
            "model_type": "mlp",
            "evaluate_every": 2,
            "inter_cluster_codec": codec,
            **more,
        }
    )


def outcome(codec: str, clusters: int, **more: Any) -> tuple[str, list[RoundResult]]:
    with InlineFabric(clusters) as fabric:
        info, rounds = completed(fabric, build_submission(configured(codec, **more)))
    assert len(info.clusters) == clusters
    return info.model_sha256, rounds


@cache
def alone(codec: str, **more: Any) -> tuple[str, list[Any]]:
    model, rounds = outcome(codec, 1, **more)
    return model, [facts(r) for r in rounds]


def crossed(rounds: list[RoundResult]) -> int:
    return sum(r.bytes_inter_cluster for r in rounds)


@pytest.mark.parametrize("clusters", [2, 3])
@pytest.mark.parametrize(
    "codec, more",
    [
        ("zstd", {}),
        ("bf16", {}),
        ("top_k", {"top_k_fraction": 0.05}),
        ("top_k", {"aggregation_strategy": "FedAdam", "client_fraction": 0.5}),
        ("top_k", {"aggregation_strategy": "Median"}),
        ("bf16", {"aggregation_strategy": "DiLoCo", "momentum": 0.9, "learning_rate": 0.01}),
        ("zstd", PEERS),
        ("bf16", PEERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))[:40],
)
def test_a_codec_gives_the_same_bits_on_any_number_of_clusters(codec: str, more: dict[str, Any], clusters: int) -> None:
    model, rounds = outcome(codec, clusters, **more)
    assert (model, [facts(r) for r in rounds]) == alone(codec, **more)
    assert sum(r.bytes_saved for r in rounds) > 0.1 * crossed(rounds) > 0
