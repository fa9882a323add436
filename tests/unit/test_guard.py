"""How a command ends: with a line and an exit code, also when a signal comes at a bad moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from icrf.console import guard
from icrf.errors import RunError


@pytest.fixture(autouse=True)
def not_terminated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guard, "_terminated", threading.Event())
    yield


def ended(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code of a command, and all that it said."""
    session = guard.Session(doors=None, debug=False)
    session.open(json=False, plain=True)
    with pytest.raises((typer.Exit, SystemExit)) as left:
        guard.guarded(command)(context=SimpleNamespace(obj=session))
    code = left.value.exit_code if isinstance(left.value, typer.Exit) else left.value.code
    said = capsys.readouterr()
    return int(code or 0), said.out + said.err


def failing(error: BaseException) -> Callable[..., None]:
    def command(**_: Any) -> None:
        raise error

    return command


def test_an_error_of_the_users_has_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ended(failing(RunError("F006", "no such run")), capsys)
    assert code not in (0, 143) and "F006" in said


def test_a_defect_is_said_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ended(failing(RuntimeError("odd")), capsys)
    assert code == 70 and "X001 RuntimeError: odd" in said and "Traceback" not in said


def test_a_command_that_is_terminated_unwinds_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command(**_: Any) -> None:
        try:
            guard.terminate(signal.SIGTERM, None)
        finally:
            cleaned.append(True)

    assert ended(command, capsys) == (143, "") and cleaned


def test_what_a_signal_breaks_on_its_way_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def command(**_: Any) -> None:
        try:
            guard.terminate(signal.SIGTERM, None)
        finally:
            # As where it comes while a condition gives its lock away.
            threading.Lock().release()

    assert ended(command, capsys) == (143, "")
