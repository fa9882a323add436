"""Addresses, the rule about plaintext, and the options that every channel and server of the fabric shares."""

from __future__ import annotations

import ipaddress
import re

from icrf.errors import LocalError

MAX_CONTROL_BYTES = 64 << 20
"""Largest control message: the graph of a submission with 100,000 nodes fits. Tensors never travel as one."""

CHUNK_BYTES = 1 << 20
"""Largest chunk of a streamed artifact."""

_KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_MESSAGE_SIZE: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_CONTROL_BYTES),
    ("grpc.max_send_message_length", MAX_CONTROL_BYTES),
)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    *_MESSAGE_SIZE,
    # The application retries, once, where it knows that it is safe; gRPC's own retries would multiply with that.
    ("grpc.enable_retries", 0),
    # An error with the traceback of a node travels in the trailing metadata, whose default limit is 8 KiB.
    ("grpc.max_metadata_size", 128 << 10),
    ("grpc.absolute_max_metadata_size", 192 << 10),
    # gRPC's own back-off grows to two minutes: a mediator that is back must be found within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels with equal options share connections and back-off otherwise, also those of other threads' agents.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment must not see, nor break, what goes to this machine.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_KEEPALIVE,
    *_MESSAGE_SIZE,
    # Without this a second server takes the same port silently, and each gets half of the connections.
    ("grpc.so_reuseport", 0),
    # Clients ping every 20 s; gRPC's default of 300 s would answer that with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?")
_ALLOWED = "HOST:PORT"


def parse_address(address: str, *, place: str = "address") -> tuple[str, int]:
    """Split ``host:port``; an IPv6 host stands in brackets and is returned without them.

    Port 0 is allowed: a server may ask for any free port.

    Raises:
        LocalError: L003 for a URL, a missing or impossible port, a bare IPv6 address or a strange host.
    """
    if "://" in address:
        scheme, _, rest = address.partition("://")
        raise _malformed(address, place, f"write it without {scheme}://: {rest.split('/')[0] or _ALLOWED}")
    if address.startswith("["):
        host, bracket, tail = address[1:].partition("]")
        if not bracket or not _is_ipv6(host):
            raise _malformed(address, place, "write [::1]:7443")
        if not tail.startswith(":"):
            raise _malformed(address, place, f"the port is missing: write [{host}]:7443")
        return host, _port(tail[1:], address, place)
    if address.count(":") > 1:
        raise _malformed(address, place, _bare_ipv6_hint(address))
    host, colon, port = address.partition(":")
    if not colon or not port:
        raise _malformed(address, place, f"the port is missing: write {host or '127.0.0.1'}:7443")
    if not _HOST.fullmatch(host):
        raise _malformed(address, place, "write a host name or an IP address before the colon: 127.0.0.1:7443")
    return host, _port(port, address, place)


def format_address(host: str, port: int) -> str:
    """The inverse of :func:`parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether `host` (no port, no brackets) can only be this machine. Names other than localhost are not resolved."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_plaintext(host: str, *, place: str = "address") -> None:
    """Let plaintext stay on this machine.

    Raises:
        LocalError: L002 if `host` is not loopback.
    """
    if not is_loopback(host):
        raise LocalError(
            "L002",
            f"refusing plaintext with {host}",
            place=place,
            allowed="127.0.0.0/8, ::1 or localhost",
            hint="use 127.0.0.1, or certificates: fabric-mediator certs init makes them, --tls-dir names them",
        )


def dial_target(address: str, *, place: str = "address", encrypted: bool = False) -> str:
    """What gRPC dials for an address.

    Raises:
        LocalError: L003 if malformed or without a real port, L002 if it is in plaintext and not on this machine.
    """
    host, port = parse_address(address, place=place)
    if port == 0:
        raise _malformed(address, place, "port 0 cannot be dialled")
    if not encrypted:
        refuse_plaintext(host, place=place)
    return format_address(host, port)


def _port(text: str, address: str, place: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65_535):
        raise _malformed(address, place, "the port is a number from 0 to 65535")
    return int(text)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _bare_ipv6_hint(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"write [{host}]:{port}" if _is_ipv6(host) and port.isdigit() else "write [::1]:7443"


def _malformed(address: str, place: str, hint: str) -> LocalError:
    return LocalError("L003", f"{address!r} is no address", place=place, allowed=_ALLOWED, hint=hint)
