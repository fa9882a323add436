"""One attempt of a round on one cluster, as a state machine: events in, steps out. Pure.

Centralized (the coordinator holds the global model)::

    coordinator:  publish model ─> send it to each remote cluster        train ─┐
                                                                                ├─> aggregate ─> report
                                       partials of all remote clusters ─────────┘
    other:        model arrives ─> train ─> send one partial ─> report

Where the aggregation rule has to see every update, they travel one by one in the place of the partials. Where it has
nodes keep something, a cluster trains also if none of its nodes takes part: its hosts carry over what they keep.

Decentralized::

    train ─> send one update per (node, remote cluster) ─┐
                                                         ├─> aggregate (mix) ─> [consensus ─> evaluate] ─> report
    updates of remote neighbours ────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from icrf.exchange import CONSENSUS, MESSAGE, MODEL, PARTIAL, UPDATE, ExchangePlan, Transfer
from icrf.ports import Arrival, PhaseReport
from icrf.protocol import CENTRALIZED, MetricSum, RoundReport, StartRound, bitmap

PUBLISH, TRAIN, AGGREGATE, EVALUATE, SEND, REPORT = "publish", "train", "aggregate", "evaluate", "send", "report"


@dataclass(frozen=True)
class Step:
    """Something the shell shall do. `transfer` belongs to ``send``, `report` to ``report``."""

    kind: str
    transfer: Transfer | None = None
    report: RoundReport | None = None


@dataclass
class _Seconds:
    """When things began and how long they took, in the shell's monotonic seconds."""

    train: float = 0.0
    exchange_from: float = -1.0
    exchange: float = 0.0
    aggregate: float = 0.0


@dataclass
class RoundMachine:
    """Drives one attempt. Call `begin` once, then feed `done` and `arrived`; each returns the next steps.

    Args:
        plan: the compiled exchange plan of the round.
        cluster: index of this cluster in the plan.
        start: the attempt.
        num_nodes: nodes of the whole federation, for the participants' bitmap.
    """

    plan: ExchangePlan
    cluster: int
    start: StartRound
    num_nodes: int
    _phase: PhaseReport = field(default_factory=PhaseReport)
    _merged: list[PhaseReport] = field(default_factory=list)
    _expected: set[tuple[str, int, int]] = field(default_factory=set)
    _sending: int = 0
    _trained: bool = False
    _mixing: bool = False
    _mixed: bool = False
    _evaluating: bool = False
    _finished: bool = False
    _overflow: tuple[int, ...] = ()
    _wire_bytes: int = 0
    _seconds: _Seconds = field(default_factory=_Seconds)

    def begin(self, now_s: float) -> list[Step]:
        """The first steps, and what has to arrive."""
        plan, here = self.plan, self.cluster
        kinds = (MODEL, PARTIAL, UPDATE, CONSENSUS) if self.start.evaluate else (MODEL, PARTIAL, UPDATE)
        self._expected = {(t.kind, t.sender, t.source) for kind in kinds for t in plan.inbound(here, kind)}
        if plan.flow != CENTRALIZED:
            return [Step(TRAIN)]
        if self._coordinates:
            return [Step(PUBLISH)]
        if self._waits_for(MODEL):
            self._seconds.exchange_from = now_s
            return []
        if self.plan.rows.anybody_keeps:
            return [Step(TRAIN)]
        return self._maybe_report(now_s)

    def arrived(self, arrival: Arrival, source: int, now_s: float) -> list[Step]:
        """A payload of this attempt came in from cluster `source`."""
        header = arrival.header
        key = (header.kind, header.sender, source)
        if header.kind == MESSAGE:
            self._wire_bytes += arrival.wire_bytes
        if self._finished or key not in self._expected:
            return []
        # Counted here, so that a payload that comes twice counts once.
        self._wire_bytes += arrival.wire_bytes
        self._expected.discard(key)
        if header.kind == MODEL and not self._trained:
            self._exchanged(now_s)
            return [Step(TRAIN)]
        return self._go_on(now_s)

    def done(self, step: Step, result: PhaseReport | None, took_s: float, now_s: float) -> list[Step]:
        """A step is finished; `result` is what a phase reported."""
        if self._finished:
            return []
        if step.kind == PUBLISH:
            sends = [Step(SEND, t) for t in self.plan.outbound(self.cluster, MODEL)]
            self._sending += len(sends)
            if self.plan.local_participants(self.cluster) or self.plan.rows.anybody_keeps:
                return [*sends, Step(TRAIN)]
            self._trained = True
            self._seconds.exchange_from = now_s
            return sends + self._go_on(now_s)
        if step.kind == SEND:
            self._sending -= 1
            return self._go_on(now_s)
        assert result is not None
        self._merged.append(result)
        if result.overflow:
            self._overflow = result.overflow
            return self._finish()
        if step.kind == TRAIN:
            self._trained = True
            self._seconds.train = took_s
            self._seconds.exchange_from = now_s
            return self._send_after_training() + self._go_on(now_s)
        self._seconds.aggregate += took_s
        if step.kind == AGGREGATE:
            self._mixed = True
            return self._send_consensus() + self._go_on(now_s)
        return self._finish()

    # ------------------------------------------------------------ inside

    @property
    def _coordinates(self) -> bool:
        return self.cluster == self.plan.coordinator

    def _waits_for(self, kind: str) -> bool:
        return any(key[0] == kind for key in self._expected)

    def _send_after_training(self) -> list[Step]:
        transfers = (*self.plan.outbound(self.cluster, PARTIAL), *self.plan.outbound(self.cluster, UPDATE))
        self._sending += len(transfers)
        return [Step(SEND, t) for t in transfers]

    def _send_consensus(self) -> list[Step]:
        if self.plan.flow == CENTRALIZED or not self.start.evaluate:
            return []
        transfers = self.plan.outbound(self.cluster, CONSENSUS)
        self._sending += len(transfers)
        return [Step(SEND, t) for t in transfers]

    def _go_on(self, now_s: float) -> list[Step]:
        if not self._trained or self._sending:
            return []
        centralized = self.plan.flow == CENTRALIZED
        if not self._mixing and (self._coordinates or not centralized):
            if self._waits_for(PARTIAL) or self._waits_for(UPDATE):
                return []
            self._exchanged(now_s)
            self._mixing = True
            return [Step(AGGREGATE)]
        return self._maybe_report(now_s)

    def _maybe_report(self, now_s: float) -> list[Step]:
        self._exchanged(now_s)
        centralized = self.plan.flow == CENTRALIZED
        if centralized and not self._coordinates:
            return self._finish()
        if not self._mixed:
            return []
        if centralized or not (self.start.evaluate and self._coordinates):
            return self._finish()
        if self._waits_for(CONSENSUS) or self._evaluating:
            return []
        self._evaluating = True
        return [Step(EVALUATE)]

    def _exchanged(self, now_s: float) -> None:
        if self._seconds.exchange_from >= 0.0:
            self._seconds.exchange += max(0.0, now_s - self._seconds.exchange_from)
            self._seconds.exchange_from = -1.0

    def _finish(self) -> list[Step]:
        self._finished = True
        sums: dict[str, tuple[int, int]] = {}
        metrics: dict[str, float] = {}
        nodes: list[int] = []
        for phase in self._merged:
            for name, (numerator, weight) in phase.metric_sums.items():
                old = sums.get(name, (0, 0))
                sums[name] = (old[0] + numerator, old[1] + weight)
            metrics.update(phase.metrics)
            nodes.extend(phase.nodes)
        state = _latest_state(self._merged)
        report = RoundReport(
            run_id=self.start.run_id,
            generation=self.start.generation,
            round=self.start.round,
            attempt=self.start.attempt,
            participants=bitmap(nodes, self.num_nodes),
            overflow=self._overflow,
            metric_sums={k: MetricSum(str(n), w) for k, (n, w) in sums.items()},
            metrics=metrics,
            node_metrics=_by_node(self._merged),
            bytes_inter_cluster=self._wire_bytes,
            bytes_intra_cluster=sum(p.bytes_intra_cluster for p in self._merged),
            train_s=self._seconds.train,
            exchange_s=self._seconds.exchange,
            aggregate_s=self._seconds.aggregate,
            absmax=state.absmax,
            model_hash=state.model_hash,
            state_hashes=state.state_hashes,
        )
        return [Step(REPORT, report=report)]


def _by_node(phases: Sequence[PhaseReport]) -> dict[str, dict[str, float]]:
    """What each node reported in any of the phases."""
    found: dict[str, dict[str, float]] = {}
    for phase in phases:
        for node, values in phase.node_metrics.items():
            found.setdefault(node, {}).update(values)
    return found


def _latest_state(phases: Sequence[PhaseReport]) -> PhaseReport:
    """What the phases say about the new state; a later phase overrides an earlier one where it says something."""
    found = PhaseReport()
    for phase in phases:
        found = PhaseReport(
            absmax=phase.absmax or found.absmax,
            model_hash=phase.model_hash or found.model_hash,
            state_hashes=phase.state_hashes or found.state_hashes,
        )
    return found
