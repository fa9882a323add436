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
                                                         ├─> aggregate (mix) ─> [consensus ─> evaluate]
    updates of remote neighbours ────────────────────────┘                   ─> [what is gathered ─> adapt] ─> report

Hierarchical: as centralized, with a coordinator per group and models and partials of several groups side by side. In a
round that ends with the global model every cluster sends the root one sum over all groups instead::

    sums of all clusters ─> aggregate (root) ─> send the global model ─┬─> install (clusters with aggregators) ─> report
                            the global model arrives (other clusters) ─┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from icrf.exchange import CONSENSUS, GATHERED, MERGED, MESSAGE, MODEL, PARTIAL, UPDATE, ExchangePlan, Transfer
from icrf.ports import Arrival, PhaseReport
from icrf.protocol import (
    DECENTRALIZED,
    EXCHANGING,
    ClusterProfile,
    MetricSum,
    PhaseSpan,
    RoundReport,
    StartRound,
    bitmap,
)
from icrf.update import sum_metrics
from icrf_agent.phase_reports import by_node, latest_state

PUBLISH, TRAIN, AGGREGATE, EVALUATE, SEND, REPORT = "publish", "train", "aggregate", "evaluate", "send", "report"
INSTALL, ADAPT = "install", "adapt"

_Expected = tuple[str, int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """Something the shell shall do. `transfer` belongs to ``send``, `report` to ``report``."""

    kind: str
    transfer: Transfer | None = None
    report: RoundReport | None = None


@dataclass
class _Seconds:
    """When things began and how long they took, in the shell's monotonic seconds.

    Attributes:
        asked: when somebody asked for the attempt; when it was begun, until somebody does.
        phases: when they began and ended.
    """

    asked: float = 0.0
    train: float = 0.0
    exchange_from: float = -1.0
    exchange: float = 0.0
    phases: list[PhaseSpan] = field(default_factory=list)


@dataclass
class RoundMachine:
    """Drives one attempt. Call `begin` once, then feed `done` and `arrived`; each returns the next steps.

    Args:
        plan: the compiled exchange plan of the round.
        cluster: index of this cluster in the plan.
        start: the attempt.
        num_nodes: nodes of the whole federation, for the participants' bitmap.
        ahead: whether nobody has asked for the attempt yet: then it stops before it makes a new state.
    """

    plan: ExchangePlan
    cluster: int
    start: StartRound
    num_nodes: int
    ahead: bool = False
    _phase: PhaseReport = field(default_factory=PhaseReport)
    _merged: list[PhaseReport] = field(default_factory=list)
    _expected: set[_Expected] = field(default_factory=set)
    _sending: int = 0
    _published: bool = False
    _trained: bool = False
    _mixing: bool = False
    _mixed: bool = False
    _ending: bool = False
    _ended: set[str] = field(default_factory=set)
    _finished: bool = False
    _overflow: tuple[int, ...] = ()
    _wire_bytes: int = 0
    _saved_bytes: int = 0
    _seconds: _Seconds = field(default_factory=_Seconds)

    def begin(self, now_s: float) -> list[Step]:
        """The first steps, and what has to arrive."""
        self._seconds.asked = now_s
        plan, here = self.plan, self.cluster
        kinds = [MODEL, PARTIAL, UPDATE, MERGED]
        if self._mixes_consensus or plan.flow != DECENTRALIZED:
            kinds.append(CONSENSUS)
        if self.start.adapt:
            kinds.append(GATHERED)
        inbound = [transfer for kind in kinds for transfer in plan.inbound(here, kind)]
        self._expected = {_key(t.kind, t.sender, t.source, t.recipients) for t in inbound}
        if plan.flow == DECENTRALIZED:
            return [Step(TRAIN)]
        if here in plan.publishing:
            return [Step(PUBLISH)]
        self._published = True
        return self._train_when_there(now_s)

    def confirmed(self, start: StartRound, now_s: float) -> list[Step]:
        """What was begun ahead is asked for now: what it has cost so far passed during the round before."""
        self.start, self.ahead = start, False
        self._seconds.asked, self._seconds.exchange = now_s, 0.0
        if self._seconds.exchange_from >= 0.0:
            self._seconds.exchange_from = now_s
        return self._go_on(now_s)

    def arrived(self, arrival: Arrival, source: int, now_s: float) -> list[Step]:
        """A payload of this attempt came in from cluster `source`."""
        header = arrival.header
        key = _key(header.kind, header.sender, source, header.recipients)
        if header.kind == MESSAGE:
            self._count(arrival)
        if self._finished or key not in self._expected:
            return []
        # Counted here, so that a payload that comes twice counts once.
        self._count(arrival)
        self._expected.discard(key)
        if header.kind == MODEL:
            return self._train_when_there(now_s) if self._published else []
        return self._go_on(now_s)

    def done(self, step: Step, result: PhaseReport | None, took_s: float, now_s: float) -> list[Step]:
        """A step is finished; `result` is what a phase reported."""
        if self._finished:
            return []
        if step.kind != SEND:
            self._seconds.phases.append(PhaseSpan(step.kind, now_s - took_s, now_s))
        if step.kind == PUBLISH:
            sends = [Step(SEND, t) for t in self.plan.outbound(self.cluster, MODEL)]
            self._sending += len(sends)
            self._published = True
            return sends + self._train_when_there(now_s)
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
            self._exchanges(now_s)
            return self._send_after_training() + self._go_on(now_s)
        if step.kind == AGGREGATE:
            self._mixed = True
            self._exchanges(now_s)
            return self._send_after_aggregating() + self._go_on(now_s)
        self._ending = False
        return self._go_on(now_s)

    # ------------------------------------------------------------ inside

    @property
    def _coordinates(self) -> bool:
        return self.cluster == self.plan.coordinator

    def _waits_for(self, kind: str) -> bool:
        return any(key[0] == kind for key in self._expected)

    @property
    def _mixes_consensus(self) -> bool:
        """Whether peers make a consensus model after they have mixed."""
        return self.plan.flow == DECENTRALIZED and self.start.evaluate

    def _train_when_there(self, now_s: float) -> list[Step]:
        """Train once all models are there that this cluster's nodes start from; go on at once where nobody trains."""
        if self._waits_for(MODEL):
            self._exchanges(now_s)
            return []
        if self.plan.local_participants(self.cluster) or self.plan.rows.anybody_keeps:
            self._exchanged(now_s)
            return [Step(TRAIN)]
        self._trained = True
        self._exchanges(now_s)
        return self._go_on(now_s)

    def _send(self, *kinds: str) -> list[Step]:
        transfers = [transfer for kind in kinds for transfer in self.plan.outbound(self.cluster, kind)]
        self._sending += len(transfers)
        return [Step(SEND, t) for t in transfers]

    def _send_after_training(self) -> list[Step]:
        if self.plan.flow == DECENTRALIZED:
            return self._send(UPDATE)
        return self._send(PARTIAL, UPDATE, CONSENSUS)

    def _send_after_aggregating(self) -> list[Step]:
        if self.plan.flow != DECENTRALIZED:
            return self._send(MERGED)
        return self._send(*[CONSENSUS] * self.start.evaluate, *[GATHERED] * self.start.adapt)

    def _go_on(self, now_s: float) -> list[Step]:
        if self.ahead or not self._trained or self._sending:
            return []
        if not self._mixing and self.cluster in self.plan.aggregating:
            awaited = [PARTIAL, UPDATE] + ([] if self.plan.flow == DECENTRALIZED else [CONSENSUS])
            if any(self._waits_for(kind) for kind in awaited):
                return []
            self._exchanged(now_s)
            self._mixing = True
            return [Step(AGGREGATE)]
        if self._mixing and not self._mixed:
            return []
        return self._end_round(now_s)

    def _end_round(self, now_s: float) -> list[Step]:
        """What follows when the new states are made, wherever they are made: another step, or the report."""
        if self._ending:
            return []
        left = [(awaited, last) for awaited, last in self._last_steps if last not in self._ended]
        if left and self._waits_for(left[0][0]):
            return []
        self._exchanged(now_s)
        if not left:
            return self._finish()
        self._ending = True
        self._ended.add(left[0][1])
        return [Step(left[0][1])]

    @property
    def _last_steps(self) -> list[tuple[str, str]]:
        """What this cluster has to do once the new states are made, in order, each with what it waits for."""
        if self.cluster in self.plan.installing:
            return [(MERGED, INSTALL)]
        if not self._coordinates or self.plan.flow != DECENTRALIZED:
            return []
        return [(CONSENSUS, EVALUATE)] * self.start.evaluate + [(GATHERED, ADAPT)] * self.start.adapt

    def _exchanges(self, now_s: float) -> None:
        """From now on this cluster waits until payloads have come or gone."""
        if self._seconds.exchange_from < 0.0:
            self._seconds.exchange_from = now_s

    def _count(self, arrival: Arrival) -> None:
        self._wire_bytes += arrival.wire_bytes
        self._saved_bytes += arrival.saved_bytes

    def _exchanged(self, now_s: float) -> None:
        if self._seconds.exchange_from >= 0.0:
            self._seconds.exchange += max(0.0, now_s - self._seconds.exchange_from)
            self._seconds.exchange_from = -1.0

    def _finish(self) -> list[Step]:
        self._finished = True
        sums = sum_metrics(phase.metric_sums for phase in self._merged)
        state = latest_state(self._merged)
        report = RoundReport(
            run_id=self.start.run_id,
            generation=self.start.generation,
            round=self.start.round,
            attempt=self.start.attempt,
            participants=bitmap([node for phase in self._merged for node in phase.nodes], self.num_nodes),
            overflow=self._overflow,
            metric_sums={k: MetricSum(str(n), w) for k, (n, w) in sums.items()},
            metrics={name: value for phase in self._merged for name, value in phase.metrics.items()},
            node_metrics=by_node(self._merged),
            bytes_inter_cluster=self._wire_bytes,
            bytes_saved=self._saved_bytes,
            bytes_intra_cluster=sum(p.bytes_intra_cluster for p in self._merged),
            train_s=self._seconds.train,
            exchange_s=self._seconds.exchange,
            absmax=state.absmax,
            model_hash=state.model_hash,
            state_hashes=state.state_hashes,
            graph=next((phase.graph for phase in self._merged if phase.graph), None),
            profile=self._profile() if self.start.profile else None,
        )
        return [Step(REPORT, report=report)]

    def _profile(self) -> ClusterProfile:
        """What the hosts did since the attempt was asked for. While payloads cross between clusters no phase runs here:
        all of them wait for that."""
        asked = self._seconds.asked
        spans = [PhaseSpan(s.name, s.began_s - asked, s.ended_s - asked) for s in self._seconds.phases]
        hosts: dict[str, dict[str, float]] = {}
        before: dict[str, dict[str, float]] = {}
        for span, phase in zip((s for s in spans if s.name != PUBLISH), self._merged, strict=True):
            for name, seconds in phase.seconds.items():
                # Of a phase that ran when the question came, all parts count by how much of it was left.
                if span.began_s < 0.0:
                    share = -span.began_s / (span.ended_s - span.began_s) if span.ended_s > 0.0 else 1.0
                    before[name] = {part: share * value for part, value in seconds.items()}
                hosts[name] = dict(seconds)
        for name, seconds in hosts.items():
            for part, value in before.get(name, {}).items():
                seconds[part] -= value
            seconds[EXCHANGING] = seconds.get(EXCHANGING, 0.0) + self._seconds.exchange
        return ClusterProfile(hosts, tuple(spans))


def _key(kind: str, sender: int, source: int, recipients: Sequence[int]) -> _Expected:
    """What tells one payload of a round from another: partials by whom they are for, all others by their sender."""
    return kind, sender, source, tuple(recipients) if kind == PARTIAL else ()
