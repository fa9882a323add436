"""A federation in the hands of a Python program: the one-cluster face of the fabric.

``FederatedBase`` submits to a fabric like everybody else; by default that fabric is embedded in this process and has
one local Ray cluster. Nothing here knows whether there are one or ten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar

from icrf import values
from icrf.client import Fabric, Result, Run, raise_unless_completed
from icrf.errors import ConfigError, LocalError, RoutingError
from icrf.federation.message import Message
from icrf.federation.node import FederatedNode
from icrf.federation.resources import resources_view
from icrf.federation.virtual_node import NodeHandle, VirtualNode
from icrf.protocol import (
    IDLE,
    READY,
    RESERVED,
    RUNNING,
    TERMINAL,
    NodeSpec,
    RoundResult,
    RunInfo,
    parts_of,
)
from icrf.sinks import MetricsSink
from icrf.spec import FederationConfig
from icrf.submission import build_submission, default_nodes, flow_of

SUPERVISOR = "supervisor"


class FederatedBase:
    """A federation: its nodes by name, its training, its messages.

    Args:
        config: the configuration; alone it also decides nodes and topology.
        nodes: the nodes in index order.
        topology: a registered name, or an adjacency matrix over `nodes` (NumPy or ``HybridAdjacencyMatrix``).
        resources: what one slot takes: ``uniform`` or ``{"num_cpus": ..., "num_gpus": ...}``.
        sinks: where metrics go, objects or descriptions, see :mod:`icrf.sinks`.
        bundle_offset: accepted for the seeds' sake; every federation has a reservation of its own.
        fabric: the fabric to run on; by default one with a single local cluster, opened on first use.

    Example:
        >>> base = FederatedBase(FederationConfig.from_yaml("digits.yaml"))
        >>> base.train(blocking=True)
        >>> base.test()
        >>> base.stop()
    """

    open_fabric: ClassVar[Callable[[], Fabric] | None] = None

    def __init__(
        self,
        config: FederationConfig,
        *,
        nodes: Sequence[VirtualNode] | None = None,
        topology: Any = None,
        resources: str | Mapping[str, float] = "uniform",
        bundle_offset: int = 0,
        fabric: Fabric | None = None,
        sinks: Sequence[MetricsSink | str] = (),
    ) -> None:
        self._sinks = tuple(sinks)
        self.config = _with_resources(config, resources)
        self.nodes = list(nodes) if nodes is not None else _nodes_of(self.config)
        self._topology = topology
        self._by_id = {node.id: node for node in self.nodes}
        self._index = {node.id: k for k, node in enumerate(self.nodes)}
        for node in self.nodes:
            node.bind(self)
        self._fabric, self._owns_fabric = fabric, fabric is None
        self._run: Run | None = None
        self._training: Future[RunInfo] | None = None
        self._rounds_asked = 0
        self.bundle_offset = bundle_offset

    # ------------------------------------------------------------ nodes

    def __getitem__(self, node_id: str) -> VirtualNode:
        if node_id not in self._by_id:
            raise RoutingError("P012", f"no node '{node_id}'", allowed=", ".join(self.node_ids[:6]) + ", ...")
        return self._by_id[node_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._by_id

    def keys(self) -> list[str]:
        return self.node_ids

    def values(self) -> list[VirtualNode]:
        return list(self.nodes)

    def items(self) -> list[tuple[str, VirtualNode]]:
        return [(node.id, node) for node in self.nodes]

    @property
    def node_ids(self) -> list[str]:
        """Names of the nodes in index order."""
        return [node.id for node in self.nodes]

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    # ------------------------------------------------------------ life

    def allocate_resources(self) -> None:
        """Reserve the slots, all or nothing over all clusters; R001 names what lacks where."""
        self._submitted()
        self._await({RESERVED, READY, RUNNING, IDLE})

    def materialize_all(self) -> None:
        """Start the hosts and set up every node: the resident set is warm afterwards."""
        run = self._submitted()
        self._port.advance(run.id, "activate")
        self._await({READY, RUNNING, IDLE})

    def train(self, blocking: bool = False, rounds: int | None = None) -> Future[RunInfo]:
        """Run rounds: the configured ones, or `rounds` more.

        Args:
            blocking: wait for them.
            rounds: how many further rounds, after those that were asked for before; None runs up to the configured
                number.

        Returns:
            A future of the run's state after the last round; its exception is the error that ended the run. What is
            still to be done before the first round (reserving, setting up nodes) is part of it.
        """
        run = self._submitted()
        done = run.info().rounds_done
        asked = self._rounds_asked if self.running else done
        wanted = self.config.federated_learning_rounds if rounds is None else asked + rounds
        if wanted > done:
            self._port.advance(run.id, "run", wanted)
        future: Future[RunInfo] = Future()
        self._training, self._rounds_asked = future, max(asked, wanted)
        threading.Thread(target=self._follow, args=(run, wanted, future), name="icrf-training", daemon=True).start()
        if blocking:
            future.result()
        return future

    def add_nodes(self, *node_ids: str) -> None:
        """Let nodes that were taken out take part again, from the next round on."""
        self.allocate_resources()
        self._submitted().add_nodes(*node_ids)

    def remove_nodes(self, *node_ids: str) -> None:
        """Take nodes out of the rounds from the next one on; before training, those that join later.

        Raises:
            RunError: F005 among peers, or if too few would be left.
        """
        self.allocate_resources()
        self._submitted().remove_nodes(*node_ids)

    def test(self, phase: str = "test") -> dict[str, dict[str, float]]:
        """Evaluate after training: metrics by node.

        Args:
            phase: ``test`` evaluates on the held-out data (centralized: the server with the global model;
                decentralized: every node with the role ``test`` with its own); ``train`` and ``eval`` let every node
                of that role evaluate on its own data.
        """
        self._finish_training()
        nodes = [n for n in self.nodes if phase in parts_of(n.role)]
        aggregating = [n for n in self.nodes if "aggregate" in parts_of(n.role)]
        if phase == "test" and aggregating:
            nodes = aggregating
        return {node.id: dict(node.call("test", phase)) for node in nodes}

    def send(self, header: str, body: Mapping[str, Any], to: str | Sequence[str] | None = None) -> None:
        """Send as the supervisor, which needs no edge; None reaches every node. Readable there at once."""
        self.activate()
        recipients = self.node_ids if to is None else [to] if isinstance(to, str) else list(to)
        message = Message(header, SUPERVISOR, dict(body))
        self._port.send_message(self._submitted().id, recipients, message.encode())

    def pull_version(self, node_ids: str | Sequence[str] | None = None) -> dict[str, Any] | list[dict[str, Any]]:
        """``{id, version, model, timestamp}`` of a node, or a list of them; waits for a training that runs."""
        self._finish_training()
        if isinstance(node_ids, str):
            return dict(self[node_ids].call("pull_version"))
        chosen = self.node_ids if node_ids is None else list(node_ids)
        return [dict(self[node_id].call("pull_version")) for node_id in chosen]

    def stop(self) -> RunInfo | None:
        """End the federation: cancel a training that runs, else store the model; release everything.

        Returns:
            The last state of the run; None when nothing was started. Harmless when called twice.
        """
        info = None
        try:
            if self._run is not None:
                if self.running:
                    self._port.cancel(self._run.id)
                else:
                    self._port.finish(self._run.id)
                info = self._run.wait()
                if self._training is not None:
                    # It ends with the run; its thread must be done with the fabric before that is closed.
                    self._training.exception()
        finally:
            if self._owns_fabric and self._fabric is not None:
                self._fabric.close()
                self._fabric = None
        return info

    def result(self) -> Result:
        """Store the final model and return it with all rounds; the federation is over afterwards."""
        self._finish_training()
        run = self._submitted()
        run.finish()
        return run.result()

    @property
    def run(self) -> Run | None:
        """The run on the fabric, once something was started."""
        return self._run

    @property
    def running(self) -> bool:
        """Whether a training runs."""
        return self._training is not None and not self._training.done()

    @property
    def resources(self) -> dict[str, dict[str, float]]:
        """CPUs and GPUs by cluster and in total (``all``), as they are reserved."""
        plan = self._run.plan() if self._run is not None else None
        return resources_view(plan, self.config)

    def collect_federation_metrics(self) -> list[RoundResult]:
        """All committed rounds: means in ``metrics``, what single nodes reported in ``node_metrics``."""
        return self._run.committed_rounds() if self._run is not None else []

    def __enter__(self) -> FederatedBase:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------ what nodes need (NodeBinding)

    def activate(self) -> None:
        """Make all nodes live; harmless when they are."""
        if not self.is_active():
            self.materialize_all()

    def is_active(self) -> bool:
        """Whether the nodes are live; asking changes nothing."""
        return self._run is not None and self._run.info().status in (READY, RUNNING, IDLE)

    def handle_of(self, node_id: str) -> Any:
        """See ``VirtualNode.handle``."""
        assert self._fabric is not None and self._run is not None
        index = self._index[node_id]
        found = self._fabric.host_of(self._run.id, index)
        if found is None:
            plan = self._run.plan()
            cluster = plan.assignment.get(node_id, "another cluster") if plan else "another cluster"
            raise RoutingError(
                "P010",
                f"{node_id} lives on cluster {cluster}, its actor cannot be reached from this process",
                place=node_id,
                value=cluster,
                hint=f'use base["{node_id}"].call(method, ...), which works anywhere',
            )
        actor, alone = found
        return actor if alone else NodeHandle(node_id, partial(actor.node_invoke.remote, index))

    def call(self, node_id: str, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """See ``VirtualNode.call``."""
        packed = values.encode([list(arguments), keywords], root="arguments")
        return values.decode(self._port.call_node(self._submitted().id, node_id, method, packed))

    # ------------------------------------------------------------ inside

    @property
    def _port(self) -> Any:
        assert self._fabric is not None
        return self._fabric.port

    def _submitted(self) -> Run:
        if self._run is None:
            if self._fabric is None:
                self._fabric = self._open()
            submission = build_submission(
                self._with_templates(self._fabric),
                nodes=[NodeSpec(node.id, node.role) for node in self.nodes],
                adjacency=None if isinstance(self._topology, str) else self._topology,
                keep=True,
                stage="reserve",
            )
            self._run = self._fabric.submit(submission, sinks=self._sinks)
        return self._run

    def _with_templates(self, fabric: Fabric) -> FederationConfig:
        """The configuration, naming the node classes that were given as classes."""
        chosen: dict[str, str] = {}
        for key, aggregates in (("server_template", True), ("client_template", False)):
            kinds = {n.template for n in self.nodes if ("aggregate" in parts_of(n.role)) is aggregates and n.template}
            if len(kinds) > 1:
                names = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise ConfigError("C008", f"several node classes: {names}", place=key, allowed="one class per kind")
            for kind in kinds - {FederatedNode}:
                chosen[key] = fabric.add_template(kind)
        return changed(self.config, **chosen) if chosen else self.config

    def _open(self) -> Fabric:
        if type(self).open_fabric is None:
            raise LocalError("L009", "no fabric to run on", hint="import FederatedBase from icrf, or pass fabric=")
        return type(self).open_fabric()  # type: ignore[misc]

    def _await(self, statuses: set[str]) -> RunInfo:
        """Follow the run until it is in one of `statuses`; the error that ended it is raised."""
        run = self._submitted()
        for event in run.events():
            if event.status in statuses and run.info().status in statuses:
                break
            if event.status in TERMINAL:
                raise_unless_completed(run.info())
        return run.info()

    def _follow(self, run: Run, wanted: int, future: Future[RunInfo]) -> None:
        try:
            for event in run.events():
                info = run.info()
                # Stopped early where the target accuracy was reached.
                stopped = info.status == IDLE and event.status == IDLE
                if info.rounds_done >= wanted or stopped:
                    break
            info = run.info()
            if info.status in TERMINAL:
                raise_unless_completed(info)
            future.set_result(info)
        except Exception as error:  # noqa: BLE001 - whoever waits for the future must get whatever it was
            future.set_exception(error)

    def _finish_training(self) -> None:
        if self._training is not None:
            self._training.result()
        else:
            self.activate()


def _nodes_of(config: FederationConfig) -> list[VirtualNode]:
    specs = default_nodes(config, flow_of(config))
    return [VirtualNode(None, spec.id, spec.role, config) for spec in specs]


def _with_resources(config: FederationConfig, resources: str | Mapping[str, float]) -> FederationConfig:
    if not isinstance(resources, str | Mapping):
        raise ConfigError(
            "C006",
            f"resources of type {type(resources).__name__}",
            place="resources",
            allowed="'uniform' or a mapping such as {'num_cpus': 1}",
            hint="a placement group of your own cannot be taken over: the fabric reserves",
        )
    if resources == "uniform":
        return config
    return changed(config, resources=resources)


def changed(config: FederationConfig, **values_by_key: Any) -> FederationConfig:
    """The same configuration with other values, validated again."""
    plain = config.model_dump(mode="json")
    return FederationConfig.from_mapping({**plain, **values_by_key})
