"""The journal on disk: SQLite in WAL mode, every ``apply`` one transaction that is on the disk when it returns."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from icrf.daemon import fsync_directory
from icrf.errors import InternalError, LocalError
from icrf.ports import Write
from icrf_mediator.store import (
    SCHEMA_KEY,
    SCHEMA_VERSION,
    TABLES,
    Key,
    check_table,
    check_unchanged,
    decode_row,
    encode_key,
    encode_row,
)

T = TypeVar("T")

# No byte of an encoded key starts a part with 0xff, so this closes the range of a prefix.
_AFTER_PREFIX = b"\xff"


class SqliteStore:
    """The :class:`icrf.ports.FederationStore` that survives a crash and a power loss. Thread-safe.

    One thread owns the connection; every call runs there, one after the other, and waits for its result.

    Args:
        path: the database file; created when missing. Its folder must exist.

    Raises:
        LocalError: L007 when the file is no journal, is damaged or is of a newer schema; L005 when not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="icrf-journal")
        try:
            self._db = self._in_thread(self._open)
        except BaseException:
            self._thread.shutdown()
            raise

    def apply(self, writes: Sequence[Write]) -> None:
        """See :class:`icrf.ports.FederationStore`.

        Raises:
            RunError: F005 for a commit that exists with other content.
            LocalError: L005 when the disk refuses, L007 when the file is damaged.
        """
        encoded = [(check_table(w.table), w.key, encode_key(w.key), encode_row(w.row)) for w in writes]
        self._in_thread(lambda: self._write(encoded))

    def rows(self, table: str, prefix: Key = ()) -> list[Write]:
        """See :class:`icrf.ports.FederationStore`."""
        low = encode_key(prefix)
        query = f"SELECT key, row FROM {check_table(table)} WHERE sort >= ? AND sort < ? ORDER BY sort"
        found = self._in_thread(lambda: self._db.execute(query, (low, low + _AFTER_PREFIX)).fetchall())
        return [Write(table, tuple(json.loads(key)), decode_row(row)) for key, row in found]

    def close(self) -> None:
        """Close the file; harmless when called twice."""
        if not self._closed:
            self._in_thread(self._db.close)
            self._closed = True
            self._thread.shutdown()

    def _in_thread(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise InternalError("X001", "the journal is closed", place=str(self._path))
        try:
            return self._thread.submit(call).result()
        except sqlite3.OperationalError as error:
            raise LocalError(
                "L005", f"journal {self._path} cannot be used: {error}", place="--state", hint="check the disk"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._foreign(str(error)) from error

    def _foreign(self, why: str) -> LocalError:
        return LocalError(
            "L007", f"{self._path} is no journal: {why}", place="--state", hint="name another folder with --state"
        )

    def _open(self) -> sqlite3.Connection:
        is_new = not self._path.exists() or self._path.stat().st_size == 0
        db = sqlite3.connect(self._path, isolation_level=None)
        try:
            self._prepare(db, is_new)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection, is_new: bool) -> None:
        if not is_new:
            self._check(db)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            # `key` repeats `sort` in a form that people can read with the sqlite3 shell.
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {table} (sort BLOB PRIMARY KEY, key TEXT NOT NULL, row TEXT NOT NULL)"
            )
        _put(db, "meta", SCHEMA_KEY, encode_key(SCHEMA_KEY), encode_row({"version": SCHEMA_VERSION}))
        db.execute("COMMIT")
        if is_new:
            fsync_directory(self._path.parent)

    def _check(self, db: sqlite3.Connection) -> None:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        found = None
        if "meta" in tables:
            found = db.execute("SELECT row FROM meta WHERE sort = ?", (encode_key(SCHEMA_KEY),)).fetchone()
        if tables and not found:
            raise self._foreign("it belongs to another program")
        if found:
            version = decode_row(found[0])["version"]
            if version > SCHEMA_VERSION:
                raise self._foreign(f"schema {version} > supported {SCHEMA_VERSION}, upgrade ICRF")
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._foreign(f"damaged ({verdict})")

    def _write(self, encoded: Sequence[tuple[str, Key, bytes, str]]) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for table, key, sort, row in encoded:
                if table == "commits":
                    old = db.execute("SELECT row FROM commits WHERE sort = ?", (sort,)).fetchone()
                    if old:
                        check_unchanged(key, old[0], row)
                _put(db, table, key, sort, row)
            db.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back by itself after some errors, such as a full disk.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _put(db: sqlite3.Connection, table: str, key: Key, sort: bytes, row: str) -> None:
    db.execute(
        f"INSERT INTO {table} (sort, key, row) VALUES (?, ?, ?) ON CONFLICT (sort) DO UPDATE SET row = excluded.row",
        (sort, json.dumps(key), row),
    )
