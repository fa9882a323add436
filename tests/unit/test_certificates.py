"""The authority, the files it issues, and what is said about files that cannot be used."""

from __future__ import annotations

import datetime
import re
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from icrf.errors import IcrfError, SecurityError
from icrf.wire.identity import CLUSTER, THE_MEDIATOR, USER, Identity, caller_of, identity_of
from icrf.wire.tls import TlsFiles
from icrf_mediator.access import Access
from icrf_mediator.certs import init_authority, issue

US, ANN = Identity(CLUSTER, "us-east"), Identity(USER, "ann")
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    init_authority(tmp_path / "certs")
    return tmp_path / "certs"


def files(folder: Path) -> TlsFiles:
    found = TlsFiles.at(folder)
    assert found is not None
    return found


def refusal(folder: Path) -> SecurityError:
    with pytest.raises(SecurityError) as caught:
        files(folder).load()
    assert "PRIVATE" not in str(caught.value)
    return caught.value


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def test_an_authority_is_made_once_and_its_keys_are_nobody_elses(authority: Path) -> None:
    keys = [authority / "ca.key", authority / "mediator" / "key.pem"]
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600, 0o600]
    before = {path: path.read_bytes() for path in authority.rglob("*") if path.is_file()}
    with pytest.raises(SecurityError, match=r"S005 .*there is an authority already"):
        init_authority(authority)
    assert {path: path.read_bytes() for path in authority.rglob("*") if path.is_file()} == before
    assert files(authority / "mediator").load().identity == THE_MEDIATOR


@pytest.mark.parametrize(("identity", "folder"), [(US, "clusters/us-east"), (ANN, "users/ann")])
def test_a_certificate_names_its_owner_and_is_of_the_authority(
    authority: Path, identity: Identity, folder: str
) -> None:
    made = issue(authority, identity, hosts=["gateway.example", "10.0.0.4"], days=7)
    assert made == authority / folder
    held = files(made).load()
    assert held.identity == identity
    assert 6 <= (held.expires - datetime.datetime.now(datetime.UTC)).days <= 7
    assert "PRIVATE" not in repr(held)
    one = certificate(made)
    one.verify_directly_issued_by(x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes()))
    names = one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    # Nobody serves with a user's certificate.
    served = ["us-east.cluster.icrf.internal", "gateway.example"] if identity == US else []
    assert names.get_values_for_type(x509.DNSName) == served
    assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_issued_again_it_has_another_key_and_the_same_name(authority: Path) -> None:
    made = files(issue(authority, US))
    stamp, first = made.stamp(), made.load()
    assert files(issue(authority, US)) == made
    again = made.load()
    assert made.stamp() != stamp
    assert (again.identity, again.key != first.key) == (first.identity, True)


def test_without_an_authority_nothing_is_issued(tmp_path: Path, authority: Path) -> None:
    with pytest.raises(SecurityError, match=r"S005 .*no authority .*certs init makes one"):
        issue(tmp_path / "nothing", US)
    (authority / "ca.key").write_text("no key")
    with pytest.raises(SecurityError, match=r"S005 .*not in PEM"):
        issue(authority, US)


def test_files_that_cannot_be_used_are_refused_by_name(authority: Path, tmp_path: Path) -> None:
    good = issue(authority, US)
    cert, key = good / "cert.pem", good / "key.pem"
    other = issue(authority, US, out=tmp_path / "other")

    def broken(name: str, data: bytes, mode: int = 0o600) -> SecurityError:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / name).write_bytes(data)
        (folder / name).chmod(mode)
        error = refusal(folder)
        assert (error.code, error.place) == ("S001", str(folder / name))
        return error

    assert "the key is not that of cert.pem" in str(broken("key.pem", (other / "key.pem").read_bytes()))
    assert "(found 0644); allowed: 0600" in str(broken("key.pem", key.read_bytes(), 0o644))
    assert "no certificate in PEM" in str(broken("cert.pem", certificate(good).public_bytes(Encoding.DER)))
    assert "no certificate in PEM" in str(broken("ca.pem", b""))
    sealed = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    assert "no unencrypted private key" in str(broken("key.pem", sealed))
    cert.unlink()
    assert "cert.pem: not readable: No such file" in str(refusal(good))


@pytest.mark.parametrize(
    ("begins", "days", "what"),
    [
        (LONG_AGO, 30, "expired on 2020-01-31 00:00 UTC"),
        (datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC), 1, "is not valid before 2199-12-31 23:55 UTC"),
    ],
)
def test_a_certificate_out_of_its_time_says_which(
    authority: Path, begins: datetime.datetime, days: int, what: str
) -> None:
    error = refusal(issue(authority, US, begins=begins, days=days))
    assert (error.code, error.exit_code) == ("S002", 78)
    assert f"the certificate {what}" in str(error)


def test_a_process_starts_with_its_own_certificate_only(authority: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = files(issue(authority, US, days=20))
    with pytest.raises(SecurityError, match=r"S004 .*names cluster us-east, not cluster eu-west"):
        made.require(Identity(CLUSTER, "eu-west"))
    assert made.require(US).identity == US
    assert re.search(r"expires on .* in (19|20) days", caplog.text)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["spiffe://icrf/cluster/a", "spiffe://icrf/cluster/b"],
        ["spiffe://icrf/cluster/a", "https://example.org"],
        ["spiffe://other/cluster/a"],
        ["spiffe://icrf/cluster/A"],
        ["spiffe://icrf/cluster/"],
        ["spiffe://icrf/cluster/a/b"],
        ["spiffe://icrf/admin/a"],
        ["spiffe://icrf/cluster/a\n"],
        ["xspiffe://icrf/cluster/a"],
    ],
)
def test_a_certificate_that_names_nobody_or_two_is_nobodys(uris: list[str]) -> None:
    for read in (
        lambda: identity_of(uris, place="test"),
        lambda: caller_of({"peer_uri": [uri.encode() for uri in uris]}, place="test"),
    ):
        with pytest.raises(SecurityError) as caught:
            read()
        assert (caught.value.code, caught.value.status) == ("S004", "PERMISSION_DENIED")


class Call:
    """The context of a handler that somebody calls."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"peer_uri": [self._uri.encode()]} if self._uri else {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


def allowed(call: Call, rpc: str) -> bool:
    try:
        Access(authenticated=True).require_kind(call, rpc)
    except IcrfError as error:
        assert error.code == "S004"
        return False
    return True


def test_who_may_call_what() -> None:
    cluster, user, mediator = Call(US.uri), Call(ANN.uri), Call(THE_MEDIATOR.uri)
    assert [allowed(cluster, rpc) for rpc in ("Connect", "Upload", "Fetch", "Submit", "Cancel")] == [True] * 3 + [
        False
    ] * 2
    assert [allowed(user, rpc) for rpc in ("Connect", "Upload", "Fetch", "Submit", "Cancel")] == [False] * 2 + [
        True
    ] * 3
    for nobody in (mediator, Call(""), Call("spiffe://icrf/cluster/us-east/x")):
        assert not any(allowed(nobody, rpc) for rpc in ("Connect", "Upload", "Fetch", "Submit"))
    # On a server of loopback nobody shows a certificate.
    Access().require_kind(Call(""), "Submit")
    Access().require_cluster(Call(""), "us-east", what="register as", place="test")
