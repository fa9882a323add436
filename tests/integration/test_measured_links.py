"""Links measured over real sockets and bad lines, and what placement makes of them."""

from __future__ import annotations

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

FAR = parse_wan("40ms,20mbit")
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


@pytest.mark.parametrize("relay", [False, True], ids=["direct", "relayed"])
def test_a_far_cluster_is_found_out_and_moves_to_the_end_of_the_line(relay: bool) -> None:
    with SocketFabric(NAMES, wan={"b": FAR}, relay=relay) as fabric:
        before = fabric.port.plan(line())
        assert cuts(before) == {frozenset("ab"), frozenset("bc")}
        measured = {(link.source, link.target): link for link in fabric.port.measure_links()}
        assert len(measured) == 6 and {link.relayed for link in measured.values()} == {relay}
        for near, far in ((("a", "c"), ("a", "b")), (("c", "a"), ("c", "b"))):
            assert measured[far].bytes_per_s * 4 < measured[near].bytes_per_s, (near, far)
            # The line lets no more through than it was told to, and a round trip takes no less.
            assert FAR.bytes_per_s / 4 < measured[far].bytes_per_s < FAR.bytes_per_s * 1.5
            assert measured[far].rtt_s >= 0.9 * FAR.round_trip_s
        after = fabric.port.plan(line())
        far_cuts = [cut for cut in cuts(after) if "b" in cut]
        assert len(far_cuts) == 1 and after.cut_edges == before.cut_edges
        assert all(link.seconds_per_round > 0.0 for link in after.links)
        # A restart of the mediator forgets nothing.
        fabric.restart_mediator()
        until(lambda: len(fabric.port.clusters()) == 3)
        assert fabric.port.plan(line()) == after


def test_a_run_is_placed_by_what_was_measured_and_its_bits_do_not_depend_on_it() -> None:
    def run(fabric: InlineFabric) -> tuple[dict[str, str], str]:
        plan = fabric.port.plan(line())
        run = fabric.port.submit(line())
        assert [event.kind for event in fabric.port.watch(run.run_id)][-1] == "end"
        info = fabric.port.get(run.run_id)
        assert info.status == COMPLETED, info.error_json
        return plan.assignment, info.model_sha256

    with SocketFabric(NAMES, wan={"b": FAR}) as fabric:
        placed, bits = run(fabric)
        fabric.port.measure_links()
        placed_again, same = run(fabric)
    assert placed_again != placed and same == bits


def test_encrypted_links_are_measured_too_and_one_that_is_cut_says_why(tmp_path: Path) -> None:
    with SocketFabric(("a", "b"), certs=tmp_path) as fabric:
        assert [link.error_json for link in fabric.port.measure_links()] == ["", ""]
        fabric.substrates["a"].kill_gateway()
        first = fabric.port.measure_links()[0]
        assert error_from_json(first.error_json).code == "U003"
        assert (first.bytes_per_s, first.rtt_s) == (0.0, 0.0)
        fabric.stop_agent("b")
        assert fabric.port.links() == []


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
