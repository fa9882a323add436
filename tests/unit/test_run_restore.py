"""What the journal gives back is what was submitted."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    Graph,
    MixingReport,
    NodeSpec,
    Rows,
    StartRound,
    StoreModel,
    Submission,
    TensorSpec,
)
from icrf_mediator.placement import Placement
from icrf_mediator.run_restore import submission_of

WHOLE = Submission(
    client_request_id="request",
    config_json="{}",
    flow="decentralized",
    nodes=(NodeSpec("a", "train"), NodeSpec("b", "train-eval")),
    graph=Graph(2, (0, 1, 2), (1, 0), weights=(0.25, 0.5), self_weights=(0.75, 0.5)),
    layout=(TensorSpec("bias", (2,), "float32"), TensorSpec("count", (), "int64", "rounded")),
    keep=True,
    stage="activate",
    code_path="/somewhere",
    rows=Rows(down=2, client_scalars=3, nodes_keep=True),
    schedule=("01", "02"),
    profile=True,
    communities=(0, -1),
)


def test_a_submission_comes_out_of_the_journal_as_it_went_in() -> None:
    unset = [f.name for f in fields(Submission) if getattr(WHOLE, f.name) == f.default]
    assert not unset, "a field that has its default proves nothing"
    assert submission_of(json.loads(json.dumps(asdict(WHOLE)))) == WHOLE
    assert replace(WHOLE, graph=replace(WHOLE.graph, weights=())) != WHOLE


@pytest.mark.parametrize("flow", [CENTRALIZED, DECENTRALIZED])
def test_a_placement_comes_out_of_the_journal_as_it_went_in(core: Any, flow: str) -> None:
    core.register("eu", "us")
    run = core.submit(flow=flow)
    row = core.store.rows("assignments", (run.run_id,))[0].row
    found = Placement.from_row(row)
    assert json.loads(json.dumps(found.row(run.run_id, 1).row)) == row
    assert isinstance(found.plan.mixing, MixingReport) == (flow == DECENTRALIZED)


def test_a_restarted_mediator_shows_the_target_and_the_rounds_that_were_asked_for(core: Any) -> None:
    core.register("eu")
    core.accuracy = 0.9
    reached = core.submit(target_accuracy=0.5, federated_learning_rounds=4)
    core.play(hold=(StoreModel,))
    asked = core.submit(keep=True, federated_learning_rounds=2)
    core.play(hold=(StoreModel, StartRound))
    core.advance(asked, "run", 7)
    again = core.restarted()
    for run, to_target, planned in ((reached, 1, 4), (asked, 0, 7)):
        for found in (core.get(run), again.get(run)):
            assert (found.rounds_to_target, found.rounds_planned) == (to_target, planned)
