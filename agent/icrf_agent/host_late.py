"""What hosts keep for updates that come late: the models they start from, and what was trained in vain so far."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from icrf.errors import InternalError
from icrf.federation.node import FederatedNode
from icrf.protocol import StartRound
from icrf.staleness import late_nodes
from icrf_agent.host_state import VersionedState

Array = np.ndarray[Any, Any]

# Above that, nodes train again what they had finished too late.
MAX_FINISHED_BYTES = 256 << 20


class EarlierModels:
    """Global models of earlier rounds, for as long as late clusters owe updates that start from them.

    Args:
        models: those that were restored, by the round after which they were committed.
    """

    def __init__(self, models: Mapping[int, Array] | None = None) -> None:
        self._models = dict(models or {})

    def enter(self, start: StartRound, server: VersionedState, size: int) -> None:
        """An attempt begins, `server` is rebased already: keep the models that it or a later round needs, no others.

        Args:
            server: the aggregator's state, whose first `size` elements are the model.
        """
        needed = sorted({late.round - 1 for late in start.late} | {owed - 1 for owed in start.kept})
        found = {number: self._models.get(number) for number in needed}
        if server.round in found and found[server.round] is None:
            # The state's own buffer may be used again.
            found[server.round] = np.array(server.committed[:size])
        missing = [number for number, model in found.items() if model is None]
        if missing:
            raise InternalError("X001", f"round {start.round} needs the model of round {missing[0]}, which is not here")
        self._models = {number: model for number, model in found.items() if model is not None}

    def sent(self, start: StartRound, row: Array) -> Array:
        """What goes out in an attempt: `row` alone, or as the first of rows (1 + late, size), one per late round."""
        if not start.late:
            return row
        return np.stack([row, *(self._models[late.round - 1] for late in start.late)])

    @property
    def by_round(self) -> Mapping[int, Array]:
        """The models that are kept."""
        return self._models


def row_for(start: StartRound, recipients: Collection[int]) -> int:
    """Which row of :meth:`EarlierModels.sent` these nodes of one cluster train from; -1: there is but one."""
    if not start.late:
        return -1
    late = late_nodes(start.late)
    owed = next((late[node] for node in recipients if node in late), None)
    return 0 if owed is None else 1 + start.late.index(owed)


class FinishedWork:
    """What each node of a host has trained last: for another attempt of that round, or a later one that it is owed to.

    Only of nodes of the built-in class: what a user's own does beside training, such as sending, is not kept.

    Args:
        num_nodes: nodes of the host that train.
        row_bytes: bytes of a model.
    """

    def __init__(self, num_nodes: int, row_bytes: int) -> None:
        self._keeps = num_nodes * row_bytes <= MAX_FINISHED_BYTES
        self._by_node: dict[int, tuple[int, dict[str, float], Array]] = {}

    def find(self, node: FederatedNode) -> tuple[dict[str, float], Array] | None:
        """The metrics and the model of a node that has trained the round that it is in."""
        found = self._by_node.get(node.context.index)
        return found[1:] if found is not None and found[0] == node.round else None

    def keep(self, node: FederatedNode, metrics: dict[str, float], model: Array) -> None:
        """A node has trained the round that it is in, from the one model that this round starts from."""
        if self._keeps and type(node) is FederatedNode:
            self._by_node[node.context.index] = (node.round, metrics, model.copy())
