"""The same bits on any number of clusters, the bytes the plan says, and runs that do not touch each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from icrf import values
from icrf.errors import IcrfError
from icrf.protocol import Plan, RoundResult, RunInfo, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, fabrics_on_demand, follow, follow_until
from icrf.testing.waiting import until

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PEERS = {"schema": "DecentralizedFederatedLearning"}
NUM_CLIENTS = 6
# Gateway frames carry headers; the plan counts payloads only.
HEADERS = 1.02


def submission_of(**keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "number_of_clients": NUM_CLIENTS,
        "federated_learning_rounds": 3,
        "learning_rate": 0.1,
        "batch_size": 64,
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data))


@dataclass(frozen=True)
class Outcome:
    """What a user sees of a finished run."""

    info: RunInfo
    rounds: tuple[RoundResult, ...]
    plan: Plan

    @property
    def hashes(self) -> list[tuple[str, str, str]]:
        return [(r.model_sha256, r.consensus_sha256, r.parent_sha256) for r in self.rounds]


def run_on(fabric: InlineFabric, submission: Submission) -> Outcome:
    plan = fabric.port.plan(submission)
    info, rounds = completed(fabric, submission)
    return Outcome(info, tuple(rounds), plan)


@pytest.fixture(scope="module")
def custom_matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two triangles that share one edge."""
    path = tmp_path_factory.mktemp("matrix") / "matrix.csv"
    edges = {(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (2, 3)}
    rows = [[int((i, j) in edges or (j, i) in edges) for j in range(6)] for i in range(6)]
    path.write_text("\n".join(",".join(map(str, row)) for row in rows))
    return path


@pytest.fixture(scope="module")
def graphs(custom_matrix: Path) -> Mapping[str, Mapping[str, Any]]:
    custom = {"federated_learning_topology": "custom", "adjacency_matrix_file_name": str(custom_matrix)}
    return {
        "star": STAR,
        "ring": {**PEERS, "federated_learning_topology": "ring"},
        "mesh": {**PEERS, "federated_learning_topology": "mesh"},
        "custom": {**PEERS, **custom},
    }


@pytest.fixture(scope="module")
def fabrics() -> Iterator[Any]:
    """A fabric of so many clusters, started when it is asked for."""
    with fabrics_on_demand() as opened:
        yield opened


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("distribution", ["iid", "dir"])
@pytest.mark.parametrize("graph", ["star", "ring", "mesh", "custom"])
def test_every_round_has_the_same_bits_on_any_number_of_clusters(
    fabrics: Any, graphs: Mapping[str, Mapping[str, Any]], graph: str, distribution: str
) -> None:
    submission = {**graphs[graph], "data_distribution_kind": distribution}
    one = run_on(fabrics(1), submission_of(**submission))
    assert len(one.rounds) == 3 and one.info.bytes_inter_cluster == 0
    assert one.info.model_sha256 == (one.rounds[-1].consensus_sha256 or one.rounds[-1].model_sha256)
    for clusters in (2, 3, 5):
        many = run_on(fabrics(clusters), submission_of(**submission))
        assert len(set(many.plan.assignment.values())) == clusters
        assert many.hashes == one.hashes
        assert many.info.model_sha256 == one.info.model_sha256
        assert [r.metrics for r in many.rounds] == [r.metrics for r in one.rounds]


def test_more_hosts_per_cluster_and_another_assignment_change_no_bit() -> None:
    with InlineFabric(1, num_slots=1) as one, InlineFabric(3, num_slots=4) as many:
        expected = run_on(one, submission_of(**STAR))
        found = run_on(many, submission_of(**STAR, assignment_strategy="round_robin"))
    assert found.hashes == expected.hashes


def test_more_clusters_than_nodes_leave_some_empty(fabrics: Any) -> None:
    submission = submission_of(**{**STAR, "number_of_clients": 2})
    outcome = run_on(fabrics(5), submission)
    assert len(outcome.info.clusters) <= 3
    assert outcome.hashes == run_on(fabrics(1), submission).hashes


def test_evaluating_less_often_changes_metrics_only(fabrics: Any, graphs: Mapping[str, Mapping[str, Any]]) -> None:
    for graph in ("star", "ring"):
        often = run_on(fabrics(2), submission_of(**graphs[graph]))
        rarely = run_on(fabrics(2), submission_of(**graphs[graph], evaluate_every=2))
        assert [r.model_sha256 for r in rarely.rounds] == [r.model_sha256 for r in often.rounds]
        assert ["accuracy" in r.metrics for r in rarely.rounds] == [False, True, True]


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("num_clients", [4, 40])
@pytest.mark.parametrize("clusters", [2, 3])
def test_a_star_sends_one_model_and_one_partial_per_remote_cluster(
    fabrics: Any, clusters: int, num_clients: int
) -> None:
    outcome = run_on(fabrics(clusters), submission_of(**{**STAR, "number_of_clients": num_clients}))
    per_cluster = 12 * outcome.plan.num_parameters
    for result in outcome.rounds:
        assert 0 < result.bytes_inter_cluster <= (clusters - 1) * per_cluster * HEADERS
        assert sum(result.bytes_by_cluster.values()) == result.bytes_inter_cluster
    assert outcome.info.bytes_inter_cluster == sum(r.bytes_inter_cluster for r in outcome.rounds)


@pytest.mark.parametrize("graph", ["ring", "mesh", "custom"])
@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_a_graph_sends_one_payload_per_sender_and_remote_cluster(
    fabrics: Any, graphs: Mapping[str, Mapping[str, Any]], graph: str, clusters: int
) -> None:
    submission = submission_of(**graphs[graph], evaluate_every=3)
    outcome = run_on(fabrics(clusters), submission)
    assignment = [outcome.plan.assignment[node.id] for node in submission.nodes]
    indptr, indices = submission.graph.indptr, submission.graph.indices
    edges = [(i, j) for i in range(len(assignment)) for j in indices[indptr[i] : indptr[i + 1]]]
    pairs = {(i, assignment[j]) for i, j in edges if assignment[i] != assignment[j]}
    expected = len(pairs) * 4 * outcome.plan.num_parameters
    for result in outcome.rounds[:2]:
        assert expected <= result.bytes_inter_cluster <= expected * HEADERS
    evaluated = expected + (clusters - 1) * 8 * outcome.plan.num_parameters
    assert evaluated <= outcome.rounds[2].bytes_inter_cluster <= evaluated * HEADERS


@pytest.mark.parametrize("graph", ["star", "ring", "mesh", "custom"])
@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_the_bytes_are_those_of_the_plan(
    fabrics: Any, graphs: Mapping[str, Mapping[str, Any]], graph: str, clusters: int
) -> None:
    outcome = run_on(fabrics(clusters), submission_of(**graphs[graph]))
    assert outcome.info.bytes_inter_cluster == pytest.approx(outcome.plan.bytes_inter_cluster_total, rel=0.02)


# ---------------------------------------------------------------- several runs


def test_two_runs_at_once_do_not_touch_each_other() -> None:
    """Their rounds alternate on the same clusters, under the same federation's name and the same nodes' names."""
    first, second = submission_of(**STAR), submission_of(**STAR, seed=1)
    with InlineFabric(2, num_slots=8) as fabric:
        expected = [run_on(fabric, s).info.model_sha256 for s in (first, second)]
        held = [
            replace(s, client_request_id=f"held {s.config_json}", keep=True, stage="activate") for s in (first, second)
        ]
        runs = [fabric.port.submit(s).run_id for s in held]
        for number in range(1, 4):
            for run_id in runs:
                fabric.port.advance(run_id, "run", number)
            for run_id in runs:
                follow_until(fabric, run_id, number)
        for run_id in runs:
            fabric.port.finish(run_id)
            follow(fabric, run_id)
        assert [fabric.port.get(run_id).model_sha256 for run_id in runs] == expected


def test_the_end_of_one_run_leaves_the_other_alone() -> None:
    with InlineFabric(2, num_slots=8) as fabric:
        config = FederationConfig.from_json(submission_of(**STAR).config_json)
        kept, doomed = (fabric.port.submit(build_submission(config, keep=True)).run_id for _ in range(2))
        follow_until(fabric, kept, 3)
        fabric.port.cancel(doomed)
        follow(fabric, doomed)
        arguments = values.encode([[], {}])
        assert values.decode(fabric.port.call_node(kept, "client_1", "ping", arguments))["id"] == "client_1"
        with pytest.raises(IcrfError):
            fabric.port.call_node(doomed, "client_1", "ping", arguments)


def test_resources_are_free_again_after_a_run() -> None:
    with InlineFabric(2, num_slots=1) as fabric:
        hashes = {run_on(fabric, submission_of(**STAR)).info.model_sha256 for _ in range(3)}
        assert len(hashes) == 1
        # What an agent says about it may come after the end that users see.
        until(lambda: [info.free_slots for info in fabric.port.clusters()] == [1, 1])


# ---------------------------------------------------------------- placement


def test_nodes_live_where_they_are_pinned() -> None:
    pins = {"client_0": "local-2", "client_1": {"gpu": "yes"}, "server": "local-3"}
    config = FederationConfig.from_json(submission_of(**STAR, placement=pins).config_json)
    with InlineFabric(3, num_slots=8, labels={"local-2": {"gpu": "no"}, "local-3": {"gpu": "yes"}}) as fabric:
        run_id = fabric.port.submit(build_submission(config, keep=True)).run_id
        follow_until(fabric, run_id, 3)
        info = fabric.port.get(run_id)
        where = {
            node: values.decode(fabric.port.call_node(run_id, node, "ping", values.encode([[], {}])))["cluster"]
            for node in pins
        }
        expected = run_on(fabric, submission_of(**STAR)).hashes
        assert info.rounds_done == 3
        assert [r.round.model_sha256 for r in rounds_of(fabric, run_id)] == [h[0] for h in expected]
    assert where == {"client_0": "local-2", "client_1": "local-3", "server": "local-3"}


def rounds_of(fabric: InlineFabric, run_id: str) -> list[Any]:
    """The round events so far."""
    done, found = fabric.port.get(run_id).rounds_done, []
    for event in fabric.port.watch(run_id):
        found += [event] if event.round else []
        if len(found) == done:
            break
    return found


@pytest.mark.parametrize("pins", [{"client_0": "nowhere"}, {"client_0": {"gpu": "yes"}}, {"client_99": "local-1"}])
def test_a_pin_to_nothing_is_refused_at_submission(pins: dict[str, Any]) -> None:
    with InlineFabric(1) as fabric, pytest.raises(IcrfError, match="C014"):
        fabric.port.submit(submission_of(**STAR, placement=pins))
