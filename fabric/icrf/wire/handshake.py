"""Why two ends do not get along about TLS. gRPC says "socket closed" to most of it; here the handshake is tried again.

A peer that refuses a certificate does so after the client believes that all is well (TLS 1.3), and gRPC's servers do it
without a word. So the reason is found by another handshake with the standard library, after a call has failed.
"""

from __future__ import annotations

import os
import socket
import ssl
import time

from icrf.errors import IcrfError, SecurityError
from icrf.wire.addresses import parse_address
from icrf.wire.identity import Identity
from icrf.wire.tls import CA_FILE, CERT_FILE, KEY_FILE, TlsFiles

PROBE_S = 2.0
AGAIN_S = 0.2

_PLAINTEXT = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})


class _Ended(Exception):
    """The peer has shaken hands and hung up: it does not like the certificate, or it is just being stopped."""


def explain(target: str, tls: TlsFiles | None, peer: Identity, *, what: str = "mediator") -> IcrfError | None:
    """What is wrong with the certificates between here and `target`; None if it is something else. Blocks for seconds.

    Args:
        target: ``host:port`` that a call could not reach.
        tls: what the call was made with.
        peer: whom it was for.
        what: what the target is, for the message.
    """
    try:
        return _shake_hands(target, tls, peer, what)
    except _Ended:
        # Who was being stopped is gone by then.
        time.sleep(AGAIN_S)
    try:
        return _shake_hands(target, tls, peer, what)
    except _Ended:
        return _refused(target, tls, what, "it ended the connection")


def _shake_hands(target: str, tls: TlsFiles | None, peer: Identity, what: str) -> IcrfError | None:
    host, port = parse_address(target)
    ended = False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if tls is not None:
            tls.load()
            context.load_verify_locations(os.path.join(tls.folder, CA_FILE))
            context.load_cert_chain(os.path.join(tls.folder, CERT_FILE), os.path.join(tls.folder, KEY_FILE))
        with (
            socket.create_connection((host, port), PROBE_S) as connection,
            context.wrap_socket(connection, server_hostname=peer.server_name) as encrypted,
        ):
            if tls is not None:
                # A content server begins with its settings.
                ended = True
                ended = not encrypted.recv(1)
    except ssl.SSLError as error:
        return _meaning(error, target, tls, what)
    except TimeoutError:
        return None
    except OSError:
        if ended:
            raise _Ended from None
        return None
    except IcrfError as error:
        return error
    if ended:
        raise _Ended
    return None if tls is not None else _wants_tls(target, what)


def _meaning(error: ssl.SSLError, target: str, tls: TlsFiles | None, what: str) -> SecurityError | None:
    if error.reason in _PLAINTEXT:
        if tls is None:
            return None
        hint = f"start the {what} with --tls-dir, or leave it out on both ends, on one machine"
        return SecurityError("S003", f"the {what} speaks plaintext", place=target, hint=hint)
    if tls is None:
        return _wants_tls(target, what)
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "is it the right address, and are both certificates of the same fabric-mediator certs init?"
        return SecurityError(
            "S003", f"the certificate of the {what} was refused here: {error.verify_message}", place=target, hint=hint
        )
    return _refused(target, tls, what, (error.reason or str(error)).lower().replace("_", " "))


def _refused(target: str, tls: TlsFiles | None, what: str, reason: str) -> SecurityError:
    place = "" if tls is None else os.path.join(tls.folder, CERT_FILE)
    hint = f"is {place} of the same authority as the {what}'s, and does it hold by that machine's clock?"
    return SecurityError("S003", f"the {what} refused this certificate: {reason}", place=target, hint=hint)


def _wants_tls(target: str, what: str) -> SecurityError:
    hint = "name the folder of your certificate with --tls-dir, $ICRF_TLS_DIR or connect(..., tls=...)"
    return SecurityError("S003", f"the {what} wants TLS and was called in plaintext", place=target, hint=hint)
