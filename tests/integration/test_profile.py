"""A run that is profiled: every host's seconds add up to the round, they are true, and no bit depends on it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.federation.node import FederatedNode
from icrf.profiling import ALL_PARTS, ROUND_PARTS, round_seconds, whole_s
from icrf.protocol import HOST_PARTS, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.clocks import StandingClock
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, fabrics_on_demand
from icrf_agent import node_host
from icrf_agent.host_meter import HostMeter
from icrf_mediator.mediator import Policy

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
GROUPS = {
    "schema": "HierarchicalFederatedLearning",
    "federated_learning_topology": "hierarchy",
    "number_of_groups": 2,
    "global_every": 2,
}
# Busy seconds are read on one clock and rounds on another one of the same machine.
CLOCKS_S = 1e-3


def submission_of(**keys: Any) -> Submission:
    data = {
        "federation_id": "fed",
        "number_of_clients": 5,
        "federated_learning_rounds": 3,
        "learning_rate": 0.1,
        "batch_size": 64,
        **keys,
    }
    return build_submission(FederationConfig.from_mapping(data), profile=True)


@pytest.fixture(scope="module")
def fabrics() -> Iterator[Any]:
    with fabrics_on_demand() as opened:
        yield opened


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("flow", [STAR, RING, GROUPS], ids=["star", "ring", "groups"])
def test_every_hosts_parts_and_its_idle_time_are_the_round(fabrics: Any, flow: dict[str, Any], clusters: int) -> None:
    rounds = completed(fabrics(clusters), submission_of(**flow))[1]
    assert len(rounds) == 3
    for result in rounds:
        assert result.profile is not None
        found = round_seconds(result)
        assert len(found) == 2 * clusters and {cluster for cluster, _ in found} == set(result.profile.clusters)
        for seconds in found.values():
            assert sum(seconds.values()) == pytest.approx(whole_s(result, result.profile))
            # Idle is what is left: it cannot be less than nothing unless a second counted twice.
            assert seconds["idle"] > -CLOCKS_S
            assert all(seconds[part] >= 0.0 for part in HOST_PARTS)
        assert any(seconds["train"] > 0.0 for seconds in found.values())
        for profile in result.profile.clusters.values():
            for span in profile.phases:
                assert span.began_s <= span.ended_s <= result.profile.working_s + CLOCKS_S
                # Only what a round before could announce may begin before its own round is asked for.
                assert span.began_s >= -CLOCKS_S or (flow is STAR and result.number > 1)
    assert all(result.profile is not None and result.profile.mediator_s > 0.0 for result in rounds[1:])
    assert [result.profile is not None and result.profile.activate_s > 0.0 for result in rounds] == [True, False, False]


def test_only_the_coordinator_evaluates_the_global_model(fabrics: Any) -> None:
    result = completed(fabrics(2), submission_of(**STAR))[1][0]
    evaluated = {host: seconds["evaluate"] > 0.0 for host, seconds in round_seconds(result).items()}
    assert sum(evaluated.values()) == 1
    assert result.profile is not None
    phases = {cluster: [span.name for span in found.phases] for cluster, found in result.profile.clusters.items()}
    assert sorted(phases.values()) == [["publish", "train", "aggregate"], ["train"]]


@pytest.mark.parametrize("flow", [STAR, RING], ids=["star", "ring"])
def test_no_bit_depends_on_it_and_nothing_is_told_unless_asked(fabrics: Any, flow: dict[str, Any]) -> None:
    submission = submission_of(**flow)
    with_it = completed(fabrics(2), submission)[1]
    without = completed(fabrics(1), replace(submission, client_request_id=uuid.uuid4().hex, profile=False))[1]
    assert [r.model_sha256 for r in with_it] == [r.model_sha256 for r in without]
    assert all(r.profile is None for r in without)


class Embedded:
    """An inline fabric in the place of local Ray clusters."""

    takes_classes = False
    templates: dict[str, type] = {}  # noqa: RUF012 - never filled

    def __init__(self, fabric: InlineFabric) -> None:
        self.port = fabric.port

    def node_handle(self, run_id: str, index: int) -> None:
        return None

    def close(self) -> None:
        """The fabric goes on for other tests."""


@pytest.mark.parametrize("clusters", [1, 2])
def test_the_command_shows_a_table_and_leaves_a_file(
    fabrics: Any, clusters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fed.yaml").write_text(json.dumps(json.loads(submission_of(**STAR).config_json)))
    port = fabrics(clusters).port
    doors = Doors(local=lambda *_: Embedded(fabrics(clusters)), plan_local=lambda submission, _: port.plan(submission))
    command = ["run", "fed.yaml", "--plain", "--clusters", str(clusters)]
    shown = CliRunner().invoke(app, [*command, "--out", "with", "--profile"], obj=doors)
    assert shown.exit_code == 0, shown.output
    lines = [json.loads(line) for line in Path("with/profile.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert len(line["hosts"]) == 2 * clusters
        for host in line["hosts"]:
            assert sum(host[part] for part in ROUND_PARTS) == pytest.approx(line["whole_s"], abs=1e-9)
    tail = shown.stdout.splitlines()[-(2 * clusters + 3) :]
    assert tail[0].split() == ["seconds", *ALL_PARTS, "total"]
    hosts = [line.split() for line in tail[1:-2]]
    assert {words[0].split("/")[0] for words in hosts} == {f"local-{k + 1}" for k in range(clusters)}
    assert len({words[-1] for words in hosts}) == 1
    assert tail[-2].startswith("all, %") and tail[-1].startswith("median round (")
    assert "Where the time went" in Path("with/report.html").read_text()
    silent = CliRunner().invoke(app, [*command, "--out", "without"], obj=doors)
    assert silent.exit_code == 0 and "median round" not in silent.stdout
    assert not Path("without/profile.jsonl").exists()
    assert "Where the time went" not in Path("without/report.html").read_text()
    first, second = (json.loads(Path(f"{name}/summary.json").read_text()) for name in ("with", "without"))
    assert first["model_sha256"] == second["model_sha256"]


# Only nodes move it.
CLOCK = StandingClock()


class Slow(FederatedNode):
    """Trains for eight seconds, and evaluates for two."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        CLOCK.time_s += 8.0
        return super().train(**kwargs)

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        CLOCK.time_s += 2.0
        return super().evaluate(phase)


def test_the_seconds_are_those_that_nodes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that stands still unless a node works: hosts run one after the other, and wait for each other."""
    monkeypatch.setattr(node_host, "HostMeter", lambda: HostMeter(lambda: CLOCK.time_s))
    names = {"client_template": "local:Slow", "server_template": "local:Slow"}
    keys = {**STAR, **names, "number_of_clients": 3, "federated_learning_rounds": 2}
    policy = Policy(lease_ttl_s=1e9)
    with InlineFabric(1, templates={"local:Slow": Slow}, policy=policy, clock=CLOCK) as fabric:
        rounds = completed(fabric, submission_of(**keys))[1]
    nothing = dict.fromkeys(("sum", "exchange", "other"), 0.0)
    for number, result in enumerate(rounds):
        # Journals are written in real time.
        commits_s = CLOCKS_S if number == 0 else CLOCKS_S + rounds[number - 1].commit_s
        assert result.profile is not None and result.profile.working_s == pytest.approx(26.0, abs=commits_s)
        first, second = ({k: v for k, v in found.items() if k != "commit"} for found in round_seconds(result).values())
        assert first.pop("idle") == pytest.approx(16.0, abs=commits_s)
        assert second.pop("idle") == pytest.approx(10.0, abs=commits_s)
        assert first == {"train": 8.0, "evaluate": 2.0, **nothing}
        assert second == {"train": 16.0, "evaluate": 0.0, **nothing}


def test_nodes_that_train_together_take_time_of_training(fabrics: Any) -> None:
    for result in completed(fabrics(1), submission_of(**STAR, vectorize=4))[1]:
        assert all(seconds["train"] > 0.0 for seconds in round_seconds(result).values())
