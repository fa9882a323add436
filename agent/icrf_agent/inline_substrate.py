"""Hosts as plain objects of this process: the fabric without Ray, for tests and simulation.

Host calls run one after the other in a single thread shared by all inline clusters of the process, because torch's
thread count and generator are process-wide.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from icrf.errors import NodeError, ResourceError, RunError
from icrf.gangs import shortages
from icrf.learning.fingerprint import numeric_fingerprint
from icrf.ports import ClusterFacts, PayloadTransport
from icrf.protocol import Capacity, Reserve
from icrf_agent.cluster_gateway import HybridClusterGateway
from icrf_agent.host_nodes import HostSetup
from icrf_agent.host_notes import HostNotes
from icrf_agent.host_state import CONTROL_METHODS
from icrf_agent.node_host import NUM_THREADS, NodeHost
from icrf_agent.substrate import Actor, Shared
from icrf_agent.topology_manager import HybridTopologyManager

# The calls of one cluster that may block at once, the wait for arrivals among them.
_NUM_WORKERS = 8
_POLL_S = 0.005


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

    def allocate(self, num_elements: int, dtype: str) -> np.ndarray[Any, Any]:
        return np.empty(num_elements, dtype)

    def put(self, array: np.ndarray[Any, Any], kind: str) -> Any:
        kept = np.array(array)
        kept.setflags(write=False)
        return kept

    def get(self, reference: Any) -> np.ndarray[Any, Any]:
        while isinstance(reference, list):
            reference = reference[0]
        found: np.ndarray[Any, Any] = reference
        return found


class InlineCpus:
    """The CPUs of a cluster, which whoever comes takes if enough are free. Thread-safe.

    Args:
        total: how many there are.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self._lock = threading.Lock()
        self._taken: dict[Hashable, float] = {}

    @property
    def free(self) -> float:
        with self._lock:
            return self.total - sum(self._taken.values())

    async def take(self, who: Hashable, amount: float, within_s: float) -> bool:
        """Take so many, in place of what they had, as soon as they are free; False if that takes too long."""
        deadline = time.monotonic() + within_s
        while not self._try(who, amount):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _try(self, who: Hashable, amount: float) -> bool:
        with self._lock:
            others = sum(taken for other, taken in self._taken.items() if other != who)
            fits = others + amount <= self.total + 1e-6
            if fits:
                self._taken[who] = amount
        return fits

    def give_back(self, who: Hashable) -> None:
        """Free what somebody has taken; harmless when that is nothing."""
        with self._lock:
            self._taken.pop(who, None)


class InlineProcess:
    """Plays the process of an actor: an object that can be killed, and comes back empty. Thread-safe.

    Args:
        name: for errors.
        make: a fresh object; told how to find out whether the life it was made for has ended.
    """

    def __init__(self, name: str, make: Callable[[Callable[[], None]], Any]) -> None:
        self.name, self._make = name, make
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Future[Any], asyncio.AbstractEventLoop] = {}
        self._life = 0
        self._target: Any = None
        self.restart()

    def living(self) -> tuple[Any, int]:
        """The object and its life; U003 if it was killed."""
        with self._lock:
            if self._target is None:
                raise self._dead()
            return self._target, self._life

    def require(self, life: int) -> None:
        """U003 unless that life goes on."""
        if self.living()[1] != life:
            raise self._dead()

    def kill(self) -> Any:
        """End it: calls in flight and later ones raise U003. What was killed."""
        with self._lock:
            killed, self._target = self._target, None
            self._life += 1
            waiting, self._waiting = self._waiting, {}
        for waiter, loop in waiting.items():
            loop.call_soon_threadsafe(_fail, waiter, self._dead())
        return killed

    def restart(self) -> None:
        """Bring it back, unless it lives."""
        with self._lock:
            if self._target is None:
                life = self._life
                self._target = self._make(lambda: self.require(life))

    async def ended(self) -> None:
        """Returns when this life has ended."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._target is None:
                return
            self._waiting[waiter] = loop
        try:
            await waiter
        except NodeError:
            return

    async def call(self, executor: ThreadPoolExecutor, method: str, arguments: tuple[Any, ...]) -> Any:
        """Run a method in `executor`; what it does after its life has ended is nobody's."""
        target, _ = self.living()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            self._waiting[waiter] = loop
        try:
            inner = loop.run_in_executor(executor, getattr(target, method), *arguments)
            inner.add_done_callback(lambda done: _settle(waiter, done))
            return await waiter
        finally:
            with self._lock:
                self._waiting.pop(waiter, None)

    def _dead(self) -> NodeError:
        return NodeError("U003", f"{self.name} died", place=self.name)


def _fail(waiter: asyncio.Future[Any], error: NodeError) -> None:
    if not waiter.done():
        waiter.set_exception(error)


def _settle(waiter: asyncio.Future[Any], done: asyncio.Future[Any]) -> None:
    error = None if done.cancelled() else done.exception()
    if waiter.done():
        return
    if done.cancelled():
        waiter.cancel()
    elif error is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(done.result())


class InlineRemote:
    """Calls an object of another process as if it were here; for use inside processes.

    Args:
        process: whose methods are called.
        alive: raises when the caller's own life has ended.
    """

    def __init__(self, process: InlineProcess, alive: Callable[[], None]) -> None:
        self._process, self._alive = process, alive

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)

        def call(*arguments: Any) -> Any:
            self._alive()
            target, life = self._process.living()
            result = getattr(target, method)(*arguments)
            self._process.require(life)
            return result

        return call


@dataclass(frozen=True)
class InlineActor:
    """An object whose methods run in `executor`; like an actor's, some are answered while a phase runs."""

    process: InlineProcess
    executor: ThreadPoolExecutor
    control: ThreadPoolExecutor

    async def call(self, method: str, *arguments: Any) -> Any:
        executor = self.control if method in CONTROL_METHODS else self.executor
        return await self.process.call(executor, method, arguments)


@dataclass
class InlineSubstrate:
    """A cluster of plain objects, which can be killed like processes. It outlives the runtime that uses it.

    Args:
        capacity: what it claims to offer.
        transport: how its gateway reaches others; None for a fabric of one cluster.
        cpus: what reservations take from; clusters of several fabrics may share it, and so may a test that plays
            another program.
    """

    capacity: Capacity = field(default_factory=lambda: Capacity(2, 2.0, 0.0, 1 << 33))
    transport: Callable[[], PayloadTransport] | None = None
    cpus: InlineCpus = field(default_factory=lambda: InlineCpus(float("inf")))
    _manager: InlineProcess | None = None
    _gateway: InlineProcess | None = None
    _slots: dict[str, int] = field(default_factory=dict)
    _hosts: dict[str, dict[str, tuple[int, InlineProcess]]] = field(default_factory=dict)
    _references: InlineReferences = field(default_factory=InlineReferences)
    _head: InlineProcess = field(default_factory=lambda: InlineProcess("head", lambda alive: object()))
    _workers: ThreadPoolExecutor | None = None
    _host_thread: ThreadPoolExecutor | None = None
    _starved: set[str] = field(default_factory=set)

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        torch.set_num_threads(NUM_THREADS)
        if self._workers is None:
            # Not the loop's own pool: it has few threads on a small machine, and one per cluster waits for arrivals.
            self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix=f"icrf-inline-{cluster}")
            self._host_thread = _HOST_THREAD.take()
        if self._manager is None:
            self._manager = InlineProcess(
                f"topology manager of {cluster}", lambda alive: HybridTopologyManager(cluster, self._references)
            )
        self._manager.restart()
        gateway: Actor | None = None
        if self.transport is not None:
            if self._gateway is None:
                self._gateway = InlineProcess(f"gateway of {cluster}", self._open_gateway)
            self._gateway.restart()
            gateway = self._actor(self._gateway)
        facts = ClusterFacts(self.capacity, numeric_fingerprint("cpu", NUM_THREADS))
        return facts, Shared(self._actor(self._manager), gateway)

    def _open_gateway(self, alive: Callable[[], None]) -> HybridClusterGateway:
        assert self.transport is not None and self._manager is not None
        # Whoever delivers does so in its own thread: no `alive`, which would ask a lock that may be held.
        manager = InlineRemote(self._manager, lambda: None)
        return HybridClusterGateway(self.transport, manager, self._references)  # type: ignore[arg-type]

    async def reserve(self, request: Reserve) -> None:
        found = shortages(request.num_slots, request.resources, self.capacity.machines, request.strategy)
        if found or request.num_slots > self.capacity.num_slots:
            allowed = f"{self.capacity.num_slots} slots"
            raise ResourceError("R001", "; ".join(found) or "too many slots", place="resources", allowed=allowed)
        asked = request.num_slots * request.resources.num_cpus
        if not await self.cpus.take((id(self), request.run_id), asked, request.deadline_s):
            raise ResourceError(
                "R003",
                f"{asked:g} CPU were not free within {request.deadline_s:g} s",
                value=f"{self.cpus.free:g} of {self.cpus.total:g} CPU free",
            )
        self._slots[request.run_id] = request.num_slots

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        if slot >= self._slots.get(setup.activation.run_id, 0):
            raise RunError("F005", f"no slot {slot} is reserved for {name}", place=name)
        hosts = self._hosts.setdefault(setup.activation.run_id, {})
        if name not in hosts or hosts[name][0] != slot:
            hosts[name] = (slot, InlineProcess(name, lambda alive: self._new_host(setup.notes, alive)))
        hosts[name][1].restart()
        return self._actor(hosts[name][1], self._host_thread)

    def _actor(self, process: InlineProcess, executor: ThreadPoolExecutor | None = None) -> InlineActor:
        assert self._workers is not None
        return InlineActor(process, executor or self._workers, self._workers)

    def _new_host(self, notes: str, alive: Callable[[], None]) -> NodeHost:
        assert self._manager is not None
        manager = InlineRemote(self._manager, alive)
        return NodeHost(manager, self._references, HostNotes(notes))  # type: ignore[arg-type]

    async def find_host(self, run_id: str, name: str, slot: int) -> Actor | None:
        found = self._hosts.get(run_id, {}).get(name)
        if found is None or found[0] != slot:
            return None
        found[1].restart()
        return self._actor(found[1], self._host_thread)

    async def keep_hosts(self, run_id: str, names: Collection[str]) -> None:
        hosts = self._hosts.setdefault(run_id, {})
        for name in set(hosts) - set(names):
            hosts.pop(name)[1].kill()

    async def open_gateway(self, address: str) -> str:
        assert self._gateway is not None
        self._gateway.restart()
        found: str = self._gateway.living()[0].address()
        return found

    async def revive(self, actor: Actor, hung: bool) -> None:
        assert isinstance(actor, InlineActor)
        if hung:
            actor.process.kill()
        actor.process.restart()

    async def release(self, run_id: str) -> None:
        self._slots.pop(run_id, None)
        self.cpus.give_back((id(self), run_id))
        await self.keep_hosts(run_id, ())
        del self._hosts[run_id]

    async def starved(self, lives: Collection[str]) -> frozenset[str]:
        return frozenset(lives) & self._starved

    async def lost(self) -> str:
        await self._head.ended()
        return "its head was killed"

    async def rebuild(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        self._head.restart()
        self._hosts.clear()
        for run_id in self._slots:
            self.cpus.give_back((id(self), run_id))
        self._slots.clear()
        return await self.start(cluster)

    async def close(self) -> None:
        for run_id in self._slots:
            self.cpus.give_back((id(self), run_id))
        if self._gateway is not None:
            await asyncio.to_thread(self.kill_gateway)
        workers, self._workers = self._workers, None
        hosts, self._host_thread = self._host_thread, None
        if hosts is not None:
            await asyncio.to_thread(_HOST_THREAD.give_back)
        if workers is not None:
            await asyncio.to_thread(workers.shutdown)

    # ------------------------------------------------------------ deaths, for tests; from any thread

    def kill_host(self, run_id: str, slot: int, *, starved: bool = False) -> None:
        """Kill the host in a slot; `starved`: as the system does when memory runs out."""
        process = next(process for place, process in self._hosts[run_id].values() if place == slot)
        if starved:
            self._starved.add(process.living()[0].life)
        process.kill()

    def kill_manager(self) -> None:
        """Kill the topology manager."""
        assert self._manager is not None
        self._manager.kill()

    def kill_gateway(self) -> None:
        """Kill the gateway; peers cannot reach it until it is open again."""
        assert self._gateway is not None
        killed = self._gateway.kill()
        if killed is not None:
            killed.close()

    def kill_cluster(self) -> None:
        """Kill everything; :meth:`lost` returns."""
        self.kill_manager()
        if self._gateway is not None:
            self.kill_gateway()
        for hosts in self._hosts.values():
            for _, process in hosts.values():
                process.kill()
        self._head.kill()
