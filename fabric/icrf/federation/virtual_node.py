"""A node as its federation sees it: a few hundred bytes until it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from icrf.errors import RunError
from icrf.spec import FederationConfig


class NodeBinding(Protocol):
    """What a federation does for its nodes."""

    def activate(self) -> None:
        """Make all nodes of the federation live; harmless when they are."""

    def is_active(self) -> bool: ...

    def handle_of(self, node_id: str) -> Any: ...

    def call(self, node_id: str, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any: ...


class NodeMethod:
    """``handle.method``; `remote` starts the call."""

    def __init__(self, invoke: Callable[..., Any], name: str) -> None:
        self._invoke, self._name = invoke, name

    def remote(self, *arguments: Any, **keywords: Any) -> Any:
        """Start the call; an ObjectRef for ``ray.get``."""
        return self._invoke(self._name, *arguments, **keywords)


class NodeHandle:
    """Stands for a node that shares its host's actor; has the same ``.method.remote()`` as an actor handle.

    Args:
        node_id: the node.
        invoke: ``invoke(method, *arguments, **keywords)`` starts a call on the host and returns its ObjectRef.
    """

    def __init__(self, node_id: str, invoke: Callable[..., Any]) -> None:
        self._node_id, self._invoke = node_id, invoke

    def __getattr__(self, name: str) -> NodeMethod:
        if name.startswith("_"):
            raise AttributeError(name)
        return NodeMethod(self._invoke, name)

    def __repr__(self) -> str:
        return f"NodeHandle({self._node_id})"


class VirtualNode:
    """One node of a federation.

    Args:
        template: its class, a ``FederatedNode`` subclass, plain or decorated with ``@ray.remote``.
        id: its name.
        role: dash-separated words out of ``train``, ``eval``, ``test``, ``aggregate``.
        config: the federation's configuration.
        log: a logger handed to the node.
    """

    __slots__ = ("_binding", "config", "id", "log", "role", "template")

    def __init__(self, template: Any, id: str, role: str, config: FederationConfig, log: Any = None) -> None:
        self.template = plain_class(template)
        self.id = id
        self.role = role
        self.config = config
        self.log = log
        self._binding: NodeBinding | None = None

    def __repr__(self) -> str:
        return f"VirtualNode({self.id}, {self.role}{', built' if self.built else ''})"

    @property
    def fed_id(self) -> str:
        return self.config.federation_id

    def bind(self, binding: NodeBinding) -> None:
        """Make it part of a federation; the federation calls this."""
        self._binding = binding

    def build(self, bundle_idx: int | None = None, placement_group: Any = None) -> None:
        """Make the node live. The fabric places it in its own reservation.

        Args:
            bundle_idx: accepted for the seeds' sake; slots are given out in index order.
            placement_group: must be None: the reservation is the fabric's.
        """
        if placement_group is not None:
            raise RunError(
                "F005",
                "a node is placed in the reservation of its federation, not in a group of your own",
                place="placement_group",
                hint="size the slots with resources={'num_cpus': ...}",
            )
        self._bound().activate()

    @property
    def built(self) -> bool:
        """Whether it is live; asking never activates it."""
        return self._binding is not None and self._binding.is_active()

    @property
    def handle(self) -> Any:
        """The node's ``ray.actor.ActorHandle`` where it has an actor of its own, else a :class:`NodeHandle`.

        Activates on first access. P010 names the cluster when the node lives on another one: use `call` there.
        """
        self._bound().activate()
        return self._bound().handle_of(self.id)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of the node on whatever cluster it lives and wait for its value."""
        self._bound().activate()
        return self._bound().call(self.id, method, arguments, keywords)

    def _bound(self) -> NodeBinding:
        if self._binding is None:
            raise RunError("F005", f"{self.id} is not part of a federation yet", hint="give it to a FederatedBase")
        return self._binding


def plain_class(template: Any) -> type:
    """The class behind a template; ``@ray.remote`` classes are taken apart."""
    metadata = getattr(template, "__ray_metadata__", None)
    # Ray decorates a subclass whose methods are all its own: which ones the user has overridden only the base tells.
    found: type = metadata.modified_class.__ray_actor_class__ if metadata is not None else template
    return found
