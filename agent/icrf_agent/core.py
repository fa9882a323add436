"""The core of an agent: what its cluster does about each instruction of the mediator. Pure: events in, actions out.

It keeps, per run, the compiled exchange plan and the open attempt, buffers payloads that come before the round they
belong to, and drops everything that is stale. The shell (``service.py``) carries out the actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from icrf.errors import IcrfError
from icrf.exchange import ExchangePlan, compile_exchange
from icrf.ports import Arrival, PhaseReport
from icrf.protocol import (
    AbortAttempt,
    Activate,
    Activated,
    CallDone,
    CallNode,
    Checkpointed,
    Dismiss,
    HeldRun,
    Instruction,
    Lease,
    LinkMeasured,
    MeasureLink,
    ModelStored,
    Reject,
    Release,
    Released,
    Relink,
    Relinked,
    Report,
    Reserve,
    Reserved,
    RoundReport,
    SaveCheckpoint,
    SendMessage,
    StartRound,
    StoreModel,
    nodes_of,
)
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf.update import choose_grid
from icrf_agent.round_machine import REPORT, RoundMachine, Step


@dataclass(frozen=True)
class Say:
    """Report to the mediator."""

    report: Report


@dataclass(frozen=True)
class Perform:
    """Carry out an instruction that needs no further decision; its outcome goes straight to the mediator."""

    instruction: (
        Reserve | Activate | Relink | SaveCheckpoint | StoreModel | CallNode | SendMessage | MeasureLink | Release
    )


@dataclass(frozen=True)
class Advance:
    """Carry out one step of an attempt and feed its outcome back with :meth:`AgentCore.step_done`.

    Attributes:
        ahead: whether nobody has asked for the attempt yet: the one before is not over then.
    """

    start: StartRound
    step: Step
    ahead: bool = False


@dataclass(frozen=True)
class Discard:
    """Drop everything of an attempt.

    Attributes:
        ahead: whether nobody has asked for it: whatever still works on it shall leave off.
    """

    run_id: str
    round: int
    attempt: int
    ahead: bool = False


Action = Say | Perform | Advance | Discard


@dataclass
class _Run:
    activation: Activate
    plan: ExchangePlan
    cluster: int
    live: bool = False
    machine: RoundMachine | None = None
    report: RoundReport | None = None
    early: list[Arrival] = field(default_factory=list)
    floor: tuple[int, int] = (0, 0)
    aborted: bool = False
    # What is expected to be asked for next, and what it has come to if that is known already.
    ahead: RoundMachine | None = None
    found_ahead: RoundReport | None = None

    @property
    def position(self) -> tuple[int, int]:
        """(round, attempt) that was asked for last, of this agent or the one before it."""
        return position_of(self.machine.start) if self.machine else self.floor

    def open_machine(self, start: StartRound) -> RoundMachine | None:
        """What drives an attempt that has no report yet."""
        wanted = (start.generation, *position_of(start))
        if self.ahead is not None and (self.ahead.start.generation, *position_of(self.ahead.start)) == wanted:
            return None if self.found_ahead else self.ahead
        machine = None if self.report or self.aborted else self.machine
        found = machine is not None and (machine.start.generation, *position_of(machine.start)) == wanted
        return machine if found else None


class AgentCore:
    """Decides for one cluster.

    Args:
        cluster: its name.
    """

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self._runs: dict[str, _Run] = {}
        self._reserved: set[str] = set()

    def instructed(self, instruction: Instruction, now_s: float) -> list[Action]:
        """The mediator says something. Repeated instructions are answered again and never done twice."""
        if isinstance(instruction, Activate):
            return self._activate(instruction)
        if isinstance(instruction, StartRound):
            return self._start(instruction, now_s)
        if isinstance(instruction, AbortAttempt):
            return self._abort(instruction)
        if isinstance(instruction, Relink):
            return self._relink(instruction)
        if isinstance(instruction, Reserve):
            self._reserved.add(instruction.run_id)
            return [Perform(instruction)]
        if isinstance(instruction, Release):
            self._runs.pop(instruction.run_id, None)
            self._reserved.discard(instruction.run_id)
            return [Perform(instruction)]
        if isinstance(instruction, Lease | Dismiss | Reject):
            return []
        if isinstance(instruction, MeasureLink):
            return [Perform(instruction)]
        run = self._runs.get(instruction.run_id)
        if run is not None and isinstance(instruction, SaveCheckpoint | StoreModel):
            # What comes in between must not wait for what may never be asked for.
            return [*self._drop_ahead(run), Perform(instruction)]
        return [Perform(instruction)]

    def arrived(self, arrival: Arrival, now_s: float) -> list[Action]:
        """A payload came in through the gateway."""
        header = arrival.header
        run = self._runs.get(header.run_id)
        if run is None or header.generation != run.activation.generation:
            return []
        position = (header.round, header.attempt)
        if position > run.position:
            run.early.append(arrival)
            return []
        if position < run.position or run.machine is None or run.aborted:
            return []
        if header.source not in run.activation.clusters:
            return []
        source = run.activation.clusters.index(header.source)
        return self._actions(run, run.machine, run.machine.arrived(arrival, source, now_s), now_s)

    def step_done(
        self, start: StartRound, step: Step, result: PhaseReport | None, took_s: float, now_s: float
    ) -> list[Action]:
        """A step was carried out; outcomes of attempts that are no longer open are dropped."""
        run = self._runs.get(start.run_id)
        machine = run.open_machine(start) if run else None
        if run is None or machine is None:
            return []
        return self._actions(run, machine, machine.done(step, result, took_s, now_s), now_s)

    def is_open(self, start: StartRound) -> bool:
        """Whether an attempt is still one that runs here and has no report."""
        run = self._runs.get(start.run_id)
        return run is not None and run.open_machine(start) is not None

    def step_failed(self, start: StartRound, error: IcrfError, recovery: str = "") -> list[Action]:
        """A step failed: the attempt is over here, and the mediator decides; `recovery` is what it would take."""
        run = self._runs.get(start.run_id)
        machine = run.open_machine(start) if run else None
        if run is None or machine is None:
            return []
        text = error.to_json()
        return self._reported(
            run,
            machine,
            RoundReport(start.run_id, start.generation, *position_of(start), error_json=text, recovery=recovery),
        )

    def reserved(self, order: Reserve) -> list[Action]:
        """A reservation was made; it is given back at once if the run was released while it was being made."""
        if order.run_id in self._reserved:
            return [Say(Reserved(order.run_id, order.generation))]
        return [Perform(Release(order.run_id, order.generation))]

    def activated(self, run_id: str, generation: int) -> None:
        """The nodes of a run are live."""
        run = self._runs.get(run_id)
        if run is not None and run.activation.generation == generation:
            run.live = True

    def adopted(self, activation: Activate, held: HeldRun) -> None:
        """Take over a run of an earlier life of this agent."""
        run = self._compile(activation)
        run.live, run.floor = True, (held.round, held.attempt)
        self._runs[activation.run_id] = run

    def inherited(self, run_id: str) -> None:
        """An earlier life of this agent may have left a reservation."""
        self._reserved.add(run_id)

    def held(self) -> tuple[HeldRun, ...]:
        """The runs that are live here, and under generation 0 those of which only a reservation may be left."""
        live = {run_id: run for run_id, run in self._runs.items() if run.live}
        held = [HeldRun(run_id, run.activation.generation, *run.position) for run_id, run in live.items()]
        return (*held, *(HeldRun(run_id, 0, 0, 0) for run_id in sorted(self._reserved - live.keys())))

    def reset(self) -> None:
        """The cluster was rebuilt: nothing is live any more."""
        self._runs.clear()
        self._reserved.clear()

    # ------------------------------------------------------------ inside

    def _activate(self, activation: Activate) -> list[Action]:
        known = self._runs.get(activation.run_id)
        if known is not None and known.activation.generation > activation.generation:
            return []
        if known is None or known.activation.generation < activation.generation:
            try:
                self._runs[activation.run_id] = self._compile(activation)
            except IcrfError as error:
                refusal = failure(activation, error)
                return [Say(refusal)] if refusal else []
        return [Perform(activation)]

    def _compile(self, activation: Activate) -> _Run:
        adjacency = HybridAdjacencyMatrix.from_graph(activation.graph)
        roles = [node.role for node in activation.nodes]
        plan = compile_exchange(activation.flow, adjacency, roles, activation.assignment, activation.rows)
        return _Run(activation, plan, activation.clusters.index(self.cluster))

    def _relink(self, order: Relink) -> list[Action]:
        """Another graph: the exchange is planned anew, and payloads of the generation before are dropped."""
        run = self._runs.get(order.run_id)
        if run is None or not run.live or order.generation < run.activation.generation:
            return []
        if order.generation > run.activation.generation:
            try:
                activation = order.applied_to(run.activation)
                run.plan, run.activation = self._compile(activation).plan, activation
            except IcrfError as error:
                return [Say(Relinked(order.run_id, order.generation, error.to_json()))]
            run.early = []
        return [Perform(order)]

    def _start(self, start: StartRound, now_s: float) -> list[Action]:
        run = self._runs.get(start.run_id)
        if run is None or start.generation != run.activation.generation:
            return []
        position = position_of(start)
        if position == run.position:
            return [Say(run.report)] if run.report else []
        if position < run.position:
            return []
        if run.ahead is not None and replace(start, ahead=None) == run.ahead.start:
            actions = self._confirm(run, run.ahead, start, now_s)
        else:
            actions = self._drop_ahead(run)
            run.machine = machine = RoundMachine(_plan_of(run, start), run.cluster, start, _num_nodes(run))
            run.report, run.aborted = None, False
            actions += self._actions(run, machine, machine.begin(now_s), now_s)
        early, run.early = run.early, []
        for arrival in early:
            actions += self.arrived(arrival, now_s)
        return actions

    def _confirm(self, run: _Run, machine: RoundMachine, start: StartRound, now_s: float) -> list[Action]:
        """What was begun ahead is what is asked for."""
        report, run.ahead, run.found_ahead = run.found_ahead, None, None
        run.machine, run.report, run.aborted = machine, None, False
        steps = machine.confirmed(start, now_s)
        return self._reported(run, machine, report) if report else self._actions(run, machine, steps, now_s)

    def _go_ahead(self, run: _Run, report: RoundReport, now_s: float) -> list[Action]:
        """Begin with what is expected to follow an attempt that has made the global model here."""
        assert run.machine is not None
        ahead = run.machine.start.ahead
        if ahead is None or report.overflow or report.error_json or run.cluster != run.plan.coordinator:
            return []
        start = run.machine.start.expected(report.model_hash, choose_grid(report.absmax, ahead.total_weight))
        assert start is not None
        run.ahead = machine = RoundMachine(_plan_of(run, start), run.cluster, start, _num_nodes(run), ahead=True)
        return self._actions(run, machine, machine.begin(now_s), now_s)

    def _drop_ahead(self, run: _Run) -> list[Action]:
        """What was begun ahead is not what comes next."""
        machine, run.ahead, run.found_ahead = run.ahead, None, None
        return [Discard(machine.start.run_id, *position_of(machine.start), ahead=True)] if machine else []

    def _abort(self, abort: AbortAttempt) -> list[Action]:
        run = self._runs.get(abort.run_id)
        actions: list[Action] = [Discard(abort.run_id, abort.round, abort.attempt)]
        if run and run.position == (abort.round, abort.attempt):
            # Its report, if there is one, is void: an attempt that was dropped here must never be committed.
            run.aborted, run.report = True, None
            actions += self._drop_ahead(run)
        return actions

    def _actions(self, run: _Run, machine: RoundMachine, steps: list[Step], now_s: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            if step.kind == REPORT and step.report is not None:
                actions += self._reported(run, machine, step.report)
                if machine is run.machine:
                    actions += self._go_ahead(run, step.report, now_s)
            else:
                actions.append(Advance(machine.start, step, machine.ahead))
        return actions

    def _reported(self, run: _Run, machine: RoundMachine, report: RoundReport) -> list[Action]:
        """An attempt has come to its report, which waits until somebody asks for it."""
        if machine is run.ahead:
            run.found_ahead = report
            return []
        run.report = report
        return [Say(report)]


def position_of(start: StartRound) -> tuple[int, int]:
    """Round and attempt."""
    return start.round, start.attempt


def _plan_of(run: _Run, start: StartRound) -> ExchangePlan:
    """The exchange of one round."""
    plan = run.plan.merged() if start.merge else run.plan
    return plan.of_round(nodes_of(start.participants)) if start.participants else plan


def _num_nodes(run: _Run) -> int:
    return run.activation.graph.num_nodes


def failure(instruction: Instruction, error: IcrfError) -> Report | None:
    """The report that carries the failure of a performed instruction; None where there is no one to tell."""
    text = error.to_json()
    if isinstance(instruction, Reserve):
        return Reserved(instruction.run_id, instruction.generation, text)
    if isinstance(instruction, Activate):
        return Activated(instruction.run_id, instruction.generation, error_json=text)
    if isinstance(instruction, Relink):
        return Relinked(instruction.run_id, instruction.generation, text)
    if isinstance(instruction, SaveCheckpoint):
        return Checkpointed(instruction.run_id, instruction.generation, instruction.round, error_json=text)
    if isinstance(instruction, StoreModel):
        return ModelStored(instruction.run_id, instruction.generation, instruction.round, error_json=text)
    if isinstance(instruction, CallNode | SendMessage):
        return CallDone(instruction.run_id, instruction.call_id, error_json=text)
    if isinstance(instruction, MeasureLink):
        return LinkMeasured(instruction.measurement, error_json=text)
    if isinstance(instruction, Release):
        return Released(instruction.run_id, instruction.generation)
    return None
