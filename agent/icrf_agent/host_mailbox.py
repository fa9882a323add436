"""What the nodes of a host send and receive by."""

from __future__ import annotations

import time
from collections.abc import Sequence

from icrf.errors import RunError
from icrf.federation.message import Message
from icrf_agent.topology_manager import HybridTopologyManager

# A waiting node occupies a thread of the topology manager, which others need too: it asks again and again instead.
_WAIT_SLICE_S = 0.2


class HostMailbox:
    """A node's way to its neighbours: through the cluster's topology manager.

    Attributes:
        position: the attempt that the host works on; None between rounds.
        open: whether the nodes are set up; other clusters may not be before.
        used: whether any of them has sent something.
    """

    def __init__(self, manager: HybridTopologyManager, run_id: str) -> None:
        self._manager, self._run_id = manager, run_id
        self.position: tuple[int, int] | None = None
        self.open = self.used = False

    def publish(self, message: Message, to: Sequence[str] | str | None) -> int:
        if not self.open:
            raise RunError(
                "F005",
                f"{message.sender_id} cannot send before all nodes are set up",
                place=message.sender_id,
                hint="send in train, not in build",
            )
        self.used = True
        return self._manager.publish(self._run_id, message, to, self.position)

    def sync(self, node_id: str, wait_s: float) -> list[Message]:
        deadline_s = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            found = self._manager.sync(self._run_id, node_id, min(left_s, _WAIT_SLICE_S), self.position)
            if found or left_s <= 0.0:
                return found

    def get_neighbors(self, node_id: str) -> list[str]:
        return self._manager.get_neighbors(self._run_id, node_id)
