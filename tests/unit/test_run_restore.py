"""What the journal gives back is what was submitted."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

from icrf.protocol import Graph, NodeSpec, Rows, Submission, TensorSpec
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
)


def test_a_submission_comes_out_of_the_journal_as_it_went_in() -> None:
    unset = [f.name for f in fields(Submission) if getattr(WHOLE, f.name) == f.default]
    assert not unset, "a field that has its default proves nothing"
    assert submission_of(json.loads(json.dumps(asdict(WHOLE)))) == WHOLE
    assert replace(WHOLE, graph=replace(WHOLE.graph, weights=())) != WHOLE
