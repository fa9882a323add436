"""``fabric-mediator certs``: what it writes, says and refuses; and what a server makes of renewed files."""

from __future__ import annotations

import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from icrf.wire.addresses import SERVER_OPTIONS
from icrf.wire.identity import CLUSTER, USER, Identity
from icrf.wire.tls import TlsFiles, listen_on
from icrf_mediator.certs import init_authority, issue
from icrf_mediator.cli import app

FILES = {"ca.pem", "cert.pem", "key.pem"}


def certs(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["certs", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = certs("init", "--dir", tmp_path / "own")
    assert made.exit_code == 0, made.output
    return tmp_path / "own"


def test_it_says_what_goes_where(folder: Path, tmp_path: Path) -> None:
    assert {path.name for path in (folder / "mediator").iterdir()} == FILES
    made = certs("issue", "us-east", "--dir", folder, "--out", tmp_path / "out", "--host", "gateway.example")
    assert made.exit_code == 0
    assert f"certificate of cluster us-east in {tmp_path / 'out'}, for 365 days" in made.stdout
    assert "fabric-agent --cluster us-east --mediator HOST:PORT --tls-dir FOLDER" in made.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert stat.S_IMODE((tmp_path / "out" / "key.pem").stat().st_mode) == 0o600
    for flags, identity in (
        (("--user", "ann"), Identity(USER, "ann")),
        (("--mediator",), Identity("mediator", "mediator")),
    ):
        assert certs("issue", *flags, "--dir", folder, "--out", tmp_path / "out").exit_code == 0
        assert TlsFiles(str(tmp_path / "out")).load().identity == identity


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("init",), 73, "S005 "),
        (("issue",), 2, "L009 certs issue: name one"),
        (("issue", "us-east", "--user", "ann"), 2, "L009 certs issue: name one"),
        (("issue", "US"), 78, "C013 NAME: 'US' is no cluster name"),
        (("issue", "--user", "../ann"), 78, "C013 --user: '../ann' is no user name"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    folder: Path, arguments: tuple[str, ...], code: int, shown: str
) -> None:
    before = sorted(folder.rglob("*"))
    done = certs(*arguments, "--dir", folder)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(shown) and done.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_server_shows_a_renewed_certificate_and_never_half_of_one(tmp_path: Path) -> None:
    init_authority(tmp_path)
    own = TlsFiles.at(issue(tmp_path, Identity(CLUSTER, "us-east")))
    assert own is not None
    server = grpc.server(ThreadPoolExecutor(1), options=SERVER_OPTIONS)
    port = listen_on(server, "127.0.0.1:0", own)
    server.start()

    def shown() -> str:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=10).strip()

    def on_disk() -> str:
        return Path(own.folder, "cert.pem").read_text().strip()

    try:
        first = on_disk()
        assert shown() == first
        issue(tmp_path, Identity(CLUSTER, "us-east"))
        assert first != on_disk() == shown()
        second = on_disk()
        # A key that has come before its certificate.
        other = issue(tmp_path, Identity(CLUSTER, "us-east"), out=tmp_path / "other")
        (other / "key.pem").replace(Path(own.folder, "key.pem"))
        assert shown() == second
        (other / "cert.pem").replace(Path(own.folder, "cert.pem"))
        assert second != on_disk() == shown()
    finally:
        server.stop(None).wait()
