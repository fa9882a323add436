"""Names for what users may plug in: a registered name, an import path or an installed entry point."""

from __future__ import annotations

import difflib
import importlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from icrf.errors import ConfigError, IcrfError

T = TypeVar("T")

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# Lets the specification know which names exist without importing the packages that own the registries (they load
# NumPy and torch). Weak, so that a registry made by a test leaves no trace.
_REGISTRIES: weakref.WeakSet[Registry[Any]] = weakref.WeakSet()
# What was registered before the package that owns the registry was imported.
_EARLY: dict[str, dict[str, Any]] = {}

KINDS = (
    "topology",
    "mixing",
    "adapter",
    "model",
    "dataset",
    "partitioner",
    "aggregator",
    "assignment",
    "metric",
    "schema",
    "sampler",
    "criterion",
    "sink",
)

# The configuration key, or the flag, that names a plug-in of this kind: the place of errors about it.
_KEYS = {
    "topology": "federated_learning_topology",
    "mixing": "mixing",
    "adapter": "topology_adaptation_strategy",
    "grouping": "group_by",
    "model": "model_type",
    "dataset": "dataset_type",
    "partitioner": "data_distribution_kind",
    "aggregator": "aggregation_strategy",
    "metric": "metrics",
    "schema": "schema",
    "sampler": "client_sampler",
    "criterion": "activation",
    "assignment": "assignment_strategy",
    "sink": "--log",
}


class Registry(Generic[T]):
    """The plug-ins of one kind, e.g. ``topology``.

    Args:
        kind: a singular noun for messages; entry points are looked up in the group ``icrf.<kind>``.

    Attributes:
        key: the configuration key that names plug-ins of this kind, the place of errors about them.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.key = _KEYS.get(kind, "")
        self._objects: dict[str, T] = {}
        _REGISTRIES.add(self)
        for name, obj in _EARLY.pop(kind, {}).items():
            self.add(name, obj)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`; returns the decorated object unchanged."""

        def decorate(obj: T) -> T:
            self.add(name, obj)
            return obj

        return decorate

    def add(self, name: str, obj: T) -> None:
        """Make `obj` known as `name`.

        The same definition may come again (a module reloaded, a notebook cell run twice) and replaces the old one.

        Raises:
            ConfigError: C008 if another object has this name.
        """
        present = self._objects.get(name)
        if present is not None and present is not obj and _definition(present) != _definition(obj):
            raise ConfigError(
                "C008",
                f"{self.kind} '{name}' is registered already",
                value=_definition(present),
                hint=f"Choose another name for {_definition(obj)}.",
            )
        self._objects[name] = obj

    def get(self, name: str) -> T:
        """The object called `name`: registered, else ``module:attr``, else an entry point of ``icrf.<kind>``.

        Raises:
            ConfigError: C010 for an unknown name, C017 for code that cannot be imported.
        """
        if name in self._objects:
            return self._objects[name]
        if ":" in name:
            loaded: T = load_attr(name, self.key)
            return loaded
        for point in entry_points(group=self._group, name=name):
            from_package: T = _import(name, point.load, f"entry point {point.value}", self.key)
            return from_package
        raise unknown_name(self.kind, name, self.names(), self.key)

    @contextmanager
    def calling(self, name: str, purpose: str = "") -> Iterator[None]:
        """Around every call of the plug-in `name` outside a node: what it raises is the user's to mend.

        Errors of the fabric pass as they are.

        Args:
            purpose: said after the reason, such as ``for round 3``.

        Raises:
            ConfigError: C017 naming key and plug-in, also where it tries to end the process.
        """
        try:
            yield
        except IcrfError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{self.kind} '{name}' raised {_reason(error)}"
            raise ConfigError("C017", f"{what} {purpose}".rstrip(), place=self.key, value=name) from error

    def names(self) -> tuple[str, ...]:
        """Registered names and installed entry points, sorted."""
        return tuple(sorted({*self._objects, *(point.name for point in self._entry_points())}))

    @property
    def _group(self) -> str:
        return f"icrf.{self.kind}"

    def _entry_points(self) -> Iterable[EntryPoint]:
        return entry_points(group=self._group)


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator that makes a plug-in known in this process, whatever its kind; it loads nothing.

    Another process knows the name only if it imports the code too. Hosts of real clusters are such processes: name
    what they need as ``module:attr``, or as an entry point of an installed package.

    Args:
        kind: one of :data:`KINDS`.
        name: what a configuration calls it.

    Raises:
        ConfigError: C010 for an unknown kind, C008 if another object has the name.
    """
    if kind not in KINDS:
        raise unknown_name("kind of plug-in", kind, KINDS)

    def decorate(obj: T) -> T:
        owners = [registry for registry in list(_REGISTRIES) if registry.kind == kind]
        for registry in owners:
            registry.add(name, obj)
        if not owners:
            _EARLY.setdefault(kind, {})[name] = obj
        return obj

    return decorate


def registered_names(kind: str) -> frozenset[str]:
    """Names that registries of this kind know at the moment, plus installed entry points of ``icrf.<kind>``."""
    known = {name for registry in list(_REGISTRIES) if registry.kind == kind for name in registry._objects}
    known |= _EARLY.get(kind, {}).keys()
    return frozenset(known | {point.name for point in entry_points(group=f"icrf.{kind}")})


def is_import_path(name: str) -> bool:
    """Whether `name` has the form ``package.module:attribute``; nothing is imported."""
    return _IMPORT_PATH.fullmatch(name) is not None


def load_attr(path: str, place: str = "") -> Any:
    """Import ``module:attr`` (``attr`` may be dotted).

    Args:
        place: the configuration key that names it, for errors.

    Raises:
        ConfigError: C017 with the reason: malformed path, module that cannot be imported, no such attribute.
    """
    if not is_import_path(path):
        raise ConfigError("C017", f"'{path}' is no import path", place=place, allowed="package.module:attribute")
    module_name, _, attribute = path.partition(":")
    found: Any = _import(path, lambda: importlib.import_module(module_name), f"module '{module_name}'", place)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            raise ConfigError(
                "C017",
                f"cannot load '{path}': '{module_name}' has no '{part}'",
                place=place,
                hint=did_you_mean(part, public),
            )
        found = getattr(found, part)
    return found


def unknown_name(kind: str, name: str, known: Iterable[str], place: str = "") -> ConfigError:
    """The C010 error for a `name` that is not among the `known` ones."""
    known = tuple(known)
    return ConfigError(
        "C010",
        f"{kind} '{name}' unknown",
        place=place,
        allowed=", ".join(known) or "module:attr",
        hint=did_you_mean(name, known),
    )


def nearest(name: str, known: Iterable[str], count: int = 2) -> tuple[str, ...]:
    """Known names that a user may have meant by `name`, best first; letter case and missing words are forgiven."""
    wanted = name.casefold()
    scores = {candidate: _likeness(wanted, candidate.casefold()) for candidate in known}
    best = sorted((c for c, score in scores.items() if score >= 0.6), key=lambda c: (-scores[c], c))
    if best and scores[best[0]] == 1:
        return (best[0],)
    # Another suggestion helps only if it is nearly as good as the first.
    return tuple(candidate for candidate in best[:count] if scores[candidate] >= scores[best[0]] - 0.1)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known names, or an empty string."""
    names = " or ".join(f"'{candidate}'" for candidate in nearest(name, known))
    return f"Did you mean {names}?" if names else ""


def _likeness(wanted: str, candidate: str) -> float:
    """Similarity in 0..1; a single word of a compound name (``rounds`` of ``federated_learning_rounds``) counts too."""
    words = candidate.split("_")
    whole = difflib.SequenceMatcher(None, wanted, candidate).ratio()
    if len(words) == 1:
        return whole
    if wanted == "".join(word[:1] for word in words):
        return 0.9
    part = max(difflib.SequenceMatcher(None, wanted, word).ratio() for word in words if word)
    return max(whole, 0.95 * part)


def _definition(obj: object) -> str:
    return f"{getattr(obj, '__module__', '?')}:{getattr(obj, '__qualname__', repr(obj))}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _import(path: str, load: Callable[[], Any], what: str, place: str) -> Any:
    try:
        return load()
    # Importing runs foreign code, which may raise anything or try to end the process.
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and path.startswith(f"{error.name}")
        raise ConfigError(
            "C017",
            f"cannot load '{path}': {what} failed to import",
            place=place,
            value=_reason(error),
            hint="Put its folder beside the configuration or on PYTHONPATH." if missing else "",
        ) from error
