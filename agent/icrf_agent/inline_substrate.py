"""Hosts as plain objects of this process: the fabric without Ray, for tests and simulation.

Host calls run one after the other in a single thread shared by all inline clusters of the process, because torch's
thread count and generator are process-wide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from icrf.errors import ResourceError
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.ports import ClusterFacts, PayloadTransport
from icrf.protocol import Capacity, Reserve
from icrf_agent.cluster_gateway import HybridClusterGateway
from icrf_agent.host_nodes import HostSetup
from icrf_agent.node_host import NUM_THREADS, NodeHost
from icrf_agent.runtime import Actor, Shared
from icrf_agent.topology_manager import HybridTopologyManager

_HOSTS = ThreadPoolExecutor(1, thread_name_prefix="icrf-inline-host")


class InlineReferences:
    """References that are the arrays themselves: copied in, read-only out, like an object store's."""

    def put(self, array: np.ndarray[Any, Any]) -> Any:
        kept = np.array(array)
        kept.setflags(write=False)
        return kept

    def get(self, reference: Any) -> np.ndarray[Any, Any]:
        while isinstance(reference, list):
            reference = reference[0]
        found: np.ndarray[Any, Any] = reference
        return found


@dataclass(frozen=True)
class InlineActor:
    """An object whose methods run in `executor`, or in a thread of the loop's own pool."""

    target: Any
    executor: ThreadPoolExecutor | None = None

    async def call(self, method: str, *arguments: Any) -> Any:
        work = getattr(self.target, method)
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, *arguments)


@dataclass
class InlineSubstrate:
    """A cluster of plain objects.

    Args:
        capacity: what it claims to offer.
        transport: how its gateway reaches others; None for a fabric of one cluster.
    """

    capacity: Capacity = field(default_factory=lambda: Capacity(2, 2.0, 0.0, 1 << 33))
    transport: Callable[[], PayloadTransport] | None = None
    _manager: HybridTopologyManager | None = None
    _gateway: HybridClusterGateway | None = None
    _slots: dict[str, int] = field(default_factory=dict)

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        torch.set_num_threads(NUM_THREADS)
        self._references = InlineReferences()
        self._manager = HybridTopologyManager(cluster, self._references)
        gateway: Actor | None = None
        if self.transport is not None:
            self._gateway = HybridClusterGateway(self.transport, self._manager, self._references)
            gateway = InlineActor(self._gateway)
        facts = ClusterFacts(self.capacity, numeric_fingerprint("cpu", NUM_THREADS))
        return facts, Shared(InlineActor(self._manager), gateway)

    async def reserve(self, request: Reserve) -> None:
        needed = request.num_slots * request.resources.num_cpus
        if needed > self.capacity.num_cpus or request.num_slots > self.capacity.num_slots:
            raise ResourceError("R001", f"{needed:g} CPUs needed, {self.capacity.num_cpus:g} in total")
        self._slots[request.run_id] = request.num_slots

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        assert self._manager is not None and slot < self._slots[setup.activation.run_id]
        return InlineActor(NodeHost(self._manager, self._references), _HOSTS)

    async def release(self, run_id: str) -> None:
        self._slots.pop(run_id, None)

    async def close(self) -> None:
        if self._gateway is not None:
            await asyncio.to_thread(self._gateway.close)
