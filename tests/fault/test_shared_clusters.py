"""Federations on the same real Ray clusters, whose slots fit one at a time: of one fabric, and of two besides."""

from __future__ import annotations

import pytest

from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.testing import FabricEnvironment

from .bench import Watch

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def federation(name: str) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": name,
            "federated_learning_schema": "DecentralizedFederatedLearning",
            "federated_learning_topology": "ring",
            "number_of_clients": 8,
            "federated_learning_rounds": 3,
            "model_type": "logistic",
        }
    )


@pytest.mark.parametrize("clusters", [1, 2])
def test_all_get_their_turn_with_the_same_bits(clusters: int) -> None:
    names = [f"a-{k}" for k in range(clusters)]
    with (
        FabricEnvironment(names, slots=2) as one,
        FabricEnvironment([f"b-{k}" for k in range(clusters)], slots=2, beside=one) as two,
        one.connect() as first,
        two.connect() as second,
    ):
        # Agents of the second fabric must not get in the order of the first one's.
        if clusters == 2:
            one.arm("agent-a-1@reserve:0!hold")
            two.arm("agent-b-0@reserve:0!hold")
        runs = [first.submit(federation("fed")), second.submit(federation("fed"))]
        if clusters == 2:
            one.await_fired("agent-a-1@reserve:0")
            two.await_fired("agent-b-0@reserve:0")
            one.release("agent-a-1@reserve:0")
            two.release("agent-b-0@reserve:0")
        runs.append(first.submit(federation("fed")))
        found = [Watch(run).outcome(400.0) for run in runs]
    assert [outcome.info.status for outcome in found] == [COMPLETED] * 3, [outcome.texts for outcome in found]
    assert len({outcome.info.model_sha256 for outcome in found}) == 1
    # Of two runs of one fabric the second is told who is before it.
    assert found[2].saw(f"fed (run {runs[0].id[:8]})")
