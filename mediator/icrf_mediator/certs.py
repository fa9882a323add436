"""The fabric's own certificate authority: a folder with a key that never leaves it, and the certificates it has issued.

::

    DIR/ca.pem, ca.key         the authority; whoever has the key can be anybody
    DIR/mediator/              what --tls-dir of the mediator names: ca.pem, cert.pem, key.pem
    DIR/clusters/NAME/         the same for the agent of a cluster
    DIR/users/NAME/            the same for a user of the SDK and of the command line
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from icrf.daemon import fsync_directory
from icrf.errors import SecurityError
from icrf.wire.identity import CLUSTER, MEDIATOR, THE_MEDIATOR, USER, Identity
from icrf.wire.tls import CA_FILE, CERT_FILE, KEY_FILE

CA_KEY_FILE = "ca.key"
CA_DAYS, LEAF_DAYS = 3650, 365

# A peer's clock may be a little behind.
_SKEW = datetime.timedelta(minutes=5)
_FOLDERS = {CLUSTER: "clusters", USER: "users"}


def init_authority(folder: Path, hosts: Sequence[str] = (), days: int = LEAF_DAYS) -> Path:
    """Make an authority and the mediator's certificate; returns the folder of the latter.

    Raises:
        SecurityError: S005 if there is an authority already, or the folder cannot be written.
    """
    if (folder / CA_KEY_FILE).exists() or (folder / CA_FILE).exists():
        raise SecurityError(
            "S005", "there is an authority already", place=str(folder),
            hint="certs issue makes certificates with it; name another folder with --dir for another fabric",
        )  # fmt: skip
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ICRF authority {secrets.token_hex(4)}")])
    builder = _builder(subject, subject, key, CA_DAYS)
    # No authority below this one: a certificate that it issued cannot issue others.
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, SHA256())
    _write(folder / CA_KEY_FILE, _pem(key), 0o600)
    _write(folder / CA_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
    return issue(folder, THE_MEDIATOR, hosts=hosts, days=days)


def issue(
    folder: Path,
    identity: Identity,
    *,
    out: Path | None = None,
    hosts: Sequence[str] = (),
    days: int = LEAF_DAYS,
    begins: datetime.datetime | None = None,
) -> Path:
    """Make a certificate with a key of its own, in place of an earlier one; returns its folder.

    Args:
        folder: of the authority.
        identity: what the certificate names.
        out: where to write, a folder of the authority's by default.
        hosts: names and addresses that other programs may dial it by; the fabric itself needs none.
        days: how long it holds.
        begins: from when on; now, by default.

    Raises:
        SecurityError: S005 if the authority cannot be read, or the folder cannot be written.
    """
    authority, authority_key = _load(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
    builder = _builder(subject, authority.subject, key, days, begins)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.kind != USER:
        names += [x509.DNSName(identity.server_name), *(_host(host) for host in hosts)]
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = builder.add_extension(issuer, critical=False).sign(authority_key, SHA256())
    target = out or _default_folder(folder, identity)
    _write(target / KEY_FILE, _pem(key), 0o600)
    _write(target / CERT_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
    _write(target / CA_FILE, authority.public_bytes(Encoding.PEM), 0o644)
    return target


def _default_folder(folder: Path, identity: Identity) -> Path:
    return folder / MEDIATOR if identity.kind == MEDIATOR else folder / _FOLDERS[identity.kind] / identity.name


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    begins: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = begins or datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
        key = load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not in PEM"
        hint = "fabric-mediator certs init makes one; --dir names its folder"
        raise SecurityError("S005", f"no authority that can be read: {why}", place=str(folder), hint=hint) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SecurityError("S005", "not a key of this fabric's authorities", place=str(folder / CA_KEY_FILE))
    return certificate, key


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write in place of an earlier file, all of it or nothing; never readable by more than `mode` says."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        fsync_directory(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise SecurityError("S005", f"cannot be written: {error.strerror}", place=str(path)) from error
