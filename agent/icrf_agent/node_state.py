"""The durable state of nodes: ``FederatedNode.state``, committed, rolled back and checkpointed with the round.

States are kept as bytes (:mod:`icrf.values`, no pickle), so that nothing a node does later can change what was
committed. A federation whose nodes have no state pays for a look at an empty dictionary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from icrf import values
from icrf.errors import IcrfError, NodeError, WeightsError
from icrf.protocol import StartRound

if TYPE_CHECKING:
    from icrf.federation.node import FederatedNode

MAX_STATE_BYTES = 16 << 20
_DIGEST_BYTES = 32
_MAGIC = b"ICRV"  # of icrf.values; a safetensors file would have a header of gigabytes

ByNode = Mapping[int, bytes]


class NodeStates:
    """The states of one host's nodes: those that are committed, and those that an open attempt has made.

    Args:
        nodes: node index -> node, in index order; they have been set up.
        cluster: for errors.
        round_number: the round after which the states were committed; 0: before the first.
        restored: states of that round, which take the place of what the set-up has made.
        all_rounds: whether this host sees every round; else a state could not follow what is committed.

    Raises:
        NodeError: U002 for a state that cannot be kept.
    """

    def __init__(
        self,
        nodes: Mapping[int, FederatedNode],
        cluster: str,
        round_number: int,
        restored: ByNode | None = None,
        *,
        all_rounds: bool = True,
    ) -> None:
        self._nodes, self._cluster, self._all_rounds = nodes, cluster, all_rounds
        self._round = round_number
        self._committed: dict[int, bytes] = {}
        self._pending: tuple[int, dict[int, bytes]] | None = None
        self._entered = round_number
        # What the phases of rounds have made, while somebody else may have changed what nodes hold.
        self._aside: dict[int, bytes] | None = None
        if round_number:
            self._committed = dict(restored or {})
            self._load(self._committed)
        else:
            self._committed = self._encoded()

    @property
    def used(self) -> bool:
        """Whether any node of this host has, or had, a state."""
        now = any(node.state for node in self._nodes.values()) if self._aside is None else self._aside
        return bool(self._committed or self._pending or now)

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
        if self._entered == start.round:
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
        for k, index in enumerate(self._nodes):
            digest = digests[_DIGEST_BYTES * k : _DIGEST_BYTES * (k + 1)]
            if index in states:
                digest = hashlib.sha256(digest + hashlib.sha256(states[index]).digest()).digest()
            found.append(digest)
        return b"".join(found)

    # ------------------------------------------------------------ inside

    def _load(self, states: ByNode) -> None:
        for index, node in self._nodes.items():
            packed = states.get(index)
            if packed or node.state:
                node.state = values.decode(packed) if packed else {}

    def _encoded(self) -> dict[int, bytes]:
        return {index: self._encode(node) for index, node in self._nodes.items() if node.state}

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


def wrap(flow_part: bytes, states: ByNode, round_number: int) -> bytes:
    """A checkpoint of a flow together with states of nodes; the flow's alone where no node has any."""
    if flow_part and not states:
        return flow_part
    nodes = {str(index): states[index] for index in sorted(states)}
    return values.encode({"round": round_number, "flow": flow_part, "nodes": nodes})


def unwrap(data: bytes, round_number: int) -> tuple[bytes, dict[int, bytes]]:
    """The inverse of :func:`wrap`.

    Raises:
        WeightsError: W010 for a checkpoint of another round, or what is none.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        return data, {}
    try:
        found: Any = values.decode(data)
        if found["round"] != round_number:
            raise WeightsError(
                "W010",
                "a checkpoint of another round",
                place="checkpoint",
                value=found["round"],
                allowed=str(round_number),
            )
        return found["flow"], {int(index): packed for index, packed in found["nodes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError("W010", "not a checkpoint of nodes with states", place="checkpoint") from error


def merge(parts: Iterable[ByNode]) -> dict[int, bytes]:
    """The states of several hosts."""
    return {index: packed for part in parts for index, packed in part.items()}
