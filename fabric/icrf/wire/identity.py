"""Who is at the other end of an encrypted connection: what a certificate of the fabric names.

The name is the certificate's URI (``spiffe://icrf/cluster/us-east``), one and only one; common name and host names say
nothing. gRPC's clients compare host names only, so a certificate that is served also has the host name
``us-east.cluster.icrf.internal``: a client asks for that one, wherever it dials, and so knows whom it has reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icrf.errors import SecurityError

CLUSTER, USER, MEDIATOR = "cluster", "user", "mediator"
KINDS = (CLUSTER, USER, MEDIATOR)

_URI = re.compile(r"spiffe://icrf/(cluster|user|mediator)/([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)")
_ALLOWED = "one URI spiffe://icrf/cluster/NAME, .../user/NAME or .../mediator/NAME"


@dataclass(frozen=True)
class Identity:
    """What a certificate stands for.

    Attributes:
        kind: ``cluster``, ``user`` or ``mediator``.
        name: lower-case letters, digits and inner hyphens.
    """

    kind: str
    name: str

    @property
    def uri(self) -> str:
        """The subject alternative name that is the identity."""
        return f"spiffe://icrf/{self.kind}/{self.name}"

    @property
    def server_name(self) -> str:
        """The host name that a client asks for, in place of the one that it dials."""
        return f"{self.name}.{self.kind}.icrf.internal"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


THE_MEDIATOR = Identity(MEDIATOR, "mediator")
"""Of every mediator: a fabric has one."""


def identity_of(uris: Iterable[str], *, place: str) -> Identity:
    """The identity of a certificate with these URIs.

    Raises:
        SecurityError: S004 if there is none, more than one, or one that is not of the fabric.
    """
    found = list(uris)
    match = _URI.fullmatch(found[0]) if len(found) == 1 else None
    if match is None:
        shown = ", ".join(found)[:200] or "none"
        raise SecurityError("S004", "the certificate names nobody", place=place, value=shown, allowed=_ALLOWED)
    return Identity(match[1], match[2])


def caller_of(auth_context: Mapping[str, Any], *, place: str) -> Identity:
    """Who called a handler of an encrypted server, from gRPC's own reading of the verified certificate.

    Args:
        auth_context: what the handler's context has of that name; its values are lists of bytes.
        place: for the error.

    Raises:
        SecurityError: S004, also for a connection without a certificate.
    """
    uris = [uri.decode("utf-8", "replace") for uri in auth_context.get("peer_uri", ())]
    return identity_of(uris, place=place)
