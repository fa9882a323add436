"""Certificates on connections: a folder of three files, read anew when they change.

Keys are named by their path everywhere in the fabric and read only where a connection is made: nothing that is logged,
journalled or handed to an actor ever holds one.
"""

from __future__ import annotations

import datetime
import logging
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from icrf.errors import IcrfError, SecurityError
from icrf.wire.addresses import CHANNEL_OPTIONS
from icrf.wire.identity import Identity, identity_of

log = logging.getLogger("icrf.tls")

CA_FILE, CERT_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
ENVIRONMENT = "ICRF_TLS_DIR"
WARN_DAYS = 30

_ISSUE_HINT = "fabric-mediator certs issue makes a new one"


@dataclass(frozen=True)
class Credentials:
    """What the files held at one moment.

    Attributes:
        ca: certificates of the authorities that peers are checked against, PEM.
        cert: the certificate, and those between it and the authority, PEM.
        key: its private key, PEM; not shown.
        identity: what the certificate names.
        expires: the moment until which it holds, UTC.
    """

    ca: bytes
    cert: bytes
    key: bytes
    identity: Identity
    expires: datetime.datetime

    def __repr__(self) -> str:
        return f"Credentials({self.identity}, until {self.expires:%Y-%m-%d})"


@dataclass(frozen=True)
class TlsFiles:
    """The folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` of one process; only its path travels.

    Args:
        folder: absolute, so that it is the same folder in another process.
    """

    folder: str

    @classmethod
    def at(cls, folder: Path | str | None) -> TlsFiles | None:
        """The files of a folder as it was typed; None for none, which means plaintext."""
        return None if folder is None else cls(os.path.abspath(folder))

    def stamp(self) -> tuple[int, ...]:
        """Changes whenever a file is replaced; zeros for files that are not there."""
        return tuple(_changed_ns(os.path.join(self.folder, name)) for name in (CA_FILE, CERT_FILE, KEY_FILE))

    def load(self) -> Credentials:
        """Read and check the files.

        Raises:
            SecurityError: S001 for a file that is missing, no PEM, readable by others (the key), encrypted, or a key
                of another certificate; S002 for a certificate that does not hold now; S004 for one that names nobody.
        """
        ca, cert, key = (self._read(name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
        certificate = self._certificate(CERT_FILE, cert)
        self._certificate(CA_FILE, ca)
        self._check_key(key, certificate)
        place = os.path.join(self.folder, CERT_FILE)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        now = datetime.datetime.now(datetime.UTC)
        if not begins <= now <= ends:
            what = f"expired on {_day(ends)}" if now > ends else f"is not valid before {_day(begins)}"
            raise SecurityError("S002", f"the certificate {what}", place=place, hint=_ISSUE_HINT)
        return Credentials(ca, cert, key, identity_of(_uris(certificate), place=place), ends)

    def require(self, wanted: Identity) -> Credentials:
        """The files of a process that starts, which must name it; a certificate that ends soon is logged.

        Raises:
            SecurityError: as :meth:`load`; S004 if the certificate names somebody else.
        """
        found = self.load()
        place = os.path.join(self.folder, CERT_FILE)
        if found.identity != wanted:
            raise SecurityError(
                "S004", f"the certificate names {found.identity}, not {wanted}", place=place, hint=_ISSUE_HINT
            )
        left = (found.expires - datetime.datetime.now(datetime.UTC)).days
        if left < WARN_DAYS:
            log.warning("the certificate %s expires on %s, in %d days", place, _day(found.expires), left)
        return found

    def _read(self, name: str) -> bytes:
        path = os.path.join(self.folder, name)
        try:
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if name == KEY_FILE and mode & 0o077:
                raise SecurityError(
                    "S001", "others may read the key", place=path, value=f"{mode:04o}", allowed="0600",
                    hint=f"chmod 600 {path}",
                )  # fmt: skip
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise SecurityError(
                "S001", f"not readable: {error.strerror}", place=path,
                hint=f"the folder needs {CA_FILE}, {CERT_FILE} and {KEY_FILE}, as fabric-mediator certs makes them",
            ) from error  # fmt: skip

    def _certificate(self, name: str, pem: bytes) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificates(pem)[0]
        except ValueError as error:
            place = os.path.join(self.folder, name)
            raise SecurityError("S001", "no certificate in PEM", place=place, hint=_ISSUE_HINT) from error

    def _check_key(self, key: bytes, certificate: x509.Certificate) -> None:
        place = os.path.join(self.folder, KEY_FILE)
        try:
            private: Any = load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            # TypeError is what an encrypted key gives; neither message is shown, as it might quote the file.
            raise SecurityError("S001", "no unencrypted private key in PEM", place=place, hint=_ISSUE_HINT) from error
        if _public_bytes(private.public_key()) != _public_bytes(certificate.public_key()):
            raise SecurityError("S001", f"the key is not that of {CERT_FILE}", place=place, hint=_ISSUE_HINT)


def open_channel(target: str, tls: TlsFiles | None, peer: Identity, *, module: Any = grpc) -> Any:
    """A channel; with `tls` it reaches nobody but `peer`, to whom it shows the certificate.

    Args:
        target: what :func:`icrf.wire.addresses.dial_target` made of the address.
        module: ``grpc`` or ``grpc.aio``.

    Raises:
        SecurityError: see :meth:`TlsFiles.load`.
    """
    if tls is None:
        return module.insecure_channel(target, options=CHANNEL_OPTIONS)
    held = tls.load()
    credentials = grpc.ssl_channel_credentials(held.ca, held.key, held.cert)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", peer.server_name))
    return module.secure_channel(target, credentials, options=options)


def listen_on(server: Any, address: str, tls: TlsFiles | None) -> int:
    """Let a server of grpc or grpc.aio listen; returns the port.

    With `tls` every client must show a certificate of the authority. Replaced files hold for the next connection.

    Raises:
        RuntimeError: from gRPC, when the address cannot be listened on.
        SecurityError: see :meth:`TlsFiles.load`.
    """
    if tls is None:
        return int(server.add_insecure_port(address))
    fetch = _Fetcher(tls)
    first = fetch.read()
    return int(server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(first, fetch, True)))


class _Fetcher:
    """What gRPC asks for at each handshake, in threads of its own: the new files if there are any."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls, self._lock = tls, threading.Lock()
        self._stamp: tuple[int, ...] = ()

    def read(self) -> Any:
        self._stamp = self._tls.stamp()
        held = self._tls.load()
        return grpc.ssl_server_certificate_configuration([(held.key, held.cert)], held.ca)

    def __call__(self) -> Any:
        with self._lock:
            if self._tls.stamp() == self._stamp:
                return None
            try:
                return self.read()
            except IcrfError as error:
                # Half of the files may be new. The next change is looked at again; until then the old ones serve.
                log.warning("the new certificate is not used: %s", error)
                return None


def _changed_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(names.get_values_for_type(x509.UniformResourceIdentifier))


def _public_bytes(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
