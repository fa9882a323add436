"""What users test their own nodes with.

* :class:`InlineFabric`: N clusters inside the test's process, without Ray; a federation takes a second.
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

__all__ = ["FabricEnvironment", "InlineFabric", "ScriptedMediator"]

_HOME = {
    "FabricEnvironment": "icrf.testing.environment",
    "InlineFabric": "icrf.testing.inline",
    "ScriptedMediator": "icrf.testing.scripted",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'icrf.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
