"""What the hosts of peers do about the graph of the rounds to come: all tell what the decision asks for, one decides.

The coordinator's first host decides, once per federation, at the end of a round: there are no weights in the mediator,
and no user code. What it decides on is exact and in node order, so that the answer does not depend on where nodes live.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from icrf.errors import ConfigError, IcrfError, NodeError
from icrf.exchange import GATHERED
from icrf.learning.rng import derive_seed, global_randomness
from icrf.protocol import Graph, StartRound
from icrf.topology import Adapter, HybridAdjacencyMatrix, Situation
from icrf_agent.host_tools import HostTools

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

    def tell(
        self, start: StartRound, rows: Mapping[int, int], trained: Collection[int], models: tuple[Array, Array, Array]
    ) -> None:
        """Publish what the decision needs of this host's nodes.

        Args:
            rows: node index -> row of each array of `models`.
            trained: those that trained in this round.
            models: what they started from, what training has made of it, and what they have after mixing.
        """
        t, width = self._t, self._adapter.num_gathered
        if not width:
            return
        told, size = np.empty((len(rows), width), t.layout.dtype), t.layout.num_parameters
        for index, k in rows.items():
            before, after, mixed = (array[k, :size] for array in models)
            loss = t.by_node.train_loss.get(index, math.nan) if index in trained else None
            self._adapter.row(loss, after - before, mixed, told[k])
        t.post(start, GATHERED, tuple(rows), told)

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
