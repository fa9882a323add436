"""What is wrong with a configuration, before it is known where it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from icrf.errors import ConfigError, ConfigErrors

Path = tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One complaint; `path` leads to the value inside the configuration, e.g. ``("placement", "client_3")``."""

    code: str
    path: Path
    message: str
    allowed: str = ""
    hint: str = ""

    def at(self, place: str) -> ConfigError:
        """The error for a user, with the place where the value was written."""
        return ConfigError(self.code, self.message, place=place, allowed=self.allowed, hint=self.hint)


# The keys that are valid by themselves, and what looks for contradictions between them.
Values = Mapping[str, Any]
Check = Callable[[Values], Iterator[Problem]]


@dataclass(frozen=True)
class Places:
    """Where each value was written.

    Attributes:
        source: what to name when nothing better is known, e.g. a file.
        by_path: place of a key, e.g. ``fed.yaml:4``, ``-o seed=x`` or ``ICRF_SEED``.
        unreadable: first-level keys whose values could not be read; they have been complained about.
    """

    source: str
    by_path: Mapping[Path, str] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()

    def find(self, path: Path) -> str:
        """The place of the innermost key of `path` that is known."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.by_path:
                return self.by_path[path[:length]]
        return self.source

    def errors(self, problems: Iterable[Problem]) -> ConfigErrors:
        """All problems as one exception."""
        return ConfigErrors(problem.at(self.find(problem.path)) for problem in problems)


def describe(value: object) -> str:
    """A value found, in the words of YAML: ``string 'ten'``, ``number 1000.0``, ``true``, ``null``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        text = str(value) if not isinstance(value, int) or value.bit_length() < 256 else f"about 2^{value.bit_length()}"
        return f"number {text}"
    if isinstance(value, str):
        return f"string {value[:80]!r}"
    kinds = ((dict, "a mapping"), (list, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a value of type {type(value).__name__}")


def too_many(key: str, value: int, most: int, of_what: str, least: int = 1) -> Problem:
    """A number above what another key allows (C008)."""
    allowed = f"{least} to {most}" if least <= most else ""
    return Problem("C008", (key,), f"{key} {value} > {most} {of_what}", allowed=allowed)
