"""The headline promise on a whole fabric without Ray: where nodes live changes no bit of any round."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from icrf.federation.node import FederatedNode
from icrf.learning.models import register_model
from icrf.protocol import NodeSpec
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, facts

NUM_CLIENTS = 6
SCHEMAS = {"star": "TraditionalFederatedLearning", "ring": "DecentralizedFederatedLearning"}
NODES = {
    "star": ["server", *(f"client_{i}" for i in range(NUM_CLIENTS))],
    "ring": [f"client_{i}" for i in range(NUM_CLIENTS)],
}

# Cluster per node (the server is the last one), and hosts per cluster.
placements = st.tuples(
    st.lists(st.integers(0, 3), min_size=NUM_CLIENTS + 1, max_size=NUM_CLIENTS + 1), st.integers(1, 3)
)


def outcome(topology: str, owners: list[int], num_slots: int) -> tuple[str, list[Any], int]:
    """Hash of the final model, everything of each round that must not depend on the placement, and bytes that
    crossed."""
    nodes = NODES[topology]
    owner_of = dict(zip(nodes, [owners[-1], *owners] if topology == "star" else owners, strict=False))
    config = FederationConfig.from_mapping(
        {
            "federation_id": "same-bits",
            "federated_learning_schema": SCHEMAS[topology],
            "federated_learning_topology": topology,
            "number_of_clients": NUM_CLIENTS,
            "federated_learning_rounds": 3,
            "number_of_epochs": 1,
            "dataset_type": "digits",
            "model_type": "mlp",
            "data_distribution_kind": "dir",
            "evaluate_every": 2,
            "placement": {node: f"local-{1 + owner}" for node, owner in owner_of.items()},
        }
    )
    with InlineFabric(1 + max(owner_of.values()), num_slots=num_slots) as fabric:
        info, rounds = completed(fabric, build_submission(config))
    assert info.clusters == tuple(sorted({f"local-{1 + owner}" for owner in owner_of.values()}))
    return info.model_sha256, [facts(r) for r in rounds], info.bytes_inter_cluster


@cache
def on_one_cluster(topology: str) -> tuple[str, list[Any], int]:
    return outcome(topology, [0] * (NUM_CLIENTS + 1), 2)


@pytest.mark.parametrize("topology", ["star", "ring"])
def test_any_placement_gives_the_same_bits_in_every_round(topology: str) -> None:
    @settings(max_examples=12, derandomize=True, database=None)
    @given(placements)
    def check(placement: tuple[list[int], int]) -> None:
        owners, num_slots = placement
        model, rounds, crossed = outcome(topology, owners, num_slots)
        alone_model, alone_rounds, _ = on_one_cluster(topology)
        assert rounds == alone_rounds
        assert model == alone_model
        used = set(owners[:NUM_CLIENTS] if topology == "ring" else owners)
        assert (crossed > 0) == (len(used) > 1)

    _, rounds, crossed = on_one_cluster(topology)
    assert [r[0] for r in rounds] == [1, 2, 3] and crossed == 0
    assert len({r[2] for r in rounds}) == 3
    check()


@pytest.mark.parametrize("scaling", [True, False])
def test_a_consensus_counts_peers_that_do_not_train_too(scaling: bool) -> None:
    nodes = [NodeSpec(f"client_{i}", "eval-test" if i else "train-eval-test") for i in range(NUM_CLIENTS)]
    keys = {
        "federation_id": "one-trains",
        "federated_learning_schema": SCHEMAS["ring"],
        "federated_learning_topology": "ring",
        "number_of_clients": NUM_CLIENTS,
        "federated_learning_rounds": 2,
        "aggregation_sample_scaling": scaling,
    }
    found = []
    for clusters in (1, 3):
        with InlineFabric(clusters) as fabric:
            submission = build_submission(FederationConfig.from_mapping(keys), nodes=nodes)
            info, rounds = completed(fabric, submission)
        found.append((info.model_sha256, [facts(r) for r in rounds]))
    assert found[0] == found[1]


@register_model("test-normed")
def normed(input_shape: Any, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(int(np.prod(input_shape))), nn.Linear(int(np.prod(input_shape)), num_classes)
    )


class Careless(FederatedNode):
    """Leaves the mode of its model and its gradients as they are."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        features, labels = self.train_data
        loss = self.loss(self.model(features), labels)
        loss.backward()
        for parameter in self.model.parameters():
            parameter.data.sub_(0.1 * parameter.grad)
        return {"loss": float(loss.detach())}

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        self.model.eval()
        features, labels = self.context.test_data
        return {"loss": float(self.loss(self.model(features), labels).detach())}


def test_nothing_of_a_node_is_left_in_the_model_for_the_next_one_on_its_host() -> None:
    keys = {
        "federation_id": "careless",
        "federated_learning_schema": SCHEMAS["star"],
        "federated_learning_topology": "star",
        "number_of_clients": NUM_CLIENTS,
        "federated_learning_rounds": 2,
        "model_type": "test-normed",
        "client_template": "local:Careless",
        "server_template": "local:Careless",
    }
    found = []
    for num_slots in (1, 3):
        with InlineFabric(1, num_slots=num_slots, templates={"local:Careless": Careless}) as fabric:
            _, rounds = completed(fabric, build_submission(FederationConfig.from_mapping(keys)))
            found.append([facts(r) for r in rounds])
    assert found[0] == found[1]
