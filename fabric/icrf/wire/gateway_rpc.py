"""Names and answers of the gateway and relay services, which are generic handlers over raw bytes.

``gateway.proto`` describes them; the generated stubs cannot be used because bulk streams bypass protobuf.
"""

from __future__ import annotations

from icrf.errors import IcrfError, ProtocolError, error_from_json
from icrf.wire._generated.icrf.v1 import gateway_pb2
from icrf.wire.codec import parse

GATEWAY_SERVICE = "icrf.v1.Gateway"
RELAY_SERVICE = "icrf.v1.Relay"
DELIVER = "Deliver"
ATTACH, SEND, RECEIVE, DONE = "Attach", "Send", "Receive", "Done"


def method_path(service: str, method: str) -> str:
    """The path under which gRPC knows a method."""
    return f"/{service}/{method}"


def encode_ack(error: IcrfError | None) -> bytes:
    """The answer to a payload: processed, or refused with this error."""
    ack = gateway_pb2.Ack(ok=error is None, error_json="" if error is None else error.to_json())
    return bytes(ack.SerializeToString())


def decode_ack(raw: bytes) -> IcrfError | None:
    """The inverse of :func:`encode_ack`; an answer that cannot be read is an error itself."""
    try:
        ack = parse(raw, gateway_pb2.Ack)
    except ProtocolError as error:
        return error
    return None if ack.ok else error_from_json(ack.error_json)
