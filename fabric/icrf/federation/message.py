"""What one node says to others: a header, a sender and a body of plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icrf import values
from icrf.errors import ConfigError, ProtocolError

MAX_HEADER_BYTES = 4096


@dataclass(frozen=True)
class Message:
    """A message in a node's mailbox.

    Attributes:
        header: what it is about, chosen by the sender; at most 4 KiB of UTF-8.
        sender_id: id of the sending node, or the federation's own name for its supervisor.
        body: values that :mod:`icrf.values` can encode, by name.
        timestamp: seconds since the epoch at the sender, for display only; order is (sender index, sequence).

    Raises:
        ConfigError: C006 for a part of the wrong type, C007 for a header that is too long.
    """

    header: str
    sender_id: str
    body: dict[str, Any] = field(default_factory=dict)
    timestamp: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("header", str), ("sender_id", str), ("body", dict), ("timestamp", float | int)):
            found = getattr(self, name)
            if not isinstance(found, kind) or isinstance(found, bool):
                raise ConfigError("C006", f"message {name} is of type {type(found).__name__}", allowed=str(kind))
        for name in ("header", "sender_id"):
            size = len(getattr(self, name).encode("utf-8", "surrogatepass"))
            if size > MAX_HEADER_BYTES:
                raise ConfigError("C007", f"message {name} of {size} bytes", allowed=f"up to {MAX_HEADER_BYTES} bytes")

    def encode(self) -> bytes:
        """The message as bytes, free of pickle.

        Raises:
            ConfigError: C006 naming the place in the body (``body['x'][3]``) that cannot be encoded.
        """
        body = values.encode(self.body, root="body")
        return values.encode([self.header, self.sender_id, float(self.timestamp), body])

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Message:
        """The inverse of :meth:`encode`.

        Raises:
            ProtocolError: P001 if `data` is not a message.
        """
        parts = values.decode(data)
        if not isinstance(parts, list) or len(parts) != 4 or not isinstance(parts[3], bytes):
            raise ProtocolError("P001", "malformed message: not a header, a sender, a time and a body")
        header, sender_id, timestamp, body = parts
        try:
            return cls(header, sender_id, values.decode(body), timestamp)
        except ConfigError as error:
            raise ProtocolError("P001", f"malformed message: {error.message}") from error
