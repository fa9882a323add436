"""A cluster that has a run alone goes from round to round with few calls, unless its nodes keep it from going ahead."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from icrf import FederatedNode, FederationConfig
from icrf.protocol import Submission
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed
from icrf_agent.topology_manager import HybridTopologyManager

ROUNDS = 6


class Greets(FederatedNode):
    """Sends a message in its second round, and looks for mail in every one."""

    def train(self) -> Any:
        if self.round == 2:
            self.send("hello", {"from": self.id})
        letters = 0.0
        while self.receive() is not None:
            letters += 1.0
        return {**super().train(), "letters": letters}


class Plain(FederatedNode):
    """A class of the user's own that neither keeps nor sends anything."""


def submission(**settings: Any) -> Submission:
    return build_submission(
        FederationConfig.from_mapping(
            {
                "federation_id": "ahead",
                "federated_learning_schema": "TraditionalFederatedLearning",
                "federated_learning_topology": "star",
                "number_of_clients": 4,
                "federated_learning_rounds": ROUNDS,
                "dataset_type": "digits",
                "evaluate_every": 3,
                **settings,
            }
        )
    )


def calls_of(monkeypatch: pytest.MonkeyPatch, clusters: int, template: type | None) -> tuple[Counter[str], list[str]]:
    """How often the managers were asked to open a round and to take one in, and the hashes of the rounds."""
    counted: Counter[str] = Counter()
    take_in, begin = HybridTopologyManager.take_in, HybridTopologyManager.begin_round

    def taken(self: HybridTopologyManager, *arguments: Any) -> None:
        counted["take_in"] += 1
        counted["begin_round"] -= 1
        take_in(self, *arguments)

    def begun(self: HybridTopologyManager, *arguments: Any) -> None:
        counted["begin_round"] += 1
        begin(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(HybridTopologyManager, "take_in", taken)
        patch.setattr(HybridTopologyManager, "begin_round", begun)
        templates = {"local:own": template} if template else None
        settings = {"client_template": "local:own"} if template else {}
        with InlineFabric(clusters, templates=templates) as fabric:
            _, rounds = completed(fabric, submission(**settings))
    return counted, [result.model_sha256 for result in rounds]


@pytest.mark.parametrize("template", [None, Plain])
def test_a_manager_hears_once_of_a_round(monkeypatch: pytest.MonkeyPatch, template: type | None) -> None:
    counted, alone = calls_of(monkeypatch, 1, template)
    assert counted == {"take_in": ROUNDS, "begin_round": 1}
    assert calls_of(monkeypatch, 3, template)[1] == alone


def test_rounds_of_nodes_that_exchange_messages_are_opened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, alone = calls_of(monkeypatch, 1, Greets)
    assert counted["begin_round"] == ROUNDS
    assert calls_of(monkeypatch, 2, Greets)[1] == alone
