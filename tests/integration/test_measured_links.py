"""Links measured over real sockets and bad lines, and what placement makes of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.errors import error_from_json
from icrf.protocol import COMPLETED, MeasuredLink, Plan, Submission
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import InlineFabric, SocketFabric, parse_wan
from icrf.testing.waiting import until
from icrf.wire.mediator_client import GrpcMediator
from icrf_agent import cluster_gateway

FAR = parse_wan("20ms,40mbit")
NAMES = ("a", "b", "c")
LINE = {
    "federation_id": "line",
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "federated_learning_topology": "line",
    "number_of_clients": 9,
    "federated_learning_rounds": 2,
    "dataset_type": "digits",
    "model_type": "mlp",
}


def line() -> Submission:
    return build_submission(FederationConfig.from_mapping(LINE))


def cuts(plan: Plan) -> set[frozenset[str]]:
    """Which clusters neighbours are on, where these are two."""
    where = [plan.assignment[f"client_{i}"] for i in range(9)]
    return {frozenset(pair) for pair in pairwise(where) if pair[0] != pair[1]}


def require_far(measured: dict[tuple[str, str], MeasuredLink], near: tuple[str, str], far: tuple[str, str]) -> None:
    """A far link is told from a near one; its line lets no more through than it was told to, and no sooner."""
    assert measured[far].bytes_per_s * 4 < measured[near].bytes_per_s, (near, far)
    assert FAR.bytes_per_s / 4 < measured[far].bytes_per_s < FAR.bytes_per_s * 1.5
    assert measured[far].rtt_s >= 0.9 * FAR.round_trip_s


def test_a_far_cluster_moves_to_the_end_of_the_line_and_bits_do_not_depend_on_it() -> None:
    def run(fabric: InlineFabric) -> tuple[Plan, str]:
        plan = fabric.port.plan(line())
        run = fabric.port.submit(line())
        assert [event.kind for event in fabric.port.watch(run.run_id)][-1] == "end"
        info = fabric.port.get(run.run_id)
        assert info.status == COMPLETED, info.error_json
        assert json.loads(b"".join(fabric.port.fetch(run.run_id, "plan.json")))["assignment"] == plan.assignment
        return plan, info.model_sha256

    with SocketFabric(NAMES, wan={"b": FAR}) as fabric:
        before, bits = run(fabric)
        assert cuts(before) == {frozenset("ab"), frozenset("bc")}
        measured = {(link.source, link.target): link for link in fabric.port.measure_links()}
        assert len(measured) == 6 and not any(link.relayed for link in measured.values())
        require_far(measured, near=("a", "c"), far=("a", "b"))
        require_far(measured, near=("c", "a"), far=("c", "b"))
        after, same = run(fabric)
    assert len([cut for cut in cuts(after) if "b" in cut]) == 1 and after.cut_edges == before.cut_edges
    assert all(link.seconds_per_round > 0.0 for link in after.links)
    assert same == bits


def test_the_way_through_the_mediator_is_measured_where_payloads_take_it() -> None:
    with SocketFabric(("a", "b"), relay=True) as near, SocketFabric(("a", "b"), wan={"b": FAR}, relay=True) as far:
        links = {"near": near.port.measure_links()[0], "far": far.port.measure_links()[0]}
    assert all(link.relayed for link in links.values())
    require_far({(where, ""): link for where, link in links.items()}, near=("near", ""), far=("far", ""))


def test_a_mediator_that_was_restarted_still_knows_the_links() -> None:
    with InlineFabric(2) as fabric:
        measured = fabric.port.measure_links()
        fabric.restart_mediator()
        until(lambda: len(fabric.port.clusters()) == 2)
        assert fabric.port.links() == measured and len(measured) == 2
        # Whoever comes under the name of another has other links.
        fabric.stop_agent("local-2")
        assert fabric.port.links() == []
        fabric.start_agent("local-2")
        assert fabric.port.links() == []


def test_encrypted_links_are_measured_too_and_one_that_is_cut_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SocketFabric(("a", "b"), certs=tmp_path) as fabric:
        assert [link.error_json for link in fabric.port.measure_links()] == ["", ""]
        monkeypatch.setattr(cluster_gateway, "PATIENCE_S", 0.2)
        # Another life of it listens elsewhere, which nobody is told here.
        fabric.substrates["a"].kill_gateway()
        cut = fabric.port.measure_links()[1]
        assert (cut.source, cut.target, cut.bytes_per_s, cut.rtt_s) == ("b", "a", 0.0, 0.0)
        assert error_from_json(cut.error_json).code == "P030"


def test_the_command_measures_over_bad_lines() -> None:
    with SocketFabric(("far", "near"), wan={"far": FAR}) as fabric:
        doors = Doors(remote=lambda address, tls: GrpcMediator(fabric.mediator_address))
        result = CliRunner().invoke(app, ["clusters", "--measure"], obj=doors)
        assert result.exit_code == 0, result.output
        rows = [row.split() for row in result.stdout.splitlines()]
        links: dict[tuple[str, ...], MeasuredLink] = {(m.source, m.target): m for m in fabric.port.links()}
        for ends in (("far", "near"), ("near", "far")):
            speed = f"{links[ends].bytes_per_s / 1e6:,.2f}"
            assert [*ends, speed, f"{1e3 * links[ends].rtt_s:,.1f}", "direct", "just", "now"] in rows
