"""Errors on the wire: an :class:`IcrfError` becomes a gRPC status and comes back as the same error.

The status code is the catalogue's. The whole error travels as JSON in the trailing metadata, so the caller sees the
same code, place and hint as if it had called in-process. Whatever else gRPC reports is mapped as well: no caller of
the fabric ever meets a bare gRPC error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from icrf.errors import IcrfError, InternalError, LocalError, ProtocolError, error_from_dict, make_error

ERROR_KEY = "icrf-error-bin"
"""Trailing metadata that holds the error."""

ACCEPTED_KEY = "icrf-accepted"
"""Initial metadata of a watch or an upload: the mediator has accepted it, however long the first event takes."""

# What grpc.aio says of a write to a stream that the peer has just ended; it hides the peer's own status.
_BROKEN_WRITE = "Internal error from Core"

_MAX_ERROR_BYTES = 48 << 10  # base64 makes it a third longer; the channel takes 128 KiB of metadata
_MAX_DETAILS = 1_000
_MAX_PART = 8_000
_CUT = " [...]"


@dataclass(frozen=True)
class RpcStatus:
    """What a servicer passes to ``context.abort``."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def to_status(error: IcrfError) -> RpcStatus:
    """The status that carries `error`. Overlong texts are cut so that the metadata stays within its limit."""
    return RpcStatus(grpc.StatusCode[error.status], _cut(str(error), _MAX_DETAILS), ((ERROR_KEY, _to_json(error)),))


def from_rpc_error(
    rpc_error: BaseException, address: str, *, what: str = "mediator", unreachable: str = "L001"
) -> IcrfError:
    """The error that a failed RPC means.

    Args:
        rpc_error: what grpc or grpc.aio raised.
        address: whom the RPC was sent to.
        what: what the address is, for the message.
        unreachable: the code for a peer that does not answer.

    Returns:
        The peer's own error if it sent one; else an error of the connection, with the address as its place.
    """
    code, details, metadata = _parts(rpc_error)
    return from_status(code, details, metadata, address, what=what, unreachable=unreachable)


def from_status(
    code: grpc.StatusCode | None,
    details: str,
    metadata: Iterable[Any],
    address: str,
    *,
    what: str = "mediator",
    unreachable: str = "L001",
) -> IcrfError:
    """Like :func:`from_rpc_error` for a status in parts; a `code` of None means that there was no status at all."""
    sent = _sent_error(metadata)
    if sent is not None:
        return sent
    details = _cut(details, _MAX_DETAILS)
    if code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.INTERNAL and details == _BROKEN_WRITE):
        hint = f"check that it runs and that {address} is its address"
        # gRPC tells the whole story of its attempts; its last words are the reason.
        reason = details.rpartition("remote host: ")[2].removeprefix("connect: ")
        return make_error(unreachable, f"{what} unreachable", place=address, value=reason or None, hint=hint)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        hint = "it may be overloaded or behind a network that drops packets; try again"
        return make_error(unreachable, f"{what} did not answer in time", place=address, hint=hint)
    if code is grpc.StatusCode.CANCELLED:
        return make_error(unreachable, f"the call to the {what} was cancelled", place=address, value=details or None)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        hint = "it is of another version, or something else listens there"
        return ProtocolError("P004", f"the {what} does not know this call", place=address, value=details, hint=hint)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ProtocolError("P026", "message larger than the limit", place=address, value=details)
    if code is grpc.StatusCode.DATA_LOSS:
        return ProtocolError("P021", "message corrupted", place=address, value=details)
    if code is grpc.StatusCode.INTERNAL and "deserializ" in details.lower():
        return ProtocolError("P001", f"the {what} answered what this version cannot read", place=address, value=details)
    name = code.name if code is not None else "no status"
    return InternalError("X001", f"the call to the {what} failed ({name})", place=address, value=details or None)


def is_unreachable(error: IcrfError) -> bool:
    """Whether the mediator did not answer, so that an idempotent call may be tried again."""
    return isinstance(error, LocalError) and error.code == "L001"


def _parts(rpc_error: BaseException) -> tuple[grpc.StatusCode | None, str, Iterable[Any]]:
    """Code, details and trailing metadata, which grpc and grpc.aio offer under equal names."""
    if not isinstance(rpc_error, grpc.RpcError) or not hasattr(rpc_error, "code"):
        return None, f"{type(rpc_error).__name__}: {rpc_error}", ()
    metadata = rpc_error.trailing_metadata() if hasattr(rpc_error, "trailing_metadata") else ()
    return rpc_error.code(), rpc_error.details() or "", metadata or ()


def _sent_error(metadata: Iterable[Any]) -> IcrfError | None:
    """The error in the metadata; None if there is none or if it is not readable."""
    raw = next((value for key, value in metadata if key == ERROR_KEY), None)
    if raw is None:
        return None
    try:
        return _from_json(raw)
    except (ValueError, TypeError, AttributeError, RecursionError):
        # A peer that sends garbage here is treated like one that sent nothing: its status still counts.
        return None


def _from_json(raw: bytes | str) -> IcrfError:
    data = json.loads(raw)
    if not isinstance(data, Mapping) or not isinstance(data.get("code"), str):
        raise ValueError("no error")
    return error_from_dict(data)


def _to_json(error: IcrfError) -> bytes:
    raw = _dump(error.to_dict())
    if len(raw) <= _MAX_ERROR_BYTES:
        return raw
    data = _cut_parts(error.to_dict())
    listed = data.pop("errors", [])
    kept = []
    room = _MAX_ERROR_BYTES - len(_dump(data)) - 1_000
    for one in listed:
        one = _cut_parts(one)
        room -= len(_dump(one)) + 1
        if room < 0:
            break
        kept.append(one)
    return _dump({**data, "errors": kept} if kept else data)


def _dump(data: Mapping[str, Any]) -> bytes:
    # JSON escapes what is not ASCII, so lone surrogates in a node's message cannot break the encoding.
    return json.dumps(data).encode("ascii")


def _cut_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    # Six bytes per character is the worst that JSON's escapes make of text; five parts must fit together.
    limit = _MAX_PART // 6
    limits = {"message": _MAX_PART // 2}
    return {k: _cut(v, limits.get(k, limit)) if isinstance(v, str) else v for k, v in data.items()}


def _cut(text: str, limit: int) -> str:
    text = text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT
    return text.encode("utf-8", "replace").decode("utf-8")
