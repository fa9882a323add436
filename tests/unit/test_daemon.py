"""State folders, locks, names, signals and exit codes of the daemons."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from icrf.daemon import MonotonicClock, StateFolder, check_cluster_name, default_state_dir, run_daemon
from icrf.errors import ConfigError, LocalError


@contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# ---------------------------------------------------------------- names and places


@pytest.mark.parametrize("name", ["a", "us-east", "0", "a" * 63, "a--b"])
def test_good_cluster_names(name: str) -> None:
    assert check_cluster_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "../x", "US", "a" * 64, "a" * 300, "-a", "a-", "a_b", "us-eаst", "a\n", "a\x1b[31m", "a b"]
)
def test_bad_cluster_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_cluster_name(name)
    assert caught.value.code == "C013"
    shown = str(caught.value)
    assert shown.isascii() and shown.isprintable() and len(shown) < 300


def test_the_state_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_state_dir("mediator") == Path("/x/icrf/mediator")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert default_state_dir("agent-a") == Path("/h/.local/state/icrf/agent-a")


def test_the_clock_moves_forward() -> None:
    clock = MonotonicClock()
    assert clock.monotonic_s() <= clock.monotonic_s()
    assert clock.wall_s() > 1.7e9


# ---------------------------------------------------------------- state folder


def test_a_state_folder_is_private_and_names_its_holder(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "a" / "b") as state:
        assert state.path.stat().st_mode & 0o777 == 0o700
        assert state.lock_file.read_text() == f"{os.getpid()}\n"


def test_a_state_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    first = StateFolder(tmp_path)
    with pytest.raises(LocalError) as caught:
        StateFolder(tmp_path)
    assert caught.value.code == "L006"
    assert f"state folder {tmp_path} is locked by pid {os.getpid()}" in str(caught.value)
    first.close()
    first.close()
    StateFolder(tmp_path).close()


def test_a_killed_holder_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import sys; from icrf.daemon import *; s = StateFolder(Path(sys.argv[1])); print('held', flush=True); input()"
    )
    with python(code, str(tmp_path)) as holder:
        assert line(holder) == "held"
        with pytest.raises(LocalError, match=f"locked by pid {holder.pid}"):
            StateFolder(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    StateFolder(tmp_path).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalError) as caught:
        StateFolder(tmp_path / "file" / "state")
    assert caught.value.code == "L005"
    assert caught.value.exit_code == 73


# ---------------------------------------------------------------- run_daemon

DAEMON = """
import asyncio, sys
from icrf.daemon import run_daemon

async def main(stop):
    print("ready", flush=True)
    await stop.wait()
    print("draining", flush=True)
    if sys.argv[1] == "hang":
        await asyncio.Event().wait()
    return 7

sys.exit(run_daemon(main))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_daemon_drain(number: signal.Signals) -> None:
    with python(DAEMON, "drain") as daemon:
        assert line(daemon) == "ready"
        daemon.send_signal(number)
        assert line(daemon) == "draining"
        assert daemon.wait() == 7


def test_a_second_signal_ends_it_at_once() -> None:
    with python(DAEMON, "hang") as daemon:
        assert line(daemon) == "ready"
        daemon.send_signal(signal.SIGTERM)
        assert line(daemon) == "draining"
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait() == 130


def test_an_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: object) -> int:
        raise LocalError("L004", "port 7443 is in use")

    assert run_daemon(main) == 73
    assert capsys.readouterr().err == "L004 port 7443 is in use\n"
    assert run_daemon(main, debug=True) == 73
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: object) -> int:
        raise KeyError("oops")

    assert run_daemon(main) == 70
    err = capsys.readouterr().err
    assert err.startswith("X001 KeyError: 'oops'") and "--debug" in err
    assert err.count("\n") == 1


PARENT = """
import subprocess, sys
child = '''
from icrf.daemon import *
async def main(stop):
    print(os.getpid(), flush=True)
    await stop.wait()
    print("orphan stopped", flush=True)
    return 0
stop_with_parent(poll_s=0.01)
run_daemon(main)
'''
subprocess.Popen([sys.executable, "-c", child])
sys.stdin.read()
"""


def test_a_daemon_stops_with_its_parent() -> None:
    with python(PARENT) as parent:
        assert line(parent).isdigit()
        parent.send_signal(signal.SIGKILL)
        assert line(parent) == "orphan stopped"
        # The end of the pipe: the orphan has ended, too.
        assert line(parent) == ""
