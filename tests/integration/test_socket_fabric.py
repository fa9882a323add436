"""Federations over real sockets and bad lines: the same bits as on one cluster, the bytes that the plan says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from torch import nn

from icrf.learning.models import register_model
from icrf.protocol import COMPLETED, Plan, RoundResult, RunInfo, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import InlineFabric, SocketFabric, parse_wan
from icrf_mediator.mediator import Policy

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star", "number_of_clients": 100}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring", "number_of_clients": 64}


WIDE = {**STAR, "number_of_clients": 2, "model_type": "wide", "federated_learning_rounds": 1, "batch_size": 512}
LINE = parse_wan("80ms,50mbit")
WINDOW = 1 << 20


@register_model("wide")
def wide(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """1 million parameters: a model of 4 MB, and a partial of 8 MB."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 14_000), nn.ReLU(), nn.Linear(14_000, num_classes))


@register_model("gigabyte")
def gigabyte(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """83 million parameters: model and partial are 1 GB together."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1_110_000), nn.ReLU(), nn.Linear(1_110_000, num_classes))


def submission_of(keys: Mapping[str, Any]) -> Submission:
    data = {"federation_id": "fed", "federated_learning_rounds": 3, "batch_size": 64, **keys}
    return build_submission(FederationConfig.from_mapping(data))


def run_on(fabric: InlineFabric, submission: Submission) -> tuple[RunInfo, list[RoundResult], Plan]:
    plan = fabric.port.plan(submission)
    run = fabric.port.submit(submission)
    rounds = [event.round for event in fabric.port.watch(run.run_id) if event.round]
    info = fabric.port.get(run.run_id)
    assert info.status == COMPLETED, info.error_json
    return info, rounds, plan


@cache
def hashes_on_one_cluster(keys: tuple[tuple[str, Any], ...]) -> list[str]:
    with InlineFabric(1) as fabric:
        return [r.model_sha256 for r in run_on(fabric, submission_of(dict(keys)))[1]]


@pytest.mark.parametrize("keys", [STAR, RING], ids=["star-100", "ring-64"])
def test_bytes_at_the_sockets_are_those_of_the_plan_and_of_the_summary(keys: dict[str, Any]) -> None:
    """What agents and mediator say to each other passes the lines as well, over ports of its own."""
    with SocketFabric(3) as fabric:
        info, rounds, plan = run_on(fabric, submission_of(keys))
        crossed = fabric.payload_bytes()
    assert [r.model_sha256 for r in rounds] == hashes_on_one_cluster(tuple(keys.items()))
    assert info.bytes_inter_cluster == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)
    assert crossed == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)


@pytest.mark.parametrize("relay", [False, True], ids=["direct", "relayed"])
@pytest.mark.parametrize(
    ("model", "beat_s"),
    [("wide", 0.4), pytest.param("gigabyte", 5.0, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_bulk_on_a_thin_line_delays_no_heartbeat_and_a_reset_costs_a_window(
    model: str, beat_s: float, relay: bool
) -> None:
    """The lease is three heartbeats long and a payload takes longer: a cluster whose heartbeats wait behind it is lost,
    and the round gets another attempt."""
    # Through the relay a window takes twice the round trip, and so the round twice its time.
    keys = {**WIDE, "model_type": model, "round_deadline_s": 1500}
    expected = hashes_on_one_cluster(tuple(keys.items()))
    policy = Policy(lease_ttl_s=3 * beat_s, heartbeat_s=beat_s)
    with SocketFabric(2, wan=LINE, relay=relay, window_bytes=WINDOW, policy=policy) as fabric:
        submission = submission_of(keys)
        plan = fabric.port.plan(submission)
        home = plan.assignment["server"]
        way, line = fabric.payload_way(home), fabric.lines[home]
        partial = 8 * plan.num_parameters
        assert partial / LINE.bytes_per_s > policy.lease_ttl_s
        # Over the way to the relay the model goes out before.
        before = line.passed(way) + (4 * plan.num_parameters if relay else 0)
        line.reset_after(before + int(0.4 * partial), way)
        info, rounds, _ = run_on(fabric, submission)
        came = line.passed(way) - before
    assert [(r.model_sha256, r.attempt) for r in rounds] == [(expected[0], 1)]
    assert info.bytes_inter_cluster == pytest.approx(plan.bytes_inter_cluster_total, rel=0.02)
    # A window, the chunk that began within it, and what headers and replies take.
    assert partial < came < 1.02 * partial + 1.5 * WINDOW
