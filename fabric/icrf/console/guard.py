"""One place where every command's errors become a line and an exit code."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable
from typing import Any

import typer

from icrf.console.terminal import Terminal
from icrf.errors import IcrfError, InternalError

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

_terminated = threading.Event()


def terminate(number: int, frame: object) -> None:
    """The handler of SIGTERM: unwinds like Ctrl-C, so that an embedded fabric is closed and leaves nothing behind."""
    _terminated.set()
    raise SystemExit(EXIT_TERMINATED)


class Session:
    """What one invocation of a command shares.

    Args:
        doors: how the commands get at a fabric.
        debug: show tracebacks.
    """

    def __init__(self, *, doors: Any, debug: bool) -> None:
        self.doors = doors
        self.debug = debug
        self.terminal = Terminal()

    def open(self, *, json: bool, plain: bool = False) -> Terminal:
        """The terminal of this command; errors use it too from now on."""
        self.terminal = Terminal(json_output=json, plain=plain)
        return self.terminal


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command, called with keywords, that never ends in a traceback unless ``--debug`` asked for one."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        session: Session = arguments["context"].obj
        try:
            command(**arguments)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            session.terminal.note("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            # A signal may come between the two steps of taking a lock; what that makes of it is no error of anybody's.
            if _terminated.is_set():
                raise typer.Exit(EXIT_TERMINATED) from error
            raise typer.Exit(_report(session, _told(error))) from error

    return run


def _told(error: Exception) -> IcrfError:
    if isinstance(error, IcrfError):
        return error
    detail = f"{type(error).__name__}: {error}"
    internal = InternalError("X001", detail, hint="fabric --debug COMMAND shows the traceback")
    internal.__cause__ = error
    return internal


def _report(session: Session, error: IcrfError) -> int:
    if session.debug:
        session.terminal.note("".join(traceback.format_exception(error)))
    session.terminal.error(error)
    if session.terminal.json_output:
        session.terminal.json({"status": "ERROR", "error": error.to_dict()})
    return error.exit_code
