"""What an agent must know after a restart: who it is, and the runs that it has activated.

One file per run, replaced as a whole: written beside it, synced, renamed, and the folder synced.
"""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from urllib.parse import quote

from icrf.errors import ProtocolError
from icrf.protocol import Activate
from icrf.wire.codec import dump_instruction, load_instruction

log = logging.getLogger("icrf.agent")

_AGENT_ID, _SUFFIX, _RESERVED, _PARTIAL = "agent-id", ".activation", ".reserved", ".part"


class AgentJournal:
    """The journal of one agent, whose lock on the state folder makes it the only writer.

    Args:
        folder: where to keep it; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._agent_id = self._read_id() or self._make_id()

    @property
    def agent_id(self) -> str:
        """The same in every life of the agent on this folder."""
        return self._agent_id

    def remember(self, activation: Activate) -> None:
        """Note the newest activation of a run; durable on return."""
        _write(self._path(activation.run_id), dump_instruction(activation))

    def reserve(self, run_id: str) -> None:
        """Note that something of a run may be on the cluster from now on; durable on return."""
        if not (path := self._path(run_id, _RESERVED)).exists():
            _write(path, run_id.encode())

    def forget(self, run_id: str) -> None:
        """The run is over here; harmless when it is not known."""
        self._path(run_id).unlink(missing_ok=True)
        self._path(run_id, _RESERVED).unlink(missing_ok=True)
        _sync_folder(self._folder)

    def reservations(self) -> list[str]:
        """Runs that something may be left of, sorted."""
        found = [path.read_text(errors="replace") for path in self._folder.glob(f"*{_RESERVED}")]
        return sorted(run_id for run_id in found if run_id)

    def activations(self) -> list[Activate]:
        """What was remembered and not forgotten, by run id; files that cannot be read are left out with a warning."""
        found = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                activation = load_instruction(path.read_bytes())
            except ProtocolError as error:
                log.warning("ignoring %s: %s", path, error)
                continue
            if isinstance(activation, Activate) and self._path(activation.run_id) == path:
                found.append(activation)
            else:
                log.warning("ignoring %s: it is not the activation of that run", path)
        return found

    def _path(self, run_id: str, suffix: str = _SUFFIX) -> Path:
        # Run ids come from the mediator: whatever they hold, they name a file in this folder.
        return self._folder / f"{quote(run_id, safe='').replace('.', '%2E')}{suffix}"

    def _read_id(self) -> str:
        path = self._folder / _AGENT_ID
        found = path.read_text(errors="replace").strip() if path.exists() else ""
        if found and not (len(found) == 32 and all(c in "0123456789abcdef" for c in found)):
            log.warning("ignoring %s: it is no agent id", path)
            return ""
        return found

    def _make_id(self) -> str:
        made = uuid.uuid4().hex
        _write(self._folder / _AGENT_ID, made.encode())
        return made


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
