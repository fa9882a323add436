"""The durable state of nodes: ``FederatedNode.state``, committed, rolled back and checkpointed with the round.

States are kept as bytes (:mod:`icrf.values`, no pickle), so that nothing a node does later can change what was
committed. A federation whose nodes have no state pays for a look at an empty dictionary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from icrf import values
from icrf.errors import IcrfError, NodeError
from icrf.protocol import StartRound
from icrf_agent.row_file import BytesFile

if TYPE_CHECKING:
    from icrf.federation.node import FederatedNode

MAX_STATE_BYTES = 16 << 20
_DIGEST_BYTES = 32

ByNode = Mapping[int, bytes]
# One that can be added to.
ByNumber = dict[int, bytes] | BytesFile


class NodeStates:
    """The states of one host's nodes: those that are committed, those that an open attempt has made, and, of nodes that
    are not active just now, what they hold.

    Args:
        active: the active nodes by index; it changes as nodes come and go.
        indices: all nodes of the host, in index order.
        cluster: for errors.
        all_rounds: whether this host sees every round; else a state could not follow what is committed.
    """

    def __init__(
        self, active: Mapping[int, FederatedNode], indices: Sequence[int], cluster: str, *, all_rounds: bool = True
    ) -> None:
        self._active, self._indices = active, indices
        self._cluster, self._all_rounds = cluster, all_rounds
        self._round = 0
        self._on_disk = False
        self._committed: ByNode = {}
        self._pending: tuple[int, ByNode] | None = None
        self._entered = 0
        # What nodes that are not active hold: of all of them, and of those that were put away since; b"" for nothing.
        self._held: ByNode = {}
        self._put_away: ByNumber = {}
        # What the phases of rounds have made, while somebody else may have changed what nodes hold.
        self._aside: ByNode | None = None

    def keep_on_disk(self) -> None:
        """Not all nodes are active at once: what is not in active ones goes to disk from now on."""
        self._on_disk = True
        self._put_away = self._collected(self._put_away)

    def begin(self, round_number: int = 0, restored: ByNode | None = None) -> None:
        """The nodes have been set up.

        Args:
            round_number: the round after which the states were committed; 0: before the first.
            restored: states of that round, which take the place of what the set-up has made.

        Raises:
            NodeError: U002 for a state that cannot be kept.
        """
        self._round = self._entered = round_number
        if round_number:
            self._committed = self._collected(restored or {})
            self._load(self._committed)
        else:
            self._committed = self._encoded()

    @property
    def used(self) -> bool:
        """Whether any node of this host has, or had, a state."""
        # A list at once: the host answers questions while nodes come and go.
        now = any(node.state for node in list(self._active.values())) or self._held or any(self._put_away.values())
        return bool(self._committed or self._pending or (now if self._aside is None else self._aside))

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds whose states are here."""
        return (self._round, self._pending[0]) if self._pending else (self._round,)

    def enter(self, start: StartRound) -> None:
        """An attempt begins: every node gets the state that the round before has committed."""
        if self._pending and self._pending[0] < start.round:
            self._round, self._committed = self._pending
        self._pending = None
        # Also an attempt that failed half-way, before anything was staged, has changed what nodes hold.
        if self._entered >= start.round:
            self._load(self._committed)
        self._entered = start.round
        if not self.used:
            self._round = start.round - 1

    def stage(self, start: StartRound) -> None:
        """Keep what the nodes have now as what the attempt has made.

        Raises:
            NodeError: U002 for a state that is no dictionary of plain values, or too large.
        """
        if self.used:
            self._pending = (start.round, self._encoded())

    def set_aside(self) -> None:
        """What is about to run is no part of a round: its changes of states last until the next phase only."""
        if self._aside is None:
            self._aside = self._encoded()

    def resume(self) -> None:
        """A phase begins: states are what the phase before has left."""
        if self._aside is not None:
            self._load(self._aside)
            self._aside = None

    def put_away(self, index: int, node: FederatedNode) -> None:
        """Keep what a node holds that is about to go.

        Raises:
            NodeError: U002 for a state that cannot be kept.
        """
        packed = self._encode(node) if node.state else b""
        if packed != self._now(index):
            self._put_away[index] = packed

    def bring_back(self, index: int, node: FederatedNode) -> None:
        """Give a node that was made again what it held."""
        packed = self._now(index)
        node.state = values.decode(packed) if packed else {}

    def at(self, round_number: int) -> ByNode | None:
        """The states of a round that is known to be committed, or None."""
        if self._pending and self._pending[0] == round_number:
            return self._pending[1]
        return self._committed if self._round == round_number else None

    def hashed(self, digests: bytes) -> bytes:
        """Hashes of model states, 32 bytes per node in index order, each covering the node's own state if it has one.

        With a state the hash is sha256(hash of the model state, then sha256 of the encoded state).
        """
        states = self._pending[1] if self._pending else self._committed
        if not states or not digests:
            return digests
        found = []
        for k, index in enumerate(self._indices):
            digest = digests[_DIGEST_BYTES * k : _DIGEST_BYTES * (k + 1)]
            if index in states:
                digest = hashlib.sha256(digest + hashlib.sha256(states[index]).digest()).digest()
            found.append(digest)
        return b"".join(found)

    # ------------------------------------------------------------ inside

    def _now(self, index: int) -> bytes:
        """What a node holds that is not active, b"" for nothing."""
        found = self._put_away.get(index)
        return self._held.get(index, b"") if found is None else found

    def _load(self, states: ByNode) -> None:
        self._hold(states)
        for index, node in self._active.items():
            packed = states.get(index)
            if packed or node.state:
                node.state = values.decode(packed) if packed else {}

    def _encoded(self) -> ByNode:
        """What all nodes hold now, as bytes that nothing changes any more."""
        made = self._collected({})
        if self._held or self._put_away or any(node.state for node in self._active.values()):
            for index in self._indices:
                node = self._active.get(index)
                packed = self._now(index) if node is None else self._encode(node) if node.state else b""
                if packed:
                    made[index] = packed
        self._hold(made)
        return made

    def _hold(self, states: ByNode) -> None:
        self._held, self._put_away = states, self._collected({})

    def _collected(self, states: ByNode) -> ByNumber:
        """A map of these states that can be added to."""
        if not self._on_disk:
            return dict(states)
        made = BytesFile()
        for index, packed in states.items():
            made[index] = packed
        return made

    def _encode(self, node: FederatedNode) -> bytes:
        place = f"{node.id} on {self._cluster}, state"
        if not self._all_rounds:
            raise NodeError(
                "U002",
                f"{node.id} keeps a state, and rounds may go on without its cluster",
                place=place,
                hint="leave min_nodes at null, or keep nothing in state",
            )
        if not isinstance(node.state, dict):
            kind = type(node.state).__name__
            raise NodeError("U002", f"{node.id}.state is {kind}", place=place, allowed="a dict of plain values")
        try:
            packed = values.encode(node.state, root="state")
        except IcrfError as error:
            raise NodeError("U002", error.message, place=place, allowed=error.allowed, hint=error.hint) from error
        if len(packed) > MAX_STATE_BYTES:
            raise NodeError(
                "U002",
                f"the state of {node.id} is too large",
                place=place,
                value=f"{len(packed)} bytes",
                allowed=f"up to {MAX_STATE_BYTES} bytes",
            )
        return packed
