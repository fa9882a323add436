"""Every built-in aggregation rule, and every way in which graphs change, on two real Ray clusters.

The bits are those of one cluster without Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from icrf.client import Fabric
from icrf.preconditions import WITH_NUM_BYZANTINE
from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.spec.choices import CHOICES
from icrf.testing import FabricEnvironment
from icrf.testing.inline import InlineFabric

pytestmark = pytest.mark.ray

COMMON = {
    "federation_id": "every-rule",
    "schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 6,
    "federated_learning_rounds": 2,
    "learning_rate": 0.1,
    "batch_size": 64,
}
# One whose nodes keep state and one that needs every update stand for the others in the fast tier.
ALWAYS = ("SCAFFOLD", "Krum")


@pytest.fixture(scope="module")
def fabric() -> Iterator[Fabric]:
    with FabricEnvironment(2, slots=1) as environment, environment.connect() as connected:
        yield connected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in CHOICES["aggregation_strategy"].built
    ],
)
def test_a_rule_runs_on_two_clusters_with_the_bits_of_one(fabric: Fabric, name: str) -> None:
    needed = {"mu": 0.1} if name == "FedProx" else {"num_byzantine": 1} if name in WITH_NUM_BYZANTINE else {}
    require_same_bits(fabric, {"aggregation_strategy": name, **needed})


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES["topology_adaptation_strategy"].built)
def test_a_graph_changes_on_two_clusters_with_the_bits_of_one(fabric: Fabric, name: str) -> None:
    peers = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring", "adaptation_share": 0.5}
    changing = {"topology_adaptation_strategy": name, "federated_learning_rounds": 4, "client_fraction": 0.7}
    require_same_bits(fabric, {**peers, **changing})


def require_same_bits(fabric: Fabric, keys: dict[str, Any]) -> None:
    """Run it on the real clusters, and on one without Ray."""
    config = FederationConfig.from_mapping({**COMMON, **keys})
    run = fabric.submit(config)
    found: list[Any] = [r.model_sha256 for r in run.rounds()]
    info = run.result().info
    assert (info.status, len(info.clusters)) == (COMPLETED, 2)
    with InlineFabric(1) as inline:
        expected = Fabric(inline.port).submit(config)
        assert [r.model_sha256 for r in expected.rounds()] == found
