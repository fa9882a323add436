"""Nodes that become active in waves, or by a criterion, on a whole fabric without Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from icrf.client import Fabric
from icrf.federation.base import FederatedBase
from icrf.federation.node import FederatedNode
from icrf.protocol import COMPLETED, IDLE, RoundResult, Submission, nodes_of
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
WAVES = {"activation": "waves", "wave_size": 2}


def submission_of(**keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "number_of_clients": 6,
        "federated_learning_rounds": 6,
        "batch_size": 64,
        "assignment_strategy": "round_robin",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data))


def committed(fabric: InlineFabric, run_id: str) -> list[RoundResult]:
    return [event.round for event in fabric.port.watch(run_id) if event.round]


def played(submission: Submission, clusters: int = 1, **options: Any) -> list[RoundResult]:
    with InlineFabric(clusters, **options) as fabric:
        run = fabric.port.submit(submission)
        rounds = committed(fabric, run.run_id)
        assert fabric.port.get(run.run_id).status == COMPLETED
    return rounds


def bits(rounds: list[RoundResult]) -> list[tuple[str, str, dict[str, float]]]:
    return [(r.model_sha256, r.participants_bitmap, r.metrics) for r in rounds]


@pytest.fixture
def criterion() -> Iterator[ModuleType]:
    module = ModuleType("criteria_of_activation")

    def odd_or_large(round_number: int, node_ids: tuple[str, ...], num_samples: Any) -> list[bool]:
        return [(k + round_number) % 2 == 0 or n > 300 for k, n in enumerate(num_samples)]

    module.odd_or_large = odd_or_large  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize("shape", [STAR, RING])
@pytest.mark.parametrize(
    "keys",
    [
        {**WAVES, "wave_period": 2},
        {**WAVES, "wave_condition": "train_loss < 2.25", "learning_rate": 0.1},
        {**WAVES, "client_fraction": 0.5, "vectorize": 2},
        {"activation": "criteria_of_activation:odd_or_large"},
    ],
)
def test_active_nodes_and_bits_are_the_same_on_any_number_of_clusters(
    shape: dict[str, Any], keys: dict[str, Any], criterion: ModuleType
) -> None:
    submission = submission_of(**shape, **keys)
    one, two, three = (bits(played(submission, clusters, num_slots=clusters)) for clusters in (1, 2, 3))
    assert one == two == three
    assert len({bitmap for _, bitmap, _ in one}) > 1


def test_each_wave_adds_so_many_nodes_and_the_rounds_say_who_took_part() -> None:
    rounds = played(submission_of(**STAR, **WAVES, wave_period=2), 2)
    assert [r.participant_nodes for r in rounds] == [(1, 2)] * 2 + [(1, 2, 3, 4)] * 2 + [(1, 2, 3, 4, 5, 6)] * 2
    assert [r.participants for r in rounds] == [2, 2, 4, 4, 6, 6]


def test_only_active_nodes_train() -> None:
    trained: list[tuple[int, str]] = []

    class Noting(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            trained.append((self.round, self.id))
            return super().train(**kwargs)

    submission = submission_of(**RING, **WAVES, federated_learning_rounds=2, client_template="local:Noting")
    played(submission, 1, templates={"local:Noting": Noting})
    assert sorted(trained) == [(1, "client_0"), (1, "client_1"), *((2, f"client_{k}") for k in range(4))]


def test_a_wave_waits_for_the_metric_that_it_is_bound_to() -> None:
    rounds = played(submission_of(**STAR, **WAVES, wave_condition="train_loss < 2.25", learning_rate=0.1))
    sizes = [r.participants for r in rounds]
    expected, active = [2], 2
    for r in rounds[:-1]:
        active += 2 * (r.metrics["train_loss"] < 2.25)
        expected.append(min(active, 6))
    assert sizes == expected and len(set(sizes)) > 1 and sizes[1] == 2


def played_in_two_parts(loses: str) -> list[RoundResult]:
    """Five rounds, the loss of something, and three more."""
    keys = {**STAR, **WAVES, "wave_condition": "train_loss < 2.25", "learning_rate": 0.1, "checkpoint_every": 2}
    config = FederationConfig.from_mapping(
        {"federation_id": "fed", "number_of_clients": 6, "federated_learning_rounds": 5, "batch_size": 64, **keys}
    )
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(build_submission(config, keep=True)).run_id
        for event in fabric.port.watch(run_id):
            if event.status == IDLE:
                break
        if loses == "mediator":
            fabric.restart_mediator()
        elif loses == "cluster":
            fabric.stop_agent("local-2")
            fabric.start_agent("local-2")
        fabric.port.advance(run_id, "run", 8)
        for event in fabric.port.watch(run_id):
            if event.round and event.round.number == 8:
                break
        fabric.port.finish(run_id)
        rounds = committed(fabric, run_id)
        assert fabric.port.get(run_id).status == COMPLETED
    return rounds


@pytest.mark.parametrize("loses", ["mediator", "cluster"])
def test_waves_go_on_as_they_would_have_after_a_crash(loses: str) -> None:
    undisturbed = played_in_two_parts("nothing")
    assert [r.participants for r in undisturbed] == [2, 2, 2, 4, 6, 6, 6, 6]
    assert bits(played_in_two_parts(loses)) == bits(undisturbed)


def test_a_users_criterion_decides_and_the_mediator_never_loads_it(criterion: ModuleType) -> None:
    submission = submission_of(**STAR, activation="criteria_of_activation:odd_or_large")
    del criterion.odd_or_large
    rounds = played(submission, 2)
    assert [r.participant_nodes for r in rounds] == [nodes_of(bytes.fromhex(row)) for row in submission.schedule]
    assert [r.participant_nodes for r in rounds[:2]] == [(2, 4, 6), (1, 3, 5)]


def test_nodes_of_later_waves_are_set_up_with_all_others_and_can_be_called() -> None:
    data = {"federation_id": "fed", "number_of_clients": 4, "federated_learning_rounds": 2, **STAR, **WAVES}
    with InlineFabric(2) as fabric:
        base = FederatedBase(FederationConfig.from_mapping(data), fabric=Fabric(fabric.port))
        base.materialize_all()
        assert base.is_active() and base["client_3"].call("ping")["round"] == 0
        base.train(rounds=1, blocking=True)
        assert [r.participant_nodes for r in base.collect_federation_metrics()] == [(1, 2)]
        assert base["client_3"].call("test")["accuracy"] > 0
        base.train(rounds=2, blocking=True)
        assert [r.participants for r in base.collect_federation_metrics()][:2] == [2, 4]
        base.stop()
