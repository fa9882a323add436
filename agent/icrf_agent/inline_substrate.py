"""Hosts as plain objects of this process: the fabric without Ray, for tests and simulation.

Host calls run one after the other in a single thread shared by all inline clusters of the process, because torch's
thread count and generator are process-wide.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from icrf.errors import ResourceError, RunError
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.ports import ClusterFacts, PayloadTransport
from icrf.protocol import Capacity, Reserve
from icrf_agent.cluster_gateway import HybridClusterGateway
from icrf_agent.host_nodes import HostSetup
from icrf_agent.node_host import NUM_THREADS, NodeHost
from icrf_agent.runtime import Actor, Shared
from icrf_agent.topology_manager import HybridTopologyManager

# The calls of one cluster that may block at once, the wait for arrivals among them.
_NUM_WORKERS = 8


class _HostThread:
    """The one thread in which hosts run; it lives as long as any inline cluster of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._users = 0

    def take(self) -> ThreadPoolExecutor:
        with self._lock:
            self._users += 1
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="icrf-inline-host")
            return self._executor

    def give_back(self) -> None:
        """Blocks, for the last user, until the hosts are idle."""
        with self._lock:
            self._users -= 1
            ended, self._executor = (None, self._executor) if self._users else (self._executor, None)
        if ended is not None:
            ended.shutdown(cancel_futures=True)


_HOST_THREAD = _HostThread()


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
    """An object whose methods run in `executor`."""

    target: Any
    executor: ThreadPoolExecutor

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
    _workers: ThreadPoolExecutor | None = None
    _hosts: ThreadPoolExecutor | None = None

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        torch.set_num_threads(NUM_THREADS)
        # Not the loop's own pool: that has few threads on a small machine, and one per cluster waits for arrivals.
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix=f"icrf-inline-{cluster}")
        self._hosts = _HOST_THREAD.take()
        self._references = InlineReferences()
        self._manager = HybridTopologyManager(cluster, self._references)
        gateway: Actor | None = None
        if self.transport is not None:
            self._gateway = HybridClusterGateway(self.transport, self._manager, self._references)
            gateway = InlineActor(self._gateway, self._workers)
        facts = ClusterFacts(self.capacity, numeric_fingerprint("cpu", NUM_THREADS))
        return facts, Shared(InlineActor(self._manager, self._workers), gateway)

    async def reserve(self, request: Reserve) -> None:
        each = request.resources.num_cpus
        needed, total = request.num_slots * each, self.capacity.num_cpus
        if needed > total or request.num_slots > self.capacity.num_slots:
            raise ResourceError(
                "R001",
                f"{request.num_slots} slots x {each:g} CPU = {needed:g} CPU needed, {total:g} in total",
                place="resources",
                allowed=f"{self.capacity.num_slots} slots",
            )
        self._slots[request.run_id] = request.num_slots

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        assert self._manager is not None and self._hosts is not None
        if slot >= self._slots.get(setup.activation.run_id, 0):
            raise RunError("F005", f"no slot {slot} is reserved for {name}", place=name)
        return InlineActor(NodeHost(self._manager, self._references), self._hosts)

    async def release(self, run_id: str) -> None:
        self._slots.pop(run_id, None)

    async def close(self) -> None:
        gateway, self._gateway = self._gateway, None
        workers, self._workers = self._workers, None
        hosts, self._hosts = self._hosts, None
        if gateway is not None:
            await asyncio.to_thread(gateway.close)
        if hosts is not None:
            await asyncio.to_thread(_HOST_THREAD.give_back)
        if workers is not None:
            await asyncio.to_thread(workers.shutdown)
