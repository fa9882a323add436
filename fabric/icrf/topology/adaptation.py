"""How the graph of peers changes between rounds: strategies, what they may ask for, and what their answer must be.

A strategy is a :class:`TopologyAdaptationStrategy`, any class with a method `adapt`, or a function. It declares what it
needs as parameters; they are injected by name, and nothing is gathered that no parameter names::

    @icrf.register("adapter", "farthest_apart")
    class FarthestApart(icrf.TopologyAdaptationStrategy):
        def adapt(self, adjacency_matrix, node_weights):
            ...
            return next_matrix

====================  ====================================================================================
``adjacency_matrix``  the graph as it is: int8, shape (num_nodes, num_nodes); [i, j] = 1: i may send to j
``initial_matrix``    the graph that the federation started with, likewise
``node_weights``      the nodes' models after the round, in the model's type, shape (num_nodes, num_parameters)
``sketches``          what training has changed in the round, as 64 numbers per node, float64, shape (num_nodes, 64),
                      see :class:`Sketcher`; zeros for nodes that did not train
``metrics``           name -> float64, shape (num_nodes,): ``train_loss``, NaN for nodes that did not train
``available``         which nodes trained in the round, bool, shape (num_nodes,)
``round_number``      the round that has just been made
``random_state``      a ``numpy.random.RandomState`` that depends on the federation's seed and the round alone
``node_ids``          the names of the nodes
====================  ====================================================================================

and any key of the configuration; the constructor of a class may ask for keys too. Arrays are read-only. A strategy is
made anew for every decision: what it should remember must be in the graph.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from icrf.errors import TopologyError
from icrf.registry import Registry
from icrf.seeds import stable_random_state
from icrf.topology.builders import answering, as_matrix, inject, require_connected
from icrf.topology.check import require_consensus
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf.topology.mixing import mixing_matrix

Array = np.ndarray[Any, Any]

STATIC = "static"

SKETCH_SIZE = 64
_SKETCHES, _WEIGHTS = "sketches", "node_weights"
# What is gathered of every node first, if anything is: whether it has trained, and its training loss.
_FACTS = ("available", "metrics")
_NUM_FACTS = 2
_GIVEN = ("adjacency_matrix", "initial_matrix", "round_number", "random_state", "node_ids")
# So many elements of a model are sketched at a time.
_CHUNK = 1 << 20

# A class with a method `adapt`, or a function.
ADAPTERS: Registry[Any] = Registry("adapter")


class TopologyAdaptationStrategy(ABC):
    """Decides on the graph of the rounds to come; see the module's docstring for the parameters of `adapt`."""

    @abstractmethod
    def adapt(self, *facts: Any, **named_facts: Any) -> Any:
        """The next graph: a dense 0/1 matrix, a SciPy matrix, a HybridAdjacencyMatrix or a networkx graph."""


class Sketcher:
    """Random projections of flat models to 64 numbers that keep angles and distances, roughly.

    A count sketch (Charikar, Chen and Farach-Colton 2002; Weinberger et al., arXiv 0902.2206): every parameter is added
    to one of 64 sums, with a sign, both drawn from the federation's seed. It is linear: the sketch of a difference is
    the difference of the sketches.

    Args:
        seed: of the federation.
        num_parameters: elements of a model.
    """

    def __init__(self, seed: int, num_parameters: int) -> None:
        self._codes = stable_random_state(seed, "sketch").randint(0, 2 * SKETCH_SIZE, num_parameters, dtype=np.uint8)

    def of(self, flat: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sketch of a model, float64, shape (64,)."""
        total = np.zeros(SKETCH_SIZE)
        for start in range(0, len(flat), _CHUNK):
            codes = self._codes[start : start + _CHUNK]
            signed = flat[start : start + _CHUNK].astype(np.float64) * ((codes & 1) * 2.0 - 1.0)
            # bincount adds one after the other, whatever the machine's vector width.
            total += np.bincount(codes >> 1, weights=signed, minlength=SKETCH_SIZE)
        return total


@dataclass(frozen=True)
class Situation:
    """What a decision is made on.

    Attributes:
        gathered: one row per node as :meth:`Adapter.row` makes it, shape (num_nodes, num_gathered).
    """

    adjacency: HybridAdjacencyMatrix
    initial: HybridAdjacencyMatrix
    round_number: int
    node_ids: tuple[str, ...]
    gathered: Array


class Adapter:
    """A strategy by name, with what it asks for.

    Args:
        name: a name of :data:`ADAPTERS`, ``module:attr`` or an entry point of ``icrf.adapter``.
        parameters: the keys of the configuration.
        num_parameters: elements of a model.

    Raises:
        ConfigError: C010 or C017 about the name, C016 or C017 about its parameters, C017 for a constructor that raises.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any], num_parameters: int) -> None:
        self._name, self._parameters = name, parameters
        self._num_parameters = num_parameters
        known = {**parameters, **dict.fromkeys((*_GIVEN, *_FACTS, _SKETCHES, _WEIGHTS), "")}
        self._asks = inject(ADAPTERS, name, known, self._function()).keys()

    @property
    def num_gathered(self) -> int:
        """Numbers per node that a decision needs."""
        sketches, weights = _SKETCHES in self._asks, _WEIGHTS in self._asks
        if not (sketches or weights or self._asks & set(_FACTS)):
            return 0
        return _NUM_FACTS + SKETCH_SIZE * sketches + self._num_parameters * weights

    @cached_property
    def _sketcher(self) -> Sketcher:
        return Sketcher(self._parameters["seed"], self._num_parameters)

    def row(self, train_loss: float | None, change: Array, model: Array, out: Array) -> None:
        """Write what a decision needs of one node.

        Args:
            train_loss: None if it did not train.
            change: what its training has added to its model, shape (num_parameters,).
            model: its model after the round, likewise.
            out: shape (num_gathered,).
        """
        out[:_NUM_FACTS] = (0.0, 0.0) if train_loss is None else (1.0, train_loss)
        at = _NUM_FACTS
        if _SKETCHES in self._asks:
            out[at : at + SKETCH_SIZE] = 0.0 if train_loss is None else self._sketcher.of(change)
            at += SKETCH_SIZE
        if _WEIGHTS in self._asks:
            out[at:] = model

    def decide(self, situation: Situation) -> HybridAdjacencyMatrix:
        """The next graph; raises whatever the strategy raises.

        Raises:
            ConfigError: C018 for an answer that is no matrix.
        TopologyError: T0xx naming the strategy, for one that is no graph of these nodes, or on which peers cannot mix
            with the configured rule.
        """
        facts = {**self._parameters, **self._facts(situation)}
        function = self._function()
        found = function(**inject(ADAPTERS, self._name, facts, function))
        with answering(f"{ADAPTERS.key} '{self._name}' after round {situation.round_number}"):
            matrix = as_matrix(ADAPTERS, self._name, found, situation.node_ids)
            require_usable(matrix, situation.adjacency.num_nodes, self._parameters)
        return matrix

    def _function(self) -> Callable[..., Any]:
        found = ADAPTERS.get(self._name)
        if inspect.isclass(found):
            arguments = inject(ADAPTERS, self._name, self._parameters, found)
            with ADAPTERS.calling(self._name):
                found = found(**arguments)
        function: Callable[..., Any] = getattr(found, "adapt", found)
        return function

    def _facts(self, situation: Situation) -> dict[str, Any]:
        """What the strategy asks for, by name."""
        seed, rows = self._parameters["seed"], situation.gathered
        make: dict[str, Callable[[], Any]] = {
            "adjacency_matrix": situation.adjacency.to_dense,
            "initial_matrix": situation.initial.to_dense,
            "round_number": lambda: situation.round_number,
            "random_state": lambda: stable_random_state(seed, "adaptation", situation.round_number),
            "node_ids": lambda: situation.node_ids,
            "available": lambda: rows[:, 0] == 1,
            "metrics": lambda: {"train_loss": _read_only(np.where(rows[:, 0] == 1, rows[:, 1], np.nan))},
            _SKETCHES: lambda: rows[:, _NUM_FACTS : _NUM_FACTS + SKETCH_SIZE].astype(np.float64),
            _WEIGHTS: lambda: rows[:, rows.shape[1] - self._num_parameters :],
        }
        return {name: _read_only(build()) for name, build in make.items() if name in self._asks}


def require_usable(matrix: HybridAdjacencyMatrix, num_nodes: int, parameters: Mapping[str, Any]) -> None:
    """Refuse a graph on which these peers cannot go on.

    Args:
        parameters: the keys of the configuration; ``mixing`` and ``allow_no_consensus`` are read.

    Raises:
        TopologyError: T010 another number of nodes, T006 several components, T004 edges in one direction only, T012
            nodes that can never agree.
    """
    together = not parameters.get("allow_no_consensus")
    if matrix.num_nodes != num_nodes:
        size = matrix.num_nodes
        raise TopologyError("T010", f"matrix {size}×{size} for {num_nodes} nodes", allowed=f"{num_nodes}×{num_nodes}")
    if together:
        require_connected(matrix)
    weights = mixing_matrix(matrix.to_graph(), str(parameters["mixing"]))
    require_consensus(weights, allow_no_consensus=not together, place="")


def changed_edges(before: HybridAdjacencyMatrix, after: HybridAdjacencyMatrix) -> tuple[int, int]:
    """How many directed edges were (added, removed)."""
    kept = int(before.to_scipy().multiply(after.to_scipy()).nnz)
    return after.num_edges - kept, before.num_edges - kept


def _read_only(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value.setflags(write=False)
    return value
