"""The room of one federation: its graph, its nodes' names and their mailboxes. Plain, without locks and without I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from icrf import values
from icrf.errors import ProtocolError, RoutingError, RunError
from icrf.federation.message import Message
from icrf.topology import build_topology
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.delivery import Addressed, Delivery, Letter
from icrf_agent.mail import Mail


class TopologyManager:
    """The room of one federation: graph, names and mailboxes.

    Attributes:
        used: whether any letter was written here, or came for somebody.
    """

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._adjacency = HybridAdjacencyMatrix.from_edges(0, [])
        self._mail: dict[int, list[Letter]] = {}
        self._read: dict[int, list[Letter]] = {}
        self._sequence: dict[int, int] = {}
        self._published = 0
        self.used = False
        self._rejected = 0

    def link_nodes(self, node_ids: Sequence[str], topology: str | np.ndarray[Any, Any] | HybridAdjacencyMatrix) -> None:
        """Name the nodes and connect them; `topology` is a registered name or an adjacency matrix."""
        if isinstance(topology, str):
            topology = build_topology(topology, len(node_ids), {})
        elif isinstance(topology, np.ndarray):
            topology = HybridAdjacencyMatrix.from_dense(topology)
        if topology.num_nodes != len(node_ids):
            raise ProtocolError("P001", f"graph of {topology.num_nodes} nodes for {len(node_ids)} node ids")
        self._ids, self._adjacency = list(node_ids), topology
        self._index = {node_id: k for k, node_id in enumerate(node_ids)}

    @property
    def adjacency(self) -> HybridAdjacencyMatrix:
        return self._adjacency

    def index(self, node_id: str) -> int:
        """Index of a node; P012 when there is none of that name."""
        if node_id not in self._index:
            raise RoutingError("P012", f"no node '{node_id}'", allowed=", ".join(self._ids[:6]) + ", ...")
        return self._index[node_id]

    def get_neighbors(self, node_id: str) -> list[str]:
        """Whom a node may send to, in index order."""
        return [self._ids[j] for j in self._adjacency.out_neighbors(self.index(node_id))]

    def require_edge(self, sender: int, recipient: int) -> None:
        """P011 naming both nodes when `sender` may not send to `recipient`."""
        if not self._adjacency.has_edge(sender, recipient):
            self._rejected += 1
            raise RoutingError(
                "P011",
                f"no edge {self._ids[sender]} -> {self._ids[recipient]}",
                place=self._ids[sender],
                value=self._ids[recipient],
                allowed=", ".join(self._ids[j] for j in self._adjacency.out_neighbors(sender)[:6]) or "nobody",
                hint="the topology decides who may talk to whom",
            )

    def require_edges(self, senders: Sequence[int], recipients: Sequence[int]) -> None:
        """Check every pair."""
        for sender in senders:
            for recipient in recipients:
                if sender != recipient:
                    self.require_edge(sender, recipient)

    def address(self, message: Message, recipient_ids: Sequence[str] | str | None) -> tuple[int, list[int]]:
        """Sender and recipients as indices, every edge checked; None addresses all neighbours."""
        sender = self.index(message.sender_id)
        if recipient_ids is None:
            return sender, [int(j) for j in self._adjacency.out_neighbors(sender)]
        names = [recipient_ids] if isinstance(recipient_ids, str) else list(dict.fromkeys(recipient_ids))
        recipients = [self.index(name) for name in names]
        for recipient in recipients:
            self.require_edge(sender, recipient)
        return sender, recipients

    def letter(self, sender: int, message: Message) -> Letter:
        """Give a message its place in the sender's sequence."""
        return self.sealed(sender, message.encode())

    def sealed(self, sender: int, message: bytes) -> Letter:
        """The same for a message that is encoded already; `sender` is -1 for the supervisor."""
        self._sequence[sender] = self._sequence.get(sender, 0) + 1
        self._published += 1
        self.used = True
        return Letter(sender, self._sequence[sender], message)

    def publish(self, message: Message, recipient_ids: Sequence[str] | str | None = None) -> int:
        """Deliver a message at once; how many mailboxes it reached. P011 along a non-edge: nobody gets it."""
        sender, recipients = self.address(message, recipient_ids)
        self.deliver(self.letter(sender, message), recipients)
        return len(recipients)

    def deliver(self, letter: Letter, recipients: Sequence[int]) -> None:
        """Put a checked letter into mailboxes."""
        self.used = True
        for recipient in recipients:
            self._mail.setdefault(recipient, []).append(letter)

    def sync(self, node_id: str) -> list[Message]:
        """Drain a node's mailbox, in (sender index, sequence) order."""
        node = self.index(node_id)
        letters = self._mail.pop(node, [])
        letters.sort(key=lambda letter: (letter.sender, letter.sequence))
        self._read.setdefault(node, []).extend(letters)
        return [Message.decode(letter.message) for letter in letters]

    def settle(self) -> None:
        """A round begins: what was read so far stays read."""
        self._read.clear()

    def unread(self) -> None:
        """A round is repeated: put back what its abandoned attempt has read, for the next one must find the same."""
        for node, letters in self._read.items():
            self._mail.setdefault(node, []).extend(letters)
        self._read.clear()

    def waiting(self, staged: Sequence[Addressed] = (), *, with_read: bool = False) -> Mail:
        """What is in the mailboxes, and what is about to be.

        Args:
            staged: what the next round will find beside it.
            with_read: also what was read since the round began.
        """
        found = [(letter, (node,)) for node, letters in sorted(self._mail.items()) for letter in letters]
        if with_read:
            found += [(letter, (node,)) for node, letters in sorted(self._read.items()) for letter in letters]
        return Mail((*found, *staged), dict(self._sequence))

    def left_by(self, round_number: int, delivery: Delivery) -> Mail:
        """What a committed round has left to be read; F006 if it is too long ago."""
        newest = delivery.position[0]
        if newest > round_number + 1 and self.used:
            raise RunError("F006", f"the mail of round {round_number} is gone", value=newest)
        if newest > round_number:
            # What the next round has read so far, it has not read before.
            return self.waiting(with_read=True)
        return self.waiting(delivery.staged(round_number))

    def restore(self, mail: Mail, here: Collection[int]) -> None:
        """Put letters back into the mailboxes of the nodes that live here."""
        for letter, recipients in mail.letters:
            self.deliver(letter, [node for node in recipients if node in here])
        self._sequence = dict(mail.numbers)
        self.used = self.used or bool(mail)

    def get_stats(self) -> dict[str, int]:
        """Counters of this room."""
        return {
            "nodes": len(self._ids),
            "edges": self._adjacency.num_edges,
            "published": self._published,
            "rejected": self._rejected,
            "waiting": sum(len(letters) for letters in self._mail.values()),
        }


def encode_letters(letters: Sequence[Addressed]) -> bytes:
    """Letters and their recipients' indices, as they travel."""
    return values.encode([[letter.sender, letter.sequence, list(to), letter.message] for letter, to in letters])


def decode_letters(bundle: bytes) -> list[Addressed]:
    """The inverse of :func:`encode_letters`.

    Raises:
        ProtocolError: P001 if the bundle is malformed.
    """
    try:
        return [(Letter(int(s), int(q), bytes(m)), tuple(int(r) for r in to)) for s, q, to, m in values.decode(bundle)]
    except (TypeError, ValueError) as error:
        raise ProtocolError("P001", f"malformed letters: {error}") from error
