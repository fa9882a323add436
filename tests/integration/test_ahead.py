"""Rounds that are begun ahead of the commit: few calls, and the same bits whatever comes in between."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from icrf import FederationConfig
from icrf.learning.training import LocalTrainer
from icrf.protocol import RoundReport, Submission
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, follow
from icrf.testing.waiting import until
from icrf_agent.node_host import NodeHost
from icrf_agent.topology_manager import HybridTopologyManager

ROUNDS, CLIENTS = 6, 4


def submission(**settings: Any) -> Submission:
    return build_submission(
        FederationConfig.from_mapping(
            {
                "federation_id": "ahead",
                "federated_learning_schema": "TraditionalFederatedLearning",
                "federated_learning_topology": "star",
                "number_of_clients": CLIENTS,
                "federated_learning_rounds": ROUNDS,
                "dataset_type": "digits",
                "evaluate_every": 3,
                **settings,
            }
        )
    )


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """The hashes of the rounds."""
    with InlineFabric(1) as fabric:
        return [result.model_sha256 for result in completed(fabric, submission())[1]]


class Reports:
    """What an agent says of rounds: held back, or lost.

    Args:
        held: the round whose report waits until `let_go`.
    """

    def __init__(self, fabric: InlineFabric, cluster: str, held: int) -> None:
        self.came = threading.Event()
        self._link, self._held = fabric.agents[cluster]._link, held
        self._kept: list[Callable[[], None]] = []
        said = self._link.report

        def report(what: Any) -> None:
            if isinstance(what, RoundReport) and what.round == held and not self.came.is_set():
                loop = asyncio.get_running_loop()
                self._kept.append(lambda: loop.call_soon_threadsafe(said, what))
                self.came.set()
            else:
                said(what)

        self._link.report = report  # type: ignore[method-assign]

    def let_go(self) -> None:
        """Say what was held back."""
        for say in self._kept:
            say()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many nodes were trained."""
    counted: Counter[str] = Counter()
    train = LocalTrainer.train

    def counting(self: LocalTrainer, *arguments: Any, **keywords: Any) -> Any:
        counted["nodes"] += 1
        return train(self, *arguments, **keywords)

    monkeypatch.setattr(LocalTrainer, "train", counting)
    return counted


def test_a_manager_hears_once_of_a_round(monkeypatch: pytest.MonkeyPatch, undisturbed: list[str]) -> None:
    heard: Counter[str] = Counter()
    for name in ("take_in", "publish_all", "begin_round"):
        told = getattr(HybridTopologyManager, name)

        def counting(self: Any, *arguments: Any, name: str = name, told: Any = told) -> None:
            heard[name] += 1
            told(self, *arguments)

        monkeypatch.setattr(HybridTopologyManager, name, counting)
    with InlineFabric(1) as fabric:
        assert [r.model_sha256 for r in completed(fabric, submission())[1]] == undisturbed
    # The first round is opened before anybody trains; taking a round in is opening it and publishing all of it.
    assert heard == {"take_in": ROUNDS, "publish_all": ROUNDS, "begin_round": ROUNDS + 1}


@pytest.mark.parametrize("clusters", [1, 3])
def test_a_round_is_repeated_while_the_next_is_under_way(
    clusters: int, trained: Counter[str], undisturbed: list[str]
) -> None:
    with InlineFabric(clusters) as fabric:
        coordinator = "local-1"
        reports = Reports(fabric, coordinator, held=2)
        run_id = fabric.port.submit(submission()).run_id
        assert reports.came.wait(60.0)
        # Nodes of the coordinator's cluster are trained for round 3, of which nobody has heard yet.
        until(lambda: trained["nodes"] > 2 * CLIENTS, 60.0)
        fabric.restart_mediator()
        _, rounds = follow(fabric, run_id)
    assert [r.model_sha256 for r in rounds] == undisturbed
    assert [r.attempt for r in rounds] == [1, 2, 2, 1, 1, 1]


def test_what_is_not_asked_for_is_left_off(monkeypatch: pytest.MonkeyPatch, trained: Counter[str]) -> None:
    going = threading.Event()
    train = LocalTrainer.train

    def waiting(self: LocalTrainer, *arguments: Any, **keywords: Any) -> Any:
        found = train(self, *arguments, **keywords)
        assert trained["nodes"] <= 2 * CLIENTS or going.wait(60.0)
        return found

    told = threading.Event()
    leave_off = NodeHost.host_leave_off

    def leaving(self: NodeHost, *attempt: int) -> None:
        leave_off(self, *attempt)
        told.set()

    monkeypatch.setattr(LocalTrainer, "train", waiting)
    monkeypatch.setattr(NodeHost, "host_leave_off", leaving)
    with InlineFabric(1, num_slots=1) as fabric:
        reports = Reports(fabric, "local-1", held=2)
        run_id = fabric.port.submit(submission()).run_id
        assert reports.came.wait(60.0)
        until(lambda: trained["nodes"] > 2 * CLIENTS, 60.0)
        fabric.port.advance(run_id, "stop", 0)
        reports.let_go()
        assert told.wait(60.0)
        going.set()
        info, rounds = follow(fabric, run_id)
    assert (info.status, len(rounds)) == ("COMPLETED", 2)
    # The node that was being trained when the run was stopped, and no other.
    assert trained["nodes"] == 2 * CLIENTS + 1
