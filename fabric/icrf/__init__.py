"""ICRF: one federation over many Ray clusters, with the same bits on one cluster or on ten.

::

    with icrf.connect() as fabric:
        run = fabric.submit(icrf.FederationConfig.from_yaml("digits.yaml"))
        for r in run.rounds():
            print(r.number, r.metrics)
        run.result().save("model.safetensors")

Importing this package is light: each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icrf.client import Fabric, Result, Run
    from icrf.criterion import register_criterion
    from icrf.errors import IcrfError
    from icrf.federation.base import FederatedBase
    from icrf.federation.contribution import contributions
    from icrf.federation.message import Message
    from icrf.federation.node import FederatedNode
    from icrf.federation.resources import get_resources_split
    from icrf.federation.schemas import (
        MeshFederatedLearningSchema,
        RingFederatedLearningSchema,
        StarFederatedLearningSchema,
        schema_factory,
    )
    from icrf.federation.supervisor import FederationSupervisor
    from icrf.federation.virtual_node import VirtualNode
    from icrf.learning import Dataset, register_aggregator, register_model
    from icrf.participation import register_sampler
    from icrf.registry import register
    from icrf.spec import FederationConfig
    from icrf.topology import (
        TopologyAdaptationStrategy,
        register_grouping,
        register_mixing,
        register_network_builder,
        register_topology,
    )

__version__ = "0.1.0"

__all__ = [
    "Dataset",
    "Fabric",
    "FederatedBase",
    "FederatedNode",
    "FederationConfig",
    "FederationSupervisor",
    "IcrfError",
    "MeshFederatedLearningSchema",
    "Message",
    "Result",
    "RingFederatedLearningSchema",
    "Run",
    "StarFederatedLearningSchema",
    "TopologyAdaptationStrategy",
    "VirtualNode",
    "__version__",
    "connect",
    "contributions",
    "get_resources_split",
    "register",
    "register_aggregator",
    "register_criterion",
    "register_grouping",
    "register_mixing",
    "register_model",
    "register_network_builder",
    "register_sampler",
    "register_topology",
    "schema_factory",
]

_HOME = {
    "Fabric": "icrf.client",
    "Run": "icrf.client",
    "Result": "icrf.client",
    "IcrfError": "icrf.errors",
    "FederatedBase": "icrf.federation.base",
    "FederatedNode": "icrf.federation.node",
    "VirtualNode": "icrf.federation.virtual_node",
    "Message": "icrf.federation.message",
    "StarFederatedLearningSchema": "icrf.federation.schemas",
    "RingFederatedLearningSchema": "icrf.federation.schemas",
    "MeshFederatedLearningSchema": "icrf.federation.schemas",
    "schema_factory": "icrf.federation.schemas",
    "FederationSupervisor": "icrf.federation.supervisor",
    "FederationConfig": "icrf.spec",
    "contributions": "icrf.federation.contribution",
    "get_resources_split": "icrf.federation.resources",
    "register": "icrf.registry",
    "register_grouping": "icrf.topology",
    "register_mixing": "icrf.topology",
    "register_network_builder": "icrf.topology",
    "register_topology": "icrf.topology",
    "TopologyAdaptationStrategy": "icrf.topology",
    "Dataset": "icrf.learning",
    "register_aggregator": "icrf.learning",
    "register_model": "icrf.learning",
    "register_criterion": "icrf.criterion",
    "register_sampler": "icrf.participation",
}

# Federations open a fabric of their own unless they are given one; this facade hands them the factory.
_FEDERATIONS = {"icrf.federation.base", "icrf.federation.schemas"}


def connect(
    address: str | None = None,
    *,
    clusters: int = 1,
    state_dir: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
    tls: Path | str | None = None,
) -> Fabric:
    """Open a fabric: the mediator at `address`, or an embedded one with `clusters` local Ray clusters.

    See :func:`icrf.client.connect`. This facade is the composition root: only here does the SDK meet the factory of
    embedded fabrics, so that nothing below imports upward.
    """
    from icrf import client  # noqa: PLC0415 - importing icrf stays light

    if address is not None or tls is not None:
        return client.connect(address, clusters=clusters, tls=tls)
    from icrf.local import open_local  # noqa: PLC0415 - loads the agent and the mediator

    return client.connect(clusters=clusters, state_dir=state_dir, on_progress=on_progress, open_local=open_local)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'icrf' has no attribute {name!r}")
    module = importlib.import_module(home)
    if home in _FEDERATIONS:
        importlib.import_module("icrf.federation.base").FederatedBase.open_fabric = staticmethod(connect)
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
