"""The one error tree of the fabric.

::

    IcrfError                      everything the fabric raises on purpose
    ├── ConfigError                C0xx  a value in a configuration
    │   └── ConfigErrors           several of them, reported at once
    ├── TopologyError              T0xx  an adjacency matrix or a graph
    ├── RoutingError               P0xx  a message that no edge, owner or generation allows
    ├── ProtocolError              P0xx  a malformed or corrupted message or chunk
    ├── WeightsError               W0xx  tensors that may not be averaged
    ├── ResourceError              R0xx  a federation asks for more than the clusters have
    ├── LocalError                 L0xx  addresses, ports, folders and locks of this machine
    ├── AgentError                 A0xx  membership of a cluster
    ├── RunError                   F0xx  a federation that is unknown, failed or was cancelled
    ├── SecurityError              S0xx  certificates, and what they allow
    └── NodeError                  U0xx  user code inside a node
        └── NodeWouldBlock         U010

Every error has a code of :data:`CATALOGUE`, the place (file and line, field, flag), the value found,
what is allowed and a hint. The code decides the exit code of a command and the status of an RPC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_CANNOT_CREATE = 73
EXIT_TRY_AGAIN = 75
EXIT_PERMISSION = 77
EXIT_CONFIG = 78


@dataclass(frozen=True)
class Entry:
    """What a code means: its title, the exit code of a command and the gRPC status of an RPC."""

    title: str
    exit_code: int
    status: str


CATALOGUE: dict[str, Entry] = {
    "C001": Entry("not readable as YAML", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C002": Entry("YAML tag not allowed", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C003": Entry("configuration too large or too deep", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C004": Entry("duplicate key", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C005": Entry("unknown key", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C006": Entry("wrong type", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C007": Entry("out of range", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C008": Entry("keys contradict each other", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C009": Entry("not finite", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C010": Entry("unknown name", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C011": Entry("several errors", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C012": Entry("not built yet", EXIT_CONFIG, "UNIMPLEMENTED"),
    "C013": Entry("bad cluster name", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C014": Entry("placement names no cluster", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C015": Entry("file not readable", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C016": Entry("required key missing", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C017": Entry("user code cannot be loaded", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C018": Entry("model and data do not fit", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "C019": Entry("no cluster has what a node needs", EXIT_CONFIG, "INVALID_ARGUMENT"),
    "T001": Entry("matrix not square", EXIT_DATA, "INVALID_ARGUMENT"),
    "T002": Entry("cell is no number >= 0", EXIT_DATA, "INVALID_ARGUMENT"),
    "T003": Entry("encoding or separator not supported", EXIT_DATA, "INVALID_ARGUMENT"),
    "T004": Entry("matrix not symmetric", EXIT_DATA, "INVALID_ARGUMENT"),
    "T005": Entry("self loop", EXIT_DATA, "INVALID_ARGUMENT"),
    "T006": Entry("graph not connected", EXIT_DATA, "INVALID_ARGUMENT"),
    "T007": Entry("mixing matrix not stochastic", EXIT_DATA, "INVALID_ARGUMENT"),
    "T008": Entry("matrix too large or empty", EXIT_DATA, "INVALID_ARGUMENT"),
    "T009": Entry("NUL byte", EXIT_DATA, "INVALID_ARGUMENT"),
    "T010": Entry("matrix and node count differ", EXIT_DATA, "INVALID_ARGUMENT"),
    "T011": Entry("topology does not exist for these parameters", EXIT_DATA, "INVALID_ARGUMENT"),
    "T012": Entry("consensus cannot be reached", EXIT_DATA, "INVALID_ARGUMENT"),
    "T013": Entry("bad mixing weight", EXIT_DATA, "INVALID_ARGUMENT"),
    "P001": Entry("malformed message", EXIT_DATA, "INVALID_ARGUMENT"),
    "P003": Entry("stale generation or attempt", EXIT_DATA, "FAILED_PRECONDITION"),
    "P004": Entry("protocol version not supported", EXIT_UNAVAILABLE, "FAILED_PRECONDITION"),
    "P010": Entry("node is owned by another cluster", EXIT_PERMISSION, "PERMISSION_DENIED"),
    "P011": Entry("no edge", EXIT_PERMISSION, "PERMISSION_DENIED"),
    "P012": Entry("unknown node", EXIT_DATA, "NOT_FOUND"),
    "P020": Entry("chunk out of order or out of range", EXIT_DATA, "INVALID_ARGUMENT"),
    "P021": Entry("chunk corrupted", EXIT_DATA, "DATA_LOSS"),
    "P022": Entry("payload truncated", EXIT_DATA, "DATA_LOSS"),
    "P026": Entry("payload too large", EXIT_DATA, "RESOURCE_EXHAUSTED"),
    "P027": Entry("what a payload was packed against is not here", EXIT_DATA, "FAILED_PRECONDITION"),
    "P030": Entry("peer cluster not reachable", EXIT_UNAVAILABLE, "UNAVAILABLE"),
    "W010": Entry("tensors differ from the model's layout", EXIT_DATA, "INVALID_ARGUMENT"),
    "W011": Entry("tensor type without an aggregation rule", EXIT_CONFIG, "UNIMPLEMENTED"),
    "W020": Entry("non-finite values", EXIT_DATA, "INVALID_ARGUMENT"),
    "W021": Entry("values outside the exact grid", EXIT_DATA, "OUT_OF_RANGE"),
    "W030": Entry("sample count out of range", EXIT_DATA, "INVALID_ARGUMENT"),
    "R001": Entry("not enough resources", EXIT_UNAVAILABLE, "RESOURCE_EXHAUSTED"),
    "R003": Entry("reservation not ready in time", EXIT_TRY_AGAIN, "DEADLINE_EXCEEDED"),
    "R004": Entry("clusters of different numeric fingerprint", EXIT_CONFIG, "FAILED_PRECONDITION"),
    "R005": Entry("no room for the state of nodes", EXIT_UNAVAILABLE, "RESOURCE_EXHAUSTED"),
    "R006": Entry("host killed for want of memory", EXIT_UNAVAILABLE, "RESOURCE_EXHAUSTED"),
    "L001": Entry("mediator unreachable", EXIT_UNAVAILABLE, "UNAVAILABLE"),
    "L002": Entry("plaintext off loopback", EXIT_CONFIG, "FAILED_PRECONDITION"),
    "L003": Entry("malformed address", EXIT_USAGE, "INVALID_ARGUMENT"),
    "L004": Entry("port in use", EXIT_CANNOT_CREATE, "UNAVAILABLE"),
    "L005": Entry("folder not writable", EXIT_CANNOT_CREATE, "FAILED_PRECONDITION"),
    "L006": Entry("state folder in use", EXIT_CANNOT_CREATE, "FAILED_PRECONDITION"),
    "L007": Entry("not a journal of this version", EXIT_CANNOT_CREATE, "FAILED_PRECONDITION"),
    "L008": Entry("Ray cluster not usable", EXIT_UNAVAILABLE, "UNAVAILABLE"),
    "L009": Entry("conflicting flags", EXIT_USAGE, "INVALID_ARGUMENT"),
    "A001": Entry("cluster name already served", EXIT_UNAVAILABLE, "ALREADY_EXISTS"),
    "A002": Entry("lease lost", EXIT_TRY_AGAIN, "FAILED_PRECONDITION"),
    "A003": Entry("agent lost", EXIT_UNAVAILABLE, "UNAVAILABLE"),
    "A004": Entry("code not allowed on this cluster", EXIT_PERMISSION, "PERMISSION_DENIED"),
    "A005": Entry("too few clusters connected", EXIT_UNAVAILABLE, "FAILED_PRECONDITION"),
    "F001": Entry("no such federation", EXIT_DATA, "NOT_FOUND"),
    "F002": Entry("federation failed", EXIT_SOFTWARE, "FAILED_PRECONDITION"),
    "F003": Entry("federation cancelled", EXIT_TRY_AGAIN, "CANCELLED"),
    "F004": Entry("ambiguous run id", EXIT_USAGE, "INVALID_ARGUMENT"),
    "F005": Entry("not possible in this state", EXIT_DATA, "FAILED_PRECONDITION"),
    "F006": Entry("no such artifact", EXIT_DATA, "NOT_FOUND"),
    "S001": Entry("certificate files not usable", EXIT_CONFIG, "FAILED_PRECONDITION"),
    "S002": Entry("certificate not valid now", EXIT_CONFIG, "FAILED_PRECONDITION"),
    "S003": Entry("TLS handshake failed", EXIT_PERMISSION, "UNAUTHENTICATED"),
    "S004": Entry("identity does not allow this", EXIT_PERMISSION, "PERMISSION_DENIED"),
    "S005": Entry("certificate authority not usable", EXIT_CANNOT_CREATE, "FAILED_PRECONDITION"),
    "U001": Entry("node raised", EXIT_SOFTWARE, "ABORTED"),
    "U002": Entry("node returned a wrong type", EXIT_SOFTWARE, "ABORTED"),
    "U003": Entry("node host died", EXIT_SOFTWARE, "ABORTED"),
    "U004": Entry("node quarantined", EXIT_SOFTWARE, "ABORTED"),
    "U010": Entry("node would block", EXIT_SOFTWARE, "FAILED_PRECONDITION"),
    "X001": Entry("internal error", EXIT_SOFTWARE, "INTERNAL"),
    "X002": Entry("round did not repeat", EXIT_SOFTWARE, "DATA_LOSS"),
}


class IcrfError(Exception):
    """An error with a code, the place, the value found, what is allowed and a hint.

    Args:
        code: a key of :data:`CATALOGUE`.
        message: one sentence that names what is wrong.
        place: file:line, field path or flag.
        value: what was found there.
        allowed: what would have been accepted.
        hint: what to do about it.
    """

    def __init__(
        self, code: str, message: str, *, place: str = "", value: object = None, allowed: str = "", hint: str = ""
    ) -> None:
        self.code = code
        self.message = message
        self.place = place
        self.value = None if value is None else str(value)
        self.allowed = allowed
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.code} {self.place}: {self.message}" if self.place else f"{self.code} {self.message}"
        if self.value is not None and self.value not in self.message:
            text += f" (found {self.value})"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        return f"{text}. {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return error_from_dict, (self.to_dict(),)

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this error."""
        return CATALOGUE[self.code].exit_code

    @property
    def status(self) -> str:
        """The name of the gRPC status that carries this error."""
        return CATALOGUE[self.code].status

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json`` and pickling; :func:`error_from_dict` reads them."""
        return {
            "code": self.code,
            "message": self.message,
            "place": self.place,
            "value": self.value,
            "allowed": self.allowed,
            "hint": self.hint,
        }

    def to_json(self) -> str:
        """One JSON text, for the wire and the journal; :func:`error_from_json` reads it."""
        return json.dumps(self.to_dict())


class ConfigError(IcrfError):
    """A value in a configuration (C0xx)."""


class ConfigErrors(ConfigError):
    """Every error of one configuration, reported at once."""

    def __init__(self, errors: Iterable[IcrfError]) -> None:
        self.errors = tuple(errors)
        super().__init__("C011", f"{len(self.errors)} errors")

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: of a single error its own, of several C011; ``errors`` has each of them."""
        whole = self.errors[0].to_dict() if len(self.errors) == 1 else super().to_dict()
        return {**whole, "errors": [e.to_dict() for e in self.errors]}


class TopologyError(IcrfError):
    """An adjacency matrix or a graph that cannot be used (T0xx)."""


class RoutingError(IcrfError):
    """A message that no edge, owner, generation or attempt allows (P003, P010-P012)."""


class ProtocolError(IcrfError):
    """A malformed, truncated or corrupted message (P0xx)."""


class WeightsError(IcrfError):
    """Tensors that may not be averaged (W0xx)."""


class ResourceError(IcrfError):
    """A federation asks for more than the clusters have (R0xx)."""


class LocalError(IcrfError):
    """Addresses, ports, folders and locks of this machine (L0xx)."""


class AgentError(IcrfError):
    """Membership of a cluster in the fabric (A0xx)."""


class RunError(IcrfError):
    """A federation that is unknown, failed or was cancelled (F0xx)."""


class SecurityError(IcrfError):
    """Certificates that cannot be used, or that do not allow what was asked for (S0xx)."""


class NodeError(IcrfError):
    """User code inside a node failed (U0xx)."""


class NodeWouldBlock(NodeError):
    """A blocking receive on a shared slot would deadlock it (U010)."""


class InternalError(IcrfError):
    """A defect of the fabric itself (X001)."""


_BY_LETTER: dict[str, type[IcrfError]] = {
    "C": ConfigError,
    "T": TopologyError,
    "P": ProtocolError,
    "W": WeightsError,
    "R": ResourceError,
    "L": LocalError,
    "A": AgentError,
    "F": RunError,
    "S": SecurityError,
    "U": NodeError,
    "X": InternalError,
}
_BY_CODE: dict[str, type[IcrfError]] = {
    "U010": NodeWouldBlock,
    "P003": RoutingError,
    "P010": RoutingError,
    "P011": RoutingError,
    "P012": RoutingError,
}


def error_class(code: str) -> type[IcrfError]:
    """The class of the tree that a code belongs to."""
    return _BY_CODE.get(code) or _BY_LETTER.get(code[:1], InternalError)


def make_error(code: str, message: str, **parts: Any) -> IcrfError:
    """Build the error class that `code` belongs to."""
    if code not in CATALOGUE:
        message, code = f"{message} (unknown code {code})", "X001"
    return error_class(code)(code, message, **parts)


def error_from_dict(data: Mapping[str, Any]) -> IcrfError:
    """The inverse of :meth:`IcrfError.to_dict`."""
    if data.get("errors"):
        return ConfigErrors(error_from_dict(e) for e in data["errors"])
    parts = {k: data.get(k) or "" for k in ("place", "allowed", "hint")}
    return make_error(str(data.get("code", "X001")), str(data.get("message", "")), value=data.get("value"), **parts)


def error_from_json(text: str) -> IcrfError:
    """The inverse of :meth:`IcrfError.to_json`; text that is no error becomes X001."""
    try:
        return error_from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError):
        return InternalError("X001", "an error that cannot be read", value=text[:200])
