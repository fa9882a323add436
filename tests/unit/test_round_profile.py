"""What a round that was begun ahead of its time reports as its own time, and what not."""

from __future__ import annotations

from icrf.exchange import PARTIAL, compile_exchange
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import CENTRALIZED, ClusterProfile, PhaseSpan, RoundReport, Rows, StartRound
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.round_machine import AGGREGATE, PUBLISH, SEND, TRAIN, RoundMachine, Step

TRAINED = {"host-0": {"train": 2.0, "exchange": 0.5}}
MERGED = {"host-0": {"train": 2.0, "exchange": 0.5, "sum": 0.125}, "host-1": {"sum": 0.25}}


def round_asked_for_at(asked_s: float) -> RoundReport:
    """A round begun at 0: published from 0.5 to 1, trained from 1 to 4; the other cluster's sum is here at 6, and
    merged until 6.5."""
    adjacency = HybridAdjacencyMatrix.from_edges(3, [(0, 1), (1, 0), (0, 2), (2, 0)])
    plan = compile_exchange(CENTRALIZED, adjacency, ["aggregate", "train", "train"], [0, 0, 1], Rows())
    start = StartRound("run", 1, 1, 1, "", (0,), 10, True, profile=True)
    machine = RoundMachine(plan, 0, start, 3, ahead=True)
    machine.begin(0.0)
    send, train = machine.done(Step(PUBLISH), None, 0.5, 1.0)
    assert (send.kind, train.kind) == (SEND, TRAIN)
    machine.done(send, None, 0.5, 1.5)
    trained = train, PhaseReport(seconds=TRAINED), 3.0, 4.0
    if asked_s < 4.0:
        machine.confirmed(start, asked_s)
        machine.done(*trained)
    else:
        machine.done(*trained)
        machine.confirmed(start, asked_s)
    (partial,) = plan.inbound(0, PARTIAL)
    about = ("run", 1, 1, 1, PARTIAL, partial.sender, "c1", "here", "float32", 1)
    header = PayloadHeader(*about, recipients=partial.recipients)
    (merge,) = machine.arrived(Arrival(header, 100), 1, 6.0)
    assert merge.kind == AGGREGATE
    (last,) = machine.done(merge, PhaseReport(seconds=MERGED), 0.5, 6.5)
    assert last.report is not None
    return last.report


def test_of_a_phase_that_is_under_way_the_share_that_is_left_counts() -> None:
    report = round_asked_for_at(3.25)
    spans = (PhaseSpan(PUBLISH, -2.75, -2.25), PhaseSpan(TRAIN, -2.25, 0.75), PhaseSpan(AGGREGATE, 2.75, 3.25))
    hosts = {"host-0": {"train": 0.5, "exchange": 2.125, "sum": 0.125}, "host-1": {"sum": 0.25, "exchange": 2.0}}
    assert (report.profile, report.train_s, report.exchange_s) == (ClusterProfile(hosts, spans), 3.0, 2.0)


def test_who_is_done_ahead_and_waits_to_be_asked_exchanges_nothing() -> None:
    report = round_asked_for_at(5.0)
    assert report.profile is not None and report.exchange_s == 1.0
    assert report.profile.hosts["host-0"] == {"train": 0.0, "exchange": 1.0, "sum": 0.125}
