"""YAML 1.2 text as plain values, each with the line it came from, and nothing that could surprise.

No tags, no merge keys, no duplicate keys; bounded size, depth and expansion of aliases. Of the unquoted words only
``true``, ``false`` and ``null`` (or ``~``, or nothing) are special: ``off``, ``no`` and ``010`` are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.reader import ReaderError

from icrf.errors import ConfigError, ConfigErrors
from icrf.spec.problems import Path

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 100_000

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
# The bound on digits keeps int() away from its own limit; a longer number is left a string and refused as one.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,299})|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NON_FINITE = re.compile(r"([-+]?)\.(?:(inf|Inf|INF)|(nan|NaN|NAN))")


@dataclass
class Document:
    """What a text says.

    Attributes:
        value: None, bool, int, float, str, list or dict.
        lines: 1-based line of each key, by its path.
        errors: what is wrong with parts of it; the rest was read on.
        unreadable: first-level keys whose values are in error.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    errors: list[ConfigError] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)


def read_yaml(text: str | bytes, source: str, *, with_lines: bool = True) -> Document:
    """Read one YAML document.

    Args:
        source: file name, flag or variable, for the places of errors.
        with_lines: whether the place of an error is ``source:line`` or just `source`.

    Raises:
        ConfigErrors: C001 for a syntax error, C003 for a text that is too large, too deep or expands too far. Tags
            (C002) and duplicate keys (C004) are left in the document's `errors`.
    """
    reader = _Reader(source, with_lines)
    if len(text) > MAX_BYTES:
        raise ConfigErrors([reader.too_large(f"more than {MAX_BYTES} bytes", 1)])
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ConfigErrors([ConfigError("C001", f"not UTF-8 at byte {error.start}", place=source)]) from error
    try:
        reader.read(yaml.parse(decoded, Loader=_PARSER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = reader.place(mark.line + 1, mark.column + 1) if mark else source
        raise ConfigErrors(
            [ConfigError("C001", error.problem or error.context or "bad syntax", place=place)]
        ) from error
    except ReaderError as error:
        line = decoded.count("\n", 0, error.position) + 1
        raise ConfigErrors([ConfigError("C001", f"{error.reason}", place=reader.place(line))]) from error
    except ConfigError as error:
        raise ConfigErrors([error]) from error
    return reader.document


@dataclass(frozen=True)
class _Node:
    """A value with what its expansion costs: `size` nodes, `height` levels below it."""

    value: Any
    size: int = 1
    height: int = 0


class _Reader:
    """Builds values from parser events. Sizes and depths are counted before anything is expanded."""

    def __init__(self, source: str, with_lines: bool) -> None:
        self.document = Document()
        self._source, self._with_lines = source, with_lines
        self._anchors: dict[str, _Node | None] = {}
        self._num_nodes = 0

    def place(self, line: int, column: int = 0) -> str:
        if not self._with_lines:
            return self._source
        return f"{self._source}:{line}:{column}" if column else f"{self._source}:{line}"

    def too_large(self, what: str, line: int) -> ConfigError:
        return ConfigError("C003", f"configuration too large or deep: {what}", place=self.place(line))

    def read(self, events: Iterator[Event]) -> None:
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._syntax(event, "a second document; a configuration is one")
            elif isinstance(event, AliasEvent | ScalarEvent | MappingStartEvent | SequenceStartEvent):
                self.document.value = self._node(event, events, (), 1).value

    def _node(self, event: Event, events: Iterator[Event], path: Path, depth: int) -> _Node:
        line = _line(event)
        if depth > MAX_DEPTH:
            raise self.too_large(f"nested deeper than {MAX_DEPTH} levels", line)
        if isinstance(event, AliasEvent):
            node = self._alias(event, depth)
        else:
            anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
            if tag is not None:
                self._complain(
                    "C002", f"tag '{_short(_as_written(tag))}' not allowed", line, path, "Write the plain value."
                )
            if anchor is not None:
                self._anchors[anchor] = None
            if isinstance(event, MappingStartEvent):
                node = self._mapping(events, path, depth)
            elif isinstance(event, SequenceStartEvent):
                node = self._sequence(events, path, depth)
            else:
                node = _Node(_scalar(event) if isinstance(event, ScalarEvent) else None)
            if anchor is not None:
                self._anchors[anchor] = node
        self._num_nodes += node.size if isinstance(event, AliasEvent) else 1
        if self._num_nodes > MAX_NODES:
            raise self.too_large(f"more than {MAX_NODES} values once aliases are expanded", line)
        return node

    def _alias(self, event: AliasEvent, depth: int) -> _Node:
        name = str(event.anchor)
        node = self._anchors.get(name)
        if node is None:
            raise self._syntax(
                event, f"alias '*{_short(name)}' {'contains itself' if name in self._anchors else 'is not defined'}"
            )
        if depth + node.height > MAX_DEPTH:
            raise self.too_large(f"nested deeper than {MAX_DEPTH} levels once aliases are expanded", _line(event))
        return node

    def _sequence(self, events: Iterator[Event], path: Path, depth: int) -> _Node:
        items: list[_Node] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._node(event, events, (*path, str(len(items))), depth + 1))
        return _around([item.value for item in items], items)

    def _mapping(self, events: Iterator[Event], path: Path, depth: int) -> _Node:
        entries: dict[str, _Node] = {}
        lines: dict[str, int] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            line = _line(event)
            key = self._key(event, events, path, depth)
            inner = (*path, key)
            if key in entries:
                known = f"duplicate key '{_short(key)}'" + (
                    f" (lines {lines[key]}, {line})" if self._with_lines else ""
                )
                self._complain("C004", known, line, inner, "Keep one of them.")
            else:
                lines[key] = line
                self.document.lines[inner] = line
            entries[key] = self._node(next(events), events, inner, depth + 1)
        return _around({key: node.value for key, node in entries.items()}, list(entries.values()))

    def _key(self, event: Event, events: Iterator[Event], path: Path, depth: int) -> str:
        value = self._node(event, events, path, depth + 1).value
        if isinstance(value, str):
            return value
        text = str(event.value) if isinstance(event, ScalarEvent) else type(value).__name__
        self._complain("C006", f"key {_short(text)} is no string", _line(event), (*path, text), "Put it in quotes.")
        return text

    def _complain(self, code: str, message: str, line: int, path: Path, hint: str) -> None:
        self.document.errors.append(ConfigError(code, message, place=self.place(line), hint=hint))
        if path:
            self.document.unreadable.add(path[0])

    def _syntax(self, event: Event, message: str) -> ConfigError:
        return ConfigError("C001", message, place=self.place(_line(event), _mark(event).column + 1))


def _mark(event: Event) -> yaml.Mark:
    mark: Any = event.start_mark  # the stubs allow None, which parsers never give
    return cast(yaml.Mark, mark)


def _line(event: Event) -> int:
    return _mark(event).line + 1


def _as_written(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!", 1)


def _around(value: Any, parts: list[_Node]) -> _Node:
    return _Node(value, 1 + sum(p.size for p in parts), 1 + max((p.height for p in parts), default=0))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _scalar(event: ScalarEvent) -> Any:
    """Resolve by the core schema of YAML 1.2 (section 10.3); quoted text is a string whatever it says."""
    text: str = event.value
    if event.style not in (None, ""):
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _NON_FINITE.fullmatch(text):
        return float(f"{special[1]}{special[2] or special[3]}")
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for anything but a string."""


_Dumper.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT.pattern})$"), "-+0123456789"),
    ("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern}|{_NON_FINITE.pattern})$"), "-+.0123456789"),
):
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values, of printable text, as YAML that :func:`read_yaml` reads back unchanged."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text
