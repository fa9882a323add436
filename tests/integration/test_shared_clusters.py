"""Federations that share clusters: in one fabric, in two that know nothing of each other, and beside other programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from icrf.console.runs_view import show_runs
from icrf.console.terminal import Terminal
from icrf.federation.node import FederatedNode
from icrf.protocol import COMPLETED, QUEUED, READY, RunEvent, RunInfo, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import waiting
from icrf.testing.inline import InlineFabric
from icrf_agent.inline_substrate import InlineCpus
from icrf_mediator import run_queue
from icrf_mediator.mediator import Policy

NAMES = ("east", "west")
HASTY = Policy(reserve_s=0.2)


class Held(FederatedNode):
    """Trains when the test lets it."""

    may_train = threading.Event()

    def train(self, **kwargs: Any) -> dict[str, float]:
        assert self.may_train.wait(60)
        return super().train(**kwargs)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_queue, "FIRST_PAUSE_S", 0.2)
    Held.may_train.clear()


def submission_of(name: str, **keys: Any) -> Submission:
    data = {
        "federation_id": name,
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": 4,
        "federated_learning_rounds": 2,
        "model_type": "logistic",
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data))


def until(events: Iterator[RunEvent], kind: str, text: str = "") -> RunEvent:
    return next(event for event in events if event.kind == kind and text in event.text)


def ended(fabric: InlineFabric, info: RunInfo) -> RunInfo:
    list(fabric.port.watch(info.run_id))
    return fabric.port.get(info.run_id)


@pytest.mark.parametrize("clusters", [NAMES[:1], NAMES])
def test_two_fabrics_on_the_same_clusters_both_get_through_with_the_same_bits(clusters: tuple[str, ...]) -> None:
    with InlineFabric(clusters) as alone:
        wanted = ended(alone, alone.port.submit(submission_of("fed"))).model_sha256
    cpus = {name: InlineCpus(3.0) for name in clusters}
    with ExitStack() as opened:
        fabrics = [opened.enter_context(InlineFabric(clusters, cpus=cpus, policy=HASTY)) for _ in range(2)]
        runs = [fabric.port.submit(submission_of("fed")) for fabric in fabrics]
        found = [ended(fabric, run) for fabric, run in zip(fabrics, runs, strict=True)]
    assert [info.status for info in found] == [COMPLETED, COMPLETED], [info.error_json for info in found]
    assert {info.model_sha256 for info in found} == {wanted}


def test_another_programs_share_is_waited_for_and_nothing_is_held_meanwhile() -> None:
    cpus = {name: InlineCpus(2.0) for name in NAMES}
    asyncio.run(cpus["west"].take("another program", 1.0, 0.0))
    with InlineFabric(NAMES, cpus=cpus, policy=HASTY) as fabric:
        run = fabric.port.submit(submission_of("fed"))
        events = fabric.port.watch(run.run_id)
        assert until(events, "status", "another try").status == QUEUED
        info = fabric.port.get(run.run_id)
        assert info.status != COMPLETED
        # Both are given back, the one that was free as well.
        until(events, "status", "another try")
        cpus["west"].give_back("another program")
        assert ended(fabric, run).status == COMPLETED
        # Clusters release what a run held when it has ended.
        waiting.until(lambda: [cpus[name].free for name in NAMES] == [2.0, 2.0])


def test_a_second_federation_is_told_who_has_the_room_and_gets_it_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with InlineFabric(NAMES, templates={"local:Node": Held}) as fabric:
        first = fabric.port.submit(submission_of("first", client_template="local:Node"))
        second = fabric.port.submit(submission_of("second"))
        text = until(fabric.port.watch(second.run_id), "waiting").text
        assert text.startswith(f"2 slots on east (0 of 2 free; held by first (run {first.run_id[:8]}) since 2")
        assert fabric.port.get(second.run_id).waiting_for == text
        show_runs(Terminal(plain=True), fabric.port.list_runs(), second.created_at)
        assert f"waits for {text}" in capsys.readouterr().out
        Held.may_train.set()
        assert [ended(fabric, run).status for run in (first, second)] == [COMPLETED, COMPLETED]


def test_with_quotas_federations_run_side_by_side() -> None:
    with InlineFabric(NAMES, num_slots=4, quota=2) as fabric:
        # They hold what they need until they may go on.
        asked = [replace(submission_of(name, number_of_clients=8), stage="activate") for name in ("a", "b", "a")]
        first, other, again = (fabric.port.submit(one) for one in asked)
        for run in (first, other):
            next(event for event in fabric.port.watch(run.run_id) if event.status == READY)
        text = until(fabric.port.watch(again.run_id), "waiting").text
        assert text.startswith("2 slots on east, where a federation may hold 2: it has 2 by a (run ")
        for run in (first, other, again):
            fabric.port.advance(run.run_id, "run", 0)
        found = [ended(fabric, run) for run in (first, other, again)]
    assert [info.status for info in found] == [COMPLETED] * 3
    assert len({info.model_sha256 for info in found}) == 1
