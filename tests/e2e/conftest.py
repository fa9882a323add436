"""The fabric's commands as a user starts them: processes, their output, and whatever they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from icrf.testing.waiting import until

MARK = "ICRF_TEST_COMMANDS"
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
COMMAND_S = 240.0
END_S = 60.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


class Daemon:
    """A command that runs, with its output so far in files."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, text: str) -> str:
        """Wait until a line of the output has `text`; the line."""

        def found() -> str | None:
            ended = self.process.poll() is not None
            line = next((line for line in [*self.out.splitlines(), *self.err.splitlines()] if text in line), None)
            assert line or not ended, "it has ended"
            return line

        try:
            return until(found, COMMAND_S)
        except (AssertionError, TimeoutError) as why:
            shown = f"no {text!r} (exit code {self.process.poll()}, {why}):\n{self.out}\n{self.err}"
            raise AssertionError(shown) from None

    def end(self, number: signal.Signals, *, group: bool = False) -> int:
        """Send a signal, to the whole foreground group as a terminal does if asked, and wait; the exit code."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(END_S)


@dataclass
class Commands:
    """Starts commands in one folder, all with one mark in their environment by which their processes are found."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[Daemon] = field(default_factory=list)

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, **self.environment, MARK: self.mark, "COLUMNS": "120"}

    def __call__(self, command: str, *arguments: object) -> Done:
        """Run a command to its end."""
        line = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
        done = subprocess.run(
            line,
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_S,
            check=False,
        )
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, command: str, *arguments: object) -> Daemon:
        """Start a command in a process group of its own."""
        line = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
        name = f"{command}-{len(self.started)}"
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with out.open("wb") as to, err.open("wb") as errors:
            process = subprocess.Popen(
                line,
                cwd=self.folder,
                env={**self._environment(), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=errors,
                start_new_session=True,
            )
        daemon = Daemon(process, out, err)
        self.started.append(daemon)
        return daemon

    def left(self) -> list[str]:
        """Command lines of living processes that any of these commands started, however far they have strayed."""
        needle = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue  # it has ended meanwhile
        return found

    def close(self) -> None:
        """End what still runs."""
        for daemon in reversed(self.started):
            if daemon.process.poll() is None:
                daemon.end(signal.SIGTERM)


MakeCommands = Callable[..., Commands]


@pytest.fixture(scope="module")
def make_commands() -> Iterator[MakeCommands]:
    """Makes :class:`Commands`; each in a folder with a short name, because sockets lie below it."""
    made: list[Commands] = []
    with tempfile.TemporaryDirectory(prefix="icrf-e2e-") as folder:

        def make(**environment: str) -> Commands:
            own = Path(folder, str(len(made)))
            own.mkdir()
            made.append(Commands(own, {"XDG_STATE_HOME": str(own / "state"), **environment}))
            return made[-1]

        yield make
        for commands in made:
            commands.close()


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES
