"""``fabric-mediator serve`` as a process: what it prints, refuses and returns."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
COMMAND = [sys.executable, "-m", "icrf_mediator.cli", "serve"]


@dataclass(frozen=True)
class Mediator:
    process: subprocess.Popen[str]
    ready_line: str
    address: str


@contextmanager
def serving(state: Path, listen: str = "127.0.0.1:0") -> Iterator[Mediator]:
    command = [*COMMAND, "--listen", listen, "--state", str(state)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    with process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            address = ready.partition(" serving on ")[2].split(" ")[0]
            yield Mediator(process, ready, address)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mediator, Path]]:
    state = tmp_path_factory.mktemp("mediator")
    with serving(state) as mediator:
        yield mediator, state


def refused(*flags: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_it_says_where_it_serves_and_is_healthy(running: tuple[Mediator, Path]) -> None:
    mediator, state = running
    expected = f"serving on {mediator.address} (plaintext, loopback only), state in {state}"
    assert mediator.ready_line.startswith("fabric-mediator ")
    assert mediator.ready_line.endswith(expected)
    with grpc.insecure_channel(mediator.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_port_in_use(running: tuple[Mediator, Path], tmp_path: Path) -> None:
    mediator, _ = running
    code, err = refused("--listen", mediator.address, "--state", str(tmp_path))
    assert code == 73
    assert err.startswith("L004 --listen: port ")
    assert mediator.address in err and err.count("\n") == 1


def test_a_state_folder_in_use(running: tuple[Mediator, Path]) -> None:
    mediator, state = running
    code, err = refused("--listen", "127.0.0.1:0", "--state", str(state))
    assert code == 73
    assert f"L006 --state: state folder {state} is locked by pid {mediator.process.pid}" in err


@pytest.mark.parametrize("flags", [("--listen", "0.0.0.0:0"), ("--insecure", "--listen", "[::]:0")])
def test_plaintext_off_loopback(tmp_path: Path, flags: tuple[str, ...]) -> None:
    code, err = refused(*flags, "--state", str(tmp_path / "state"))
    assert code == 78
    assert err.startswith("L002 --listen: refusing plaintext")
    assert "use 127.0.0.1, or certificates: fabric-mediator certs init" in err


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (("--listen", "::1:7443"), "L003 --listen"),
        (("--listen", "127.0.0.1"), "L003 --listen"),
        (("--listen", "127.0.0.1:70000"), "L003 --listen"),
        (("--port", "1"), "No such option"),
        (("--listen",), "requires an argument"),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: tuple[str, ...], shown: str) -> None:
    code, err = refused("--state", str(tmp_path / "state"), *flags)
    assert code == 2
    assert shown in err


def test_a_journal_of_a_newer_version(tmp_path: Path) -> None:
    with serving(tmp_path) as mediator:
        mediator.process.send_signal(signal.SIGTERM)
        assert mediator.process.wait() == 0
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("""UPDATE meta SET row = '{"version": 9}'""")
    db.commit()
    db.close()
    code, err = refused("--listen", "127.0.0.1:0", "--state", str(tmp_path))
    assert code == 73
    assert err.startswith("L007") and "schema 9 > supported 1, upgrade ICRF" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_frees_everything(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as mediator:
        mediator.process.send_signal(number)
        assert mediator.process.wait() == 0
        assert mediator.process.stderr is not None
        assert mediator.process.stderr.read() == ""
    with serving(tmp_path, mediator.address) as again:
        assert again.address == mediator.address
        host, _, port = again.address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=10).close()
