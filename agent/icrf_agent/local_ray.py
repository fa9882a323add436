"""Starts, finds again and ends the local Ray cluster of an agent, through its keeper process. Imports no Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from icrf.errors import LocalError
from icrf_agent import keeper

DEFAULT_OBJECT_STORE_BYTES = 512 << 20
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
ORPHAN_GRACE_S = 120.0

_POLL_S = 0.05
_LOG_TAIL_LINES = 20


@dataclass(frozen=True)
class KeeperState:
    """What a keeper says about itself in ``keeper.json``; `address` is empty until its cluster answers."""

    pid: int
    session_id: int
    address: str
    token_path: str
    temp_dir: str
    settings: tuple[int, ...]


class LocalRay:
    """The Ray cluster of one state folder. Not thread-safe; blocking calls."""

    def __init__(self) -> None:
        self._state_dir = Path()
        self._state: KeeperState | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reattached = False

    @property
    def reattached(self) -> bool:
        """Whether `ensure` found the cluster alive instead of starting it."""
        return self._reattached

    @property
    def session_id(self) -> int:
        """The session that holds every process of the cluster; 0 before `ensure`."""
        return self._state.session_id if self._state else 0

    @property
    def temp_dir(self) -> Path | None:
        """Ray's folder of sockets and logs."""
        return Path(self._state.temp_dir) if self._state else None

    def ensure(
        self,
        state_dir: Path,
        num_cpus: int,
        *,
        lock_file: Path | None = None,
        num_gpus: int = 0,
        object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES,
        orphan_grace_s: float = ORPHAN_GRACE_S,
        deadline_s: float = START_DEADLINE_S,
    ) -> str:
        """Start the cluster, or re-attach to the living one of this folder if it was started with equal settings.

        Args:
            state_dir: holds ``keeper.json``, the token and the log; one cluster per folder.
            num_cpus: CPUs that the cluster offers.
            lock_file: the lock that the caller holds while it lives; default ``state_dir/lock``.
            orphan_grace_s: how long the cluster outlives the holder of the lock.
            deadline_s: how long to wait for the cluster to answer.

        Returns:
            ``127.0.0.1:PORT``, the address for ``ray.init``; see :meth:`environment`.

        Raises:
            LocalError: L008 with the end of the log when the cluster does not come up.
        """
        self._state_dir = state_dir.resolve()
        settings = (num_cpus, num_gpus, object_store_bytes)
        deadline = time.monotonic() + deadline_s
        self._state = self._read()
        self._reattached = self._state is not None and self._is_usable(self._state, settings)
        if not self._reattached:
            # A dead keeper may have left Ray's processes; one with other settings is replaced.
            self.stop()
            lock = lock_file or self._state_dir / "lock"
            self._spawn(lock, settings, orphan_grace_s)
        self._state = self._await_address(deadline, deadline_s)
        return self._state.address

    def environment(self) -> dict[str, str]:
        """Variables that a driver of this cluster must set before it imports Ray."""
        if self._state is None:
            return {}
        return keeper.ray_environment(self._state.token_path) | keeper.PATIENCE

    def check(self) -> None:
        """Whether the cluster is still kept. `ensure` returns when the head answers; the rest of Ray may fail later.

        Raises:
            LocalError: L008 with the end of the log when the keeper has ended.
        """
        if self._state is not None and (self._read() is None or not self._is_keeper(self._state)):
            raise self._failed("has ended")

    def stop(self) -> None:
        """End the cluster with everything of its session; harmless when there is none.

        Raises:
            LocalError: L008 when processes cannot be ended.
        """
        state, self._state = self._state, None
        if state is not None:
            if self._is_keeper(state):
                os.kill(state.pid, signal.SIGTERM)
                self._await_end(state.session_id)
            if self._owns_session(state) and not keeper.end_session(state.session_id):
                left = keeper.session_members(state.session_id)
                raise LocalError(
                    "L008", f"processes of the local Ray cluster do not end: {left}", place="--ray-address"
                )
            self._remove_files(state)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _read(self) -> KeeperState | None:
        path = self._state_dir / keeper.STATE_NAME
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return KeeperState(**{**data, "settings": tuple(data["settings"])})

    def _is_usable(self, state: KeeperState, settings: tuple[int, ...]) -> bool:
        if not self._is_keeper(state) or state.settings != settings:
            return False
        return not state.address or keeper.accepts(state.address)

    def _is_keeper(self, state: KeeperState) -> bool:
        """Whether the process is this folder's keeper, not a later one that got the same id."""
        try:
            arguments = Path("/proc", str(state.pid), "cmdline").read_bytes().split(b"\0")
            in_session = os.getsid(state.pid) == state.session_id
        except (FileNotFoundError, ProcessLookupError):
            return False
        return in_session and os.fsencode(self._state_dir) in arguments and any(b"keeper" in a for a in arguments)

    def _owns_session(self, state: KeeperState) -> bool:
        """Whether a session id still means our cluster, and not a later session that got the same id."""
        if self._is_keeper(state):
            return True
        return any(_belongs(pid, state) for pid in keeper.session_members(state.session_id))

    def _spawn(self, lock: Path, settings: tuple[int, ...], orphan_grace_s: float) -> None:
        num_cpus, num_gpus, object_store_bytes = settings
        # By its path, so that the keeper starts however this package came to be importable; -P keeps its siblings out.
        command = [
            sys.executable,
            "-P",
            keeper.__file__,
            "--state",
            str(self._state_dir),
            "--lock",
            str(lock.resolve()),
        ]
        command += [f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", f"--object-store-bytes={object_store_bytes}"]
        command += [f"--orphan-grace-s={orphan_grace_s}"]
        with (self._state_dir / keeper.LOG_NAME).open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _await_address(self, deadline: float, deadline_s: float) -> KeeperState:
        while time.monotonic() < deadline:
            state = self._read()
            if state is not None and state.address:
                return state
            if self._process is not None and self._process.poll() is not None:
                raise self._failed(f"ended with exit code {self._process.returncode}")
            if self._process is None and (state is None or not self._is_keeper(state)):
                raise self._failed("ended while it was starting")
            time.sleep(_POLL_S)
        error = self._failed(f"did not answer within {deadline_s:g} s")
        self._state = self._read()
        self.stop()
        raise error

    def _failed(self, why: str) -> LocalError:
        path = self._state_dir / keeper.LOG_NAME
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        tail = "\n".join(lines[-_LOG_TAIL_LINES:]) or "(empty)"
        return LocalError(
            "L008", f"the local Ray cluster {why}", place="--ray-address", hint=f"The end of {path}:\n{tail}"
        )

    def _await_end(self, session_id: int) -> None:
        deadline = time.monotonic() + STOP_DEADLINE_S
        while keeper.session_members(session_id) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _remove_files(self, state: KeeperState) -> None:
        """What a keeper removes by itself unless it was killed."""
        shutil.rmtree(state.temp_dir, ignore_errors=True)
        Path(state.token_path).unlink(missing_ok=True)
        (self._state_dir / keeper.STATE_NAME).unlink(missing_ok=True)


def _belongs(pid: int, state: KeeperState) -> bool:
    """Whether a process was started with the cluster's token or has a file of its temp folder open.

    Some of Ray's processes overwrite their environment with their title; all of them have a log open.
    """
    try:
        environment = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it ended meanwhile, or it is another user's
    marked = os.fsencode(f"RAY_AUTH_TOKEN_PATH={state.token_path}") in environment
    return marked or any(path.startswith(os.path.join(state.temp_dir, "")) for path in _open_files(pid))


def _open_files(pid: int) -> Iterator[str]:
    for fd in list(Path("/proc", str(pid), "fd").glob("*")):
        try:
            yield os.readlink(fd)
        except FileNotFoundError:
            continue  # closed meanwhile
