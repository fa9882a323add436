"""Artifacts, checkpoints and models as bytes: in memory, and as files that are whole or absent."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

from icrf.daemon import fsync_directory
from icrf.errors import InternalError, LocalError, ProtocolError, RunError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_ALLOWED = "letters, digits and . _ - in parts joined by /, no part starting with a dot, at most 200 characters"
_MAX_NAME = 200
_TEMPORARY = ".tmp"


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def _check_names(run_id: str, artifact: str) -> None:
    """Names come from agents and users: nothing in them may leave the folder (P001)."""
    for field, name in (("run_id", run_id), ("artifact", artifact)):
        if not _is_name(name) or (field == "run_id" and "/" in name):
            shown = ascii(name[:_MAX_NAME])
            raise ProtocolError("P001", f"{shown} is no name of a blob", place=field, allowed=_ALLOWED)


def _unknown(run_id: str, artifact: str) -> RunError:
    return RunError("F006", f"run {run_id[:_MAX_NAME]!a} has no artifact {artifact[:_MAX_NAME]!a}", place="artifact")


class MemoryBlobs:
    """The :class:`icrf.ports.BlobStore` that forgets at exit. Thread-safe."""

    def __init__(self) -> None:
        self._blobs: dict[tuple[str, str], bytes] = {}

    def writer(self, run_id: str, artifact: str) -> _MemoryWriter:
        """See :class:`icrf.ports.BlobStore`. Raises ProtocolError P001 for a bad name."""
        _check_names(run_id, artifact)
        return _MemoryWriter(self._blobs, (run_id, artifact))

    def read(self, run_id: str, artifact: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        """See :class:`icrf.ports.BlobStore`."""
        data = self._blobs.get((run_id, artifact))
        if data is None:
            raise _unknown(run_id, artifact)
        return (data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))

    def delete_run(self, run_id: str, prefix: str = "") -> None:
        """Delete the run's artifacts whose name starts with `prefix`; harmless when there are none."""
        for key in list(self._blobs):
            if key[0] == run_id and key[1].startswith(prefix):
                self._blobs.pop(key, None)


class _MemoryWriter:
    def __init__(self, blobs: dict[tuple[str, str], bytes], key: tuple[str, str]) -> None:
        self._blobs, self._key = blobs, key
        self._buffer: bytearray | None = bytearray()

    def write(self, chunk: bytes) -> None:
        if self._buffer is None:
            raise _ended(*self._key)
        self._buffer += chunk

    def commit(self) -> str:
        if self._buffer is None:
            raise _ended(*self._key)
        data, self._buffer = bytes(self._buffer), None
        self._blobs[self._key] = data
        return hashlib.sha256(data).hexdigest()

    def abort(self) -> None:
        self._buffer = None


def _ended(run_id: str, artifact: str) -> InternalError:
    return InternalError("X001", f"writer of {run_id}/{artifact} was used after its end", place="blobs")


class FolderBlobs:
    """The :class:`icrf.ports.BlobStore` of files, ``root/run_id/artifact``. Thread-safe.

    A file is written under a temporary name, synced, renamed and its folder synced, so that a reader or a crash
    finds either the whole artifact or none. An artifact's ``/`` is percent-quoted, so that ``a`` and ``a/b`` can
    both exist and one folder holds all of a run.

    Args:
        root: owned by this store alone (the mediator's state folder is locked); leftovers of a crash are removed.

    Raises:
        LocalError: L005 when the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._temporary = self._root / _TEMPORARY
        # Creating a run's folder and removing it must not interleave.
        self._lock = threading.Lock()
        try:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(self._root, error) from error

    def writer(self, run_id: str, artifact: str) -> _FolderWriter:
        """See :class:`icrf.ports.BlobStore`. Raises ProtocolError P001 for a bad name."""
        _check_names(run_id, artifact)
        return _FolderWriter(self._temporary, self._path(run_id, artifact), self._lock)

    def read(self, run_id: str, artifact: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        """See :class:`icrf.ports.BlobStore`. The chunks stay those of this moment if the artifact is replaced."""
        if not (_is_name(run_id) and _is_name(artifact)) or "/" in run_id:
            raise _unknown(run_id, artifact)
        try:
            file = self._path(run_id, artifact).open("rb")
        except FileNotFoundError as error:
            raise _unknown(run_id, artifact) from error
        chunks = _chunks(file, chunk_bytes)
        next(chunks)
        return chunks

    def delete_run(self, run_id: str, prefix: str = "") -> None:
        """Delete the run's artifacts whose name starts with `prefix`; harmless when there are none."""
        if not _is_name(run_id) or "/" in run_id:
            return
        folder = self._root / run_id
        with self._lock:
            for path in folder.iterdir() if folder.is_dir() else ():
                if unquote(path.name).startswith(prefix):
                    path.unlink()
            # Fails while other artifacts are left, and when the folder never was.
            with suppress(OSError):
                folder.rmdir()

    def _path(self, run_id: str, artifact: str) -> Path:
        return self._root / run_id / quote(artifact, safe="")


def _chunks(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    # The first, empty item is consumed by `read`: from then on the generator closes the file even if never iterated.
    with file:
        yield b""
        while chunk := file.read(chunk_bytes):
            yield chunk


class _FolderWriter:
    def __init__(self, temporary: Path, target: Path, lock: threading.Lock) -> None:
        self._target, self._lock = target, lock
        self._hash = hashlib.sha256()
        try:
            fd, name = tempfile.mkstemp(dir=temporary)
        except OSError as error:
            raise _not_writable(temporary, error) from error
        self._temporary = Path(name)
        self._file: BinaryIO | None = os.fdopen(fd, "wb")

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise _ended(self._target.parent.name, self._target.name)
        return self._file

    def write(self, chunk: bytes) -> None:
        file = self._open_file()
        try:
            file.write(chunk)
        except OSError as error:
            self.abort()
            raise _not_writable(self._target, error) from error
        self._hash.update(chunk)

    def commit(self) -> str:
        file = self._open_file()
        try:
            file.flush()
            os.fsync(file.fileno())
            with self._lock:
                folder = self._target.parent
                folder.mkdir(exist_ok=True)
                self._temporary.rename(self._target)
                fsync_directory(folder)
                fsync_directory(folder.parent)
        except OSError as error:
            self.abort()
            raise _not_writable(self._target, error) from error
        file.close()
        self._file = None
        return self._hash.hexdigest()

    def abort(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        self._temporary.unlink(missing_ok=True)
        # A full disk may refuse the buffered rest again; the file is gone either way.
        with suppress(OSError):
            file.close()


def _not_writable(path: Path, error: OSError) -> LocalError:
    return LocalError("L005", f"{path} cannot be written: {error.strerror}", place="--state", hint="check the disk")
