"""Whole federations whose hosts compute in another memory than their own, and what is said where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from icrf.errors import ResourceError
from icrf.federation.node import FederatedNode
from icrf.learning.devices import Device
from icrf.protocol import COMPLETED, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


SHAPES = [
    {**STAR, "evaluate_clients": True, "metrics": ["macro_f1"]},
    {**STAR, "aggregation_strategy": "SCAFFOLD", "vectorize": 2},
    {**STAR, "model_type": f"{__name__}:normed", "private_keys": ["1.*"]},
    {**STAR, "schema": "ClusterFederatedLearning", "number_of_models": 2, "first_choice": "loss"},
    {**RING, "momentum": 0.9, "keep_optimizer_state": True, "resident_nodes": 1},
    {**RING, "optimizer": "Adam", "keep_optimizer_state": True, "vectorize": 2, "learning_rate": 0.01},
    {
        "schema": "HierarchicalFederatedLearning",
        "federated_learning_topology": "hierarchy",
        "number_of_groups": 2,
        "global_every": 2,
    },
]


def submission_of(**keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "number_of_clients": 4,
        "federated_learning_rounds": 2,
        "batch_size": 128,
        "assignment_strategy": "round_robin",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data))


def played(submission: Submission, **options: Any) -> list[Any]:
    with InlineFabric(2, **options) as fabric:
        run_id = fabric.port.submit(submission).run_id
        rounds = [event.round for event in fabric.port.watch(run_id) if event.round]
        info = fabric.port.get(run_id)
        assert (info.status, info.error_json) == (COMPLETED, "")
    return [info.model_sha256, *((r.model_sha256, r.metrics) for r in rounds)]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for a GPU, on a CPU."""
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, name: cls("cpu", apart=True)))


@pytest.mark.parametrize("keys", SHAPES)
def test_where_hosts_compute_changes_no_bit(keys: dict[str, Any], request: pytest.FixtureRequest) -> None:
    submission = submission_of(**keys)
    expected = played(submission)
    request.getfixturevalue("elsewhere")
    assert played(submission) == expected


def test_data_and_model_of_a_node_are_on_the_device(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[int] = []
    plain = Device.put
    monkeypatch.setattr(Device, "put", lambda self, tensor: put.append(tensor.data_ptr()) or plain(self, tensor))
    seen: list[bool] = []

    class Looking(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            seen.append({self.train_data[0].data_ptr(), self.train_data[1].data_ptr()} <= set(put))
            return super().train(**kwargs)

    played(submission_of(**STAR, client_template="local:Looking"), templates={"local:Looking": Looking})
    assert seen and all(seen)


def test_without_a_gpu_a_federation_on_gpus_is_refused_with_numbers() -> None:
    submission = submission_of(**STAR, device="cuda", resources={"num_cpus": 0.5, "num_gpus": 0.25})
    with InlineFabric(1) as fabric:
        plan = fabric.port.plan(submission)
        assert not plan.feasible
        with pytest.raises(ResourceError) as caught:
            fabric.port.submit(submission)
    assert caught.value.code == "R001"
    assert "cluster local-1: 2 slots x 0.25 GPU = 0.5 GPU needed, 0 GPU in total" in plan.problems
    assert "cluster local-1: device cuda needs a GPU, 0 GPU in total" in caught.value.message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("keys", SHAPES)
def test_a_gpu_gives_the_same_bits_twice_and_nearly_those_of_a_cpu(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = submission_of(**keys)
    here = played(submission)
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, name: cls("cuda", apart=True)))
    there = played(submission)
    assert played(submission) == there
    for (_, found), (_, expected) in zip(there[1:], here[1:], strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)
