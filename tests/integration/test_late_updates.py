"""Late updates that count by their age, on a fabric without Ray: closed forms, and the same bits after any crash."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icrf.console.live import plain_round
from icrf.federation.node import FederatedNode
from icrf.learning.datasets import DATASETS, Dataset
from icrf.learning.models import register_model
from icrf.learning.training import LocalTrainer
from icrf.ports import PhaseReport
from icrf.protocol import IDLE, TERMINAL, Instruction, RoundResult, StartRound
from icrf.run_folder import round_line
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.clocks import MovedClock
from icrf.testing.inline import InlineFabric
from icrf_agent.core import Action, AgentCore
from icrf_agent.round_machine import TRAIN, Step
from icrf_mediator.checkpoints import Checkpoints
from icrf_mediator.mediator import Policy

STAR = {
    "federation_id": "late",
    "schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "late_updates": "weigh",
    "min_nodes": 1,
}
LATE = "local-2"
Late = Callable[[set[int]], None]


def fabric_of(clusters: int, clock: MovedClock, **parts: Any) -> InlineFabric:
    return InlineFabric(clusters, policy=Policy(lease_ttl_s=1e6), clock=clock, **parts)


@pytest.fixture
def clock() -> MovedClock:
    return MovedClock()


@pytest.fixture
def late_in(monkeypatch: pytest.MonkeyPatch, clock: MovedClock) -> Late:
    """Names the rounds whose first attempt the late cluster sleeps through."""
    instructed = AgentCore.instructed
    rounds: set[int] = set()

    def sleeps(core: AgentCore, order: Instruction, now_s: float) -> list[Action]:
        if core.cluster == LATE and isinstance(order, StartRound) and order.round in rounds:
            rounds.discard(order.round)
            clock.ahead_s += 1000.0
            return []
        return instructed(core, order, now_s)

    monkeypatch.setattr(AgentCore, "instructed", sleeps)
    return rounds.update


class Run:
    """A kept run, taken some rounds further at a time."""

    def __init__(self, fabric: InlineFabric, **keys: Any) -> None:
        config = FederationConfig.from_mapping({**STAR, **keys})
        self.fabric, self.submission = fabric, build_submission(config, keep=True)
        self.id = fabric.port.submit(self.submission).run_id
        self.to(config.federated_learning_rounds)

    def to(self, rounds: int) -> list[RoundResult]:
        """All results once so many rounds are done."""
        port = self.fabric.port
        if port.get(self.id).rounds_done < rounds:
            port.advance(self.id, "run", rounds)
        found: list[RoundResult] = []
        self.texts: list[str] = []
        for event in port.watch(self.id):
            found += [event.round] if event.round else []
            self.texts.append(event.text)
            info = port.get(self.id)
            assert info.status not in TERMINAL, info.error_json
            if event.status == IDLE and info.status == IDLE and info.rounds_done == rounds:
                return found
        raise AssertionError("the run has ended")

    def finish(self) -> None:
        """Give back its slots."""
        self.fabric.port.finish(self.id)
        for _ in self.fabric.port.watch(self.id):
            pass


# ---------------------------------------------------------------- the closed form


class Point(nn.Module):
    """One float64 number, whatever the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((1,), 5.0, dtype=torch.float64))

    def forward(self, features: Any) -> Any:
        return self.x.expand(len(features), 1)


@register_model("test-late-point")
def point() -> nn.Module:
    return Point()


@DATASETS.register("test-late-samples")
def samples(data_dir: str = "") -> Dataset:
    features, labels = np.zeros((3, 1), np.float32), np.zeros(3, np.int64)
    return Dataset(features, labels, features, labels, 1, "test-late-samples")


def half_way(x: Fraction, node: int, number: int) -> Fraction:
    """A step of size 1/2 on ``(x - t)^2 / 2``, with t = 4 node + number."""
    return (x + 4 * node + number) / 2


class Stepper(FederatedNode):
    """Steps half of the way to its target of the round."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        with torch.no_grad():
            x = self.model.x
            x -= 0.5 * (x - (4 * self.context.index + self.round))
        return {"loss": float(self.round)}


class Teller(FederatedNode):
    """A server that says where the model is."""

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        return {"x": float(next(self.model.parameters()).detach()[0])}


POINT = {
    "number_of_clients": 3,
    "model_type": "test-late-point",
    "dataset_type": "test-late-samples",
    "client_template": "local:Stepper",
    "server_template": "local:Teller",
    "aggregation_sample_scaling": False,
    "staleness_exponent": 1.0,
    "placement": {"server": "local-1", "client_0": LATE, "client_1": LATE, "client_2": "local-1"},
}
TEMPLATES = {"local:Stepper": Stepper, "local:Teller": Teller}


def test_a_late_update_is_that_of_its_round_and_weighs_by_its_age(clock: MovedClock, late_in: Late) -> None:
    late_in({1, 3, 4})
    with fabric_of(2, clock, templates=TEMPLATES) as fabric:
        run = Run(fabric, **POINT, federated_learning_rounds=6)
        rounds = run.to(6)
    x0 = Fraction(5)
    x1 = half_way(x0, 3, 1)  # without the nodes 1 and 2 of the late cluster
    older = [half_way(x0, node, 1) for node in (1, 2)]
    x2 = (sum(older) * Fraction(1, 2) + half_way(x1, 3, 2)) / 2
    assert [rounds[k].metrics["x"] for k in (0, 1)] == [float(x1), float(x2)]
    x3 = half_way(x2, 3, 3)
    x4 = half_way(x3, 3, 4)
    third = Fraction(341, 1024)  # two rounds late, in the parts that everybody counts in
    older = [half_way(x2, node, 3) for node in (1, 2)]
    x5 = (sum(older) * third + half_way(x4, 3, 5)) / (1 + 2 * third)
    x6 = sum(half_way(x5, node, 6) for node in (1, 2, 3)) / 3
    assert [r.metrics["x"] for r in rounds] == pytest.approx([float(x) for x in (x1, x2, x3, x4, x5, x6)], rel=1e-12)
    assert [(r.participant_nodes, r.staleness) for r in rounds] == [
        ((3,), {}),
        ((1, 2, 3), {"client_0": 1, "client_1": 1}),
        ((3,), {}),
        ((3,), {}),
        ((1, 2, 3), {"client_0": 2, "client_1": 2}),
        ((1, 2, 3), {}),
    ]
    assert round_line(rounds[1])["staleness"] == {"client_0": 1, "client_1": 1}
    assert "  late 2" in plain_round(rounds[1], 6) and "late" not in plain_round(rounds[2], 6)
    # The metrics of a late update are those of its round; the mean over nodes weighs by samples.
    assert rounds[1].metrics["train_loss"] == pytest.approx((1 + 1 + 2) / 3)


def test_what_is_too_old_is_dropped_and_the_cluster_starts_afresh(clock: MovedClock, late_in: Late) -> None:
    late_in({1, 2})
    with fabric_of(2, clock, templates=TEMPLATES) as fabric:
        run = Run(fabric, **POINT, max_staleness=1, federated_learning_rounds=3)
        rounds = run.to(3)
    assert [(r.participant_nodes, r.staleness) for r in rounds] == [((3,), {}), ((3,), {}), ((1, 2, 3), {})]
    x2 = half_way(half_way(Fraction(5), 3, 1), 3, 2)
    assert rounds[2].metrics["x"] == pytest.approx(float(sum(half_way(x2, k, 3) for k in (1, 2, 3)) / 3), rel=1e-12)
    assert "local-2 is too late: its updates of round 1 are dropped" in run.texts


# ---------------------------------------------------------------- the same bits

DIGITS = {
    "number_of_clients": 6,
    "batch_size": 64,
    "client_fraction": 0.7,
    "seed": 4,
    "checkpoint_every": 2,
    "federated_learning_rounds": 3,
}
ON_TWO = {"server": "local-1", **{f"client_{i}": LATE if i < 2 else "local-1" for i in range(6)}}
ON_THREE = {**ON_TWO, "client_4": "local-3", "client_5": "local-3"}

History = list[tuple[str, tuple[int, ...], dict[str, int], dict[str, float]]]


def history(rounds: list[RoundResult]) -> History:
    return [(r.model_sha256, r.participant_nodes, r.staleness, r.metrics) for r in rounds]


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when round 2, in which the cluster was late, is in a checkpoint."""
    found = threading.Event()
    arrived = Checkpoints.arrived

    def told(checkpoints: Checkpoints, cluster: str, number: int, artifact: str) -> bool:
        complete = arrived(checkpoints, cluster, number, artifact)
        if complete and number == 2:
            found.set()
        return complete

    monkeypatch.setattr(Checkpoints, "arrived", told)
    return found


def played(late_in: Late, fabric: InlineFabric, disturb: Callable[[str], None], **keys: Any) -> tuple[History, Run]:
    """Six rounds, late in 2, 3 and 5: round 4 has updates of round 2, round 6 of round 5. Disturbed before 4."""
    late_in({2, 3, 5})
    run = Run(fabric, **DIGITS, **keys)
    disturb(run.id)
    found = history(run.to(6))
    run.finish()
    return found, run


@pytest.mark.parametrize("vectorize", ["off", 3])
def test_the_same_bits_on_more_clusters_and_after_any_crash(
    clock: MovedClock, late_in: Late, durable: threading.Event, vectorize: str | int
) -> None:
    on_two: dict[str, Any] = {"placement": ON_TWO, "vectorize": vectorize}

    def kill(cluster: str) -> Callable[[str], None]:
        def strike(run_id: str) -> None:
            assert durable.wait(30)
            for slot in range(2):
                fabric.substrates[cluster].kill_host(run_id, slot)

        return strike

    with fabric_of(2, clock) as fabric:
        expected, run = played(late_in, fabric, lambda run_id: None, **on_two)
        assert [sorted(staleness.values()) for _, _, staleness, _ in expected] == [[], [], [], [2, 2], [], [1]]
        drawn = [sum(node in nodes for node in (1, 2)) for _, nodes, _, _ in expected]
        assert drawn[1:3] == [0, 0] and drawn[3] == 2
        durable.clear()
        lost_late, run = played(late_in, fabric, kill(LATE), **on_two)
        assert fabric.port.get(run.id).rounds_done == 6
        durable.clear()
        lost_server, run = played(late_in, fabric, kill("local-1"), **on_two)
        # It went back to the checkpoint of round 2, which has the model of round 1 for the late cluster.
        restored = [row.row["round"] for row in fabric.store.rows("activations", (run.id,))]
        assert restored == [0, 2]
        restarted, run = played(late_in, fabric, lambda run_id: fabric.restart_mediator(), **on_two)
    with fabric_of(3, clock) as fabric:
        on_three, _ = played(late_in, fabric, lambda run_id: None, placement=ON_THREE, vectorize=vectorize)
    assert lost_late == expected
    assert lost_server == expected
    assert restarted == expected
    assert on_three == expected


def test_what_was_finished_too_late_is_not_trained_again(clock: MovedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held up after training: the next round brings what is there, with the bits of training it again."""
    trained: list[int] = []
    train, done = LocalTrainer.train, AgentCore.step_done

    def counted(trainer: LocalTrainer, *arguments: Any, **keywords: Any) -> Any:
        trained.append(1)
        return train(trainer, *arguments, **keywords)

    held_up: set[int] = set()

    def slow(
        core: AgentCore, start: StartRound, step: Step, result: PhaseReport | None, took_s: float, now_s: float
    ) -> list[Action]:
        if core.cluster == LATE and step.kind == TRAIN and (start.round, start.attempt) == (2, 1) and held_up:
            held_up.clear()
            clock.ahead_s += 1000.0
            return []
        return done(core, start, step, result, took_s, now_s)

    monkeypatch.setattr(LocalTrainer, "train", counted)
    monkeypatch.setattr(AgentCore, "step_done", slow)
    keys = {**DIGITS, "client_fraction": 1.0, "placement": ON_TWO}
    with fabric_of(2, clock) as fabric:
        held_up.add(2)
        run = Run(fabric, **keys)
        rounds = run.to(3)
        run.finish()
        assert rounds[2].staleness == {"client_0": 1, "client_1": 1}
        # Round 1: 6, round 2: 6, of which attempt 2 repeats none; round 3: the four that are not late.
        assert len(trained) == 16
        monkeypatch.setattr("icrf_agent.host_late.MAX_FINISHED_BYTES", 0)
        held_up.add(2)
        again = Run(fabric, **keys).to(3)
    assert len(trained) == 16 + 6 + 6 + 4 + 6
    assert history(again) == history(rounds)
