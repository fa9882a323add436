"""Which nodes of a host are active: a bounded number, of which the least recently used one makes room first.

A node is a virtual actor: it is made when something is to be done with it and, where not all fit, put away again
afterwards. How many may be active is configured, or measured while the host sets its nodes up.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from icrf.federation.node import FederatedNode
from icrf.residency import host_budget
from icrf.spec import FederationConfig
from icrf_agent.host_notes import HostNotes

_PAGE = os.sysconf("SC_PAGE_SIZE")
# A host whose nodes took less than this part of what they may take did not die of them.
_SUSPICIOUS = 4


class Residents:
    """The active nodes of a host.

    Args:
        activate: makes a node, from scratch or from what is kept of it.
        passivate: keeps what has to be kept of a node that is about to go.

    Attributes:
        limit: how many may be active at once, at least 1; None: all.
    """

    def __init__(self, activate: Callable[[int], FederatedNode], passivate: Callable[[FederatedNode], None]) -> None:
        self._activate, self._passivate = activate, passivate
        self._active: OrderedDict[int, FederatedNode] = OrderedDict()
        self.limit: int | None = None

    @property
    def active(self) -> Mapping[int, FederatedNode]:
        """The active nodes by index, the least recently used first; it changes with every use."""
        return self._active

    def get(self, index: int) -> FederatedNode:
        """A node, made active if it is not."""
        node = self._active.get(index)
        if node is None:
            self._make_room()
            node = self._active[index] = self._activate(index)
        elif self.limit is not None:
            self._active.move_to_end(index)
        return node

    def _make_room(self) -> None:
        while self.limit is not None and len(self._active) >= self.limit:
            index = next(iter(self._active))
            self._passivate(self._active[index])
            del self._active[index]


class Admission:
    """Decides, while a host sets up its nodes one after the other, how many of them may be active at once.

    The configuration decides (``resident_nodes``); else nodes are admitted until they, measured, and what is kept of
    them take the memory that there is for them (``resident_memory_mb``, or a share of what is free). Where an earlier
    process of this host died while its nodes took much of that, they will be half as many: it may have died of them.

    Args:
        num_nodes: of this host.
        num_hosts: hosts of the run on this cluster.
        kept_bytes: what is kept of an active node in memory from round to round, besides the node itself.
        notes: what an earlier process of the host has noted, and where to note it for a later one.
        most: no more than so many, whatever is free; None: as many as memory allows.
    """

    def __init__(
        self,
        config: FederationConfig,
        num_nodes: int,
        num_hosts: int,
        kept_bytes: int,
        notes: HostNotes,
        most: int | None = None,
    ) -> None:
        self._num_nodes, self._kept, self._notes = num_nodes, kept_bytes, notes
        self._budget = host_budget(config.resident_memory_mb, free_memory(), num_hosts)
        most = min(config.resident_nodes or num_nodes, most or num_nodes)
        earlier, taken = notes.earlier_residents
        if earlier and taken * _SUSPICIOUS >= self._budget:
            most = min(most, max(1, earlier // 2))
        self._most = most
        self._start = resident_bytes()

    def limit(self, active: int) -> int | None:
        """How many may be active, now that so many are; None: at least one more."""
        if active >= self._most < self._num_nodes or (active < self._num_nodes and self._taken(active) >= self._budget):
            return active
        return None

    def note(self, active: int) -> None:
        """Note for a later process of this host what the nodes of this one take."""
        self._notes.residents(active, self._taken(active))

    def _taken(self, active: int) -> int:
        return max(0, resident_bytes() - self._start) + active * self._kept


def resident_bytes() -> int:
    """What this process has in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0


def free_memory() -> int | None:
    """Bytes that this machine, or the container, has left; None where the system does not tell."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
        folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text().strip()
        if limit.isdecimal():
            found.append(max(0, int(limit) - int((folder / "memory.current").read_text())))
    except (OSError, KeyError, ValueError):
        # Another system, or another version of control groups: what was found so far counts.
        return min(found, default=None)
    return min(found)
