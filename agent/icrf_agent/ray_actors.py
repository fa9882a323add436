"""What runs inside Ray's workers: actors around the plain classes, and the handles that call them.

An actor method never lets an exception through: it answers with an :class:`Outcome`, so that no class of ours has to
survive Ray's own exception wrapping, and no traceback reaches a user.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from icrf.errors import IcrfError, InternalError, NodeError, error_from_json
from icrf_agent.cluster_gateway import GatewaySettings, HybridClusterGateway
from icrf_agent.topology_manager import HybridTopologyManager


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
    except Exception as error:  # noqa: BLE001 - whatever it is, it must reach the agent as a value
        print(traceback.format_exc(), file=sys.stderr, flush=True)  # noqa: T201 - the worker's log
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"
        return Outcome(error_json=InternalError("X001", text, hint="the worker's log has the traceback").to_json())


class RayReferences:
    """The object store of the Ray cluster; references are ObjectRefs, possibly in lists so that Ray lets them be."""

    def put(self, array: np.ndarray[Any, Any]) -> Any:
        return ray.put(array)

    def get(self, reference: Any) -> np.ndarray[Any, Any]:
        while isinstance(reference, list):
            reference = reference[0]
        found: np.ndarray[Any, Any] = ray.get(reference)
        return found


class Remote:
    """Calls an actor's plain object as if it were here; for use inside workers."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)
        actor = self._actor
        return lambda *arguments: ray.get(actor.invoke.remote(method, *arguments)).take()


class ManagerActor:
    """The actor of the topology manager."""

    def __init__(self, cluster: str) -> None:
        self._target = HybridTopologyManager(cluster, RayReferences())

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        return outcome_of(lambda: getattr(self._target, method)(*arguments))


class GatewayActor:
    """The actor of the gateway; threaded, beside the agent."""

    def __init__(self, settings: GatewaySettings, manager: Any) -> None:
        self._settings, self._manager = settings, manager
        self._target: HybridClusterGateway | None = None

    def open(self) -> Outcome:
        """Open the transport; apart from the constructor, so that its errors reach the agent."""

        def work() -> str:
            self._target = HybridClusterGateway(self._settings.transport, Remote(self._manager), RayReferences())  # type: ignore[arg-type]
            return self._target.address()

        return outcome_of(work)

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        return outcome_of(lambda: getattr(self._target, method)(*arguments))


class HostActor:
    """The actor of a host. `NodeHost` is imported here, in the worker, because it loads torch."""

    def __init__(self, manager: Any) -> None:
        from icrf_agent.node_host import NodeHost  # noqa: PLC0415 - torch belongs into the worker only

        self._host = NodeHost(Remote(manager), RayReferences())  # type: ignore[arg-type]

    def invoke(self, method: str, *arguments: Any) -> Outcome:
        return outcome_of(lambda: getattr(self._host, method)(*arguments))

    def node_invoke(self, index: int, method: str, *arguments: Any, **keywords: Any) -> Any:
        """A node's method, for handles inside the cluster; raises what the node raised."""
        return self._host.host_invoke(index, method, *arguments, **keywords)

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

    taken = {"invoke", "node_invoke", "pid"}
    public = [n for n, _ in inspect.getmembers(template, callable) if not n.startswith("_") and n not in taken]
    return type(f"{template.__name__}Host", (HostActor,), {name: forward(name) for name in public})


@dataclass(frozen=True)
class RayActor:
    """A handle as the runtime wants it (see ``runtime.Actor``); for use in the agent's loop."""

    handle: Any
    name: str

    async def call(self, method: str, *arguments: Any) -> Any:
        return await answer(self.handle.invoke.remote(method, *arguments), self.name, method)


async def answer(reference: Any, name: str, method: str) -> Any:
    """The value behind the reference of an :class:`Outcome`; no exception of Ray's comes out of here.

    Raises:
        NodeError: U003 when the actor died.
        IcrfError: what the actor answered, X001 for anything else that Ray reports.
    """
    try:
        outcome: Outcome = await reference
    except ray.exceptions.RayActorError as error:
        raise NodeError("U003", f"{name} died during {method}", place=name, hint="its worker's log says why") from error
    except ray.exceptions.RayError as error:
        raise InternalError("X001", f"{name}.{method}: {type(error).__name__}: {error}") from error
    return outcome.take()
