"""Watches over a running federation: who is there, the topology of those, an orderly end below `min_nodes`.

A node is there as long as its cluster is. A host that dies is no loss: the agent of the cluster brings it back and
the round runs again. A cluster that is lost takes its nodes with it until an agent serves it again.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

from icrf.client import Run
from icrf.errors import IcrfError, RunError
from icrf.federation.base import FederatedBase
from icrf.participation import training
from icrf.protocol import TERMINAL
from icrf.topology import HybridAdjacencyMatrix

PING_S = 5.0

log = logging.getLogger("icrf.supervisor")


@dataclass(frozen=True)
class Sighting:
    """What one ping has found.

    Attributes:
        lost: ids of nodes that were there at the ping before and are not now, in node order.
        back: ids of those that are there again.
        below: whether fewer training nodes are there than the federation needs.
    """

    lost: tuple[str, ...]
    back: tuple[str, ...]
    below: bool


class Roster:
    """Which nodes of a federation are there. Pure.

    Args:
        node_ids: all nodes in index order.
        trains: indices of those that train.
        least: fewest training nodes that the federation needs.
        graph: the topology of all nodes.
    """

    def __init__(
        self, node_ids: Sequence[str], trains: Collection[int], least: int, graph: HybridAdjacencyMatrix
    ) -> None:
        self._ids, self._trains, self._least, self._graph = tuple(node_ids), frozenset(trains), least, graph
        self._there = list(range(len(self._ids)))

    @property
    def there(self) -> tuple[str, ...]:
        """Ids of the nodes that were there at the last ping, in node order."""
        return tuple(self._ids[i] for i in self._there)

    @property
    def topology(self) -> HybridAdjacencyMatrix:
        """The graph between the nodes that are there; row k is the k-th of :attr:`there`."""
        if len(self._there) == len(self._ids):
            return self._graph
        position = {node: k for k, node in enumerate(self._there)}
        pairs = zip(*(side.tolist() for side in self._graph.edges()), strict=True)
        kept = [(position[i], position[j]) for i, j in pairs if i in position and j in position]
        return HybridAdjacencyMatrix.from_edges(len(self._there), kept, symmetric=False)

    def seen(self, ids: Collection[str]) -> Sighting:
        """These nodes have answered."""
        before, found = set(self._there), set(ids)
        self._there = [i for i, name in enumerate(self._ids) if name in found]
        now = set(self._there)
        return Sighting(
            lost=tuple(self._ids[i] for i in sorted(before - now)),
            back=tuple(self._ids[i] for i in sorted(now - before)),
            below=len(now & self._trains) < self._least,
        )


class FederationSupervisor:
    """Pings a federation every few seconds; a context manager that stops pinging.

    When nodes are lost, :attr:`topology` is that of the others and `on_change` is told. When fewer than `min_nodes`
    training nodes are there, the run is ended in order: the last committed model is stored if the server's cluster is
    there, and every cluster is told to release what it holds. Whether the run goes on meanwhile without the lost nodes
    is the federation's own policy (``min_nodes``, ``on_cluster_loss``).

    Args:
        federation: a federation that was started, or a run that was submitted here.
        interval_s: seconds between two pings.
        min_nodes: fewest training nodes; by default those of the configuration, which are all unless it says so.
        on_change: called with every :class:`Sighting` in which nodes were lost or came back.
    """

    def __init__(
        self,
        federation: FederatedBase | Run,
        *,
        interval_s: float = PING_S,
        min_nodes: int | None = None,
        on_change: Callable[[Sighting], None] | None = None,
    ) -> None:
        run = federation.run if isinstance(federation, FederatedBase) else federation
        submission = run.submission if run is not None else None
        if run is None or submission is None:
            raise RunError("F005", "nothing was submitted here that could be supervised", hint="call train() first")
        trains = training(submission)
        config = json.loads(submission.config_json)
        least = min_nodes or config.get("min_nodes") or len(trains)
        self._nodes_move = config.get("on_cluster_loss") == "reassign" or bool(config.get("clustering_period"))
        graph = HybridAdjacencyMatrix.from_graph(submission.graph)
        self._run, self._interval_s, self._on_change = run, interval_s, on_change
        self._roster = Roster([node.id for node in submission.nodes], trains, least, graph)
        self._owner_of: dict[str, str] = {}
        self._ended = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of the nodes that are there, in node order."""
        return self._roster.there

    @property
    def topology(self) -> HybridAdjacencyMatrix:
        """The graph between the nodes that are there, in the order of :attr:`nodes`."""
        return self._roster.topology

    @property
    def ended(self) -> bool:
        """Whether the supervisor has ended the run, or found it ended."""
        return self._ended

    def ping(self) -> Sighting:
        """Look once who is there, and do what follows from it."""
        if (self._nodes_move or not self._owner_of) and self._run.info().clusters:
            plan = self._run.plan()
            self._owner_of = dict(plan.assignment) if plan is not None else {}
        if not self._owner_of:
            # It waits for its place: there is nobody yet who could be lost.
            return Sighting((), (), False)
        clusters = {cluster.name for cluster in self._run.clusters()}
        sighting = self._roster.seen([name for name, cluster in self._owner_of.items() if cluster in clusters])
        if sighting.lost or sighting.back:
            log.warning("lost: %s; back: %s", ", ".join(sighting.lost) or "-", ", ".join(sighting.back) or "-")
            if self._on_change is not None:
                self._on_change(sighting)
        if self._run.info().status in TERMINAL:
            self._ended = True
        elif sighting.below:
            log.warning("%d nodes are too few: the federation ends", len(self.nodes))
            self._run.stop()
            self._ended = True
        return sighting

    def start(self) -> FederationSupervisor:
        """Ping in a thread of its own until `close`, or until the run has ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="icrf-supervisor", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop pinging; the run goes on. Harmless when called twice."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> FederationSupervisor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._ended and not self._stopping.wait(self._interval_s):
            try:
                self.ping()
            except IcrfError as error:
                # The mediator may be away for a while; it knows better than a ping that nobody has answered.
                log.warning("no answer: %s", error)
