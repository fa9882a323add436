"""What the hosts of peers do about the graph of the rounds to come: all tell what the decision asks for, one decides.

The coordinator's first host decides, once per federation, at the end of a round: there are no weights in the mediator,
and no user code. What it decides on is exact and in node order, so that the answer does not depend on where nodes live.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from icrf.errors import ConfigError, IcrfError, NodeError
from icrf.exchange import GATHERED
from icrf.learning.rng import derive_seed, global_randomness
from icrf.protocol import Graph, StartRound
from icrf.topology import Adapter, HybridAdjacencyMatrix, Situation
from icrf_agent.host_tools import HostTools, blocks_of

Array = np.ndarray[Any, Any]


class HostAdaptation:
    """One host's part in changing the graph.

    Attributes:
        graph: the one in force.

    Raises:
        ConfigError: C008 if the strategy here is not the one that was submitted.
    """

    def __init__(self, tools: HostTools) -> None:
        self._t = tools
        self.graph = tools.activation.graph
        self._initial = tools.activation.initial_graph or self.graph
        config, rows = tools.nodes.config, tools.activation.rows
        self._name = config.topology_adaptation_strategy
        self._adapter = Adapter(self._name, config.model_dump(), tools.layout.num_parameters)
        if self._adapter.num_gathered != rows.gathered:
            raise ConfigError(
                "C008",
                "the adaptation strategy here asks for something else than the one that was submitted",
                place="topology_adaptation_strategy",
                value=f"{self._adapter.num_gathered} numbers per node",
                allowed=str(rows.gathered),
                hint="install the same version of its code on every cluster",
            )

    def telling(self, start: StartRound, trained: Collection[int]) -> Telling | None:
        """What tells the host that decides of this host's nodes; None where it need not know anything of them.

        Args:
            trained: those that trained in this round.
        """
        return Telling(self._t, self._adapter, start, trained) if self._adapter.num_gathered else None

    def decide(self, start: StartRound) -> Graph:
        """The graph of the rounds to come.

        Raises:
            NodeError: U001 for whatever the strategy raises.
            TopologyError: T0xx for an answer on which these peers cannot go on.
        """
        t, nodes = self._t, self._t.activation.nodes
        everybody = range(len(nodes))
        rows = t.rows_of(t.collect(start, GATHERED), everybody) if self._adapter.num_gathered else {}
        gathered = np.stack([rows[i] for i in everybody]) if rows else np.empty((len(nodes), 0), t.layout.dtype)
        situation = Situation(
            adjacency=HybridAdjacencyMatrix.from_graph(self.graph),
            initial=HybridAdjacencyMatrix.from_graph(self._initial),
            round_number=start.round,
            node_ids=tuple(node.id for node in nodes),
            gathered=gathered,
        )
        try:
            with global_randomness(derive_seed(t.nodes.config.seed, -1, start.round, "global adapt")):
                return self._adapter.decide(situation).to_graph()
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            place = f"topology_adaptation_strategy {self._name} on {t.nodes.cluster}, after round {start.round}"
            raise NodeError("U001", f"{type(error).__name__}: {error}", place=place) from error


class Telling:
    """Publishes what a decision needs of this host's nodes: they come one after the other, and leave in blocks."""

    def __init__(self, tools: HostTools, adapter: Adapter, start: StartRound, trained: Collection[int]) -> None:
        self._t, self._adapter, self._start, self._trained = tools, adapter, start, trained
        width = adapter.num_gathered
        blocks = blocks_of(tools.nodes.indices, width * tools.layout.dtype.itemsize)
        self._block = tools.buffer("told", (len(blocks[0]), width))
        self._senders: list[int] = []

    def add(self, index: int, before: Array, after: Array, mixed: Array) -> None:
        """Take in the next node, in index order.

        Args:
            before: what its round started from, shape (num_parameters,).
            after: what training has made of that, likewise.
            mixed: what it has after mixing, likewise.
        """
        loss = self._t.by_node.train_loss.get(index, math.nan) if index in self._trained else None
        self._adapter.row(loss, after - before, mixed, self._block[len(self._senders)])
        self._senders.append(index)
        if len(self._senders) == len(self._block):
            self.publish()

    def publish(self) -> None:
        """Post what is left."""
        if self._senders:
            self._t.post(self._start, GATHERED, self._senders, self._block[: len(self._senders)])
            self._senders = []
