"""One round as a transaction: open an attempt, collect one report per cluster, commit or try again. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from icrf.errors import IcrfError, InternalError
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    ClusterProfile,
    Graph,
    LateUpdates,
    RoundReport,
    RoundResult,
    StartRound,
    nodes_of,
)
from icrf.staleness import late_nodes, scaled
from icrf.update import choose_grid, elementwise_max, merkle_root, metric_mean, sum_metrics

MAX_ESCALATION = 12  # 8 bits each: beyond it the values left float32


@dataclass(frozen=True)
class Commit:
    """The outcome of a round: what its commit row says.

    Attributes:
        opened_s: when the clusters were asked for the attempt, in the mediator's monotonic seconds.
        profiles: where the time went on each cluster that told.
    """

    round: int
    attempt: int
    participants: bytes
    num_participants: int
    model_hash: str
    parent_hash: str
    consensus_hash: str
    metrics: dict[str, float]
    absmax: tuple[float, ...]
    bytes_inter_cluster: int
    bytes_intra_cluster: int
    bytes_by_cluster: dict[str, int]
    train_s: float
    exchange_s: float
    node_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluated: bool = False
    late: tuple[LateUpdates, ...] = ()
    graph: Graph | None = None
    opened_s: float = 0.0
    profiles: dict[str, ClusterProfile] = field(default_factory=dict)
    bytes_saved: int = 0

    def result(self, generation: int, wall_s: float, node_ids: Sequence[str] = ()) -> RoundResult:
        """The round as users see it.

        Args:
            node_ids: by node index, for the late ones.
        """
        older = late_nodes(self.late)
        return RoundResult(
            number=self.round,
            attempt=self.attempt,
            generation=generation,
            wall_s=wall_s,
            train_s=self.train_s,
            exchange_s=self.exchange_s,
            commit_s=0.0,
            metrics=self.metrics,
            bytes_inter_cluster=self.bytes_inter_cluster,
            bytes_intra_cluster=self.bytes_intra_cluster,
            bytes_saved=self.bytes_saved,
            participants=self.num_participants,
            model_sha256=self.model_hash,
            parent_sha256=self.parent_hash,
            consensus_sha256=self.consensus_hash,
            bytes_by_cluster=self.bytes_by_cluster,
            participants_bitmap=self.participants.hex(),
            node_metrics=self.node_metrics,
            staleness={node_ids[node]: self.round - older[node].round for node in sorted(older)},
        )


@dataclass
class Attempt:
    """The open attempt of a round and what has been reported for it."""

    start: StartRound
    clusters: tuple[str, ...]
    opened_s: float
    reports: dict[str, RoundReport] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [c for c in self.clusters if c not in self.reports]


class RoundLedger:
    """The chain of committed states of one run and the attempt that is open.

    Args:
        flow: ``centralized``, ``decentralized`` or ``hierarchical``.
        clusters: names of the clusters that take part, in assignment order.
        keepers: nodes with a state of their own per cluster, ascending, in the order of the cluster's state hashes.
        coordinator: the cluster that makes the global or consensus model.
        by_samples: whether a node weighs as much as it has samples; else all weigh one.
    """

    def __init__(
        self,
        flow: str,
        clusters: tuple[str, ...],
        keepers: dict[str, tuple[int, ...]],
        coordinator: str,
        *,
        by_samples: bool = True,
    ) -> None:
        self.flow = flow
        self.clusters = clusters
        self.keepers = keepers
        self.coordinator = coordinator
        self.round = 0
        self.head_hash = ""
        self.absmax: tuple[float, ...] = ()
        self.total_weight = 0
        self.samples: dict[int, int] = {}
        self._by_samples = by_samples
        self.open: Attempt | None = None
        self._escalation: list[int] = []
        self._history: dict[int, tuple[str, tuple[float, ...]]] = {}
        self._with_model: set[int] = set()
        self._evaluated: set[int] = set()

    def move(self, clusters: tuple[str, ...], keepers: dict[str, tuple[int, ...]], coordinator: str) -> None:
        """From now on nodes live elsewhere; no attempt is open."""
        self.clusters, self.keepers, self.coordinator = clusters, keepers, coordinator

    def begin(self, absmax: Sequence[Sequence[float]], head_hash: str, total_weight: int) -> None:
        """Set the state before the first round: initial maxima per cluster, hash, and the sum of sample counts."""
        self.absmax = elementwise_max(absmax)
        self.head_hash = head_hash
        self.total_weight = total_weight
        self._history.setdefault(0, (head_hash, self.absmax))

    def remember(
        self, number: int, model_hash: str, absmax: Sequence[float], with_model: bool, evaluated: bool
    ) -> None:
        """Take over a commit of the journal; the last one remembered is the head."""
        self._history[number] = (model_hash, tuple(absmax))
        if with_model:
            self._with_model.add(number)
        if evaluated:
            self._evaluated.add(number)
        self.round, self.head_hash, self.absmax = number, model_hash, tuple(absmax)

    def rewind(self, number: int) -> str:
        """Go back to the committed state of a round; its hash."""
        self.open = None
        self.round = number
        self.head_hash, self.absmax = self._history[number]
        return self.head_hash

    def recorded(self, number: int) -> str:
        """The hash that a round was committed with before; empty for a round that is new."""
        return self._history[number][0] if number in self._history else ""

    def made_model(self, number: int) -> bool:
        """Whether a committed round has made a global or consensus model."""
        return number in self._with_model

    def was_evaluated(self, number: int) -> bool:
        """Whether a committed round was evaluated."""
        return number in self._evaluated

    def open_round(self, draft: StartRound, now_s: float, without: Collection[str] = ()) -> StartRound:
        """Open the next round.

        Args:
            draft: what it asks for, without the state that it starts from.
            without: clusters that are not asked.
        """
        self._escalation = [0] * len(self.absmax)
        grid = choose_grid(self.absmax, draft.total_weight, self._escalation)
        start = replace(draft, parent_hash=self.head_hash, grid=grid)
        self.open = Attempt(start, tuple(c for c in self.clusters if c not in without), now_s)
        return start

    def weight_in(self, participants: bytes, late: Sequence[LateUpdates]) -> int:
        """What the weights of a round add up to: n_k over all participants. Peers all mix, whoever trains."""
        if self.flow != CENTRALIZED or not (participants or late):
            return self.total_weight
        return self.weight_of(nodes_of(participants) if participants else self.samples, late)

    def weight_of(self, nodes: Iterable[int], late: Sequence[LateUpdates] = ()) -> int:
        """What the weights of these nodes add up to, where some bring a late update."""
        older = late_nodes(late)
        return sum(scaled(self.samples[node] if self._by_samples else 1, node, older) for node in nodes)

    def most_weight(self, nodes: Iterable[int]) -> int:
        """The same for all that train, or what a sum of a round may come to: a consensus counts every peer as one."""
        peers = sum(map(len, self.keepers.values())) if self.flow == DECENTRALIZED else 0
        return max(self.weight_of(nodes), peers)

    def accepts(self, report: RoundReport) -> bool:
        """Whether a report belongs to the open attempt; everything else is stale and dropped."""
        return self.open is not None and (report.round, report.attempt) == (
            self.open.start.round,
            self.open.start.attempt,
        )

    def retry_coarser(self, overflow: Sequence[int], now_s: float) -> StartRound | None:
        """Run the open round again with a coarser grid for the tensors that left it; None when there is no coarser.

        Only tensors that really overflowed are coarsened, so the grid that finally holds is the finest that can,
        whichever cluster reported first: the bits do not depend on the number of clusters.
        """
        assert self.open is not None
        for tensor in overflow:
            self._escalation[tensor] += 1
            if self._escalation[tensor] > MAX_ESCALATION:
                return None
        old = self.open.start
        grid = choose_grid(self.absmax, old.total_weight, self._escalation)
        start = replace(old, attempt=old.attempt + 1, grid=grid, ahead=None)
        self.open = Attempt(start, self.open.clusters, now_s)
        return start

    def collect(self, cluster: str, report: RoundReport) -> Commit | None:
        """Take one cluster's report; the commit once all are there."""
        assert self.open is not None
        self.open.reports[cluster] = report
        return None if self.open.missing else self._commit(self.open)

    def _commit(self, attempt: Attempt) -> Commit:
        reports = attempt.reports
        coordinator = reports[self.coordinator]
        participants = _union([r.participants for r in reports.values()])
        if self.flow == CENTRALIZED:
            model_hash, absmax = coordinator.model_hash, coordinator.absmax
        else:
            model_hash = self.root(self.leaves({c: r.state_hashes for c, r in reports.items()}))
            absmax = elementwise_max(r.absmax for r in reports.values())
        commit = Commit(
            round=attempt.start.round,
            attempt=attempt.start.attempt,
            participants=participants,
            num_participants=sum(b.bit_count() for b in participants),
            model_hash=model_hash,
            parent_hash=attempt.start.parent_hash,
            consensus_hash=coordinator.model_hash,
            metrics={**_metric_means(list(reports.values())), **coordinator.metrics},
            absmax=absmax,
            bytes_inter_cluster=sum(r.bytes_inter_cluster for r in reports.values()),
            bytes_intra_cluster=sum(r.bytes_intra_cluster for r in reports.values()),
            bytes_saved=sum(r.bytes_saved for r in reports.values()),
            bytes_by_cluster={c: reports[c].bytes_inter_cluster for c in attempt.clusters},
            train_s=max(r.train_s for r in reports.values()),
            exchange_s=max(r.exchange_s for r in reports.values()),
            node_metrics={node: found for r in reports.values() for node, found in r.node_metrics.items()},
            evaluated=attempt.start.evaluate,
            late=attempt.start.late,
            graph=coordinator.graph,
            opened_s=attempt.opened_s,
            profiles={c: profile for c, r in reports.items() if (profile := r.profile) is not None},
        )
        self.round, self.head_hash, self.absmax, self.open = commit.round, model_hash, absmax, None
        self._history.setdefault(commit.round, (model_hash, absmax))
        if commit.consensus_hash:
            self._with_model.add(commit.round)
        if commit.evaluated:
            self._evaluated.add(commit.round)
        return commit

    @staticmethod
    def root(leaves: list[bytes]) -> str:
        """The hash of a state that several nodes keep: the Merkle root over (index, node-state hash)."""
        return merkle_root(leaves)

    def leaves(self, hashes: dict[str, bytes]) -> list[bytes]:
        """State hashes in node-index order, from the clusters' packed hashes."""
        by_node: dict[int, bytes] = {}
        for cluster, packed in hashes.items():
            for k, node in enumerate(self.keepers[cluster]):
                by_node[node] = packed[32 * k : 32 * k + 32]
        return [by_node[node] for node in sorted(by_node)]


def _union(bitmaps: Sequence[bytes]) -> bytes:
    out = bytearray(max((len(b) for b in bitmaps), default=0))
    for bitmap in bitmaps:
        for i, byte in enumerate(bitmap):
            out[i] |= byte
    return bytes(out)


def _metric_means(reports: Sequence[RoundReport]) -> dict[str, float]:
    totals = sum_metrics({k: (int(s.numerator), s.weight) for k, s in r.metric_sums.items()} for r in reports)
    return {name: metric_mean(*total) for name, total in sorted(totals.items())}


def differs(number: int, recorded: str, found: str) -> IcrfError:
    """The error of a round that did not repeat: its state depends on something that is not in the journal."""
    return InternalError(
        "X002",
        f"round {number} did not repeat: its state has another hash than the one committed",
        value=found[:16],
        allowed=recorded[:16],
        hint="user code must draw randomness from self.generator(...) only, and clusters must have equal fingerprints",
    )
