"""Rounds of some of the clients, and rounds without a cluster, on a whole fabric without Ray."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from icrf import StarFederatedLearningSchema
from icrf.client import Fabric
from icrf.federation.node import FederatedNode
from icrf.protocol import COMPLETED, Instruction, Plan, RoundResult, RunInfo, StartRound, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.clocks import MovedClock
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import follow
from icrf_agent.core import Action, AgentCore
from icrf_mediator.mediator import Policy

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
HEADERS = 1.05
FIRST_ON_TWO = {f"client_{i}": "local-2" for i in range(2)}
REST_ON_ONE = {"server": "local-1", **{f"client_{i}": "local-1" for i in range(2, 6)}}


def submission_of(**keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "number_of_clients": 6,
        "federated_learning_rounds": 4,
        "batch_size": 64,
        "assignment_strategy": "round_robin",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data))


def run_on(fabric: InlineFabric, submission: Submission) -> tuple[RunInfo, list[RoundResult], list[str]]:
    run = fabric.port.submit(submission)
    events = list(fabric.port.watch(run.run_id))
    info = fabric.port.get(run.run_id)
    assert (info.status, info.error_json) == (COMPLETED, "")
    return info, [e.round for e in events if e.round], [e.text for e in events if e.kind == "warning"]


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "keys", [{**STAR, "client_fraction": 0.5}, {**STAR, "sampled_clients": 1}, {**RING, "client_fraction": 0.5}]
)
def test_sampled_rounds_have_the_same_bits_on_any_number_of_clusters(keys: dict[str, Any]) -> None:
    submission = submission_of(**keys)
    found = []
    for clusters in (1, 2, 3):
        with InlineFabric(clusters, num_slots=clusters) as fabric:
            info, rounds, _ = run_on(fabric, submission)
        found.append([info.model_sha256, *((r.model_sha256, r.participants_bitmap, r.metrics) for r in rounds)])
    assert found[0] == found[1] == found[2]
    assert {bitmap for _, bitmap, _ in found[0][1:]} != {found[0][1][1]}


def test_only_clusters_with_participants_exchange_anything() -> None:
    submission = submission_of(**STAR, sampled_clients=1, seed=5)
    with InlineFabric(3) as fabric:
        plan: Plan = fabric.port.plan(submission)
        _, rounds, _ = run_on(fabric, submission)
    ids = [node.id for node in submission.nodes]
    away = [r for r in rounds if plan.assignment[ids[r.participant_nodes[0]]] != plan.assignment["server"]]
    per_round = (4 + 8) * plan.num_parameters
    assert 0 < len(away) < len(rounds)
    for r in rounds:
        expected = per_round if r in away else 0
        assert expected <= r.bytes_inter_cluster <= expected * HEADERS
    assert plan.bytes_inter_cluster_total == pytest.approx(len(away) * per_round, abs=len(rounds))


@pytest.fixture
def turns() -> Iterator[str]:
    module = ModuleType("turn_samplers")
    module.by_turns = lambda number, ids, count, random_state: [ids[number % len(ids)]]  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield "turn_samplers:by_turns"
    del sys.modules[module.__name__]


def test_a_users_sampler_decides_and_the_mediator_never_loads_it(turns: str) -> None:
    submission = submission_of(**STAR, client_sampler=turns)
    del sys.modules["turn_samplers"].by_turns  # type: ignore[attr-defined]
    with InlineFabric(2) as fabric:
        _, rounds, _ = run_on(fabric, submission)
    assert [r.participant_nodes for r in rounds] == [(2,), (3,), (4,), (5,)]


def test_weights_are_those_of_the_participants_alone() -> None:
    """One client at a time: the new global model is exactly what that client has trained."""

    trained: dict[int, Any] = {}

    class Recorded(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            metrics = super().train(**kwargs)
            trained[self.round] = self.context.model.layout.model_sha256(self.context.model.snapshot())
            return metrics

    submission = submission_of(**STAR, sampled_clients=1, client_template="local:Recorded")
    with InlineFabric(1, templates={"local:Recorded": Recorded}) as fabric:
        _, rounds, _ = run_on(fabric, submission)
    assert trained == {r.number: r.model_sha256 for r in rounds}


# ---------------------------------------------------------------- late and lost clusters


def test_a_late_cluster_is_left_out_of_the_round_and_is_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = MovedClock()
    instructed = AgentCore.instructed

    def hangs_once(core: AgentCore, order: Instruction, now_s: float) -> list[Action]:
        if core.cluster == "local-2" and isinstance(order, StartRound) and (order.round, order.attempt) == (2, 1):
            clock.ahead_s += 1000.0
            return []
        return instructed(core, order, now_s)

    monkeypatch.setattr(AgentCore, "instructed", hangs_once)
    submission = submission_of(**STAR, min_nodes=4, placement={**FIRST_ON_TWO, **REST_ON_ONE}, round_deadline_s=600)
    with InlineFabric(2, policy=Policy(lease_ttl_s=1e6), clock=clock) as fabric:
        _, rounds, warnings = run_on(fabric, submission)
    # The first attempt of round 3 may have been begun on what became of the one that was given up.
    assert [(r.number, r.attempt, r.participant_nodes) for r in rounds] == [
        (1, 1, (1, 2, 3, 4, 5, 6)),
        (2, 2, (3, 4, 5, 6)),
        (3, 2, (1, 2, 3, 4, 5, 6)),
        (4, 1, (1, 2, 3, 4, 5, 6)),
    ]
    assert warnings == ["round 2 goes on without local-2: 4 of 6 nodes take part"]


def test_without_a_lost_cluster_the_bits_are_those_of_the_recorded_participants() -> None:
    reached, goes_on = threading.Event(), threading.Event()

    class Waits(FederatedNode):
        def aggregate(self, state: Any) -> Any:
            if self.round == 2 and not reached.is_set():
                reached.set()
                goes_on.wait()
            return state

    keys = {**STAR, "placement": {**FIRST_ON_TWO, **REST_ON_ONE}, "min_nodes": 2, "on_cluster_loss": "exclude"}
    submission = submission_of(**keys, server_template="local:Waits")
    with InlineFabric(2, templates={"local:Waits": Waits}) as fabric:
        run = fabric.port.submit(submission)
        reached.wait()
        fabric.stop_agent("local-2")
        goes_on.set()
        info, rounds = follow(fabric, run.run_id)
    assert (info.status, info.error_json) == (COMPLETED, "")
    assert [r.participant_nodes for r in rounds] == [(1, 2, 3, 4, 5, 6), *[(3, 4, 5, 6)] * 3]

    def as_recorded(number: int, ids: list[str], count: int, random_state: Any) -> list[str]:
        return [submission.nodes[i].id for i in rounds[number - 1].participant_nodes]

    module = sys.modules["recorded_samplers"] = ModuleType("recorded_samplers")
    module.as_recorded = as_recorded  # type: ignore[attr-defined]
    try:
        again = submission_of(**STAR, client_sampler="recorded_samplers:as_recorded")
    finally:
        del sys.modules["recorded_samplers"]
    with InlineFabric(1) as fabric:
        _, repeated, _ = run_on(fabric, again)
    assert [r.model_sha256 for r in repeated] == [r.model_sha256 for r in rounds]


# ---------------------------------------------------------------- what roles are for


@pytest.mark.parametrize("schema", [STAR, RING])
def test_clients_measure_what_their_roles_say_in_evaluated_rounds_only(schema: dict[str, Any]) -> None:
    keys = {**schema, "client_role": "train-eval-test", "federated_learning_rounds": 2, "evaluate_every": 2}
    found = []
    for clusters in (1, 3):
        with InlineFabric(clusters, num_slots=clusters) as fabric:
            _, rounds, _ = run_on(fabric, submission_of(**keys, evaluate_clients=True))
        found.append([(r.model_sha256, r.metrics) for r in rounds])
    assert found[0] == found[1]
    first, second = (set(metrics) for _, metrics in found[0])
    assert first == {"train_loss"}
    measured = {"train_loss", "accuracy", "loss", "eval_accuracy", "eval_loss", "test_accuracy", "test_loss"}
    assert second == measured
    # Looking changes no bit of what is trained.
    with InlineFabric(2) as fabric:
        _, rounds, _ = run_on(fabric, submission_of(**keys))
    assert [r.model_sha256 for r in rounds] == [sha256 for sha256, _ in found[0]]
    assert set(rounds[1].metrics) == {"train_loss", "accuracy", "loss"}


def test_the_mean_over_clients_weighs_own_data_by_samples_and_held_out_data_equally() -> None:
    class Known(FederatedNode):
        def evaluate(self, phase: str = "test") -> dict[str, float]:
            return {"score": float(self.context.index * (1 if phase == "eval" else 10))}

    keys = {**STAR, "federated_learning_rounds": 1, "data_distribution_kind": "dir", "evaluate_clients": True}
    submission = submission_of(**keys, client_template="local:Known")
    with InlineFabric(2, templates={"local:Known": Known}) as fabric:
        run = fabric.port.submit(submission)
        list(fabric.port.watch(run.run_id))
        (row,) = fabric.store.rows("activations", (run.run_id,))
        (committed,) = fabric.store.rows("commits", (run.run_id,))
    samples = dict(row.row["samples"])
    assert len(set(samples.values())) > 1
    mean = sum(node * count for node, count in samples.items()) / sum(samples.values())
    assert committed.row["metrics"]["eval_score"] == pytest.approx(mean, rel=1e-9)
    assert committed.row["metrics"]["test_score"] == pytest.approx(35.0, rel=1e-9)


# ---------------------------------------------------------------- nodes that come and go


def test_nodes_join_and_leave_between_rounds_with_the_same_bits_everywhere() -> None:
    config = FederationConfig.from_mapping({"federation_id": "fed", "batch_size": 64, **STAR})
    found = []
    for clusters in (1, 2, 3):
        with InlineFabric(clusters) as inline:
            base = StarFederatedLearningSchema(roles=["train"] * 5, config=config, fabric=Fabric(inline.port))
            base.remove_nodes("client_4")
            base.train(rounds=2, blocking=True)
            base.add_nodes("client_4")
            base.train(rounds=1, blocking=True)
            base.remove_nodes("client_0", "client_1")
            base.train(rounds=1, blocking=True)
            found.append([(r.participant_nodes, r.model_sha256) for r in base.collect_federation_metrics()])
            base.stop()
    assert found[0] == found[1] == found[2]
    assert [nodes for nodes, _ in found[0]] == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4, 5), (3, 4, 5)]
