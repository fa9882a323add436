"""The wide-area line: what passes stays whole; it is counted, paced, delayed, held up and cut as it was told."""

import contextlib
import socket
import threading
import time

import pytest
from typer.testing import CliRunner

from icrf.cli import Doors, app
from icrf.errors import LocalError
from icrf.local import LocalFabric
from icrf.wan import WanLine, WanShape, parse_wan

WAIT_S = 20.0


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("80ms,50mbit", WanShape(0.08, 0.0, 6_250_000.0)),
        ("50mbit", WanShape(0.0, 0.0, 6_250_000.0)),
        ("1s, jitter=10ms", WanShape(1.0, 0.01, 0.0)),
        ("1.5gbit,200us", WanShape(0.0002, 0.0, 187_500_000.0)),
    ],
)
def test_a_shape_is_read(text, shape):
    assert parse_wan(text) == shape


@pytest.mark.parametrize("text", ["", "fast", "80", "80ms,90ms", "50mbit,1gbit", "jitter=5mbit", "80ms;50mbit", "-1ms"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(LocalError, match=r"L009 --wan.*80ms,50mbit"):
        parse_wan(text)


class Echo:
    """Sends back what it gets, over any number of connections."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = []
        self.serving = threading.Thread(target=self.serve)
        self.serving.start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self.echo, args=(connection,)))
                self.threads[-1].start()

    def echo(self, connection):
        with connection, contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in (self.serving, *self.threads):
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture
def echo():
    server = Echo()
    yield server
    server.close()


def dial(address):
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def send_all(connection, data):
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def exchange(address, data):
    """What comes back for `data`."""
    with dial(address) as connection:
        sending = threading.Thread(target=send_all, args=(connection, data))
        sending.start()
        found = bytearray()
        while part := connection.recv(1 << 16):
            found += part
        sending.join(WAIT_S)
    return bytes(found)


DATA = bytes(range(256)) * 4_000


def test_what_passes_stays_whole_and_is_counted_both_ways(echo):
    with WanLine(WanShape(0.002, 0.001)) as line:
        assert exchange(line.way_out(echo.address), DATA) == DATA
        assert (line.bytes_up, line.bytes_down) == (len(DATA), len(DATA))
        assert exchange(line.way_in(echo.address), b"abc") == b"abc"
        assert (line.bytes_up, line.bytes_down) == (len(DATA) + 3, len(DATA) + 3)


def test_a_line_is_no_faster_than_it_was_told(echo):
    shape = WanShape(0.05, 0.0, 4_000_000.0)
    with WanLine(shape) as line:
        address = line.way_out(echo.address)
        began = time.monotonic()
        assert exchange(address, DATA) == DATA
        assert time.monotonic() - began >= len(DATA) / shape.bytes_per_s + shape.round_trip_s


def test_connections_take_turns_so_that_a_small_one_overtakes_a_large_one(echo):
    with WanLine(WanShape(bytes_per_s=1_000_000.0)) as line:
        address = line.way_out(echo.address)
        with dial(address) as bulk:
            sending = threading.Thread(target=bulk.sendall, args=(DATA,))
            sending.start()
            assert bulk.recv(1)
            assert exchange(address, b"heartbeat") == b"heartbeat"
            assert line.bytes_up < len(DATA)
            got = 1
            while got < len(DATA):
                got += len(bulk.recv(1 << 16))
            sending.join(WAIT_S)


def test_a_stall_holds_everything_up_and_loses_nothing(echo):
    with WanLine(WanShape()) as line, dial(line.way_out(echo.address)) as connection:
        connection.sendall(b"a")
        assert connection.recv(1) == b"a"
        line.stall()
        connection.sendall(b"b")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        line.go_on()
        connection.settimeout(WAIT_S)
        assert connection.recv(1) == b"b"


def test_a_reset_ends_what_is_open_and_new_connections_are_taken(echo):
    with WanLine(WanShape()) as line:
        address = line.way_out(echo.address)
        with dial(address) as connection:
            connection.sendall(b"a")
            assert connection.recv(1) == b"a"
            line.reset()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert exchange(address, b"again") == b"again"


def test_a_reset_comes_once_after_so_many_bytes(echo):
    with WanLine(WanShape()) as line:
        address = line.way_out(echo.address)
        line.reset_after(100_000, address)
        with pytest.raises(ConnectionError):
            exchange(address, DATA)
        assert 100_000 <= line.bytes_up < len(DATA)
        assert exchange(address, DATA) == DATA


def test_a_target_that_does_not_listen_looks_like_that():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = f"127.0.0.1:{gone.getsockname()[1]}"
    with WanLine(WanShape()) as line, dial(line.way_out(target)) as connection, contextlib.suppress(ConnectionError):
        assert connection.recv(1) == b""


# ---------------------------------------------------------------- the option of the commands


@pytest.mark.parametrize("command", [["demo"], ["run", "fed.yaml", "--clusters", "2"]])
def test_a_command_puts_the_line_between_its_clusters(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fed.yaml").write_text(
        "federation_id: f\nschema: StarFederatedLearning\nfederated_learning_topology: star\n"
    )
    asked = []

    def local(clusters, state, progress, wan=None):
        asked.append((clusters, wan))
        raise LocalError("L008", "no cluster today")

    doors = Doors(local=local)
    for option, shape in ((["--wan", "80ms,50mbit"], WanShape(0.08, 0.0, 6_250_000.0)), ([], None)):
        result = CliRunner().invoke(app, [*command, *option], obj=doors)
        assert "no cluster today" in result.stderr
        assert asked.pop() == (2, shape)
    result = CliRunner().invoke(app, [*command, "--wan", "slow"], obj=doors)
    assert (result.exit_code, asked) == (2, []) and "L009 --wan" in result.stderr


def test_one_cluster_has_no_line(tmp_path):
    with pytest.raises(LocalError, match="L009 --wan"):
        LocalFabric(1, state_dir=tmp_path / "state", wan=WanShape(0.08))
    assert not (tmp_path / "state").exists()
