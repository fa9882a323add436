"""Calling a user's function with what it has parameters for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def accepted_arguments(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments, by name, that `function` has parameters for.

    A function that takes ``**kwargs`` gets all of them; one whose signature cannot be read (some builtins) gets none.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # no signature; or no callable, which its call will say
        return {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in parameters}
