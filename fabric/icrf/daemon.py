"""What the daemons of the fabric share: state folder, lock, clock, signals and exit codes. No Ray, no network."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from icrf.errors import EXIT_SOFTWARE, ConfigError, IcrfError, InternalError, LocalError

CLUSTER_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
EXIT_ABORTED = 130

_LOCK_TRIES = 10
_LOCK_PAUSE_S = 0.02
_SHOWN_CHARACTERS = 80


class MonotonicClock:
    """The :class:`icrf.ports.Clock` of real time."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never runs backwards."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch, for display only."""
        return time.time()


def check_cluster_name(name: str, *, place: str = "--cluster", what: str = "cluster") -> str:
    """Return `name` if it may name a cluster, or `what` else has names of that form.

    Raises:
        ConfigError: C013.
    """
    if CLUSTER_NAME.fullmatch(name):
        return name
    # ascii() keeps control characters and look-alike letters visible in terminals and logs.
    shown = ascii(name) if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]!a}..."
    raise ConfigError(
        "C013",
        f"{shown} is no {what} name",
        place=place,
        allowed="lower-case letters, digits and inner hyphens, 1 to 63 characters",
        hint="for example us-east",
    )


def default_state_dir(name: str) -> Path:
    """Where the daemon `name` keeps its state: ``$XDG_STATE_HOME/icrf/name`` or ``~/.local/state/icrf/name``."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "icrf" / name


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable; without it a renamed file may vanish at power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StateFolder:
    """A folder that one daemon owns for as long as it holds the lock in it.

    The lock is the kernel's (``flock``), so it is free the moment its holder dies, however it dies. The file names
    the holder's process id for humans.

    Args:
        path: created with its parents when missing, readable by the owner only.

    Raises:
        LocalError: L005 when the folder cannot be written, L006 when another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.lock_file = self.path / "lock"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise LocalError(
                "L005",
                f"state folder {self.path} is not writable: {error.strerror}",
                place="--state",
                hint="name a folder that you may write with --state",
            ) from error
        if not self._take():
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise LocalError(
                "L006",
                f"state folder {self.path} is locked by pid {holder}",
                place="--state",
                hint="stop that process or name another folder with --state",
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _take(self) -> bool:
        # The keeper of a local Ray cluster probes this lock for an instant now and then: one refusal proves nothing.
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                time.sleep(_LOCK_PAUSE_S)
            else:
                return True
        return False

    def close(self) -> None:
        """Give the folder free; harmless when called twice. The files stay."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def configure_logging(*, debug: bool = False) -> None:
    """Send the fabric's log to standard error; for the commands of daemons only."""
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("icrf", "icrf_agent", "icrf_mediator"):
        logging.getLogger(name).setLevel(level)


def stop_with_parent(poll_s: float = 0.5) -> None:
    """Send this process SIGTERM once the process that started it is gone, so that nothing is left orphaned.

    A thread watches the parent's id. (The kernel's parent-death signal would fire when the *thread* that started us
    ends, which is wrong for embedded fabrics that start agents from short-lived threads.)
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="icrf-parent-watch", daemon=True).start()


def report_error(error: BaseException, *, debug: bool = False) -> int:
    """Show an error on standard error, one line unless `debug`; returns the exit code that belongs to it."""
    if debug:
        traceback.print_exception(error)
    if not isinstance(error, IcrfError):
        detail = f"{type(error).__name__}: {error}"
        error = InternalError("X001", detail, hint="" if debug else "run again with --debug for the traceback")
    sys.stderr.write(f"{error}\n")
    return error.exit_code or EXIT_SOFTWARE


def stop_on_signals(stop: asyncio.Event) -> None:
    """Let SIGTERM and SIGINT set `stop`, and the next one end the process at once with exit code 130.

    :func:`run_daemon` has done this already. Call it again, in the main thread's loop, after ``ray.init``: Ray puts a
    handler of its own in front, which writes a stack trace first.
    """
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(EXIT_ABORTED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


def run_daemon(main: Callable[[asyncio.Event], Awaitable[int]], *, debug: bool = False) -> int:
    """Run a daemon until it ends by itself or is told to stop.

    Args:
        main: the daemon; it drains and returns its exit code once the event is set. SIGTERM and SIGINT set the event;
            a second signal ends the process at once with exit code 130.
        debug: show tracebacks.

    Returns:
        The exit code: that of `main`, or that of the error it raised.
    """

    async def supervised() -> int:
        stop = asyncio.Event()
        stop_on_signals(stop)
        return await main(stop)

    try:
        return asyncio.run(supervised())
    except Exception as error:  # noqa: BLE001 - the outermost frame of a command: every error becomes one line
        return report_error(error, debug=debug)
