"""Deterministic faults: a process of the fabric kills itself, or stands still, at a named place of a named round.

::

    ICRF_FAILPOINTS="mediator@commit:3,agent-us-east@exchange:4!hold"  ICRF_FAILPOINTS_DIR=/tmp/points

A point is ``[ROLE@]PHASE:ROUND[!hold]``. Without a role the first process that gets there takes it. A process that
reaches a point first makes the point durable as a file in the folder, so that each fires once, however often the
process is started again, and so that a test can tell that it fired. Then it kills itself with SIGKILL; with ``!hold``
it stands still instead until the file ``POINT.go`` appears beside it, so that a test can kill something else meanwhile.
``ICRF_FAILPOINTS=@armed`` stands for the points in the folder's file ``armed``, which may change while processes live.

Without the variable every call returns at once: this is for tests and costs nothing elsewhere.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from icrf.errors import ConfigError

VARIABLE, FOLDER_VARIABLE = "ICRF_FAILPOINTS", "ICRF_FAILPOINTS_DIR"
FROM_FILE, ARMED = "@armed", "armed"
PHASES = ("submit", "reserve", "activate", "train", "exchange", "aggregate", "commit", "result")
HOLD_LIMIT_S = 120.0

_SYNTAX = re.compile(r"(?:([a-z0-9][-a-z0-9]*)@)?([a-z]+):([0-9]{1,7})(!hold)?")
_GO = ".go"
_HOLD_POLL_S = 0.01


@dataclass(frozen=True)
class Point:
    """One place where one process dies, or stands still."""

    role: str
    phase: str
    round: int
    hold: bool

    @property
    def name(self) -> str:
        """How it is written, without what happens there; also the name of its file."""
        return f"{self.role}@{self.phase}:{self.round}" if self.role else f"{self.phase}:{self.round}"


@dataclass
class _Process:
    """What this process knows of its points; None until they are asked for, or where they may change."""

    role: str = ""
    points: tuple[Point, ...] | None = None
    folder: Path = Path()


_process = _Process()


def set_role(role: str) -> None:
    """Say which process this is: ``mediator``, ``agent-NAME``. Daemons call it once, at their start.

    Raises:
        ConfigError: C006 if the variables are malformed: at the start, where it is seen.
    """
    _process.role = role
    _load()


def reached(phase: str, round_number: int = 0) -> None:
    """Die or stand still here if a point says so and has not fired yet.

    Args:
        phase: one of :data:`PHASES`.
        round_number: 0 outside rounds.
    """
    points = _load() if _process.points is None else _process.points
    for point in points:
        if (point.phase, point.round) == (phase, round_number) and point.role in ("", _process.role):
            _fire(point, _process.folder)


def fired(folder: Path) -> list[str]:
    """The names of the points that have fired, sorted."""
    return sorted(path.name for path in folder.glob("*:*") if path.suffix != _GO)


def release(folder: Path, name: str) -> None:
    """Let the process go on that stands still at the point `name`."""
    (folder / f"{name}{_GO}").touch()


def parse(environment: Mapping[str, str]) -> tuple[tuple[Point, ...], Path]:
    """The points of the environment and their folder.

    Raises:
        ConfigError: C006.
    """
    text, folder = environment.get(VARIABLE, ""), environment.get(FOLDER_VARIABLE, "")
    if text and not os.path.isdir(folder):
        raise ConfigError(
            "C006",
            f"{VARIABLE} needs a folder for what has fired",
            place=FOLDER_VARIABLE,
            value=folder or "nothing",
            allowed="a folder that exists",
        )
    if text == FROM_FILE:
        armed = Path(folder, ARMED)
        text = armed.read_text() if armed.exists() else ""
    return tuple(_point(part.strip()) for part in text.split(",")) if text else (), Path(folder)


def arm(folder: Path, points: str) -> None:
    """Forget what has fired in `folder`, and let processes that were started with ``@armed`` fire at `points`."""
    for path in folder.glob("*:*"):
        path.unlink()
    parse({VARIABLE: points, FOLDER_VARIABLE: str(folder)})
    changed = folder / f"{ARMED}.new"
    changed.write_text(points)
    changed.rename(folder / ARMED)


def _point(text: str) -> Point:
    match = _SYNTAX.fullmatch(text)
    if match is None or match[2] not in PHASES:
        raise ConfigError(
            "C006",
            f"{text!a} is no fail-point",
            place=VARIABLE,
            allowed=f"[ROLE@]PHASE:ROUND[!hold], separated by commas, with a phase of {', '.join(PHASES)}",
        )
    return Point(match[1] or "", match[2], int(match[3]), match[4] is not None)


def _load() -> tuple[Point, ...]:
    points, _process.folder = parse(os.environ)
    if os.environ.get(VARIABLE) != FROM_FILE:
        _process.points = points
    return points


def _fire(point: Point, folder: Path) -> None:
    marker = folder / point.name
    try:
        fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    # Durable first: the process that is started in this one's place must not die here again.
    for descriptor in (fd, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)):
        os.fsync(descriptor)
        os.close(descriptor)
    if not point.hold:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + HOLD_LIMIT_S
    while not marker.with_name(marker.name + _GO).exists() and time.monotonic() < deadline:
        time.sleep(_HOLD_POLL_S)
