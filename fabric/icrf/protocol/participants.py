"""Sets of nodes as bytes, bit i % 8 of byte i // 8 for node i; and how many nodes a round wants."""

from __future__ import annotations

from collections.abc import Iterable


def bitmap(nodes: Iterable[int], num_nodes: int) -> bytes:
    """The set `nodes` of a federation of `num_nodes`."""
    out = bytearray((num_nodes + 7) // 8)
    for node in nodes:
        out[node // 8] |= 1 << (node % 8)
    return bytes(out)


def nodes_of(packed: bytes) -> tuple[int, ...]:
    """The inverse of :func:`bitmap`, ascending."""
    return tuple(8 * at + bit for at, byte in enumerate(packed) if byte for bit in range(8) if byte >> bit & 1)


def sample_size(num_clients: int, fraction: float, number: int | None) -> int:
    """How many of `num_clients` take part: `number`, or max(fraction * num_clients, 1) rounded down."""
    if number is not None:
        return min(number, num_clients)
    # 0.29 * 100 is 28.999999999999996 in binary: what was meant is 29.
    return max(1, int(fraction * num_clients + 1e-9))
