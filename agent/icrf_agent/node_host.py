"""A host: the process that fills one slot and runs the phases of its nodes.

A plain class; ``ray_substrate.py`` makes an actor of it, ``inline_substrate.py`` calls it directly.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from icrf import values
from icrf.errors import NodeError, RunError
from icrf.federation.message import Message
from icrf.learning.rng import restored_randomness
from icrf.ports import ModelFile, PhaseReport
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    EXCHANGING,
    HIERARCHICAL,
    OTHER,
    SUMMING,
    Activated,
    Relink,
    StartRound,
)
from icrf_agent.host_flows import CentralizedFlow
from icrf_agent.host_groups import HierarchicalFlow
from icrf_agent.host_meter import HostMeter, MeteredReferences
from icrf_agent.host_nodes import HostNodes, HostSetup
from icrf_agent.host_notes import HostNotes
from icrf_agent.host_peers import DecentralizedFlow
from icrf_agent.host_state import HostHeld
from icrf_agent.host_tools import HostTools, HostTray, Worked
from icrf_agent.host_vector import Together
from icrf_agent.kept import Kept
from icrf_agent.node_metrics import NodeMetrics
from icrf_agent.object_store import References
from icrf_agent.postings import Posting
from icrf_agent.topology_manager import HybridTopologyManager

NUM_THREADS = 1

Handed = Sequence[Posting] | None
Flow = CentralizedFlow | DecentralizedFlow | HierarchicalFlow

_FLOWS: dict[str, type[Flow]] = {
    CENTRALIZED: CentralizedFlow,
    DECENTRALIZED: DecentralizedFlow,
    HIERARCHICAL: HierarchicalFlow,
}


class NodeHost:
    """Runs the nodes of one slot.

    Args:
        manager: the cluster's topology manager (or a handle with its methods).
        references: the cluster's object store.
        notes: where to note whose code runs.
        life: what tells this process from those before and after it in the same slot.

    Attributes:
        life: as given.
    """

    def __init__(
        self, manager: HybridTopologyManager, references: References, notes: HostNotes | None = None, life: str = ""
    ) -> None:
        self._manager, self._notes = manager, notes
        self._meter = HostMeter()
        self._references = MeteredReferences(references, self._meter)
        self.life = life or uuid.uuid4().hex
        self._generation = 0
        self._nodes: HostNodes | None = None
        self._flow: Flow | None = None
        self._tray = HostTray()

    def host_setup(self, setup: HostSetup) -> Activated:
        """Build the nodes; this host's part of the state that the run starts from.

        Raises:
            WeightsError: W010, W020 for a state that does not fit; see also :class:`HostNodes`.
        """
        _use_one_thread()
        self._generation = 0
        # What was set up before must not be in memory beside what comes.
        self._nodes = self._flow = None
        nodes = HostNodes(setup, self._manager, self._notes, self._meter)
        by_node = NodeMetrics(setup.activation.nodes)
        layout, self._tray = nodes.layout, HostTray()
        passed = self._manager, self._references, by_node, Together(nodes), self._tray
        tools = HostTools(setup.activation, nodes, layout, *passed)
        flow: Flow = _FLOWS[setup.activation.flow](tools, setup.state)
        self._nodes, self._flow, self._generation = nodes, flow, setup.activation.generation
        found = flow.initial()
        return Activated(
            found.run_id,
            found.generation,
            num_samples=nodes.sample_counts(),
            absmax=found.absmax,
            state_hashes=self._identity(found.state_hashes),
            model_hash=found.model_hash,
        )

    def host_held(self) -> HostHeld:
        """What is set up here; answered at any time, also while a phase runs."""
        nodes, flow, generation = self._nodes, self._flow, self._generation
        if nodes is None or flow is None or not generation:
            return HostHeld(self.life)
        rounds = flow.rounds or (nodes.states.rounds if nodes.states.used else ())
        return HostHeld(self.life, generation, tuple(nodes.indices), rounds, nodes.states.used)

    def host_leave_off(self, round_number: int, attempt: int) -> None:
        """An attempt is given up: no further node is trained for it. Heard at any time, also before it begins here."""
        self._tray.left_off = (round_number, attempt)

    def host_checkpoint(self, round_number: int) -> bytes:
        """This host's part of the committed state of a round; F006 if it is not here."""
        nodes, flow = self._ready()
        packed = flow.checkpoint(round_number) if flow.rounds else b""
        states = nodes.states.at(round_number) if nodes.states.used else {}
        if packed is None or states is None:
            raise RunError("F006", f"no state of round {round_number} on {nodes.cluster}")
        return Kept(packed, states).pack(round_number)

    def host_publish_model(self, start: StartRound, handed: Handed = None) -> Worked:
        """Publish the models that are kept here (hosts with an aggregator)."""

        def work(flow: Flow) -> PhaseReport:
            flow.publish_model(start)
            return PhaseReport()

        return self._phase(start, handed, EXCHANGING, work)

    def host_train(self, start: StartRound, handed: Handed = None) -> Worked:
        """Train this host's nodes."""
        with restored_randomness():
            return self._phase(start, handed, OTHER, lambda flow: self._staged(start, flow.train(start)))

    def host_aggregate(self, start: StartRound, handed: Handed = None) -> Worked:
        """Merge or mix, as the flow has it."""
        return self._phase(start, handed, SUMMING, lambda flow: self._staged(start, flow.aggregate(start)))

    def host_install(self, start: StartRound, handed: Handed = None) -> Worked:
        """Take over the global model of a hierarchy (hosts with an aggregator)."""
        return self._phase(start, handed, SUMMING, lambda flow: self._staged(start, flow.install(start)))

    def host_evaluate(self, start: StartRound, handed: Handed = None) -> Worked:
        """Make and evaluate the consensus model (first host of the coordinator).

        The hashes of the nodes are settled by then, so the node that evaluates keeps nothing of it.
        """

        def work(flow: Flow) -> PhaseReport:
            self._ready()[0].states.set_aside()
            return flow.evaluate(start)

        return self._phase(start, handed, SUMMING, work)

    def host_adapt(self, start: StartRound, handed: Handed = None) -> Worked:
        """Decide on the graph of the rounds to come (first host of the coordinator)."""
        return self._phase(start, handed, OTHER, lambda flow: PhaseReport(graph=self._peers().adapt(start)))

    def host_relink(self, order: Relink) -> None:
        """Take over another graph, under a new generation."""
        self._peers().relink(order.graph)
        self._ready()[0].mailbox.relink(order.graph)
        self._generation = order.generation

    def host_model(self, round_number: int) -> ModelFile:
        """The global or consensus model of a committed round, or all of several; F006 where this host has none."""
        nodes, flow = self._ready()
        flat = flow.model_at(round_number)
        if flat is None:
            raise RunError("F006", f"no model of round {round_number} on {nodes.cluster}")
        layout = nodes.layout.repeated(nodes.config.num_models)
        # One entry: safetensors writes several in no fixed order, and equal models shall be equal files.
        metadata = {"icrf": f"{nodes.config.federation_id} round {round_number}"}
        return ModelFile(layout.to_safetensors(flat, metadata), layout.model_sha256(flat))

    def host_call(self, index: int, method: str, arguments: bytes) -> bytes:
        """Call a public method of a node with its current state loaded; values in and out are ``icrf.values``."""
        node = self._ready()[0].get(index)
        if method.startswith("_") or not callable(getattr(node, method, None)):
            raise RunError("F005", f"{node.id} has no method '{method}'", place=node.id, value=method)
        positional, keywords = values.decode(arguments)
        result = _plain(self._between_rounds(index).call(index, method, *positional, **keywords))
        return values.encode(result, root=f"{node.id}.{method}()")

    def host_invoke(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """The same inside one cluster, where arguments and results are passed by Ray itself."""
        return self._between_rounds(index).call(index, method, *arguments, **keywords)

    def _phase(self, start: StartRound, handed: Handed, part: str, work: Callable[[Flow], PhaseReport]) -> Worked:
        """One phase of an attempt: `handed` is all that was posted in it so far, unless other clusters post too; what
        is not measured as something else takes the time of `part`."""
        nodes, flow = self._ready()
        _use_one_thread()
        tray = self._tray
        try:
            with self._meter.phase((start.round, start.attempt), part):
                nodes.enter(start)
                tray.handed, tray.made = handed, []
                report = work(flow)
                nodes.mailbox.flush()
            return Worked(report, tuple(tray.made), self._meter.seconds, nodes.mailbox.used)
        finally:
            tray.handed, tray.made = None, []

    def _peers(self) -> DecentralizedFlow:
        flow = self._ready()[1]
        if not isinstance(flow, DecentralizedFlow):
            raise RunError("F005", "only the graph of peers changes")
        return flow

    def _staged(self, start: StartRound, report: PhaseReport) -> PhaseReport:
        """Stage the nodes' own states after a phase."""
        states = self._ready()[0].states
        if not states.used:
            return report
        states.stage(start)
        return replace(report, node_states=True, state_hashes=self._identity(report.state_hashes))

    def _identity(self, hashes: bytes) -> bytes:
        """Among peers the hash of a node covers its own state too; where servers make models, no hash does."""
        nodes, flow = self._ready()
        return nodes.states.hashed(hashes) if isinstance(flow, DecentralizedFlow) else hashes

    def _ready(self) -> tuple[HostNodes, Flow]:
        if self._nodes is None or self._flow is None:
            raise NodeError("U003", "this host was restarted and holds no nodes", place="host")
        return self._nodes, self._flow

    def _between_rounds(self, index: int) -> HostNodes:
        """Load a node's current state; what it sends now belongs to the last round, whichever that is."""
        nodes, flow = self._ready()
        _use_one_thread()
        nodes.get(index).context.model.load(flow.state_of(index))
        nodes.mailbox.enter(None)
        nodes.states.set_aside()
        return nodes


def _use_one_thread() -> None:
    """Before anything is computed: MKL counts per calling thread, and phases need not be called from the one that has
    set up the nodes."""
    torch.set_num_threads(NUM_THREADS)


def _plain(result: Any) -> Any:
    """Messages as dicts, so that `receive` and `sync` can be called from afar."""
    if isinstance(result, Message):
        return {name: getattr(result, name) for name in ("header", "sender_id", "body", "timestamp")}
    return [_plain(item) for item in result] if isinstance(result, list) else result
