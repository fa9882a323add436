"""What an agent decides: which instruction does what, what is stale, and that a fabric of agents never gets stuck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import NodeError, error_from_json
from icrf.exchange import CONSENSUS, MESSAGE, PARTIAL, ExchangePlan, compile_exchange
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    HIERARCHICAL,
    AbortAttempt,
    Activate,
    Activated,
    CallNode,
    HeldRun,
    Instruction,
    Lease,
    LinkMeasured,
    MeasureLink,
    NodeSpec,
    PeerAddress,
    Reject,
    Release,
    Released,
    Relink,
    Relinked,
    Reserve,
    Reserved,
    Resources,
    RoundReport,
    Rows,
    SendMessage,
    StartRound,
    StoreModel,
    TensorSpec,
)
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.core import Action, Advance, AgentCore, Discard, Perform, Say, failure
from icrf_agent.round_machine import AGGREGATE, PUBLISH, SEND, TRAIN

WIRE_BYTES = 10


def activation_of(flow: str, assignment: Sequence[int], *, generation: int = 1, run_id: str = "run") -> Activate:
    """A star around node 0, a hierarchy of two groups around the first and the last node, or a ring; every node that
    does not aggregate trains."""
    num_nodes = len(assignment)
    if flow == CENTRALIZED:
        pairs = [(0, i) for i in range(1, num_nodes)]
        roles = ["aggregate", *["train"] * (num_nodes - 1)]
    elif flow == HIERARCHICAL:
        last = num_nodes - 1
        pairs = [(0, last), *((0 if i % 2 else last, i) for i in range(1, last))]
        roles = ["aggregate", *["train"] * (num_nodes - 2), "aggregate"]
    else:
        pairs = [(i, (i + 1) % num_nodes) for i in range(num_nodes)]
        roles = ["train"] * num_nodes
    edges = sorted({edge for i, j in pairs for edge in ((i, j), (j, i)) if i != j})
    clusters = tuple(f"c{k}" for k in range(max(assignment) + 1))
    return Activate(
        run_id=run_id,
        generation=generation,
        federation="fed",
        config_json="{}",
        flow=flow,
        nodes=tuple(NodeSpec(f"n{i}", role) for i, role in enumerate(roles)),
        graph=HybridAdjacencyMatrix.from_edges(num_nodes, edges).to_graph(),
        layout=(TensorSpec("w", (4,), "float32"),),
        clusters=clusters,
        assignment=tuple(assignment),
        peers=tuple(PeerAddress(name, "") for name in clusters),
        num_slots=1,
    )


def plan_of(activation: Activate) -> ExchangePlan:
    adjacency = HybridAdjacencyMatrix.from_graph(activation.graph)
    roles = [node.role for node in activation.nodes]
    return compile_exchange(activation.flow, adjacency, roles, activation.assignment, activation.rows)


def start_of(
    number: int = 1,
    attempt: int = 1,
    *,
    generation: int = 1,
    evaluate: bool = True,
    merge: bool = False,
    adapt: bool = False,
) -> StartRound:
    return StartRound("run", generation, number, attempt, "", (0,), 10, evaluate, merge=merge, adapt=adapt)


def payload(
    start: StartRound, kind: str, sender: int, source: str, target: str, recipients: tuple[int, ...] = (0,)
) -> Arrival:
    header = PayloadHeader(
        run_id=start.run_id,
        generation=start.generation,
        round=start.round,
        attempt=start.attempt,
        kind=kind,
        sender=sender,
        source=source,
        target=target,
        dtype="float32",
        num_elements=4,
        recipients=recipients if kind == PARTIAL else (),
    )
    return Arrival(header, WIRE_BYTES)


def active_core(activation: Activate, cluster: str = "c0") -> AgentCore:
    core = AgentCore(cluster)
    assert core.instructed(activation, 0.0) == [Perform(activation)]
    return core


def steps_of(actions: Sequence[Action]) -> list[str]:
    return [action.step.kind for action in actions if isinstance(action, Advance)]


STAR = activation_of(CENTRALIZED, [0, 0, 1])


# ---------------------------------------------------------------- instructions without a decision


@pytest.mark.parametrize(
    "instruction",
    [
        Reserve("run", 1, "fed", 1, Resources(), "PACK", 1.0),
        StoreModel("run", 1, 1),
        CallNode("run", 1, "call", "n0", "ping", b""),
        MeasureLink("measurement", PeerAddress("b", "")),
        SendMessage("run", 1, "call", (0,), b""),
        Release("run", 1),
    ],
)
def test_simple_instructions_are_performed(instruction: Instruction) -> None:
    assert AgentCore("c0").instructed(instruction, 0.0) == [Perform(instruction)]


@pytest.mark.parametrize("instruction", [Lease(10.0, 1.0), Reject("{}")])
def test_membership_is_none_of_the_cores_business(instruction: Instruction) -> None:
    assert AgentCore("c0").instructed(instruction, 0.0) == []


def test_failures_are_reported_in_the_words_of_the_instruction() -> None:
    error = NodeError("U001", "broken")
    assert failure(Reserve("run", 2, "fed", 1, Resources(), "", 1.0), error) == Reserved("run", 2, error.to_json())
    assert failure(STAR, error) == Activated("run", 1, error_json=error.to_json())
    assert failure(Release("run", 2), error) == Released("run", 2)
    assert failure(MeasureLink("m", PeerAddress("b", "")), error) == LinkMeasured("m", error_json=error.to_json())
    assert failure(Lease(1.0, 1.0), error) is None


def test_a_graph_that_its_flow_cannot_use_is_reported_and_not_raised() -> None:
    broken = replace(STAR, graph=HybridAdjacencyMatrix.from_edges(3, []).to_graph())
    (action,) = AgentCore("c0").instructed(broken, 0.0)
    assert isinstance(action, Say) and isinstance(action.report, Activated)
    assert "P011" in action.report.error_json


# ---------------------------------------------------------------- rounds


def test_a_round_of_an_unknown_run_or_generation_is_dropped() -> None:
    assert AgentCore("c0").instructed(start_of(), 0.0) == []
    assert active_core(STAR).instructed(start_of(generation=2), 0.0) == []


def test_a_repeated_start_is_not_done_twice_and_is_answered_by_the_same_report() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    start = start_of()
    actions = core.instructed(start, 0.0)
    assert steps_of(actions) == [PUBLISH]
    assert core.instructed(start, 1.0) == []
    reports = finish(core, actions)
    assert len(reports) == 1
    assert core.instructed(start, 2.0) == [Say(reports[0])]
    assert core.instructed(start, 3.0) == [Say(reports[0])]


def test_a_repeated_activation_is_answered_again_and_keeps_the_open_attempt() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    actions = core.instructed(start_of(), 0.0)
    again = activation_of(CENTRALIZED, [0, 0])
    assert core.instructed(again, 1.0) == [Perform(again)]
    assert len(finish(core, actions)) == 1


def test_a_new_generation_replaces_the_run() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    old = core.instructed(start_of(), 0.0)
    core.instructed(activation_of(CENTRALIZED, [0, 0], generation=2), 1.0)
    assert finish(core, old) == []
    assert steps_of(core.instructed(start_of(generation=2), 2.0)) == [PUBLISH]


def test_a_later_attempt_supersedes_and_an_earlier_one_is_stale() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    first = core.instructed(start_of(), 0.0)
    second = core.instructed(start_of(attempt=2), 1.0)
    assert core.instructed(start_of(), 2.0) == []
    assert finish(core, first) == []
    assert [(r.round, r.attempt) for r in finish(core, second)] == [(1, 2)]


def test_payloads_that_come_before_their_round_wait_for_it() -> None:
    core = active_core(STAR, "c1")
    assert core.arrived(payload(start_of(2), "model", 0, "c0", "c1"), 0.0) == []
    assert core.arrived(payload(start_of(1), "model", 0, "c0", "c1"), 0.0) == []
    first = core.instructed(start_of(1), 1.0)
    assert steps_of(first) == [TRAIN]
    assert len(finish(core, first)) == 1
    assert steps_of(core.instructed(start_of(2), 2.0)) == [TRAIN]


def test_payloads_of_a_skipped_attempt_are_forgotten() -> None:
    core = active_core(STAR, "c1")
    core.arrived(payload(start_of(1, 1), "model", 0, "c0", "c1"), 0.0)
    assert core.instructed(start_of(1, 2), 1.0) == []
    assert core.arrived(payload(start_of(1, 1), "model", 0, "c0", "c1"), 2.0) == []
    assert steps_of(core.arrived(payload(start_of(1, 2), "model", 0, "c0", "c1"), 3.0)) == [TRAIN]


@pytest.mark.parametrize(
    "arrival",
    [
        payload(replace(start_of(), run_id="other"), "model", 0, "c0", "c1"),
        payload(start_of(generation=2), "model", 0, "c0", "c1"),
        payload(start_of(), "model", 0, "nowhere", "c1"),
        payload(start_of(), PARTIAL, -1, "c0", "c1"),
    ],
    ids=["run", "generation", "source", "kind"],
)
def test_payloads_that_belong_elsewhere_are_ignored(arrival: Arrival) -> None:
    core = active_core(STAR, "c1")
    core.instructed(start_of(), 0.0)
    assert core.arrived(arrival, 1.0) == []


def test_a_failed_step_is_reported_once_and_ends_the_attempt() -> None:
    core = active_core(STAR)
    start = start_of()
    (publish,) = [a for a in core.instructed(start, 0.0) if isinstance(a, Advance)]
    actions = [a for a in core.step_done(start, publish.step, None, 0.0, 1.0) if isinstance(a, Advance)]
    error = NodeError("U001", "broken")
    (said,) = core.step_failed(start, error)
    assert isinstance(said, Say) and isinstance(said.report, RoundReport)
    assert said.report.error_json == error.to_json()
    assert core.step_failed(start, error) == []
    assert all(core.step_done(start, a.step, PhaseReport(), 0.0, 2.0) == [] for a in actions)
    assert core.arrived(payload(start, PARTIAL, -1, "c1", "c0"), 3.0) == []
    assert core.instructed(start, 4.0) == [said]


def test_an_aborted_attempt_is_discarded_and_never_reported() -> None:
    core = active_core(STAR)
    start = start_of()
    actions = core.instructed(start, 0.0)
    assert core.instructed(AbortAttempt("run", 1, 1), 1.0) == [Discard("run", 1, 1)]
    assert finish(core, actions) == []
    assert core.step_failed(start, NodeError("U001", "late")) == []
    assert core.instructed(start, 2.0) == []
    assert steps_of(core.instructed(start_of(attempt=2), 3.0)) == [PUBLISH]


def test_an_abort_voids_a_report_that_was_made() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    start = start_of()
    assert len(finish(core, core.instructed(start, 0.0))) == 1
    core.instructed(AbortAttempt("run", 1, 1), 1.0)
    assert core.instructed(start, 2.0) == []


def test_an_abort_of_another_attempt_leaves_the_open_one_alone() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    actions = core.instructed(start_of(attempt=2), 0.0)
    assert core.instructed(AbortAttempt("run", 1, 1), 1.0) == [Discard("run", 1, 1)]
    assert len(finish(core, actions)) == 1


def test_after_release_nothing_of_the_run_has_an_effect() -> None:
    core = active_core(STAR)
    start = start_of()
    actions = core.instructed(start, 0.0)
    assert core.instructed(Release("run", 1), 1.0) == [Perform(Release("run", 1))]
    assert finish(core, actions) == []
    assert core.arrived(payload(start, PARTIAL, -1, "c1", "c0"), 2.0) == []
    assert core.instructed(start, 3.0) == []


def test_runs_do_not_touch_each_other() -> None:
    core = active_core(activation_of(CENTRALIZED, [0, 0]))
    other = activation_of(CENTRALIZED, [0, 0], run_id="other")
    core.instructed(other, 0.0)
    actions = core.instructed(start_of(), 0.0)
    core.instructed(AbortAttempt("other", 1, 1), 1.0)
    core.instructed(Release("other", 1), 1.0)
    assert len(finish(core, actions)) == 1


def finish(core: AgentCore, actions: Sequence[Action]) -> list[RoundReport]:
    """Carry out all steps one after the other; what is reported in the end."""
    reports: list[RoundReport] = []
    queue = list(actions)
    while queue:
        action = queue.pop(0)
        if isinstance(action, Say) and isinstance(action.report, RoundReport):
            reports.append(action.report)
        elif isinstance(action, Advance):
            queue += core.step_done(action.start, action.step, PhaseReport(), 0.0, 0.0)
    return reports


# ---------------------------------------------------------------- a fabric of cores


@dataclass
class Event:
    """Something that will happen at a cluster."""

    cluster: int
    what: Instruction | Arrival | Advance


@dataclass
class Fabric:
    """Agents whose instructions, steps and payloads take any time they like; instructions keep their order."""

    activation: Activate
    cores: list[AgentCore] = field(default_factory=list)
    instructions: list[list[Instruction]] = field(default_factory=list)
    loose: list[Event] = field(default_factory=list)
    reports: list[tuple[int, RoundReport]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.activation.clusters:
            self.cores.append(active_core(self.activation, name))
            self.instructions.append([])

    def tell(self, instruction: Instruction) -> None:
        for queue in self.instructions:
            queue.append(instruction)

    def possible(self) -> list[Event]:
        return [Event(k, queue[0]) for k, queue in enumerate(self.instructions) if queue] + self.loose

    def happen(self, event: Event, *, copy: bool = False) -> None:
        core = self.cores[event.cluster]
        if isinstance(event.what, Arrival):
            self.loose.remove(event)
            actions = core.arrived(event.what, 0.0)
        elif isinstance(event.what, Advance):
            self.loose.remove(event)
            start, step = event.what.start, event.what.step
            if step.kind == SEND and step.transfer is not None:
                t, names = step.transfer, self.activation.clusters
                arrival = payload(start, t.kind, t.sender, names[t.source], names[t.target], t.recipients)
                self.loose += [Event(t.target, arrival)] * (2 if copy else 1)
            actions = core.step_done(start, step, PhaseReport(), 0.0, 0.0)
        else:
            self.instructions[event.cluster].pop(0)
            actions = core.instructed(event.what, 0.0)
        for action in actions:
            if isinstance(action, Advance):
                self.loose.append(Event(event.cluster, action))
            elif isinstance(action, Say) and isinstance(action.report, RoundReport):
                self.reports.append((event.cluster, action.report))


@st.composite
def any_activation(draw: st.DrawFn) -> Activate:
    flow = draw(st.sampled_from([CENTRALIZED, DECENTRALIZED, HIERARCHICAL]))
    num_nodes = draw(st.integers(4 if flow == HIERARCHICAL else 2, 6))
    wanted = draw(st.lists(st.integers(0, 3), min_size=num_nodes, max_size=num_nodes))
    names = sorted(set(wanted))
    gathered = draw(st.integers(0, 2)) if flow == DECENTRALIZED else 0
    return replace(activation_of(flow, [names.index(c) for c in wanted]), rows=Rows(gathered=gathered))


@given(any_activation(), st.booleans(), st.data())
def test_a_round_ends_on_every_cluster_whatever_comes_when(
    activation: Activate, evaluate: bool, data: st.DataObject
) -> None:
    fabric = Fabric(activation)
    merge = activation.flow == HIERARCHICAL and data.draw(st.booleans())
    adapt = activation.flow == DECENTRALIZED and data.draw(st.booleans())
    fabric.tell(start_of(evaluate=evaluate, merge=merge, adapt=adapt))
    while events := fabric.possible():
        event = data.draw(st.sampled_from(events))
        fabric.happen(event, copy=data.draw(st.booleans()))
    assert sorted(cluster for cluster, _ in fabric.reports) == list(range(len(activation.clusters)))
    plan = plan_of(activation)
    crossing = len(plan.merging if merge else plan.transfers) + (len(plan.evaluation) if evaluate else 0)
    crossing += len(plan.adaptation) if adapt else 0
    assert sum(r.bytes_inter_cluster for _, r in fabric.reports) == WIRE_BYTES * crossing
    assert all(not r.error_json for _, r in fabric.reports)


@given(any_activation(), st.data())
def test_after_an_abort_the_next_attempt_ends_whatever_is_left_of_the_first(
    activation: Activate, data: st.DataObject
) -> None:
    fabric = Fabric(activation)
    fabric.tell(start_of(attempt=1))
    for _ in range(data.draw(st.integers(0, 30))):
        if not (events := fabric.possible()):
            break
        fabric.happen(data.draw(st.sampled_from(events)))
    fabric.reports.clear()
    fabric.tell(AbortAttempt("run", 1, 1))
    fabric.tell(start_of(attempt=2))
    while events := fabric.possible():
        fabric.happen(data.draw(st.sampled_from(events)))
    second = [cluster for cluster, report in fabric.reports if report.attempt == 2]
    assert sorted(second) == list(range(len(activation.clusters)))


@given(any_activation(), st.integers(2, 4), st.data())
def test_rounds_follow_each_other_with_and_without_evaluation(
    activation: Activate, num_rounds: int, data: st.DataObject
) -> None:
    fabric = Fabric(activation)
    for number in range(1, num_rounds + 1):
        fabric.reports.clear()
        merge = activation.flow == HIERARCHICAL and number % 3 == 0
        fabric.tell(start_of(number, evaluate=number % 2 == 0, merge=merge))
        while events := fabric.possible():
            fabric.happen(data.draw(st.sampled_from(events)))
        assert sorted(c for c, r in fabric.reports if r.round == number) == list(range(len(activation.clusters)))


def test_the_coordinator_of_a_ring_waits_for_everyones_consensus() -> None:
    core = active_core(activation_of(DECENTRALIZED, [0, 1, 2]))
    start = start_of()
    actions = core.instructed(start, 0.0)
    for sender, source in ((1, "c1"), (2, "c2")):
        core.arrived(payload(start, "update", sender, source, "c0"), 1.0)
    assert steps_of(actions) == [TRAIN]
    assert finish(core, actions) == []
    core.arrived(payload(start, MESSAGE, -1, "c1", "c0"), 2.0)
    assert core.arrived(payload(start, CONSENSUS, -1, "c1", "c0"), 2.0) == []
    assert steps_of(core.arrived(payload(start, CONSENSUS, -1, "c2", "c0"), 3.0)) == ["evaluate"]
    assert AGGREGATE not in steps_of(core.arrived(payload(start, CONSENSUS, -1, "c2", "c0"), 4.0))


# ---------------------------------------------------------------- other graphs


def relink(activation: Activate, generation: int = 2) -> Relink:
    """All nodes with all others."""
    num_nodes = len(activation.nodes)
    return Relink("run", generation, HybridAdjacencyMatrix.from_dense(1 - np.eye(num_nodes)).to_graph())


def test_another_graph_is_planned_anew_and_what_belongs_to_the_old_one_is_dropped() -> None:
    activation = activation_of(DECENTRALIZED, [0, 0, 1, 1])
    core = active_core(activation)
    core.activated("run", 1)
    finish(core, core.instructed(start_of(), 0.0))
    order = relink(activation)
    assert core.instructed(order, 1.0) == [Perform(order)] == core.instructed(order, 1.0)
    assert core.held() == (HeldRun("run", 2, 1, 1),)
    assert core.instructed(relink(activation, 1), 1.0) == [] == core.instructed(start_of(2), 1.0)
    old, new = start_of(2), start_of(2, generation=2)
    assert core.arrived(payload(old, "update", 2, "c1", "c0"), 2.0) == []
    actions = core.instructed(new, 2.0)
    (train,) = [action for action in actions if isinstance(action, Advance)]
    sent = [a.step.transfer for a in core.step_done(new, train.step, PhaseReport(), 0.0, 3.0) if isinstance(a, Advance)]
    # Node 0 is a neighbour of both nodes there now, as node 1 is.
    assert [(t.sender, t.recipients) for t in sent if t] == [(0, (2, 3)), (1, (2, 3))]


def test_a_run_that_is_not_live_here_takes_no_other_graph() -> None:
    activation = activation_of(DECENTRALIZED, [0, 1])
    assert AgentCore("c0").instructed(relink(activation), 0.0) == []
    assert active_core(activation).instructed(relink(activation), 0.0) == []


def test_a_graph_of_other_nodes_is_refused_and_the_old_one_stays() -> None:
    activation = activation_of(DECENTRALIZED, [0, 0, 1])
    core = active_core(activation)
    core.activated("run", 1)
    (say,) = core.instructed(relink(activation_of(DECENTRALIZED, [0, 1])), 0.0)
    assert isinstance(say, Say) and isinstance(say.report, Relinked)
    assert error_from_json(say.report.error_json).code == "C008"
    assert core.held() == (HeldRun("run", 1, 0, 0),)
