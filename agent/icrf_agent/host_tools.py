"""What the flows of a host work with: postings, the host's exact sum, and training with its metrics."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icrf.errors import InternalError, NodeError, RoutingError, WeightsError
from icrf.exchange import CONSENSUS, MODEL, PARTIAL
from icrf.federation.node import FederatedNode
from icrf.learning.aggregation import clip_update
from icrf.learning.layout import Layout
from icrf.learning.vectorized import Outcome
from icrf.ports import PhaseReport
from icrf.protocol import EXCHANGING, SUMMING, Activate, StartRound, nodes_of
from icrf.update import ExactSum, elementwise_max, exact_metric
from icrf_agent.host_late import FinishedWork
from icrf_agent.host_nodes import HostNodes
from icrf_agent.host_vector import Together
from icrf_agent.node_metrics import NodeMetrics
from icrf_agent.object_store import References
from icrf_agent.postings import Posting
from icrf_agent.topology_manager import HybridTopologyManager

Array = np.ndarray[Any, Any]
# Rows of nodes are posted in blocks of about the first size; a reader has so many bytes of them at hand.
POSTING_BYTES, AT_HAND_BYTES = 16 << 20, 256 << 20
MetricSums = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Worked:
    """What a host answers after a phase.

    Attributes:
        postings: what it has posted in it.
        seconds: where its time went in all phases of the attempt so far, by part.
        letters: whether nodes of it have sent any since they were set up.
    """

    report: PhaseReport
    postings: tuple[Posting, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    letters: bool = False


@dataclass
class HostTray:
    """What passes between a host and its callers in a phase.

    Attributes:
        handed: all that was posted in the attempt so far; None where other clusters may have posted more.
        made: what this host posts in the phase.
        left_off: the attempt that was given up last while it might still run here.
    """

    handed: Sequence[Posting] | None = None
    made: list[Posting] = field(default_factory=list)
    left_off: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class HostTools:
    """What both flows work with.

    Attributes:
        by_node: what each node reports.
        together: which nodes train together.
        tray: what passes between this host and its callers in a phase.
        kept: buffers for the life of the host: the first touch of a large buffer's pages takes longer than the sum.
    """

    activation: Activate
    nodes: HostNodes
    layout: Layout
    manager: HybridTopologyManager
    references: References
    by_node: NodeMetrics
    together: Together
    tray: HostTray = field(default_factory=HostTray)
    kept: dict[str, Any] = field(default_factory=dict)

    def post(self, start: StartRound, kind: str, senders: Sequence[int], array: Array, **more: Any) -> None:
        """Put an array into the object store and describe it to this cluster's manager and hosts."""
        self.tray.made.append(
            Posting(
                start.run_id,
                start.generation,
                start.round,
                start.attempt,
                kind,
                tuple(senders),
                self.references.put(array, kind),
                **more,
            )
        )

    def collect(self, start: StartRound, kind: str) -> list[Posting]:
        """What was posted in this attempt, ordered by first sender."""
        if self.tray.handed is not None:
            return sorted((p for p in self.tray.handed if p.kind == kind), key=lambda posting: posting.senders)
        with self.nodes.meter.doing(EXCHANGING):
            return self.manager.collect(start.run_id, start.round, start.attempt, kind)

    def require_wanted(self, start: StartRound) -> None:
        """P003 for an attempt that was given up."""
        if self.tray.left_off == (start.round, start.attempt):
            raise RoutingError("P003", f"round {start.round} attempt {start.attempt} was given up")

    def foreign_bytes(self, postings: Sequence[Posting], row_bytes: int) -> int:
        """Bytes of rows that hosts of the same cluster made elsewhere."""
        mine, here = set(self.nodes.indices), self.activation.assignment
        cluster = here[self.nodes.indices[0]]
        rows = 0
        for posting in postings:
            local = [n for n in posting.senders if here[n] == cluster]
            if local and not mine.issuperset(local):
                rows += 1 if posting.kind in (MODEL, PARTIAL, CONSENSUS) else len(local)
        return rows * row_bytes

    @staticmethod
    def taking_part(start: StartRound, nodes: Sequence[int]) -> tuple[int, ...]:
        """Those of `nodes` that train in this round."""
        if not start.participants:
            return tuple(nodes)
        chosen = frozenset(nodes_of(start.participants))
        return tuple(i for i in nodes if i in chosen)

    def exact_sum(self, start: StartRound) -> ExactSum:
        """The host's one sum, emptied, on the attempt's grid; its last use is over."""
        total: ExactSum | None = self.kept.get("sum")
        if total is None:
            total = self.kept["sum"] = ExactSum(*self._summed(start.grid), start.total_weight, self._names)
        total.reset(start.grid, start.total_weight)
        return total

    def _summed(self, grid: Sequence[int]) -> tuple[tuple[int, ...], Sequence[int]]:
        """Sizes of all summed tensors, and their grid."""
        rows = self.activation.rows
        return (*self.layout.sizes * rows.up, *([rows.scalars] if rows.scalars else [])), grid

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.layout.names * self.activation.rows.up, "scalars")

    def buffer(self, purpose: str, shape: tuple[int, ...]) -> Array:
        """An array of the model's type that the host keeps for this purpose."""
        if purpose not in self.kept:
            self.kept[purpose] = np.empty(shape, self.layout.dtype)
        found: Array = self.kept[purpose]
        return found

    def weight(self, index: int) -> int:
        """What a node counts in a sum: its samples, or one where all nodes count the same."""
        samples = self.nodes.weight(index)
        return samples if self.nodes.config.aggregation_sample_scaling else 1

    def rows_of(self, postings: Sequence[Posting], nodes: Sequence[int]) -> Mapping[int, Array]:
        """The row that each of these nodes has posted; X001 naming those without."""
        rows = PostedRows(postings, nodes, self.references)
        missing = [self.activation.nodes[j].id for j in nodes if j not in rows]
        if missing:
            raise InternalError("X001", f"updates of {', '.join(missing[:5])} did not arrive")
        return rows

    @property
    def has_last_word(self) -> bool:
        """Whether any node of this host looks at new states itself."""
        return any(map(self._has_last_word, self.nodes.indices))

    def _has_last_word(self, index: int) -> bool:
        return self.nodes.kind(index).aggregate is not FederatedNode.aggregate

    def merge(
        self, start: StartRound, postings: Sequence[Posting], expected_weight: int, own: ExactSum | None = None
    ) -> ExactSum:
        """Merge partials; every participant must be in, once.

        Args:
            own: what was summed here on the attempt's grid, to which the partials are added; None: nothing.
        """
        total = self.exact_sum(start) if own is None else own
        for posting in postings:
            array = self.references.get(posting.reference)
            sizes, grid = self._summed(start.grid)
            total.merge(ExactSum.from_array(array, posting.weight, sizes, grid, start.total_weight, self._names))
        if total.weight != expected_weight:
            raise InternalError("X001", f"partials add up to weight {total.weight}, expected {expected_weight}")
        return total

    def add_to(self, total: ExactSum, index: int, flat: Array, weight: int) -> tuple[int, ...]:
        """Add what a node contributes to a sum; the tensors that left their bound."""
        with self.nodes.blamed(index), self.nodes.meter.doing(SUMMING):
            return total.add(flat, weight)

    def best_of(self, index: int, models: Array) -> int:
        """Which of these models has the lowest loss on a node's own data; of equal ones the first.

        Args:
            models: one model after the other, flat.
        """
        losses = []
        for model in models.reshape(-1, self.layout.num_parameters):
            self.nodes.model.load(model)
            losses.append(self.nodes.loss_of(index))
        return losses.index(min(losses))

    def train_node(
        self,
        start: StartRound,
        index: int,
        sums: MetricSums,
        finished: FinishedWork | None = None,
        ahead: Outcome | None = None,
    ) -> Array:
        """Train one node on the model that is loaded, and count its metrics; the live flat parameters.

        Args:
            finished: what need not be trained again, and where to keep what is.
            ahead: what it has been trained to already, together with others; then no model need be loaded.
        """
        node = self.nodes.get(index)
        found = finished.find(node) if finished and ahead is None else None
        if ahead is not None:
            metrics = self.nodes.metrics(index, "train", {"loss": ahead.loss})
        elif found:
            metrics, model = found
            self.nodes.model.load(model)
        else:
            metrics = self.nodes.measure(index, "train")
        self.count(start, index, "train_", metrics, self.nodes.weight(index), sums)
        if ahead is not None and not self.layout.private:
            flat = ahead.row
        else:
            if ahead is not None:
                self.nodes.model.load(ahead.row)
            with self.nodes.blamed(index):
                flat = self.nodes.model.flat
        if finished and not found:
            finished.keep(node, metrics, flat)
        return flat

    def evaluate_node(self, start: StartRound, index: int, sums: MetricSums) -> None:
        """Where clients are evaluated: count what a node's roles measure on the model that is loaded.

        ``eval`` is its own data, and weighs by samples; ``test`` is what is held out. Of several models nobody but the
        clients can tell which is meant for what: then theirs is the accuracy of the round.
        """
        config = self.nodes.config
        if not start.evaluate or not (config.evaluate_clients or config.num_models > 1):
            return
        node = self.nodes.get(index)
        if config.evaluate_clients and node.is_eval_node and node.is_train_node:
            metrics = self.nodes.measure(index, "evaluate", "eval")
            self.count(start, index, "eval_", metrics, self.nodes.weight(index), sums)
        prefixes = ["test_"] * config.evaluate_clients + [""] * (config.num_models > 1)
        if prefixes and node.is_test_node:
            metrics = self.nodes.measure(index, "evaluate", "test")
            for prefix in prefixes:
                self.count(start, index, prefix, metrics, 1, sums)

    def evaluate_own(self, start: StartRound, index: int, sums: MetricSums) -> None:
        """Where models are private in part, a common one is no model: a node evaluates its own, and all count one."""
        if start.evaluate and self.layout.private:
            self.count(start, index, "", self.nodes.measure(index, "evaluate", "test"), 1, sums)

    def count(
        self, start: StartRound, index: int, prefix: str, metrics: dict[str, float], weight: int, sums: MetricSums
    ) -> None:
        """Add what a node has measured to the exact sums, each under `prefix` and its name."""
        named = {f"{prefix}{name}": value for name, value in metrics.items()}
        self.add_up(index, named, weight, sums)
        self.by_node.add(start, index, named)

    def add_up(self, index: int, metrics: Mapping[str, float], weight: int, sums: MetricSums) -> None:
        """Add a node's metrics to the exact sums of all."""
        for name, value in metrics.items():
            old = sums.get(name, (0, 0))
            with self.nodes.blamed(index):
                part = exact_metric(value, weight)
            sums[name] = (old[0] + part, old[1] + weight)

    def clip(self, index: int, before: Array, trained: Array, learned: Sequence[slice]) -> None:
        """Where the configuration says so, shorten in place what a node has changed the `learned` parts by."""
        clip_norm = self.nodes.config.clip_norm
        if clip_norm is not None:
            with self.nodes.meter.doing(SUMMING):
                self.require_finite(index, trained)
                clip_update(before, trained, clip_norm, learned)

    def require_finite(self, index: int, flat: Array) -> None:
        """Raise W020, blaming the node, for values that are not finite."""
        with self.nodes.blamed(index):
            bad = self.layout.first_nonfinite(flat)
            if bad:
                raise WeightsError("W020", f"non-finite values in {bad}", hint="lower the learning rate")

    def absmax(self, state: Array) -> tuple[float, ...]:
        """Largest absolute value per tensor over several models, shape (num_models, num_parameters)."""
        return elementwise_max(self.layout.absmax(row) for row in state)

    def last_word(self, index: int, state: Array) -> None:
        """Settle a node's new state, and let its own `aggregate` change it, where its class has one; in place."""
        self.layout.settle(state)
        if not self._has_last_word(index):
            return
        node = self.nodes.get(index)
        self.nodes.model.load(state)
        shared = state[: self.layout.num_parameters]
        changed = self.nodes.call(index, "aggregate", shared)
        place = f"{node.id} on {self.nodes.cluster}, aggregate"
        if not isinstance(changed, np.ndarray):
            kind = type(changed).__name__
            raise NodeError("U002", f"{node.id}.aggregate returned {kind}", place=place, allowed="a NumPy array")
        with self.nodes.blamed(index):
            self.layout.check(changed, size=len(shared))
        bad = self.layout.first_nonfinite(changed)
        if bad:
            raise WeightsError("W020", f"{node.id}.aggregate made non-finite values in {bad}", place=place)
        np.copyto(shared, changed)
        self.layout.settle(shared)


class PostedRows(Mapping[int, Array]):
    """The rows that nodes have posted, fetched when they are asked for; a few postings are at hand at a time.

    Args:
        postings: what was posted, a row per sender.
        nodes: the nodes whose rows are wanted.
    """

    def __init__(self, postings: Sequence[Posting], nodes: Sequence[int], references: References) -> None:
        self._references = references
        needed = frozenset(nodes)
        self._places = {
            sender: (posting, row)
            for posting in postings
            for row, sender in enumerate(posting.senders)
            if sender in needed
        }
        self._fetched: OrderedDict[tuple[int, ...], Array] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, node: int) -> Array:
        posting, row = self._places[node]
        array = self._fetched.get(posting.senders)
        if array is None:
            while self._bytes >= AT_HAND_BYTES:
                self._bytes -= self._fetched.popitem(last=False)[1].nbytes
            array = self._references.get(posting.reference).reshape(len(posting.senders), -1)
            self._fetched[posting.senders] = array
            self._bytes += array.nbytes
        found: Array = array[row]
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def blocks_of(nodes: Sequence[int], row_bytes: int) -> list[Sequence[int]]:
    """Nodes in groups whose rows make a posting each: of bounded size, so that no host needs all rows at once."""
    size = max(1, POSTING_BYTES // max(1, row_bytes))
    return [nodes[k : k + size] for k in range(0, len(nodes), size)]


def row_hashes(state: Array) -> bytes:
    """The sha256 of every model, shape (num_models, num_parameters), 32 bytes each."""
    return b"".join(hashlib.sha256(np.ascontiguousarray(row).data).digest() for row in state)
