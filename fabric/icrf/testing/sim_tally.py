"""The tally: a federation whose final state reads out which contribution was lost or counted twice. Integers only.

A state is a vector of ``num_nodes + 2`` integers. Slot i counts how often node i has contributed; slot ``num_nodes``
sums ``round * prime_i mod 2^31``; the last slot depends on the state that a contribution was made from, so that work on
a stale state shows. In a hierarchy the first member of a group hands on the group's state with its contribution; where
the groups are merged, the sum is the root's, and the other groups begin at nothing. Where the graph of peers changes,
it depends on all of their states, so that a decision on other states, or a round on another graph, shows. Addition of
integers is exact in every order, so the states of a run are known beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from icrf.protocol import CENTRALIZED, HIERARCHICAL, Graph, NodeSpec, Rows, Submission, TensorSpec, nodes_that
from icrf.topology import Hierarchy
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf.update import METRIC_UNIT_BITS, choose_grid, merkle_root, metric_mean

Vector = np.ndarray[Any, Any]

PRIMES = (1_000_003, 1_299_709, 15_485_863, 32_452_843, 49_979_687, 67_867_967, 86_028_121, 104_395_301, 122_949_823)
MODULUS = 1 << 31
ESCALATION_BITS = 8
ADAPTATION = "topology_adaptation_strategy"


def total(rows: Sequence[Vector]) -> Vector:
    """The sum of vectors."""
    return np.asarray(np.stack(rows).sum(axis=0), np.int64)


def digest(state: Vector) -> bytes:
    """sha256 of a state's values."""
    return hashlib.sha256(np.ascontiguousarray(state, dtype=np.int64).tobytes()).digest()


def absmax(states: Sequence[Vector]) -> tuple[float, ...]:
    """The largest value of the one tensor."""
    return (float(max(int(np.abs(s).max()) for s in states)),)


@dataclass(frozen=True)
class Expected:
    """What a fault-free run commits in one round.

    Attributes:
        states: the global model, or one state per node that keeps one.
        head: hash of the model, or the Merkle root over the states.
        consensus: sum of all states, where there are several.
    """

    states: tuple[Vector, ...]
    head: str
    consensus: Vector | None

    @property
    def model(self) -> Vector:
        """What is stored as the model of the run, if this is its last round."""
        return self.states[0] if self.consensus is None else self.consensus


class Tally:
    """The arithmetic of one tally federation.

    Args:
        submission: its nodes, graph and flow.
    """

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.num_nodes = len(submission.nodes)
        self.centralized = submission.flow == CENTRALIZED
        self.participants = nodes_that("train", submission.nodes)
        self.aggregator = next(iter(nodes_that("aggregate", submission.nodes)), -1)
        self.config: Mapping[str, Any] = json.loads(submission.config_json)
        self.hierarchy: Hierarchy | None = None
        if submission.flow == HIERARCHICAL:
            adjacency = HybridAdjacencyMatrix.from_graph(submission.graph)
            self.hierarchy = Hierarchy.of(adjacency, [node.role for node in submission.nodes])
        # The nodes with a state that rounds start from.
        self.keepers = tuple(range(self.num_nodes))
        if self.centralized or self.hierarchy:
            self.keepers = self.hierarchy.aggregators if self.hierarchy else (self.aggregator,)
        self.rounds = int(self.config["federated_learning_rounds"])
        rows = [int.from_bytes(bytes.fromhex(row), "little") for row in submission.schedule]
        self._drawn = {
            number: tuple(i for i in self.participants if not rows or rows[(number - 1) % len(rows)] >> i & 1)
            for number in range(1, self.rounds + 1)
        }
        self._decided: dict[int, tuple[int, ...]] = {}
        self._chosen: dict[int, tuple[int, ...]] = {}
        self.weighs = self.config.get("late_updates") == "weigh"
        self._cluster_of: tuple[int, ...] = ()
        # By round: the nodes whose clusters were late, and the rounds that nodes owed before it.
        self._late: dict[int, set[int]] = {}
        self._owed: dict[int, dict[int, int]] = {1: {}}
        self._expected = [self._summary([self.initial() for _ in self.keepers])]
        # The graph in force after each round.
        self._graphs = [submission.graph]
        self._foresee(1)

    # ------------------------------------------------------------ what nodes do

    def initial(self) -> Vector:
        """The state before the first round."""
        return np.zeros(self.num_nodes + 2, np.int64)

    def update(self, node: int, number: int, state: Vector) -> Vector:
        """What a peer sends its neighbours: its state, with its contribution if it takes part in the round."""
        return state + self.contribution(node, number, state) if node in self._chosen[number] else state

    def merges(self, number: int) -> bool:
        """Whether a round of a hierarchy ends with one model for all groups."""
        return number == self.rounds or number % int(self.config["global_every"]) == 0

    def within(self, members: Sequence[int], number: int, base: Vector) -> list[Vector]:
        """What members of one group hand on in a round: the first of the group also the state that it started from."""
        assert self.hierarchy is not None
        group = self.hierarchy.members[self.hierarchy.group_of[members[0]]]
        made = [self.contribution(node, number, base) for node in members]
        return [*made, base] if group[0] in members else made

    def installed(self, aggregator: int, merged: Vector) -> Vector:
        """What a group goes on from once all are merged."""
        assert self.hierarchy is not None
        return merged if aggregator == self.hierarchy.root else self.initial()

    @staticmethod
    def samples(node: int) -> int:
        """Training samples of a node."""
        return node + 1

    def contribution(self, node: int, number: int, base: Vector) -> Vector:
        """What `node` adds in round `number` to the state `base`."""
        made = self.initial()
        prime = PRIMES[node % len(PRIMES)]
        made[node] = 1
        made[-2] = number * prime % MODULUS
        made[-1] = (int(base[-1]) * 31 + prime) % MODULUS
        return made

    def chosen(self, number: int) -> tuple[int, ...]:
        """The nodes that contribute in a round."""
        return self._chosen[number]

    def place(self, cluster_of: Sequence[int]) -> None:
        """The mediator has written down where nodes live."""
        self._cluster_of = tuple(cluster_of)

    def decide(self, number: int, nodes: Sequence[int], late: Sequence[int] = ()) -> None:
        """The mediator has written down that a round goes on with these nodes, without others that are late."""
        self._decided[number] = tuple(nodes)
        self._late[number] = set(late)
        self._foresee(number)

    def ages(self, number: int) -> dict[int, int]:
        """Which nodes contribute to a round what they owed, and how many rounds late."""
        owed = self._owed[number]
        return {node: number - owed[node] for node in self._chosen[number] if node in owed}

    def mix(self, node: int, rows: Mapping[int, Vector], graph: Graph) -> Vector:
        """The new state of `node` from its own update and its neighbours', in node order; its own count stays."""
        mixed = rows[node].copy()
        for other in self.neighbours(graph)[node]:
            mixed = (mixed + (other + 2) * rows[other]) % MODULUS
        mixed[node] = rows[node][node]
        return mixed

    def neighbours(self, graph: Graph) -> tuple[tuple[int, ...], ...]:
        """Per node the nodes whose updates it mixes in, ascending."""
        return self._neighbours(graph)

    @cached_property
    def _neighbours(self) -> Callable[[Graph], tuple[tuple[int, ...], ...]]:
        @cache
        def of(graph: Graph) -> tuple[tuple[int, ...], ...]:
            adjacency = HybridAdjacencyMatrix.from_graph(graph)
            return tuple(tuple(int(j) for j in adjacency.in_neighbors(i)) for i in range(self.num_nodes))

        return of

    def adapts(self, number: int) -> bool:
        """Whether a round decides on the graph of those after it."""
        return ADAPTATION in self.config and number % int(self.config["adaptation_period"]) == 0

    def told(self, states: Sequence[Vector]) -> list[list[int]]:
        """What nodes tell for the decision on the next graph, a row each; nothing where nothing is gathered."""
        return [[int(state[-1])] * self.submission.rows.gathered for state in states]

    def next_graph(self, graph: Graph, number: int, told: int) -> Graph:
        """What a round decides on: every node takes the place of another one.

        Args:
            told: the sum of what all nodes have told.
        """
        shift = 1 + (number + told) % max(1, self.num_nodes - 1)
        rows, columns = HybridAdjacencyMatrix.from_graph(graph).edges()
        pairs = (np.stack([rows, columns], axis=1).astype(np.int64) + shift) % self.num_nodes
        return HybridAdjacencyMatrix.from_edges(self.num_nodes, pairs, symmetric=False).to_graph()

    def graph_after(self, number: int) -> Graph:
        """The graph in force after a round, without any fault."""
        return self._graphs[number]

    def loss(self, node: int, number: int) -> tuple[int, int]:
        """(numerator, weight) of a node's training loss."""
        weight = self.samples(node)
        return (((100 * number + node) << METRIC_UNIT_BITS) * weight, weight)

    def overflows(self, number: int, grid: Sequence[int]) -> bool:
        """Whether the values of a round leave this grid: a property of the round, equal whenever it is repeated."""
        wanted = int(self.config["tally_escalations"][number - 1])
        found = (grid[0] - self._base_grid(number)) // ESCALATION_BITS
        return found < wanted

    # ------------------------------------------------------------ what must come out

    def expected(self, number: int) -> Expected:
        """The outcome of a round without any fault."""
        return self._expected[number]

    def expected_loss(self, number: int) -> float:
        """The mean training loss of a round."""
        ages = self.ages(number)
        parts = [self.loss(node, number - ages.get(node, 0)) for node in self._chosen[number]]
        return metric_mean(sum(n for n, _ in parts), sum(w for _, w in parts))

    def bitmap(self, number: int) -> bytes:
        """All participants of a round."""
        out = bytearray((self.num_nodes + 7) // 8)
        for node in self._chosen[number]:
            out[node // 8] |= 1 << (node % 8)
        return bytes(out)

    def counts(self, states: Sequence[Vector]) -> list[int]:
        """How often each participant was counted, as the state itself says."""
        return [int((states[0] if self.centralized else states[i])[i]) for i in self.participants]

    def times(self, node: int) -> int:
        """In how many rounds a node contributes."""
        return sum(node in nodes for nodes in self._chosen.values())

    # ------------------------------------------------------------ inside

    def _foresee(self, first: int) -> None:
        del self._expected[first:], self._graphs[first:]
        for number in range(first, self.rounds + 1):
            self._settle(number)
            self._expected.append(self._summary(self._step(self._expected[-1].states, number)))
            graph = self._graphs[-1]
            if self.adapts(number):
                told = sum(sum(row) for row in self.told(self._expected[-1].states))
                graph = self.next_graph(graph, number, told)
            self._graphs.append(graph)

    def _settle(self, number: int) -> None:
        """Who takes part in a round, and what is owed after it: by nodes of clusters that were late, and do nothing
        else until they have brought it or it is too old."""
        owed = self._owed[number]
        busy = {self._cluster_of[node] for node in owed}
        wanted = {n for n in self._drawn[number] if not busy or self._cluster_of[n] not in busy}.union(owed)
        self._chosen[number] = self._decided.get(number, tuple(sorted(wanted)))
        after = {node: since for node, since in owed.items() if node not in self._chosen[number]}
        for node in self._late.get(number, ()):
            if self._cluster_of[node] not in busy:
                after[node] = number
        most = int(self.config.get("max_staleness", 0))
        self._owed[number + 1] = {node: since for node, since in after.items() if number + 1 - since <= most}

    def weight(self, number: int) -> int:
        """What the weights of a centralized round add up to; in parts of 1024 where somebody is late."""
        ages, exponent = self.ages(number), float(self.config.get("staleness_exponent", 0.0))
        parts = {node: max(1, round(1024 / (1 + age) ** exponent)) for node, age in ages.items()}
        return sum(self.samples(i) * (parts.get(i, 1024) if ages else 1) for i in self._chosen[number])

    def _base_grid(self, number: int) -> int:
        weight = self.weight(number) if self.centralized else sum(self.samples(i) for i in self.participants)
        return choose_grid(absmax(self._expected[number - 1].states), weight)[0]

    def _step(self, states: Sequence[Vector], number: int) -> list[Vector]:
        if self.centralized:
            ages = self.ages(number)
            added = [
                self.contribution(i, number - ages.get(i, 0), self._expected[number - 1 - ages.get(i, 0)].states[0])
                for i in self._chosen[number]
            ]
            return [total([states[0], *added])]
        if self.hierarchy:
            groups = zip(self.hierarchy.members.values(), states, strict=True)
            made = [total(self.within(members, number, state)) for members, state in groups]
            return [self.installed(a, total(made)) for a in self.keepers] if self.merges(number) else made
        rows = {i: self.update(i, number, states[i]) for i in range(self.num_nodes)}
        return [self.mix(i, rows, self._graphs[number - 1]) for i in range(self.num_nodes)]

    def _summary(self, states: Sequence[Vector]) -> Expected:
        if self.centralized:
            return Expected(tuple(states), digest(states[0]).hex(), None)
        return Expected(tuple(states), merkle_root([digest(s) for s in states]), total(states))


def tally_submission(
    request_id: str,
    flow: str,
    edges: Sequence[tuple[int, int]],
    num_nodes: int,
    config: Mapping[str, Any],
    schedule: Sequence[Sequence[int]] = (),
    aggregators: Sequence[int] = (),
    gathered: int = 0,
) -> Submission:
    """A tally federation.

    Args:
        edges: undirected; of a centralized flow, a star around node 0, which aggregates.
        config: the resolved configuration; `tally_escalations` lists per round how often its grid is too fine.
        schedule: who takes part in each round; empty: all.
        aggregators: of a hierarchy.
        gathered: numbers per peer that a decision on the next graph needs, where `config` says that it changes.
    """
    roles = ["train"] * num_nodes
    if flow == CENTRALIZED:
        roles[0] = "aggregate"
    for node in aggregators:
        roles[node] = "aggregate"
    return Submission(
        client_request_id=request_id,
        config_json=json.dumps(dict(config), sort_keys=True),
        flow=flow,
        nodes=tuple(NodeSpec(f"node_{i}", role) for i, role in enumerate(roles)),
        graph=HybridAdjacencyMatrix.from_edges(num_nodes, list(edges)).to_graph(),
        layout=(TensorSpec("tally", (num_nodes + 2,), "int64"),),
        rows=Rows(gathered=gathered),
        schedule=tuple(sum(1 << i for i in nodes).to_bytes((num_nodes + 7) // 8, "little").hex() for nodes in schedule),
    )
