"""How much memory the nodes of a host may take: the same rule for the plan of a federation and for its hosts."""

from __future__ import annotations

MEGABYTE = 1_000_000
# The rest is for Ray, the object store and whoever else works on the machine.
_SHARE = 2


def host_budget(resident_memory_mb: int | None, free_bytes: int | None, num_hosts: int) -> int:
    """Bytes that the active nodes of one host may take.

    Args:
        resident_memory_mb: what is configured; None: an equal share of half of what is free.
        free_bytes: of the machine; None where nobody knows, which bounds nothing.
        num_hosts: hosts that share it.
    """
    if resident_memory_mb is not None:
        return resident_memory_mb * MEGABYTE
    return 1 << 62 if free_bytes is None else free_bytes // _SHARE // max(1, num_hosts)


def resident_nodes(most: int | None, num_nodes: int, node_bytes: int, budget: int) -> int:
    """How many nodes of a host can be active at once, at least one.

    Args:
        most: what is configured, None for as many as there are.
        node_bytes: what an active node takes.
        budget: see :func:`host_budget`.
    """
    return max(1, min(num_nodes, most or num_nodes, budget // max(1, node_bytes)))
