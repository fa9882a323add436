"""What runs inside Ray's workers: actors around the plain classes, and the handles that call them.

An actor method never lets an exception through: it answers with an :class:`Outcome`, so that no class of ours has to
survive Ray's own exception wrapping, and no traceback reaches a user.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from icrf.errors import IcrfError, InternalError, NodeError, error_from_json
from icrf.exchange import MODEL, PARTIAL
from icrf.wire.allocator import keep_freed_frames
from icrf_agent.cluster_gateway import GatewaySettings, HybridClusterGateway
from icrf_agent.host_notes import HostNotes
from icrf_agent.host_state import CONTROL_METHODS
from icrf_agent.ray_landing import Landed, Room, landed, opened
from icrf_agent.ray_probe import ClusterWatch
from icrf_agent.topology_manager import HybridTopologyManager

CONTROL = "control"

# What Ray raises when a process died, or what it held is gone; all of it means: this part must be done again.
DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.RaySystemError,
)


@dataclass(frozen=True)
class Outcome:
    """A value, or the error as JSON."""

    value: Any = None
    error_json: str = ""

    def take(self) -> Any:
        """The value; raises the error."""
        if self.error_json:
            raise error_from_json(self.error_json)
        return self.value


def outcome_of(work: Callable[[], Any]) -> Outcome:
    """Run `work`; unexpected exceptions become X001, their traceback goes to the worker's log."""
    try:
        return Outcome(work())
    except IcrfError as error:
        return Outcome(error_json=error.to_json())
    except DEATHS as error:
        return Outcome(error_json=death_of("another process", "its work", error).to_json())
    except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the agent as a value
        print(traceback.format_exc(), file=sys.stderr, flush=True)  # noqa: T201 - the worker's log
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"
        return Outcome(error_json=InternalError("X001", text, hint="the worker's log has the traceback").to_json())


def death_of(name: str, what: str, error: BaseException) -> NodeError:
    """U003 for what Ray says about a dead process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return NodeError(
        "U003", f"{name} died during {what}", place=name, value=said[:300], hint="its worker's log says why"
    )


# Ray sends an argument of up to 100 KiB along with the call; a put and a get of the same cost a call each. But what
# goes along goes to every host: only what hosts make one of each, and not what grows with the number of nodes.
_ALONG_BYTES = 88 << 10
_ALONG = frozenset({MODEL, PARTIAL})


class RayReferences:
    """The object store of the Ray cluster; references are ObjectRefs, possibly in lists so that Ray lets them be or in
    what has landed, or small models and partials themselves."""

    def __init__(self) -> None:
        self._room = Room()

    def allocate(self, num_elements: int, dtype: str) -> np.ndarray[Any, Any]:
        return self._room.allocate(num_elements, dtype)

    def put(self, array: np.ndarray[Any, Any], kind: str) -> Any:
        if (reference := landed(array)) is not None:
            return reference
        return array.copy() if kind in _ALONG and array.nbytes <= _ALONG_BYTES else ray.put(array)

    def get(self, reference: Any) -> np.ndarray[Any, Any]:
        while isinstance(reference, list):
            reference = reference[0]
        if isinstance(reference, np.ndarray):
            return reference
        has_landed = isinstance(reference, Landed)
        try:
            found: np.ndarray[Any, Any] = ray.get(reference.reference if has_landed else reference)
        except DEATHS as error:
            raise death_of("the owner of a payload", "the round", error) from error
        if not has_landed:
            return found
        if (array := opened(reference, found)) is None:
            raise NodeError(
                "U003",
                "a payload was written to disk before it was complete",
                place="object store",
                hint="give this Ray cluster's object store more memory",
            )
        return array


class Remote:
    """Calls an actor's plain object as if it were here; for use inside workers."""

    def __init__(self, actor: Any, name: str = "topology manager") -> None:
        self._actor, self._name = actor, name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)
        return lambda *arguments: self._call(method, arguments)

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            outcome: Outcome = ray.get(self._actor.invoke.remote(method, *arguments))
        except DEATHS as error:
            raise death_of(self._name, method, error) from error
        return outcome.take()


class ManagerActor:
    """The actor of the topology manager."""

    def __init__(self, cluster: str) -> None:
        self._target = HybridTopologyManager(cluster, RayReferences())

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        return outcome_of(lambda: getattr(self._target, method)(*arguments))

    def pid(self) -> int:
        """The worker's process."""
        return os.getpid()


class GatewayActor:
    """The actor of the gateway; threaded, beside the agent."""

    def __init__(self, settings: GatewaySettings, manager: Any) -> None:
        self._settings, self._manager = settings, manager
        keep_freed_frames()
        self._opening = threading.Lock()
        self._target: HybridClusterGateway | None = None

    def open(self, listen: str = "") -> Outcome:
        """Open the transport unless it is open; apart from the constructor, so that its errors reach the agent.

        Args:
            listen: the address of an earlier life, which peers know; empty: as the settings say.
        """

        def work() -> str:
            with self._opening:
                if self._target is None:
                    settings = replace(self._settings, listen=listen) if listen else self._settings
                    remote = Remote(self._manager)
                    self._target = HybridClusterGateway(settings.transport, remote, RayReferences())  # type: ignore[arg-type]
                return self._target.address()

        return outcome_of(work)

    def describe(self) -> tuple[GatewaySettings, str]:
        """Its settings and the id of the topology manager it works for."""
        return self._settings, actor_id(self._manager)

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        def work() -> Any:
            if self._target is None:
                raise NodeError("U003", "the gateway was restarted and is not open", place="gateway")
            return getattr(self._target, method)(*arguments)

        return outcome_of(work)

    def pid(self) -> int:
        """The worker's process."""
        return os.getpid()


def actor_id(handle: Any) -> str:
    """What tells an actor from a later one of the same name."""
    found: str = handle._actor_id.hex()
    return found


class HostActor:
    """The actor of a host. `NodeHost` is imported here, in the worker, because it loads torch."""

    def __init__(self, manager: Any, slot: int = 0, notes: str = "") -> None:
        from icrf_agent.node_host import NodeHost  # noqa: PLC0415 - torch belongs into the worker only

        self._about = (slot, actor_id(manager))
        recorder = HostNotes(notes)
        recorder.record_faults()
        # Ray's own name of this process, by which it also knows why it ended.
        life = ray.get_runtime_context().get_worker_id()
        self._host = NodeHost(Remote(manager), RayReferences(), recorder, life)  # type: ignore[arg-type]

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        return outcome_of(lambda: getattr(self._host, method)(*arguments))

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def host_control(self, method: str, *arguments: Any) -> Outcome:
        """Like `invoke`, and answered while a phase runs."""
        return self.invoke(method, *arguments)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def host_about(self) -> tuple[int, str]:
        """Its slot and the id of the topology manager it works for."""
        return self._about

    def node_invoke(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """A node's method, for handles inside the cluster; raises what the node raised."""
        return self._host.host_invoke(index, method, *arguments, **keywords)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def pid(self) -> int:
        """The worker's process."""
        return os.getpid()


def own_actor_class(template: type, index: int) -> type:
    """A host class with the public methods of a node's class, for a node that has an actor of its own."""

    def forward(name: str) -> Callable[..., Any]:
        def method(self: HostActor, *arguments: Any, **keywords: Any) -> Any:
            return self.node_invoke(index, name, *arguments, **keywords)

        method.__name__ = name
        return method

    taken = {"invoke", "host_control", "host_about", "node_invoke", "pid"}
    public = [n for n, _ in inspect.getmembers(template, callable) if not n.startswith("_") and n not in taken]
    return type(f"{template.__name__}Host", (HostActor,), {name: forward(name) for name in public})


@dataclass(frozen=True)
class RayActor:
    """A handle as the runtime wants it (see ``substrate.Actor``); for use in the agent's loop."""

    handle: Any
    name: str
    watch: ClusterWatch

    async def call(self, method: str, *arguments: Any) -> Any:
        self.watch.require(self.name, method)
        remote = self.handle.host_control if method in CONTROL_METHODS else self.handle.invoke
        return await answer(remote.remote(method, *arguments), self.watch, self.name, method)


async def answer(reference: Any, watch: ClusterWatch, name: str, method: str) -> Any:
    """The value behind the reference of an :class:`Outcome`; no exception of Ray's comes out of here.

    Raises:
        NodeError: U003 when the actor, or its whole cluster, died.
        IcrfError: what the actor answered, X001 for anything else that Ray reports.
    """
    try:
        outcome: Outcome = await watch.result_of(reference, name, method)
    except DEATHS as error:
        raise death_of(name, method, error) from error
    except ray.exceptions.RayError as error:
        raise InternalError("X001", f"{name}.{method}: {type(error).__name__}: {error}") from error
    return outcome.take()
