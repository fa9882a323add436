"""Names and answers of the gateway and relay services, which are generic handlers over raw bytes.

``gateway.proto`` describes them; the generated stubs cannot be used because bulk streams bypass protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass

from icrf.errors import IcrfError, ProtocolError, error_from_json
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.codec import parse

GATEWAY_SERVICE = "icrf.v1.Gateway"
RELAY_SERVICE = "icrf.v1.Relay"
DELIVER = "Deliver"
ATTACH, SEND, RECEIVE = "Attach", "Send", "Receive"

INITIAL_CREDIT_BYTES = 2 << 20
"""Bytes of data that every receiver takes unasked; for more, a sender waits until it is told."""


@dataclass(frozen=True)
class Reply:
    """What a receiver says during a transfer.

    Attributes:
        verified_chunks: how many chunks are there; the sender need never send them again.
        credit_bytes: bytes of data, from the payload's beginning, that may be sent by now.
        answered: whether this is the last reply.
        error: with the last reply, why the payload was refused; None: it was processed.
    """

    verified_chunks: int = 0
    credit_bytes: int = 0
    answered: bool = False
    error: IcrfError | None = None


def method_path(service: str, method: str) -> str:
    """The path under which gRPC knows a method."""
    return f"/{service}/{method}"


def encode_reply(reply: Reply) -> bytes:
    """A reply as it travels."""
    message = gateway_pb2.TransferReply(verified_chunks=reply.verified_chunks, credit_bytes=reply.credit_bytes)
    if reply.answered:
        error = reply.error
        message.ack.CopyFrom(gateway_pb2.Ack(ok=error is None, error_json="" if error is None else error.to_json()))
    return bytes(message.SerializeToString())


def decode_reply(raw: bytes) -> Reply:
    """The inverse of :func:`encode_reply`; a reply that cannot be read is an answer with the reason."""
    try:
        message = parse(raw, gateway_pb2.TransferReply)
    except ProtocolError as unreadable:
        return Reply(answered=True, error=unreadable)
    if not message.HasField("ack"):
        return Reply(message.verified_chunks, message.credit_bytes)
    error = None if message.ack.ok else error_from_json(message.ack.error_json)
    return Reply(message.verified_chunks, message.credit_bytes, True, error)
