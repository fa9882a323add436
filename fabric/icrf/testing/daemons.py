"""Daemons of a test environment as processes that can be killed, started again and supervised."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from icrf.errors import IcrfError, make_error
from icrf.testing.waiting import until

_RESTART_PAUSE_S = 0.2
_TAIL_LINES = 25


class Daemon:
    """One daemon over all its lives. Thread-safe.

    Args:
        name: what errors call it.
        command: makes the command line of the next life.
        environment: of the process.
        log_file: output of all lives, one after the other.
        ready: what a life writes once it serves.
        code: of the error when it does not come up.

    Attributes:
        starts: how many lives there were.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        log_file: Path,
        ready: re.Pattern[str],
        code: str,
    ) -> None:
        self.name = name
        self.starts = 0
        self._command, self._environment = command, dict(environment)
        self._log_file, self._ready, self._code = log_file, ready, code
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._offset = 0
        self._wanted = False

    @property
    def pid(self) -> int:
        """Of the present or the last life; 0 before the first."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Begin a life; harmless while one goes on."""
        with self._lock:
            self._wanted = True
            if self.alive:
                return
            with self._log_file.open("ab") as log:
                self._offset = log.tell()
                self._process = subprocess.Popen(
                    list(self._command()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                )
            self.starts += 1

    def kill(self) -> None:
        """SIGKILL; a supervisor starts it again."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and stay down; returns the exit code. After `timeout_s` it is killed."""
        with self._lock:
            self._wanted = False
            if self._process is None:
                return 0
            self._process.send_signal(signal.SIGTERM)
            try:
                return self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                return self._process.wait()

    def restart(self) -> None:
        """Kill it if it lives, and start it again."""
        with self._lock:
            self.kill()
            self.start()

    def revive(self) -> None:
        """Start it again if it has died and is wanted: a supervisor's work."""
        with self._lock:
            if self._wanted and not self.alive:
                self.start()

    def log(self, *, this_life: bool = False) -> str:
        """What it wrote, in all its lives or in the present one."""
        if not self._log_file.exists():
            return ""
        data = self._log_file.read_bytes()
        return data[self._offset if this_life else 0 :].decode(errors="replace")

    def wait_ready(self, timeout_s: float = 60.0, *, supervised: bool = False) -> re.Match[str]:
        """Wait until it serves; the match of its ready line.

        Args:
            timeout_s: how long.
            supervised: do not give up when a life ends; another one begins.

        Raises:
            IcrfError: with the end of its log, if it ended or took too long.
        """

        def ready() -> re.Match[str] | None:
            alive = self.alive
            if not alive and not supervised:
                raise self._failed(f"ended with {self._process.returncode if self._process else 'no start'}")
            return self._ready.search(self.log(this_life=True)) if alive else None

        try:
            return until(ready, timeout_s)
        except TimeoutError:
            raise self._failed(f"was not ready within {timeout_s:.0f} s") from None

    def _failed(self, why: str) -> IcrfError:
        tail = "\n".join(self.log().splitlines()[-_TAIL_LINES:]) or "(empty)"
        return make_error(
            self._code, f"{self.name} {why}", place=self.name, hint=f"The end of {self._log_file}:\n{tail}"
        )


class Supervisor:
    """Starts daemons again that have died, as systemd would, until it is closed."""

    def __init__(self, daemons: Sequence[Daemon]) -> None:
        self._daemons = tuple(daemons)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="icrf-supervisor", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_RESTART_PAUSE_S):
            for daemon in self._daemons:
                daemon.revive()

    def close(self) -> None:
        """Stop watching; harmless when called twice."""
        self._stop.set()
        self._thread.join()
