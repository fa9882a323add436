"""How many bytes the kernel has counted at TCP sockets (Linux): what crossed, whoever sent it and whatever it says."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator

# From the kernel's headers: linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h and linux/tcp.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_INET_DIAG_INFO = 2
_ALL_STATES = 0xFFFFFFFF
_NETLINK_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_DIAG_BYTES = 72
_BYTES_RECEIVED_AT = 128
_READ_BYTES = 1 << 17


def received_bytes(port: int) -> int:
    """Bytes that came in at the open connections to a port of this machine, without TCP's own headers."""
    return sum(_received(family, port) for family in (socket.AF_INET, socket.AF_INET6))


def _received(family: int, port: int) -> int:
    sockets = bytes(48)
    body = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), _ALL_STATES) + sockets
    request = _NETLINK_HEADER.pack(_NETLINK_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.send(request)
        return sum(_count(entry) for entry in _entries(kernel) if int.from_bytes(entry[4:6], "big") == port)


def _entries(kernel: socket.socket) -> Iterator[bytes]:
    """An ``inet_diag_msg`` with its attributes for each socket; any other message ends the answer."""
    while True:
        data = kernel.recv(_READ_BYTES)
        at = 0
        while at < len(data):
            length, kind, *_ = _NETLINK_HEADER.unpack_from(data, at)
            if kind != _SOCK_DIAG_BY_FAMILY:
                return
            yield data[at + _NETLINK_HEADER.size : at + length]
            at += _padded(length)


def _count(entry: bytes) -> int:
    """``tcpi_bytes_received``; 0 for a socket that has none, such as one that listens."""
    at = _DIAG_BYTES
    while at < len(entry):
        length, kind = _ATTRIBUTE.unpack_from(entry, at)
        if kind == _INET_DIAG_INFO and length >= _ATTRIBUTE.size + _BYTES_RECEIVED_AT + 8:
            return int.from_bytes(entry[at + _ATTRIBUTE.size + _BYTES_RECEIVED_AT :][:8], sys.byteorder)
        at += _padded(length)
    return 0


def _padded(length: int) -> int:
    return (length + 3) & ~3


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on now, for programs that do not choose one themselves."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    found: list[int] = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


def is_open(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True
