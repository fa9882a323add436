"""Plays the shell around one round machine by hand: says what is done, and remembers what it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.exchange import PARTIAL, ExchangePlan, Transfer, compile_exchange
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import CENTRALIZED, DECENTRALIZED, RoundReport, Rows, StartRound
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.round_machine import AGGREGATE, EVALUATE, REPORT, TRAIN, RoundMachine, Step

WIRE_BYTES = 100


def star_plan(assignment: Sequence[int], roles: Sequence[str] | None = None, rows: Rows | None = None) -> ExchangePlan:
    """Node 0 aggregates, all others train (unless `roles` says otherwise)."""
    num_nodes = len(assignment)
    edges = [pair for i in range(1, num_nodes) for pair in ((0, i), (i, 0))]
    roles = roles or ["aggregate", *["train"] * (num_nodes - 1)]
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, edges)
    return compile_exchange(CENTRALIZED, adjacency, roles, assignment, rows or Rows())


def ring_plan(assignment: Sequence[int], rows: Rows | None = None) -> ExchangePlan:
    """Peers in a ring."""
    num_nodes = len(assignment)
    edges = {pair for i in range(num_nodes) for j in [(i + 1) % num_nodes] for pair in ((i, j), (j, i))}
    adjacency = HybridAdjacencyMatrix.from_edges(num_nodes, sorted(edges))
    return compile_exchange(DECENTRALIZED, adjacency, ["train"] * num_nodes, assignment, rows or Rows())


def machine_of(plan: ExchangePlan, cluster: int, *, evaluate: bool = True, adapt: bool = False) -> RoundMachine:
    """The first attempt of round 1."""
    start = StartRound("run", 1, 1, 1, "", (0,), 10, evaluate, adapt=adapt)
    return RoundMachine(plan, cluster, start, len(plan.assignment))


def arrival_of(transfer: Transfer, wire_bytes: int = WIRE_BYTES) -> Arrival:
    """What a planned transfer comes in as."""
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
        """What it has asked for and was not done."""
        return [step.kind for step in self.pending]

    def finish(self, kind: str, result: PhaseReport | None = None, *, took_s: float = 0.0, now_s: float = 0.0) -> None:
        """The first pending step of this kind is done."""
        step = next(s for s in self.pending if s.kind == kind)
        self.pending.remove(step)
        if result is None and kind in (TRAIN, AGGREGATE, EVALUATE):
            result = PhaseReport()
        self._take(self.machine.done(step, result, took_s, now_s))

    def confirm(self, start: StartRound, now_s: float) -> None:
        """What was begun ahead is asked for."""
        self._take(self.machine.confirmed(start, now_s))

    def arrive(self, transfer: Transfer, *, now_s: float = 0.0, wire_bytes: int = WIRE_BYTES) -> None:
        """A payload has come."""
        self._take(self.machine.arrived(arrival_of(transfer, wire_bytes), transfer.source, now_s))
