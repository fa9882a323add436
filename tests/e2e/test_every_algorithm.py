"""Every built-in aggregation rule on two real Ray clusters, with the bits that it has on one cluster without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from icrf.client import Fabric
from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.spec.choices import CHOICES
from icrf.testing import FabricEnvironment
from icrf.testing.inline import InlineFabric

pytestmark = pytest.mark.ray

# What one rule needs does not disturb the others.
COMMON = {
    "federation_id": "every-rule",
    "schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 6,
    "federated_learning_rounds": 2,
    "learning_rate": 0.1,
    "batch_size": 64,
    "mu": 0.1,
    "num_byzantine": 1,
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
    config = FederationConfig.from_mapping({**COMMON, "aggregation_strategy": name})
    run = fabric.submit(config)
    found: list[Any] = [r.model_sha256 for r in run.rounds()]
    info = run.result().info
    assert (info.status, len(info.clusters)) == (COMPLETED, 2)
    with InlineFabric(1) as inline:
        expected = Fabric(inline.port).submit(config)
        assert [r.model_sha256 for r in expected.rounds()] == found
