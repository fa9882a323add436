"""A host: the process that fills one slot and runs the phases of its nodes.

A plain class; ``ray_substrate.py`` makes an actor of it, ``inline_substrate.py`` calls it directly.
"""

from __future__ import annotations

from typing import Any

import torch

from icrf import values
from icrf.errors import RunError
from icrf.federation.message import Message
from icrf.ports import ModelFile, PhaseReport
from icrf.protocol import CENTRALIZED, Activated, StartRound
from icrf_agent.host_flows import CentralizedFlow, DecentralizedFlow, Flow, HostTools
from icrf_agent.host_nodes import HostNodes, HostSetup
from icrf_agent.topology_manager import HybridTopologyManager, References

NUM_THREADS = 1


class NodeHost:
    """Runs the nodes of one slot.

    Args:
        manager: the cluster's topology manager (or a handle with its methods).
        references: the cluster's object store.
    """

    def __init__(self, manager: HybridTopologyManager, references: References) -> None:
        self._manager, self._references = manager, references
        self._nodes: HostNodes | None = None
        self._flow: Flow | None = None

    def host_setup(self, setup: HostSetup) -> Activated:
        """Build the nodes; this host's part of the run's initial state."""
        torch.set_num_threads(NUM_THREADS)
        nodes = HostNodes(setup, self._manager)
        tools = HostTools(setup.activation, nodes, nodes.layout, self._manager, self._references)
        flow: Flow = CentralizedFlow(tools) if setup.activation.flow == CENTRALIZED else DecentralizedFlow(tools)
        self._nodes, self._flow = nodes, flow
        found = flow.initial()
        return Activated(
            found.run_id,
            found.generation,
            num_samples=nodes.sample_counts(),
            absmax=found.absmax,
            state_hashes=found.state_hashes,
            model_hash=found.model_hash,
        )

    def host_publish_model(self, start: StartRound) -> None:
        """See ``CentralizedFlow.publish_model``."""
        self._at(start).publish_model(start)

    def host_train(self, start: StartRound) -> PhaseReport:
        """Train this host's nodes."""
        return self._at(start).train(start)

    def host_aggregate(self, start: StartRound) -> PhaseReport:
        """Merge or mix, as the flow has it."""
        return self._at(start).aggregate(start)

    def host_evaluate(self, start: StartRound) -> PhaseReport:
        """Make and evaluate the consensus model (first host of the coordinator)."""
        return self._at(start).evaluate(start)

    def host_model(self, round_number: int) -> ModelFile:
        """The global or consensus model of a committed round; F006 where this host has none."""
        assert self._flow is not None and self._nodes is not None
        flat = self._flow.model_at(round_number)
        if flat is None:
            raise RunError("F006", f"no model of round {round_number} on {self._nodes.cluster}")
        layout = self._nodes.layout
        # One entry: safetensors writes several in no fixed order, and equal models shall be equal files.
        metadata = {"icrf": f"{self._nodes.config.federation_id} round {round_number}"}
        return ModelFile(layout.to_safetensors(flat, metadata), layout.model_sha256(flat))

    def host_call(self, index: int, method: str, arguments: bytes) -> bytes:
        """Call a public method of a node with its current state loaded; values in and out are ``icrf.values``."""
        assert self._nodes is not None
        node = self._nodes.get(index)
        if method.startswith("_") or not callable(getattr(node, method, None)):
            raise RunError("F005", f"{node.id} has no method '{method}'", place=node.id, value=method)
        positional, keywords = values.decode(arguments)
        result = _plain(self._between_rounds(index).call(index, method, *positional, **keywords))
        return values.encode(result, root=f"{node.id}.{method}()")

    def host_invoke(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """The same inside one cluster, where arguments and results are passed by Ray itself."""
        return self._between_rounds(index).call(index, method, *arguments, **keywords)

    def _at(self, start: StartRound) -> Flow:
        assert self._flow is not None and self._nodes is not None
        self._nodes.enter(start)
        return self._flow

    def _between_rounds(self, index: int) -> HostNodes:
        """Load a node's current state; what it sends now belongs to the last round, whichever that is."""
        assert self._flow is not None and self._nodes is not None
        self._nodes.get(index).context.model.load(self._flow.state_of(index))
        self._nodes.mailbox.position = None
        return self._nodes


def _plain(result: Any) -> Any:
    """Messages as dicts, so that `receive` and `sync` can be called from afar."""
    if isinstance(result, Message):
        return {name: getattr(result, name) for name in ("header", "sender_id", "body", "timestamp")}
    return [_plain(item) for item in result] if isinstance(result, list) else result
