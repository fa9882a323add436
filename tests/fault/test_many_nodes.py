"""Ten thousand nodes with states of their own, on few slots of real Ray clusters, one of which dies meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from icrf.protocol import COMPLETED
from icrf.spec import FederationConfig
from icrf.testing import FabricEnvironment
from icrf.testing.processes import private_bytes

from .bench import Outcome, Watch

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_NODES, LIMIT_S = 10_000, 800.0
# A model, its velocity, and both a second time while a round is under way: 154 kB a node, 1.5 GB for all of them.
RESIDENT_MB = 200
# What a host takes beside its nodes: Python, Ray, torch and the data, and postings of a bounded size.
HOST_BYTES = 900 << 20
DATA = """
import numpy as np

from icrf.learning.datasets import Dataset


def synthetic():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 160_100)
    centres = rng.standard_normal((10, 64)).astype(np.float32)
    features = centres[labels] + rng.standard_normal((len(labels), 64), dtype=np.float32)
    return Dataset(features[100:], labels[100:], features[:100], labels[:100], 10, "synthetic")
"""


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FederationConfig:
    (tmp_path / "many_rows.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    return FederationConfig.from_mapping(
        {
            "federation_id": "many",
            "federated_learning_schema": "DecentralizedFederatedLearning",
            "federated_learning_topology": "ring",
            "number_of_clients": NUM_NODES,
            "federated_learning_rounds": 3,
            "model_type": "mlp",
            "dataset_type": "many_rows:synthetic",
            "momentum": 0.9,
            "keep_optimizer_state": True,
            "resident_memory_mb": RESIDENT_MB,
            "evaluate_every": 3,
            "checkpoint_every": 1,
            "round_deadline_s": LIMIT_S,
        }
    )


def hashes(outcome: Outcome) -> list[tuple[int, str]]:
    assert outcome.info.status == COMPLETED, outcome.texts
    assert [result.participants for result in outcome.rounds] == [NUM_NODES] * 3
    return outcome.hashes()


def test_ten_thousand_nodes_on_two_slots_survive_a_host_with_the_same_bits(ring: FederationConfig) -> None:
    with FabricEnvironment(1, slots=2) as environment:
        name = "agent-local-1@train:2"
        environment.arm(f"{name}!hold")
        with environment.connect() as fabric:
            watch = Watch(fabric.submit(ring))
            environment.await_fired(name, LIMIT_S)
            assert private_bytes(environment.actor_pid("local-1", "host")) < HOST_BYTES
            environment.kill_actor("local-1", "host")
            environment.release(name)
            disturbed = hashes(watch.outcome(LIMIT_S))
    with FabricEnvironment(2, slots=1) as environment, environment.connect() as fabric:
        assert hashes(Watch(fabric.submit(ring)).outcome(LIMIT_S)) == disturbed
