"""Who may call what, in one place: the certificate's kind decides about the call, its name about the rest.

Without certificates a server listens on loopback only, and whoever reaches it is this machine's user.
"""

from __future__ import annotations

import logging
from typing import Any

from icrf.errors import SecurityError
from icrf.wire.identity import CLUSTER, USER, Identity, caller_of

log = logging.getLogger("icrf.mediator.access")

_KINDS = {"Connect": (CLUSTER,), "Upload": (CLUSTER,), "Fetch": (USER, CLUSTER)}
_OTHERWISE = (USER,)


class Access:
    """Checks callers.

    Args:
        authenticated: whether the server is one of TLS, which lets nobody in without a certificate.
    """

    def __init__(self, *, authenticated: bool = False) -> None:
        self._authenticated = authenticated

    def caller(self, context: Any, place: str) -> Identity | None:
        """Who calls; None where nobody shows certificates.

        Raises:
            SecurityError: S004 for a certificate that names nobody.
        """
        return caller_of(context.auth_context(), place=place) if self._authenticated else None

    def require_kind(self, context: Any, rpc: str) -> None:
        """Refuse a kind of caller that `rpc` is not for; S004."""
        caller, kinds = self.caller(context, rpc), _KINDS.get(rpc, _OTHERWISE)
        if caller is not None and caller.kind not in kinds:
            raise _refused(caller, context, f"may not call {rpc}", rpc, " or ".join(kinds))

    def require_cluster(self, context: Any, cluster: str, *, what: str, place: str) -> None:
        """Refuse a caller that is not this cluster; S004."""
        caller = self.caller(context, place)
        if caller is not None and caller != Identity(CLUSTER, cluster):
            raise _refused(caller, context, f"may not {what} cluster {cluster}", place, f"cluster {cluster}")


def _refused(caller: Identity, context: Any, what: str, place: str, allowed: str) -> SecurityError:
    error = SecurityError(
        "S004", f"the certificate names {caller}, which {what}", place=place, allowed=allowed,
        hint="fabric-mediator certs issue makes a certificate for it",
    )  # fmt: skip
    log.warning("refused %s: %s", context.peer(), error)
    return error
