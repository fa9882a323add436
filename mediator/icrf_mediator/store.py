"""The journal in memory, and what every journal shares: tables, the order of keys, the form of rows."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from icrf.errors import InternalError, RunError
from icrf.ports import Write

TABLES = (
    "submissions",
    "runs",
    "goals",
    "assignments",
    "activations",
    "members",
    "participants",
    "attempts",
    "commits",
    "checkpoints",
    "graphs",
    "relinks",
    "events",
    "links",
    "meta",
)
SCHEMA_VERSION = 1
SCHEMA_KEY = ("schema",)

Key = tuple[str | int, ...]

_BYTES_TAG = "$base64"
_INT, _STR = b"\x01", b"\x02"
_INT_OFFSET = 1 << 63


def encode_key(key: Key) -> bytes:
    """Bytes whose order is the order of keys: part by part, integers by value and before strings.

    Every part ends itself, so the encoding of a prefix is a prefix of the encoding.
    """
    parts = []
    for part in key:
        if isinstance(part, str):
            parts.append(_STR + part.encode("utf-8", "surrogatepass").replace(b"\0", b"\0\xff") + b"\0\x01")
        elif -_INT_OFFSET <= part < _INT_OFFSET:
            parts.append(_INT + (part + _INT_OFFSET).to_bytes(8, "big"))
        else:
            raise InternalError("X001", "key part outside 64 bits", place="journal", value=part)
    return b"".join(parts)


def _encode_bytes(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {_BYTES_TAG: base64.b64encode(value).decode()}
    raise InternalError("X001", f"the journal holds plain values, not {type(value).__name__}", place="journal")


def _decode_bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES_TAG]) if value.keys() == {_BYTES_TAG} else value


def encode_row(row: Mapping[str, Any]) -> str:
    """A row as JSON text. Bytes are kept; tuples come back as lists."""
    return json.dumps(dict(row), default=_encode_bytes, separators=(",", ":"))


def decode_row(text: str) -> dict[str, Any]:
    """The inverse of :func:`encode_row`; a fresh value each time."""
    row: dict[str, Any] = json.loads(text, object_hook=_decode_bytes)
    return row


def check_table(table: str) -> str:
    """Refuse a table that no journal has."""
    if table not in TABLES:
        raise InternalError("X001", f"no table {table!r}", place="journal", allowed=", ".join(TABLES))
    return table


def check_unchanged(key: Key, old: str, new: str) -> None:
    """A commit is for ever: writing it again is fine, writing another one is not (F005)."""
    if old != new and _canonical(old) != _canonical(new):
        place = f"round {key[1]}" if len(key) > 1 else ""
        raise RunError("F005", f"commit {list(key)} exists with other content", place=place)


def _canonical(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


class MemoryStore:
    """The :class:`icrf.ports.FederationStore` that forgets at exit. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[str, dict[Key, str]] = {table: {} for table in TABLES}
        self._tables["meta"][SCHEMA_KEY] = encode_row({"version": SCHEMA_VERSION})

    def apply(self, writes: Sequence[Write]) -> None:
        """See :class:`icrf.ports.FederationStore`."""
        staged: dict[tuple[str, Key], str] = {}
        with self._lock:
            for write in writes:
                encode_key(write.key)
                text, rows = encode_row(write.row), self._tables[check_table(write.table)]
                old = staged.get((write.table, write.key), rows.get(write.key))
                if write.table == "commits" and old is not None:
                    check_unchanged(write.key, old, text)
                staged[write.table, write.key] = text
            for (table, key), text in staged.items():
                self._tables[table][key] = text

    def rows(self, table: str, prefix: Key = ()) -> list[Write]:
        """See :class:`icrf.ports.FederationStore`."""
        with self._lock:
            found = [(k, t) for k, t in self._tables[check_table(table)].items() if k[: len(prefix)] == prefix]
        return [Write(table, key, decode_row(text)) for key, text in sorted(found, key=lambda kt: encode_key(kt[0]))]

    def close(self) -> None:
        """Nothing to release."""
