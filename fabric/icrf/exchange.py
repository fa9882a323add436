"""The exchange plan: which payloads cross between clusters in a round, known before the round starts.

A graph and an assignment of its nodes to clusters decide everything: one payload per (sender, remote cluster), fanned
out on arrival, and one exact partial sum per remote cluster where the receiver only needs a sum. All participants of a
run compile the same plan from the same values, so that nobody has to announce what will come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from icrf.errors import ConfigError, RoutingError
from icrf.protocol import CENTRALIZED, DECENTRALIZED, HIERARCHICAL, Rows, parts_of
from icrf.topology.hierarchy import Hierarchy
from icrf.topology.hybrid import SHOWN, HybridAdjacencyMatrix

MODEL, UPDATE, PARTIAL, CONSENSUS = "model", "update", "partial", "consensus"
# The global model of a hierarchy on its way to the aggregators of the groups.
MERGED = "merged"
# What peers tell the coordinator about themselves, where it decides on their next graph.
GATHERED = "gathered"
# What nodes say to each other; it is not planned.
MESSAGE = "message"
# What links are measured with: it belongs to no run, and whoever gets it drops it.
PROBE = "probe"

K = TypeVar("K")
V = TypeVar("V")

# The sender of what a cluster as a whole contributes.
CLUSTER_SENDER = -1

# What a cluster sends as a whole: sums that are exact, and rows of all of its nodes.
EXACT = (PARTIAL, CONSENSUS)
OF_A_CLUSTER = (*EXACT, GATHERED)

# Exact partial sums are float64, whatever the model's dtype.
PARTIAL_ITEMSIZE = 8


@dataclass(frozen=True, slots=True)
class Transfer:
    """One payload from one cluster to another.

    Attributes:
        kind: ``model``, ``update``, ``partial``, ``consensus``, ``merged`` or ``gathered``.
        sender: node index, or -1 for what a cluster sends as a whole.
        source: cluster index it leaves.
        target: cluster index it goes to.
        recipients: node indices at `target`, ascending; empty for what no node receives, such as a consensus partial.
    """

    kind: str
    sender: int
    source: int
    target: int
    recipients: tuple[int, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """What crosses between clusters; clusters and nodes are indices.

    Attributes:
        assignment: cluster per node.
        coordinator: the cluster that holds the global (or consensus) model.
        participants: the nodes that train, ascending.
        transfers: payloads of a round without evaluation.
        evaluation: consensus partials that an evaluated round of a decentralized flow adds.
        aggregators: the nodes that make models for others, ascending.
        merging: payloads of a round of a hierarchical flow that ends with one model for all groups.
        merges: whether this is the plan of such a round.
        rows: what the aggregation rule moves.
        adaptation: what a round of a decentralized flow that decides on the next graph adds.
    """

    flow: str
    assignment: tuple[int, ...]
    coordinator: int
    participants: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    evaluation: tuple[Transfer, ...] = ()
    aggregators: tuple[int, ...] = ()
    merging: tuple[Transfer, ...] = ()
    merges: bool = False
    rows: Rows = field(default_factory=Rows)
    adaptation: tuple[Transfer, ...] = ()

    def merged(self) -> ExchangePlan:
        """The plan of a round of a hierarchical flow that ends with one model for all groups."""
        return replace(self, transfers=self.merging, merges=True)

    @cached_property
    def publishing(self) -> frozenset[int]:
        """The clusters whose aggregators send models to those that train."""
        return frozenset(self.assignment[node] for node in self.aggregators)

    @cached_property
    def aggregating(self) -> frozenset[int]:
        """The clusters that make new states out of what nodes have contributed."""
        if self.merges:
            return frozenset({self.coordinator})
        return self.publishing or frozenset(self.assignment)

    @property
    def installing(self) -> frozenset[int]:
        """The clusters whose aggregators take a global model over at the end of the round."""
        return self.publishing if self.merges else frozenset()

    def of_round(self, chosen: Sequence[int]) -> ExchangePlan:
        """The plan of a round in which only the `chosen` nodes train.

        A cluster without any neither receives the global model nor sends a partial or an update. Peers mix whether they
        train or not, so between them nothing changes.
        """
        if self.flow != CENTRALIZED:
            return self
        training = frozenset(chosen)
        busy = {self.assignment[node] for node in training}
        transfers = []
        for transfer in self.transfers:
            if transfer.kind == MODEL and transfer.target in busy:
                recipients = tuple(node for node in transfer.recipients if node in training)
                transfers.append(replace(transfer, recipients=recipients))
            elif transfer.kind == UPDATE and transfer.sender in training:  # noqa: SIM114 - three kinds, three rules
                transfers.append(transfer)
            elif transfer.kind == PARTIAL and transfer.source in busy:
                transfers.append(transfer)
        participants = tuple(node for node in self.participants if node in training)
        return replace(self, participants=participants, transfers=tuple(transfers))

    def outbound(self, cluster: int, kind: str) -> tuple[Transfer, ...]:
        """The payloads of `kind` that leave `cluster`, in plan order."""
        return self._by_source.get((cluster, kind), ())

    def inbound(self, cluster: int, kind: str) -> tuple[Transfer, ...]:
        """The payloads of `kind` that `cluster` receives, in plan order."""
        return self._by_target.get((cluster, kind), ())

    def local_nodes(self, cluster: int) -> tuple[int, ...]:
        """The nodes of `cluster`, ascending."""
        return self._local_nodes.get(cluster, ())

    def local_participants(self, cluster: int) -> tuple[int, ...]:
        """The nodes of `cluster` that train, ascending."""
        return self._local_participants.get(cluster, ())

    def payload_bytes(self, num_parameters: int, itemsize: int = 4) -> int:
        """Payload bytes of one round without evaluation over all links; headers are not counted.

        Args:
            num_parameters: elements of the flat model.
            itemsize: bytes of one element of a model or update; partials always take 8.
        """
        return sum(self.transfer_bytes(t, num_parameters, itemsize) for t in self.transfers)

    def transfer_bytes(self, transfer: Transfer, num_parameters: int, itemsize: int = 4) -> int:
        """Payload bytes of one transfer."""
        elements = num_elements(transfer.kind, num_parameters, self.rows, len(self.local_nodes(transfer.source)))
        return elements * (PARTIAL_ITEMSIZE if transfer.kind in EXACT else itemsize)

    def evaluation_bytes(self, num_parameters: int) -> int:
        """Payload bytes that an evaluation adds."""
        return len(self.evaluation) * PARTIAL_ITEMSIZE * num_parameters

    def adaptation_bytes(self, num_parameters: int, itemsize: int = 4) -> int:
        """Payload bytes that a decision on the next graph adds."""
        return sum(self.transfer_bytes(t, num_parameters, itemsize) for t in self.adaptation)

    def links(self, num_parameters: int, itemsize: int = 4) -> dict[tuple[int, int], int]:
        """(source cluster, target cluster) -> payload bytes of one round without evaluation, ordered by link."""
        totals: Counter[tuple[int, int]] = Counter()
        for transfer in self.transfers:
            totals[transfer.source, transfer.target] += self.transfer_bytes(transfer, num_parameters, itemsize)
        return dict(sorted(totals.items()))

    @cached_property
    def _by_source(self) -> dict[tuple[int, str], tuple[Transfer, ...]]:
        return _grouped(((t.source, t.kind), t) for t in self.transfers + self.evaluation + self.adaptation)

    @cached_property
    def _by_target(self) -> dict[tuple[int, str], tuple[Transfer, ...]]:
        return _grouped(((t.target, t.kind), t) for t in self.transfers + self.evaluation + self.adaptation)

    @cached_property
    def _local_nodes(self) -> dict[int, tuple[int, ...]]:
        return _grouped((cluster, node) for node, cluster in enumerate(self.assignment))

    @cached_property
    def _local_participants(self) -> dict[int, tuple[int, ...]]:
        return _grouped((self.assignment[node], node) for node in self.participants)


def num_elements(kind: str, num_parameters: int, rows: Rows, num_nodes: int) -> int:
    """Elements of a payload of this kind.

    Args:
        num_nodes: of the cluster that sends it, which decides where there is a row for each.
    """
    if kind == GATHERED:
        return rows.gathered * num_nodes
    if kind == MODEL:
        return rows.down * num_parameters
    return rows.up * num_parameters + rows.scalars if kind == PARTIAL else num_parameters


def compile_exchange(
    flow: str,
    adjacency: HybridAdjacencyMatrix,
    roles: Sequence[str],
    assignment: Sequence[int],
    rows: Rows = Rows(),
) -> ExchangePlan:
    """Compile the exchange plan of a federation.

    Args:
        flow: ``centralized``, ``decentralized`` or ``hierarchical``.
        roles: dash-separated words per node; ``train`` makes a participant, ``aggregate`` the one aggregator, or that
            of a group.
        assignment: cluster index per node.
        rows: what the aggregation rule of a centralized flow moves.

    Raises:
        ConfigError: C008 not exactly one aggregator, no hierarchy, or lists of different length; C010 unknown flow.
        RoutingError: P011 a participant without the edges to and from its aggregator.
    """
    if not adjacency.num_nodes == len(roles) == len(assignment):
        raise ConfigError(
            "C008",
            f"graph of {adjacency.num_nodes} nodes, {len(roles)} roles and an assignment of {len(assignment)}",
            place="nodes",
        )
    clusters = np.array(assignment, dtype=np.int64)
    words = [parts_of(role) for role in roles]
    participants = np.array([i for i, role in enumerate(words) if "train" in role], dtype=np.int64)
    aggregators: tuple[int, ...] = ()
    evaluation: tuple[Transfer, ...] = ()
    merging: tuple[Transfer, ...] = ()
    if flow == CENTRALIZED:
        aggregators = (_aggregator(words),)
        _require_star_edges(adjacency, aggregators[0], participants)
        transfers = _centralized(aggregators[0], participants, clusters, rows.every_update)
    elif flow == HIERARCHICAL:
        hierarchy = Hierarchy.of(adjacency, roles)
        aggregators = hierarchy.aggregators
        transfers, merging = _hierarchical(hierarchy, clusters)
    elif flow == DECENTRALIZED:
        transfers = _updates(adjacency, clusters)
        evaluation = _totals(clusters, int(clusters[0])) if len(clusters) else ()
    else:
        allowed = ", ".join((CENTRALIZED, DECENTRALIZED, HIERARCHICAL))
        raise ConfigError("C010", f"unknown flow {flow!r}", place="flow", allowed=allowed)
    return ExchangePlan(
        flow=flow,
        assignment=tuple(clusters.tolist()),
        coordinator=int(clusters[aggregators[0] if aggregators else 0]) if len(clusters) else 0,
        participants=tuple(participants.tolist()),
        transfers=transfers,
        evaluation=evaluation,
        aggregators=aggregators,
        merging=merging,
        rows=rows,
        adaptation=tuple(replace(t, kind=GATHERED) for t in evaluation) if rows.gathered else (),
    )


def _aggregator(words: Sequence[frozenset[str]]) -> int:
    found = [node for node, role in enumerate(words) if "aggregate" in role]
    if len(found) != 1:
        shown = ", ".join(str(node) for node in found[:SHOWN])
        raise ConfigError(
            "C008",
            f"{len(found)} nodes aggregate{f' ({shown})' if found else ''}",
            place="nodes",
            allowed="exactly one node whose role contains 'aggregate' in a centralized flow",
        )
    return found[0]


def _require_star_edges(
    adjacency: HybridAdjacencyMatrix, aggregator: int, participants: np.ndarray[Any, np.dtype[np.int64]]
) -> None:
    clients = participants[participants != aggregator]
    no_way_up = np.setdiff1d(clients, adjacency.in_neighbors(aggregator))
    no_way_down = np.setdiff1d(clients, adjacency.out_neighbors(aggregator))
    missing = [f"{node}->{aggregator}" for node in no_way_up] + [f"{aggregator}->{node}" for node in no_way_down]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise RoutingError(
            "P011",
            f"no edge {', '.join(missing[:SHOWN])}{more}",
            allowed="edges between every participant and the aggregator, both ways",
            hint="a star has them; a peer graph needs the decentralized schema",
        )


def _centralized(
    aggregator: int,
    participants: np.ndarray[Any, np.dtype[np.int64]],
    clusters: np.ndarray[Any, np.dtype[np.int64]],
    every_update: bool,
) -> tuple[Transfer, ...]:
    coordinator = int(clusters[aggregator])
    remote = participants[clusters[participants] != coordinator]
    models = _fan_out(MODEL, np.full_like(remote, aggregator), remote, clusters)
    if every_update:
        return (*models, *_fan_out(UPDATE, remote, np.full_like(remote, aggregator), clusters))
    partials = [Transfer(PARTIAL, CLUSTER_SENDER, model.target, coordinator, (aggregator,)) for model in models]
    return (*models, *partials)


def _hierarchical(
    hierarchy: Hierarchy, clusters: np.ndarray[Any, np.dtype[np.int64]]
) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """The payloads of a round within the groups, and of one that ends with the global model.

    What crosses is what a group has outside of its aggregator's cluster: nothing of a group that lies whole on one.
    The sums of a merging round go to the root at once, one per cluster, whichever groups they are of.
    """
    nodes = np.array(list(hierarchy.group_of), dtype=np.int64)
    above = np.array(list(hierarchy.group_of.values()), dtype=np.int64)
    away = clusters[nodes] != clusters[above]
    models = _fan_out(MODEL, above[away], nodes[away], clusters)
    partials = tuple(Transfer(PARTIAL, CLUSTER_SENDER, m.target, m.source, (m.sender,)) for m in models)
    root, coordinator = hierarchy.root, int(clusters[hierarchy.root])
    totals = _totals(clusters[nodes], coordinator)
    others = np.array([a for a in hierarchy.aggregators if clusters[a] != coordinator], dtype=np.int64)
    back = _fan_out(MERGED, np.full_like(others, root), others, clusters)
    return (*models, *partials), (*models, *totals, *back)


def _totals(clusters: np.ndarray[Any, np.dtype[np.int64]], coordinator: int) -> tuple[Transfer, ...]:
    """An exact sum of all that a cluster has, from each of `clusters` to the coordinator."""
    sources = [source for source in np.unique(clusters).tolist() if source != coordinator]
    return tuple(Transfer(CONSENSUS, CLUSTER_SENDER, source, coordinator, ()) for source in sources)


def _updates(adjacency: HybridAdjacencyMatrix, clusters: np.ndarray[Any, Any]) -> tuple[Transfer, ...]:
    senders, receivers = adjacency.edges()
    crossing = clusters[senders] != clusters[receivers]
    return _fan_out(UPDATE, senders[crossing], receivers[crossing], clusters)


def _fan_out(
    kind: str, senders: np.ndarray[Any, Any], receivers: np.ndarray[Any, Any], clusters: np.ndarray[Any, Any]
) -> tuple[Transfer, ...]:
    """One transfer per (sender, cluster of a receiver), ordered by both."""
    if not len(senders):
        return ()
    order = np.lexsort((receivers, clusters[receivers], senders))
    senders, receivers = senders[order], receivers[order]
    targets = clusters[receivers]
    starts = np.flatnonzero(np.r_[True, (senders[1:] != senders[:-1]) | (targets[1:] != targets[:-1])])
    ends = np.r_[starts[1:], len(senders)]
    names = receivers.tolist()
    heads = zip(
        senders[starts].tolist(),
        clusters[senders[starts]].tolist(),
        targets[starts].tolist(),
        starts.tolist(),
        ends.tolist(),
        strict=True,
    )
    return tuple(Transfer(kind, node, source, to, tuple(names[start:end])) for node, source, to, start, end in heads)


def _grouped(pairs: Iterator[tuple[K, V]]) -> dict[K, tuple[V, ...]]:
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in groups.items()}
