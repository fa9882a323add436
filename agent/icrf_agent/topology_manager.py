"""Who may talk to whom: every message of a federation passes the adjacency matrix here.

:class:`TopologyManager` is the room of one federation: its graph, its nodes' names and their mailboxes.
:class:`HybridTopologyManager` is the actor of a cluster: the rooms of all its runs, what hosts have posted for the
open attempt, and the merged partial that leaves for another cluster.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from icrf import values
from icrf.errors import ProtocolError, RoutingError
from icrf.exchange import CONSENSUS, MODEL, PARTIAL, UPDATE
from icrf.federation.message import Message
from icrf.ports import Arrival, PayloadHeader
from icrf.protocol import Activate
from icrf.topology import build_topology
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.object_store import GlobalObjectStore, object_key

SUPERVISOR = "supervisor"
MESSAGE = "message"
Position = tuple[int, int]


class References(Protocol):
    """The cluster's own object store: arrays in, references out."""

    def put(self, array: np.ndarray[Any, Any]) -> Any: ...

    def get(self, reference: Any) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class Posting:
    """What a host publishes in one phase: headers for many messages and one reference to their payload.

    Attributes:
        senders: the nodes that speak; row k of an update's array is that of ``senders[k]``.
        recipients: whom each sender addresses; None means each sender's own neighbours.
        weight: sum of sample counts behind a partial.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    kind: str
    senders: tuple[int, ...]
    reference: Any
    recipients: tuple[int, ...] | None = None
    weight: int = 0

    @property
    def position(self) -> Position:
        return self.round, self.attempt


@dataclass(frozen=True)
class Letter:
    """One user message on its way: sender index (-1: the supervisor), its sequence number, and the encoded message."""

    sender: int
    sequence: int
    message: bytes


class TopologyManager:
    """The room of one federation: graph, names and mailboxes."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._adjacency = HybridAdjacencyMatrix.from_edges(0, [])
        self._mail: dict[int, list[Letter]] = {}
        self._sequence: dict[int, int] = {}
        self._published = 0
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
        names = [recipient_ids] if isinstance(recipient_ids, str) else list(recipient_ids)
        recipients = [self.index(name) for name in names]
        for recipient in recipients:
            self.require_edge(sender, recipient)
        return sender, recipients

    def letter(self, sender: int, message: Message) -> Letter:
        """Give a message its place in the sender's sequence."""
        self._sequence[sender] = self._sequence.get(sender, 0) + 1
        self._published += 1
        return Letter(sender, self._sequence[sender], message.encode())

    def publish(self, message: Message, recipient_ids: Sequence[str] | str | None = None) -> int:
        """Deliver a message at once; how many mailboxes it reached. P011 along a non-edge: nobody gets it."""
        sender, recipients = self.address(message, recipient_ids)
        self.deliver(self.letter(sender, message), recipients)
        return len(recipients)

    def deliver(self, letter: Letter, recipients: Sequence[int]) -> None:
        """Put a checked letter into mailboxes."""
        for recipient in recipients:
            self._mail.setdefault(recipient, []).append(letter)

    def sync(self, node_id: str) -> list[Message]:
        """Drain a node's mailbox, in (sender index, sequence) order."""
        letters = self._mail.pop(self.index(node_id), [])
        letters.sort(key=lambda letter: (letter.sender, letter.sequence))
        return [Message.decode(letter.message) for letter in letters]

    def get_stats(self) -> dict[str, int]:
        """Counters of this room."""
        return {
            "nodes": len(self._ids),
            "edges": self._adjacency.num_edges,
            "published": self._published,
            "rejected": self._rejected,
            "waiting": sum(len(letters) for letters in self._mail.values()),
        }


@dataclass
class _Room:
    """A run on this cluster."""

    activation: Activate
    cluster: int
    topology: TopologyManager
    position: Position = (0, 0)
    dead: set[Position] = field(default_factory=set)
    postings: dict[tuple[Position, str], list[Posting]] = field(default_factory=dict)
    staged: dict[Position, list[tuple[Letter, tuple[int, ...]]]] = field(default_factory=dict)
    outbox: dict[Position, list[tuple[Letter, tuple[int, ...]]]] = field(default_factory=dict)
    arrived: dict[PayloadHeader, int] = field(default_factory=dict)

    def local(self, nodes: Collection[int]) -> list[int]:
        return [n for n in nodes if self.activation.assignment[n] == self.cluster]


class HybridTopologyManager:
    """The topology manager of one cluster: routing, postings and mailboxes of all its runs. Thread-safe.

    Args:
        cluster: name of the cluster.
        references: the cluster's object store.
    """

    def __init__(self, cluster: str, references: References) -> None:
        self._cluster = cluster
        self._references = references
        self._rooms: dict[str, _Room] = {}
        self._store = GlobalObjectStore()
        self._lock = threading.RLock()
        self._mail_came = threading.Condition(self._lock)

    def link(self, activation: Activate) -> None:
        """Open (or re-open under a new generation) the room of a run."""
        with self._lock:
            topology = TopologyManager()
            adjacency = HybridAdjacencyMatrix.from_graph(activation.graph)
            topology.link_nodes([node.id for node in activation.nodes], adjacency)
            self._store.delete(activation.run_id)
            self._rooms[activation.run_id] = _Room(activation, activation.clusters.index(self._cluster), topology)

    def unlink(self, run_id: str) -> None:
        """Close the room of a run and free what it held."""
        with self._lock:
            self._rooms.pop(run_id, None)
            self._store.delete(run_id)

    def linked(self) -> dict[str, tuple[int, int, int]]:
        """The runs that have a room: generation, and the newest round and attempt that were begun."""
        with self._lock:
            return {run_id: (room.activation.generation, *room.position) for run_id, room in self._rooms.items()}

    def arrived(self) -> list[Arrival]:
        """What other clusters have delivered for attempts that are not over, in the order it came."""
        with self._lock:
            return [Arrival(header, size) for room in self._rooms.values() for header, size in room.arrived.items()]

    # ------------------------------------------------------------ rounds

    def begin_round(self, run_id: str, generation: int, round_number: int, attempt: int) -> None:
        """A new attempt opens: drop what older ones posted, and let committed messages into the mailboxes."""
        with self._lock:
            room = self._room(run_id, generation)
            position = (round_number, attempt)
            if position <= room.position:
                return
            if round_number > room.position[0]:
                self._open_mail(room, before=round_number)
            room.position = position
            for key in [k for k in room.postings if k[0] < position]:
                self._drop(room, key)
            room.dead = {p for p in room.dead if p >= position}
            room.arrived = {h: n for h, n in room.arrived.items() if (h.round, h.attempt) >= position}

    def abort(self, run_id: str, round_number: int, attempt: int) -> None:
        """Void an attempt: nothing of it is accepted or kept."""
        with self._lock:
            room = self._rooms.get(run_id)
            if room is None:
                return
            position = (round_number, attempt)
            room.dead.add(position)
            room.staged.pop(position, None)
            room.outbox.pop(position, None)
            room.arrived = {h: n for h, n in room.arrived.items() if (h.round, h.attempt) != position}
            for key in [k for k in room.postings if k[0] == position]:
                self._drop(room, key)

    def publish_many(self, posting: Posting) -> None:
        """A host's batch of a phase. Every edge is checked before anything is accepted."""
        with self._lock:
            room = self._room(posting.run_id, posting.generation)
            self._require_open(room, posting.position)
            if posting.recipients is not None:
                room.topology.require_edges(posting.senders, posting.recipients)
            self._keep(room, posting)

    def collect(self, run_id: str, round_number: int, attempt: int, kind: str) -> list[Posting]:
        """What was posted (here and by other clusters) in an attempt, ordered by first sender; P003 if it is over."""
        with self._lock:
            room = self._known(run_id)
            self._require_open(room, (round_number, attempt))
            found = room.postings.get(((round_number, attempt), kind), [])
            return sorted(found, key=lambda p: p.senders)

    def cluster_partial(self, run_id: str, round_number: int, attempt: int, kind: str) -> Posting:
        """The exact sum of this cluster's partials, as the one posting that leaves the cluster."""
        postings = self.collect(run_id, round_number, attempt, kind)
        if len(postings) == 1:
            return postings[0]
        total = np.zeros_like(self._references.get(postings[0].reference))
        for posting in postings:
            total += self._references.get(posting.reference)
        first = postings[0]
        senders = tuple(sorted(n for p in postings for n in p.senders))
        weight = sum(p.weight for p in postings)
        reference = self._references.put(total)
        return Posting(
            run_id, first.generation, round_number, attempt, kind, senders, reference, first.recipients, weight
        )

    def deliver(self, header: PayloadHeader, reference: Any, wire_bytes: int = 0) -> None:
        """A payload that came through the gateway: owner, generation, attempt and edges are checked first."""
        with self._lock:
            room = self._room(header.run_id, header.generation)
            self._require_open(room, (header.round, header.attempt))
            senders = self._senders_of(room, header)
            if header.kind in (MODEL, UPDATE):
                neighbours = room.topology.adjacency.out_neighbors(header.sender)
                if not room.local([int(j) for j in neighbours]):
                    node = room.activation.nodes[header.sender].id
                    raise RoutingError("P011", f"no edge from {node} into cluster {self._cluster}", place=node)
            elif header.kind == PARTIAL:
                room.topology.require_edges(senders, header.recipients)
            self._keep(
                room,
                Posting(
                    header.run_id,
                    header.generation,
                    header.round,
                    header.attempt,
                    header.kind,
                    senders,
                    reference,
                    header.recipients or None,
                    header.weight,
                ),
            )
            room.arrived.setdefault(header, wire_bytes)

    # ------------------------------------------------------------ user messages

    def publish(
        self,
        run_id: str,
        message: Message,
        recipient_ids: Sequence[str] | str | None,
        position: Position,
    ) -> int:
        """A node's message. It is readable after the round's barrier, on every cluster alike."""
        with self._lock:
            room = self._known(run_id)
            sender, recipients = room.topology.address(message, recipient_ids)
            if room.activation.assignment[sender] != room.cluster:
                raise _not_owner(message.sender_id, room)
            letter = room.topology.letter(sender, message)
            local = room.local(recipients)
            remote = [n for n in recipients if n not in set(local)]
            if local:
                room.staged.setdefault(position, []).append((letter, tuple(local)))
            if remote:
                room.outbox.setdefault(position, []).append((letter, tuple(remote)))
            return len(recipients)

    def publish_supervisor(self, run_id: str, recipients: Sequence[int], message: bytes) -> None:
        """A message of the federation itself: no edge is needed, and it is readable at once."""
        with self._mail_came:
            room = self._known(run_id)
            room.topology.deliver(Letter(-1, len(message), message), recipients)
            self._mail_came.notify_all()

    def take_outbox(self, run_id: str, position: Position) -> dict[int, bytes]:
        """Letters for other clusters, one encoded bundle per cluster index; they are handed out once."""
        with self._lock:
            room = self._known(run_id)
            by_cluster: dict[int, list[list[Any]]] = {}
            for letter, recipients in room.outbox.pop(position, []):
                for cluster in sorted({room.activation.assignment[n] for n in recipients}):
                    there = [n for n in recipients if room.activation.assignment[n] == cluster]
                    by_cluster.setdefault(cluster, []).append([letter.sender, letter.sequence, there, letter.message])
            return {cluster: values.encode(letters) for cluster, letters in by_cluster.items()}

    def deliver_letters(self, header: PayloadHeader, bundle: bytes, wire_bytes: int = 0) -> None:
        """Letters of another cluster's nodes; every edge and every owner is checked before any is accepted."""
        letters = [(Letter(s, q, m), tuple(to)) for s, q, to, m in values.decode(bundle)]
        with self._lock:
            room = self._room(header.run_id, header.generation)
            position = (header.round, header.attempt)
            self._require_open(room, position)
            if header in room.arrived:
                return
            for letter, recipients in letters:
                self._require_owner(room, letter.sender, header.source)
                for recipient in recipients:
                    room.topology.require_edge(letter.sender, recipient)
            room.staged.setdefault(position, []).extend(letters)
            room.arrived[header] = wire_bytes

    def sync(self, run_id: str, node_id: str, wait_s: float = 0.0) -> list[Message]:
        """Drain a node's mailbox; with `wait_s` wait that long for a message of the supervisor."""
        with self._mail_came:
            room = self._known(run_id)
            found = room.topology.sync(node_id)
            if not found and wait_s > 0.0:
                self._mail_came.wait(wait_s)
                found = room.topology.sync(node_id)
            return found

    def get_neighbors(self, run_id: str, node_id: str) -> list[str]:
        """Whom a node may send to."""
        with self._lock:
            return self._known(run_id).topology.get_neighbors(node_id)

    def get_stats(self, run_id: str) -> dict[str, int]:
        """Counters of a run's room and of the references held for it."""
        with self._lock:
            stats = self._known(run_id).topology.get_stats()
            return {**stats, "references": len(self._store.keys(f"{run_id}/"))}

    # ------------------------------------------------------------ inside

    def _room(self, run_id: str, generation: int) -> _Room:
        room = self._rooms.get(run_id)
        if room is None or room.activation.generation != generation:
            held = room.activation.generation if room else "none"
            raise RoutingError(
                "P003", f"generation {generation} of run {run_id[:8]} is not in force on {self._cluster}", value=held
            )
        return room

    def _known(self, run_id: str) -> _Room:
        room = self._rooms.get(run_id)
        if room is None:
            raise RoutingError("P003", f"run {run_id[:8]} is not linked on {self._cluster}", value="none")
        return room

    def _require_open(self, room: _Room, position: Position) -> None:
        if position < room.position or position in room.dead:
            raise RoutingError(
                "P003",
                f"round {position[0]} attempt {position[1]} is over on {self._cluster}",
                value=f"round {room.position[0]} attempt {room.position[1]}",
            )

    def _require_owner(self, room: _Room, node: int, source: str) -> None:
        owner = room.activation.clusters[room.activation.assignment[node]]
        if owner != source:
            raise RoutingError(
                "P010", f"node {room.activation.nodes[node].id} is owned by {owner}", place=source, value=source
            )

    def _senders_of(self, room: _Room, header: PayloadHeader) -> tuple[int, ...]:
        if header.kind in (MODEL, UPDATE):
            self._require_owner(room, header.sender, header.source)
            return (header.sender,)
        activation = room.activation
        source = activation.clusters.index(header.source) if header.source in activation.clusters else -1
        members = [n for n, c in enumerate(activation.assignment) if c == source]
        if header.kind == CONSENSUS:
            return tuple(members)
        return tuple(n for n in members if "train" in activation.nodes[n].role.split("-"))

    def _keep(self, room: _Room, posting: Posting) -> None:
        held = room.postings.setdefault((posting.position, posting.kind), [])
        if any(p.senders == posting.senders for p in held):
            return
        held.append(posting)
        who = ",".join(str(n) for n in posting.senders[:4])
        key = object_key(posting.run_id, who, posting.round)
        self._store.put(f"{key}/{posting.attempt}/{posting.kind}", posting.reference)

    def _drop(self, room: _Room, key: tuple[Position, str]) -> None:
        for posting in room.postings.pop(key):
            who = ",".join(str(n) for n in posting.senders[:4])
            name = object_key(posting.run_id, who, posting.round)
            self._store.delete(f"{name}/{posting.attempt}/{posting.kind}")

    def _open_mail(self, room: _Room, before: int) -> None:
        for position in sorted(p for p in room.staged if p[0] < before):
            for letter, recipients in room.staged.pop(position):
                room.topology.deliver(letter, recipients)
        for position in [p for p in room.outbox if p[0] < before]:
            del room.outbox[position]


def _not_owner(node_id: str, room: _Room) -> RoutingError:
    return RoutingError("P010", f"node {node_id} does not live on this cluster", place=node_id)
