"""What users test their own nodes with.

* :class:`InlineFabric`: N clusters inside the test's process, without Ray; a federation takes a second.
* :class:`SocketFabric`: the same over gRPC on real sockets, through lines that delay, pace, stall and reset.
* :class:`WanLine`: such a line alone, to put in front of anything that listens; :func:`parse_wan` reads its shape.
* :class:`FabricEnvironment`: N real Ray clusters, real daemons, and faults on demand; a start takes ten seconds.
* :class:`ScriptedMediator`: a mediator that answers what the test wrote down.

Importing this package is light: each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icrf.testing.environment import FabricEnvironment
    from icrf.testing.inline import InlineFabric
    from icrf.testing.scripted import ScriptedMediator
    from icrf.testing.sockets import SocketFabric
    from icrf.wan import WanLine, WanShape, parse_wan

__all__ = [
    "FabricEnvironment",
    "InlineFabric",
    "ScriptedMediator",
    "SocketFabric",
    "WanLine",
    "WanShape",
    "parse_wan",
]

_HOME = {
    "FabricEnvironment": "icrf.testing.environment",
    "InlineFabric": "icrf.testing.inline",
    "ScriptedMediator": "icrf.testing.scripted",
    "SocketFabric": "icrf.testing.sockets",
    "WanLine": "icrf.wan",
    "WanShape": "icrf.wan",
    "parse_wan": "icrf.wan",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'icrf.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
