"""One attempt of a round on one cluster: what it does, in which order, and that it always ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.exchange import CONSENSUS, GATHERED, MESSAGE, MODEL, PARTIAL, UPDATE, ExchangePlan, Transfer, compile_exchange
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    ClusterProfile,
    MetricSum,
    PhaseSpan,
    RoundReport,
    Rows,
    StartRound,
    bitmap,
)
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.round_machine import ADAPT, AGGREGATE, EVALUATE, PUBLISH, REPORT, SEND, TRAIN, RoundMachine, Step

WIRE_BYTES = 100


def star_plan(assignment: Sequence[int], roles: Sequence[str] | None = None, rows: Rows | None = None) -> ExchangePlan:
    """Node 0 aggregates, all others train (unless `roles` says otherwise)."""
    num_nodes = len(assignment)
    edges = [pair for i in range(1, num_nodes) for pair in ((0, i), (i, 0))]
    roles = roles or ["aggregate", *["train"] * (num_nodes - 1)]
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, edges)
    return compile_exchange(CENTRALIZED, adjacency, roles, assignment, rows or Rows())


def ring_plan(assignment: Sequence[int], rows: Rows | None = None) -> ExchangePlan:
    num_nodes = len(assignment)
    edges = {pair for i in range(num_nodes) for j in [(i + 1) % num_nodes] for pair in ((i, j), (j, i))}
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, sorted(edges))
    return compile_exchange(DECENTRALIZED, adjacency, ["train"] * num_nodes, assignment, rows or Rows())


def machine_of(plan: ExchangePlan, cluster: int, *, evaluate: bool = True, adapt: bool = False) -> RoundMachine:
    start = StartRound("run", 1, 1, 1, "", (0,), 10, evaluate, adapt=adapt)
    return RoundMachine(plan, cluster, start, len(plan.assignment))


def arrival_of(transfer: Transfer, wire_bytes: int = WIRE_BYTES) -> Arrival:
    header = PayloadHeader(
        run_id="run",
        generation=1,
        round=1,
        attempt=1,
        kind=transfer.kind,
        sender=transfer.sender,
        source=f"c{transfer.source}",
        target="here",
        dtype="float32",
        num_elements=1,
        recipients=transfer.recipients if transfer.kind == PARTIAL else (),
    )
    return Arrival(header, wire_bytes)


class Play:
    """Feeds one machine and remembers what it asked for."""

    def __init__(self, machine: RoundMachine) -> None:
        self.machine = machine
        self.pending: list[Step] = []
        self.reports: list[RoundReport] = []
        self.asked: list[str] = []
        self._take(machine.begin(0.0))

    def _take(self, steps: list[Step]) -> None:
        for step in steps:
            self.asked.append(step.kind)
            if step.kind == REPORT:
                assert step.report is not None
                self.reports.append(step.report)
            else:
                self.pending.append(step)

    def kinds(self) -> list[str]:
        return [step.kind for step in self.pending]

    def finish(self, kind: str, result: PhaseReport | None = None, *, took_s: float = 0.0, now_s: float = 0.0) -> None:
        """The first pending step of this kind is done."""
        step = next(s for s in self.pending if s.kind == kind)
        self.pending.remove(step)
        if result is None and kind in (TRAIN, AGGREGATE, EVALUATE):
            result = PhaseReport()
        self._take(self.machine.done(step, result, took_s, now_s))

    def arrive(self, transfer: Transfer, *, now_s: float = 0.0, wire_bytes: int = WIRE_BYTES) -> None:
        self._take(self.machine.arrived(arrival_of(transfer, wire_bytes), transfer.source, now_s))


# ---------------------------------------------------------------- centralized


def test_the_coordinator_trains_while_the_model_is_on_its_way() -> None:
    play = Play(machine_of(star_plan([0, 0, 1, 2]), 0))
    assert play.kinds() == [PUBLISH]
    play.finish(PUBLISH)
    assert sorted(play.kinds()) == [SEND, SEND, TRAIN]
    assert [s.transfer.target for s in play.pending if s.transfer] == [1, 2]


def test_every_update_travels_by_itself_where_the_rule_wants_to_see_it() -> None:
    plan = star_plan([0, 0, 1, 1], rows=Rows(every_update=True))
    other = Play(machine_of(plan, 1))
    other.arrive(plan.inbound(1, MODEL)[0])
    other.finish(TRAIN)
    sent = [s.transfer for s in other.pending if s.transfer]
    assert [(t.kind, t.sender, t.recipients) for t in sent] == [(UPDATE, 2, (0,)), (UPDATE, 3, (0,))]
    coordinator = Play(machine_of(plan, 0))
    coordinator.finish(PUBLISH)
    coordinator.finish(SEND)
    coordinator.finish(TRAIN)
    coordinator.arrive(sent[1])
    assert AGGREGATE not in coordinator.asked
    coordinator.arrive(sent[0])
    assert coordinator.kinds() == [AGGREGATE]


@pytest.mark.parametrize("cluster", [0, 1])
def test_what_nodes_keep_is_carried_over_where_nobody_takes_part(cluster: int) -> None:
    for rows in (Rows(), Rows(client=1)):
        plan = star_plan([0, 1, 2], ["aggregate", "test", "train"], rows)
        play = Play(machine_of(plan, cluster))
        if cluster == 0:
            play.finish(PUBLISH)
        assert (TRAIN in play.asked) == (rows.client > 0)
        if TRAIN in play.asked and cluster == 1:
            play.finish(TRAIN)
        assert len(play.reports) == cluster


@pytest.mark.parametrize("order", ["train first", "arrivals first", "in between"])
def test_the_coordinator_aggregates_when_its_own_training_and_all_partials_are_there(order: str) -> None:
    plan = star_plan([0, 0, 1, 2])
    first, second = plan.inbound(0, PARTIAL)
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH)
    play.finish(SEND)
    play.finish(SEND)
    if order == "train first":
        play.finish(TRAIN)
        play.arrive(first)
        assert AGGREGATE not in play.asked
        play.arrive(second)
    elif order == "arrivals first":
        play.arrive(second)
        play.arrive(first)
        assert AGGREGATE not in play.asked
        play.finish(TRAIN)
    else:
        play.arrive(first)
        play.finish(TRAIN)
        assert AGGREGATE not in play.asked
        play.arrive(second)
    assert play.kinds() == [AGGREGATE]
    play.finish(AGGREGATE, PhaseReport(model_hash="m", metrics={"accuracy": 0.5}))
    assert [r.model_hash for r in play.reports] == ["m"]
    assert play.reports[0].metrics == {"accuracy": 0.5}


def test_the_coordinator_waits_for_its_own_sends_before_it_aggregates() -> None:
    """A send that fails must be able to fail the attempt."""
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH)
    play.finish(TRAIN)
    play.arrive(plan.inbound(0, PARTIAL)[0])
    assert AGGREGATE not in play.asked
    play.finish(SEND)
    assert play.kinds() == [AGGREGATE]


def test_another_cluster_trains_when_the_model_comes_and_reports_when_its_partial_is_accepted() -> None:
    plan = star_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, 1))
    assert play.asked == []
    play.arrive(plan.inbound(1, MODEL)[0])
    assert play.kinds() == [TRAIN]
    play.finish(TRAIN, PhaseReport(nodes=(2, 3), metric_sums={"train_loss": (7, 5)}))
    assert play.kinds() == [SEND] and play.pending[0].transfer == plan.outbound(1, PARTIAL)[0]
    assert not play.reports
    play.finish(SEND)
    (report,) = play.reports
    assert report.participants == bitmap([2, 3], 4)
    assert report.metric_sums == {"train_loss": MetricSum("7", 5)}
    assert report.bytes_inter_cluster == WIRE_BYTES


def test_a_cluster_without_participants_reports_at_once() -> None:
    plan = star_plan([0, 0, 1], ["aggregate", "train", "eval"])
    play = Play(machine_of(plan, 1))
    assert play.asked == [REPORT]


def test_a_coordinator_without_local_participants_only_merges() -> None:
    plan = star_plan([0, 1, 1])
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH)
    assert play.kinds() == [SEND]
    play.finish(SEND)
    assert play.kinds() == []
    play.arrive(plan.inbound(0, PARTIAL)[0])
    play.finish(AGGREGATE)
    assert TRAIN not in play.asked
    assert len(play.reports) == 1


# ---------------------------------------------------------------- decentralized


def test_a_round_with_evaluation_gathers_the_consensus_at_the_coordinator() -> None:
    plan = ring_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, 0))
    play.finish(TRAIN)
    assert play.kinds() == [SEND, SEND]
    for transfer in plan.inbound(0, UPDATE):
        play.arrive(transfer)
    play.finish(SEND)
    assert AGGREGATE not in play.asked
    play.finish(SEND)
    play.finish(AGGREGATE, PhaseReport(state_hashes=b"s", absmax=(1.0,)))
    assert not play.reports and not play.pending
    play.arrive(plan.inbound(0, CONSENSUS)[0])
    play.finish(EVALUATE, PhaseReport(model_hash="consensus", metrics={"loss": 1.0}))
    (report,) = play.reports
    assert (report.state_hashes, report.model_hash, report.metrics) == (b"s", "consensus", {"loss": 1.0})
    assert report.absmax == (1.0,)


def test_an_early_consensus_is_not_asked_for_again() -> None:
    plan = ring_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, 0))
    play.arrive(plan.inbound(0, CONSENSUS)[0])
    play.finish(TRAIN)
    play.finish(SEND)
    play.finish(SEND)
    for transfer in plan.inbound(0, UPDATE):
        play.arrive(transfer)
    play.finish(AGGREGATE)
    assert play.kinds() == [EVALUATE]


def test_another_cluster_sends_its_consensus_and_does_not_evaluate() -> None:
    plan = ring_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, 1))
    play.finish(TRAIN)
    for transfer in plan.inbound(1, UPDATE):
        play.arrive(transfer)
    play.finish(SEND)
    play.finish(SEND)
    play.finish(AGGREGATE)
    assert [s.transfer for s in play.pending] == list(plan.outbound(1, CONSENSUS))
    assert not play.reports
    play.finish(SEND)
    assert EVALUATE not in play.asked and len(play.reports) == 1


@pytest.mark.parametrize("cluster", [0, 1])
def test_without_evaluation_no_consensus_is_made(cluster: int) -> None:
    plan = ring_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, cluster, evaluate=False))
    play.finish(TRAIN)
    for transfer in plan.inbound(cluster, UPDATE):
        play.arrive(transfer)
    play.finish(SEND)
    play.finish(SEND)
    play.finish(AGGREGATE)
    assert len(play.reports) == 1 and not play.pending
    assert EVALUATE not in play.asked


# ---------------------------------------------------------------- both


def test_a_payload_that_comes_twice_counts_once() -> None:
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 1))
    model = plan.inbound(1, MODEL)[0]
    play.arrive(model)
    play.arrive(model)
    assert play.asked == [TRAIN]
    play.finish(TRAIN)
    play.arrive(model)
    play.finish(SEND)
    assert play.reports[0].bytes_inter_cluster == WIRE_BYTES


def test_messages_are_counted_and_cause_nothing() -> None:
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 1))
    play.arrive(Transfer(MESSAGE, -1, 0, 1, ()), wire_bytes=7)
    play.arrive(Transfer(MESSAGE, -1, 0, 1, ()), wire_bytes=8)
    assert play.asked == []
    play.arrive(plan.inbound(1, MODEL)[0])
    play.finish(TRAIN)
    play.finish(SEND)
    assert play.reports[0].bytes_inter_cluster == WIRE_BYTES + 15


def test_a_payload_that_nobody_planned_is_ignored() -> None:
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 1))
    play.arrive(Transfer(UPDATE, 1, 0, 1, (2,)))
    play.arrive(replace(plan.inbound(1, MODEL)[0], sender=1))
    play.arrive(replace(plan.inbound(1, MODEL)[0], source=1))
    assert play.asked == []


@pytest.mark.parametrize("kind", [TRAIN, AGGREGATE])
def test_an_overflow_ends_the_attempt_with_one_report(kind: str) -> None:
    plan = ring_plan([0, 0, 1, 1])
    play = Play(machine_of(plan, 0))
    if kind == AGGREGATE:
        play.finish(TRAIN)
        for transfer in plan.inbound(0, UPDATE):
            play.arrive(transfer)
        play.finish(SEND)
        play.finish(SEND)
    play.finish(kind, PhaseReport(overflow=(3,)))
    assert [r.overflow for r in play.reports] == [(3,)]
    for transfer in (*plan.inbound(0, UPDATE), *plan.inbound(0, CONSENSUS)):
        play.arrive(transfer)
    assert len(play.reports) == 1 and not play.pending


def test_an_overflow_while_payloads_are_being_sent_reports_once() -> None:
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH)
    play.finish(TRAIN, PhaseReport(overflow=(0,)))
    play.finish(SEND)
    play.arrive(plan.inbound(0, PARTIAL)[0])
    assert len(play.reports) == 1 and AGGREGATE not in play.asked


def test_times_are_those_of_the_phases() -> None:
    plan = star_plan([0, 0, 1])
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH, now_s=1.0)
    play.finish(SEND, now_s=1.5)
    play.finish(TRAIN, took_s=3.0, now_s=4.0)
    play.arrive(plan.inbound(0, PARTIAL)[0], now_s=6.0)
    play.finish(AGGREGATE, took_s=0.5, now_s=6.5)
    (report,) = play.reports
    assert (report.train_s, report.exchange_s) == (3.0, 2.0)


@pytest.mark.parametrize("wanted", [True, False])
def test_hosts_wait_for_payloads_while_no_phase_runs(wanted: bool) -> None:
    plan = star_plan([0, 0, 1])
    start = StartRound("run", 1, 1, 1, "", (0,), 10, True, profile=wanted)
    machine = RoundMachine(plan, 0, start, 3)
    play = Play(machine)
    play.finish(PUBLISH, took_s=0.5, now_s=1.0)
    play.finish(SEND, now_s=1.5)
    trained = {"host-0": {"train": 2.0, "exchange": 0.25}, "host-1": {"train": 1.0}}
    play.finish(TRAIN, PhaseReport(seconds=trained), took_s=3.0, now_s=4.0)
    play.arrive(plan.inbound(0, PARTIAL)[0], now_s=6.0)
    merged = {"host-0": {"train": 2.0, "exchange": 0.5, "sum": 0.125}}
    play.finish(AGGREGATE, PhaseReport(seconds=merged), took_s=0.5, now_s=6.5)
    expected = ClusterProfile(
        {"host-0": {"train": 2.0, "exchange": 2.5, "sum": 0.125}, "host-1": {"train": 1.0, "exchange": 2.0}},
        (PhaseSpan(PUBLISH, 0.5, 1.0), PhaseSpan(TRAIN, 1.0, 4.0), PhaseSpan(AGGREGATE, 6.0, 6.5)),
    )
    assert play.reports[0].profile == (expected if wanted else None)


def test_peers_wait_for_consensus_partials_too() -> None:
    plan = ring_plan([0, 0, 1])
    play = Play(machine_of(plan, 0))
    play.finish(TRAIN, took_s=1.0, now_s=1.0)
    while SEND in play.kinds():
        play.finish(SEND, now_s=1.0)
    for transfer in plan.inbound(0, UPDATE):
        play.arrive(transfer, now_s=2.0)
    play.finish(AGGREGATE, took_s=1.0, now_s=3.0)
    play.arrive(plan.inbound(0, CONSENSUS)[0], now_s=7.0)
    play.finish(EVALUATE, took_s=1.0, now_s=8.0)
    assert play.reports[0].exchange_s == 5.0


def test_a_coordinator_that_only_merges_counts_its_wait_as_exchange() -> None:
    plan = star_plan([0, 1])
    play = Play(machine_of(plan, 0))
    play.finish(PUBLISH, now_s=1.0)
    play.finish(SEND, now_s=1.5)
    play.arrive(plan.inbound(0, PARTIAL)[0], now_s=6.0)
    play.finish(AGGREGATE, now_s=6.5)
    assert play.reports[0].exchange_s == 5.0


def test_bitmap_sets_one_bit_per_node() -> None:
    assert bitmap([0, 9], 10) == b"\x01\x02"
    assert bitmap([], 0) == b""


# ---------------------------------------------------------------- any order


@st.composite
def any_machine(draw: st.DrawFn) -> RoundMachine:
    num_nodes = draw(st.integers(2, 7))
    num_clusters = draw(st.integers(1, 4))
    assignment = draw(st.lists(st.integers(0, num_clusters - 1), min_size=num_nodes, max_size=num_nodes))
    if draw(st.booleans()):
        roles = ["aggregate", *(draw(st.sampled_from(["train", "eval"])) for _ in range(num_nodes - 1))]
        roles[-1] = "train"
        plan = star_plan(assignment, roles)
    else:
        plan = ring_plan(assignment)
    cluster = draw(st.sampled_from(sorted(set(assignment))))
    return machine_of(plan, cluster, evaluate=draw(st.booleans()))


@given(any_machine(), st.data())
def test_every_order_of_events_ends_with_exactly_one_report(machine: RoundMachine, data: st.DataObject) -> None:
    plan, here = machine.plan, machine.cluster
    kinds = [MODEL, PARTIAL, UPDATE, *([CONSENSUS] if machine.start.evaluate else [])]
    expected = [t for kind in kinds for t in plan.inbound(here, kind)]
    copies = data.draw(st.lists(st.sampled_from(expected), max_size=4)) if expected else []
    coming = expected + copies
    play = Play(machine)
    while coming or play.pending:
        choice = data.draw(st.integers(0, len(coming) + len(play.pending) - 1))
        if choice < len(coming):
            play.arrive(coming.pop(choice))
        else:
            step = play.pending[choice - len(coming)]
            play.finish(step.kind)
        assert len(play.reports) <= 1
        assert not (play.reports and play.pending), "work is asked for after the report"
    (report,) = play.reports
    assert report.bytes_inter_cluster == WIRE_BYTES * len(expected)
    for kind in (PUBLISH, TRAIN, AGGREGATE, EVALUATE, REPORT):
        assert play.asked.count(kind) <= 1
    sent = [k for k in play.asked if k == SEND]
    outbound = [t for kind in kinds for t in plan.outbound(here, kind)]
    assert len(sent) == len(outbound)


# ---------------------------------------------------------------- the next graph


def mixed(plan: ExchangePlan, cluster: int, *, evaluate: bool) -> Play:
    """A round that decides on the next graph, until this cluster has mixed."""
    play = Play(machine_of(plan, cluster, evaluate=evaluate, adapt=True))
    play.finish(TRAIN)
    for _ in plan.outbound(cluster, UPDATE):
        play.finish(SEND)
    for transfer in plan.inbound(cluster, UPDATE):
        play.arrive(transfer)
    play.finish(AGGREGATE)
    return play


@pytest.mark.parametrize("evaluate", [False, True])
def test_the_coordinator_decides_when_all_have_told_it_and_after_the_evaluation(evaluate: bool) -> None:
    plan, graph = ring_plan([0, 1, 2], Rows(gathered=5)), HybridAdjacencyMatrix.from_edges(3, [(0, 1)]).to_graph()
    play = mixed(plan, 0, evaluate=evaluate)
    first, second = plan.inbound(0, GATHERED)
    play.arrive(first)
    if evaluate:
        for transfer in plan.inbound(0, CONSENSUS):
            play.arrive(transfer)
        assert play.kinds() == [EVALUATE]
        play.arrive(second)
        play.finish(EVALUATE, PhaseReport(model_hash="consensus"))
    else:
        assert play.kinds() == []
        play.arrive(second)
    assert play.kinds() == [ADAPT]
    play.finish(ADAPT, PhaseReport(graph=graph))
    (report,) = play.reports
    assert report.graph == graph and report.model_hash == ("consensus" if evaluate else "")


def test_the_others_tell_and_are_done_and_nothing_is_told_that_nobody_asks_for() -> None:
    plan = ring_plan([0, 1, 2], Rows(gathered=5))
    play = mixed(plan, 2, evaluate=False)
    assert [step.transfer.kind for step in play.pending if step.transfer] == [GATHERED] and not play.reports
    play.finish(SEND)
    assert [report.graph for report in play.reports] == [None]
    alone = mixed(ring_plan([0, 1, 2]), 0, evaluate=False)
    assert alone.kinds() == [ADAPT]
    assert mixed(ring_plan([0, 1, 2]), 2, evaluate=False).reports
