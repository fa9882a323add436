"""Who may talk to whom: every message of a federation passes the adjacency matrix here.

:class:`HybridTopologyManager` is the actor of a cluster: the rooms of all its runs (see ``room.py``), what hosts have
posted for the open attempt, and the merged partial that leaves for another cluster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from icrf.errors import ProtocolError, RoutingError, RunError, WeightsError
from icrf.exchange import EXACT, GATHERED, OF_A_CLUSTER, PARTIAL, num_elements
from icrf.federation.message import Message
from icrf.ports import Arrival, PayloadHeader
from icrf.protocol import HIERARCHICAL, Activate, Relink, element_type
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.delivery import Outgoing, Position
from icrf_agent.mail import NO_MAIL, Mail
from icrf_agent.object_store import GlobalObjectStore, References, object_key
from icrf_agent.postings import FROM_A_NODE, ClusterRoom, Posting
from icrf_agent.room import TopologyManager, decode_letters, encode_letters


class HybridTopologyManager:
    """The topology manager of one cluster: routing, postings and mailboxes of all its runs. Thread-safe.

    Args:
        cluster: name of the cluster.
        references: the cluster's object store.
    """

    def __init__(self, cluster: str, references: References) -> None:
        self._cluster = cluster
        self._references = references
        self._rooms: dict[str, ClusterRoom] = {}
        self._store = GlobalObjectStore()
        self._lock = threading.RLock()
        self._mail_came = threading.Condition(self._lock)

    def link(self, activation: Activate, mail: Mail = NO_MAIL) -> None:
        """Open (or re-open under a new generation) the room of a run, where `mail` waits for those that live here."""
        with self._lock:
            present = self._rooms.get(activation.run_id)
            if present is not None and present.activation.generation == activation.generation:
                return
            self._store.delete(activation.run_id)
            topology = TopologyManager()
            adjacency = HybridAdjacencyMatrix.from_graph(activation.graph)
            topology.link_nodes([node.id for node in activation.nodes], adjacency)
            room = ClusterRoom(activation, activation.clusters.index(self._cluster), topology)
            topology.restore(mail, frozenset(room.local(range(len(activation.nodes)))))
            self._rooms[activation.run_id] = room

    def relink(self, order: Relink) -> None:
        """The nodes of a run are linked otherwise from now on, under a new generation; mail that was sent stays sent.

        Raises:
            RoutingError: P003 if the run is not here, or a later generation is in force.
        """
        with self._lock:
            room = self._linked(order.run_id)
            if order.generation < room.activation.generation:
                self._room(order.run_id, order.generation)
            room.activation = order.applied_to(room.activation)
            adjacency = HybridAdjacencyMatrix.from_graph(order.graph)
            room.topology.link_nodes([node.id for node in room.activation.nodes], adjacency)

    def unlink(self, run_id: str) -> None:
        """Close the room of a run and free what it held."""
        with self._mail_came:
            self._rooms.pop(run_id, None)
            self._store.delete(run_id)
            self._mail_came.notify_all()

    def linked(self) -> dict[str, tuple[int, int, int]]:
        """The runs that have a room: generation, and the newest round and attempt that were begun."""
        with self._lock:
            return {run_id: (room.activation.generation, *room.position) for run_id, room in self._rooms.items()}

    def arrived(self) -> list[Arrival]:
        """What other clusters have delivered for attempts that are not over, in the order it came."""
        with self._lock:
            return [Arrival(header, *size) for room in self._rooms.values() for header, size in room.arrived.items()]

    # ------------------------------------------------------------ rounds

    def begin_round(self, run_id: str, generation: int, round_number: int, attempt: int) -> None:
        """A new attempt opens: drop what older ones posted, and let committed messages into the mailboxes.

        Harmless when it is open or over; P003 where it was aborted.
        """
        with self._lock:
            room = self._room(run_id, generation)
            position = (round_number, attempt)
            if room.delivery.is_void(position):
                self._require_open(room, position)
            if position <= room.position:
                return
            is_next = round_number > room.position[0]
            for letter, recipients in room.delivery.begin(position):
                room.topology.deliver(letter, recipients)
            if is_next:
                room.topology.settle()
            else:
                room.topology.unread()
            for key in [k for k in room.postings if k[0] < position]:
                self._drop(room, key)
            room.arrived = {h: n for h, n in room.arrived.items() if (h.round, h.attempt) >= position}

    def abort(self, run_id: str, round_number: int, attempt: int) -> None:
        """Void an attempt: nothing of it is accepted or kept."""
        with self._lock:
            room = self._rooms.get(run_id)
            if room is None:
                return
            position = (round_number, attempt)
            room.delivery.abort(position)
            room.arrived = {h: n for h, n in room.arrived.items() if (h.round, h.attempt) != position}
            for key in [k for k in room.postings if k[0] == position]:
                self._drop(room, key)

    def publish_many(self, posting: Posting) -> None:
        """A host's batch of a phase. Every edge is checked before anything is accepted."""
        with self._lock:
            room = self._room(posting.run_id, posting.generation)
            self._require_open(room, posting.position)
            for sender in posting.senders:
                self._require_owner(room, sender, self._cluster)
            if posting.recipients is not None:
                room.topology.require_edges(posting.senders, posting.recipients)
            self._keep(room, posting)

    def publish_all(self, postings: Sequence[Posting]) -> None:
        """What the hosts of this cluster have made in a phase."""
        for posting in postings:
            self.publish_many(posting)

    def take_in(
        self, run_id: str, generation: int, round_number: int, attempt: int, postings: Sequence[Posting]
    ) -> None:
        """Open an attempt that has been prepared, with all that was posted in it so far."""
        self.begin_round(run_id, generation, round_number, attempt)
        self.publish_all(postings)

    def collect(self, run_id: str, round_number: int, attempt: int, kind: str) -> list[Posting]:
        """What was posted (here and by other clusters) in an attempt, ordered by first sender; P003 if it is over."""
        with self._lock:
            room = self._linked(run_id)
            self._require_open(room, (round_number, attempt))
            found = room.postings.get(((round_number, attempt), kind), {})
            return [found[senders] for senders in sorted(found)]

    def posted_by(self, run_id: str, round_number: int, attempt: int, kind: str, sender: int) -> tuple[Posting, int]:
        """What a node of this cluster has posted, as if it alone had, and which row of the payload is its own.

        Raises:
            RoutingError: P003 if the attempt is over.
            RunError: F005 if it has posted nothing.
        """
        with self._lock:
            room = self._linked(run_id)
            position = (round_number, attempt)
            self._require_open(room, position)
            found = room.places.get((position, kind), {}).get(sender)
            if found is None:
                raise RunError("F005", f"node {sender} has posted no {kind} in round {round_number}")
            return replace(found[0], senders=(sender,)), found[1]

    def cluster_posting(
        self, run_id: str, round_number: int, attempt: int, kind: str, recipients: tuple[int, ...] | None = None
    ) -> Posting:
        """What this cluster sends as a whole: the exact sum of its partials, or the rows of all of its nodes.

        Args:
            recipients: only what is addressed to these; None: all of them.
        """
        postings = self.collect(run_id, round_number, attempt, kind)
        postings = [posting for posting in postings if recipients in (None, posting.recipients)]
        if not postings:
            raise RoutingError("P003", f"no {kind} of round {round_number} attempt {attempt} on {self._cluster}")
        if len(postings) == 1:
            return postings[0]
        first, arrays = postings[0], [self._references.get(posting.reference) for posting in postings]
        if kind == GATHERED:
            # Hosts have their nodes in order, one after the other.
            total, senders = np.concatenate(arrays), tuple(n for p in postings for n in p.senders)
        else:
            total, senders = np.array(arrays[0]), tuple(sorted(n for p in postings for n in p.senders))
            for array in arrays[1:]:
                total += array
        weight = sum(p.weight for p in postings)
        reference = self._references.put(total, kind)
        return Posting(
            run_id, first.generation, round_number, attempt, kind, senders, reference, first.recipients, weight
        )

    def require_welcome(self, header: PayloadHeader) -> None:
        """Refuse what :meth:`deliver` would refuse, before any of the payload has come."""
        with self._lock:
            self._welcome(header)

    def deliver(self, header: PayloadHeader, reference: Any, wire_bytes: int = 0, saved_bytes: int = 0) -> bool:
        """A payload that came through the gateway: owner, generation, attempt and edges are checked first.

        Returns:
            False for a payload that is here already: its sender had not heard that it arrived.
        """
        with self._lock:
            room, senders = self._welcome(header)
            at = (header.run_id, header.generation, header.round, header.attempt)
            described = (header.recipients or None, header.weight)
            is_new = self._keep(room, Posting(*at, header.kind, senders, reference, *described))
            if is_new:
                room.arrived[header] = wire_bytes, saved_bytes
            return is_new

    # ------------------------------------------------------------ user messages

    def publish(
        self,
        run_id: str,
        message: Message,
        recipient_ids: Sequence[str] | str | None,
        position: Position | None = None,
    ) -> int:
        """A node's message. It is readable after the round's barrier, on every cluster alike.

        Args:
            position: the attempt that the node runs in; None between rounds, where the last one counts.
        """
        with self._lock:
            room = self._linked(run_id)
            position = room.position if position is None else position
            self._require_open(room, position)
            sender, recipients = room.topology.address(message, recipient_ids)
            self._require_owner(room, sender, self._cluster)
            room.post(position, room.topology.letter(sender, message), recipients)
            return len(recipients)

    def post(self, run_id: str, position: Position, letters: Sequence[Outgoing]) -> None:
        """What nodes of this cluster have published in an attempt. Every edge is checked before any is accepted."""
        with self._lock:
            room = self._linked(run_id)
            self._require_open(room, position)
            for sender, recipients, _ in letters:
                self._require_owner(room, sender, self._cluster)
                for recipient in recipients:
                    room.topology.require_edge(sender, recipient)
            for sender, recipients, message in letters:
                room.post(position, room.topology.sealed(sender, message), recipients)

    def publish_supervisor(self, run_id: str, recipients: Sequence[int], message: bytes) -> None:
        """A message of the federation itself: no edge is needed, and it is readable at once."""
        with self._mail_came:
            room = self._linked(run_id)
            room.topology.deliver(room.topology.sealed(-1, message), room.local(recipients))
            self._mail_came.notify_all()

    def outbox(self, run_id: str, position: Position) -> dict[int, tuple[int, bytes]]:
        """Letters for other clusters, as one encoded bundle for each cluster's index, with the number of the last one.
        They are handed out until they are acknowledged."""
        with self._lock:
            pending = self._linked(run_id).delivery.pending(position)
        return {cluster: (number, encode_letters(letters)) for cluster, (number, letters) in pending.items()}

    def acknowledge(self, run_id: str, position: Position, cluster: int, number: int) -> None:
        """A cluster has taken its letters up to that number."""
        with self._lock:
            self._linked(run_id).delivery.acknowledge(position, cluster, number)

    def deliver_letters(self, header: PayloadHeader, bundle: bytes, wire_bytes: int = 0) -> bool:
        """Letters of another cluster's nodes; every edge and every owner is checked before any is accepted.

        Returns:
            False for a bundle that is here already.
        """
        letters = decode_letters(bundle)
        with self._lock:
            room = self._room(header.run_id, header.generation)
            position = (header.round, header.attempt)
            self._require_open(room, position)
            for letter, recipients in letters:
                self._require_owner(room, letter.sender, header.source)
                self._require_local(room, recipients)
                for recipient in recipients:
                    room.topology.require_edge(letter.sender, recipient)
            is_new = [room.delivery.stage(position, letter, recipients) for letter, recipients in letters]
            if any(is_new):
                # Bundles of two phases may have equal headers.
                room.arrived[header] = room.arrived.get(header, (0, 0))[0] + wire_bytes, 0
            return any(is_new)

    def mail_after(self, run_id: str, round_number: int) -> Mail:
        """The letters that a committed round has left for the nodes here; F006 if it is too long ago."""
        with self._lock:
            room = self._linked(run_id)
            return room.topology.left_by(round_number, room.delivery)

    def has_mail(self, run_id: str) -> bool:
        """Whether nodes of a run have exchanged letters here."""
        with self._lock:
            room = self._linked(run_id)
            return room.topology.used or bool(room.delivery.staged(room.position[0]))

    def sync(self, run_id: str, node_id: str, wait_s: float = 0.0, position: Position | None = None) -> list[Message]:
        """Drain a node's mailbox; with `wait_s` wait up to that long for a message of the supervisor.

        A node that still runs an attempt that is over (`position`) gets nothing: the mail is for the next one.
        """
        deadline_s = time.monotonic() + wait_s
        with self._mail_came:
            while True:
                room = self._linked(run_id)
                if position is not None and position < room.position:
                    return []
                found = room.topology.sync(node_id)
                left_s = deadline_s - time.monotonic()
                if found or left_s <= 0.0:
                    return found
                self._mail_came.wait(left_s)

    def get_neighbors(self, run_id: str, node_id: str) -> list[str]:
        """Whom a node may send to."""
        with self._lock:
            return self._linked(run_id).topology.get_neighbors(node_id)

    def get_stats(self, run_id: str) -> dict[str, int]:
        """Counters of a run's room and of the references held for it."""
        with self._lock:
            stats = self._linked(run_id).topology.get_stats()
            return {**stats, "references": len(self._store.keys(f"{run_id}/"))}

    # ------------------------------------------------------------ inside

    def _linked(self, run_id: str) -> ClusterRoom:
        if run_id not in self._rooms:
            raise RoutingError("P003", f"run {run_id[:8]} is not active on {self._cluster}", value="none")
        return self._rooms[run_id]

    def _room(self, run_id: str, generation: int) -> ClusterRoom:
        room = self._rooms.get(run_id)
        if room is None or room.activation.generation != generation:
            held = room.activation.generation if room else "none"
            raise RoutingError(
                "P003", f"generation {generation} of run {run_id[:8]} is not in force on {self._cluster}", value=held
            )
        return room

    def _require_open(self, room: ClusterRoom, position: Position) -> None:
        if not room.delivery.is_open(position):
            raise RoutingError(
                "P003",
                f"round {position[0]} attempt {position[1]} is over on {self._cluster}",
                value=f"round {room.position[0]} attempt {room.position[1]}",
            )

    def _require_owner(self, room: ClusterRoom, node: int, source: str) -> None:
        if not 0 <= node < len(room.activation.nodes):
            raise RoutingError("P012", f"no node of index {node}", place=source, value=node)
        owner = room.activation.clusters[room.activation.assignment[node]]
        if owner != source:
            raise RoutingError(
                "P010", f"node {room.activation.nodes[node].id} is owned by {owner}", place=source, value=source
            )

    def _require_local(self, room: ClusterRoom, recipients: Sequence[int]) -> None:
        """What comes in is for nodes that live here, and for somebody."""
        if not recipients:
            raise RoutingError("P012", f"nobody on {self._cluster} is addressed", place=self._cluster)
        for recipient in recipients:
            self._require_owner(room, recipient, self._cluster)

    def _require_shape(self, room: ClusterRoom, header: PayloadHeader, num_senders: int) -> None:
        elements = num_elements(header.kind, room.num_parameters, room.activation.rows, num_senders)
        wanted = ("float64" if header.kind in EXACT else element_type(room.activation.layout), elements)
        if (header.dtype, header.num_elements) != wanted:
            raise WeightsError(
                "W010",
                f"{header.kind} from {header.source} differs from the model's layout",
                place=header.source,
                value=f"{header.dtype} x {header.num_elements}",
                allowed=f"{wanted[0]} x {wanted[1]}",
            )

    def _welcome(self, header: PayloadHeader) -> tuple[ClusterRoom, tuple[int, ...]]:
        """The room of a payload and who speaks in it: owner, generation, attempt, edges and shape are right."""
        room = self._room(header.run_id, header.generation)
        self._require_open(room, (header.round, header.attempt))
        senders = self._senders_of(room, header)
        if header.kind in FROM_A_NODE:
            neighbours = room.topology.adjacency.out_neighbors(header.sender)
            if not room.local([int(j) for j in neighbours]):
                node = room.activation.nodes[header.sender].id
                raise RoutingError("P011", f"no edge from {node} into cluster {self._cluster}", place=node)
        elif header.kind == PARTIAL:
            self._require_local(room, header.recipients)
            room.topology.require_edges(senders, header.recipients)
        self._require_shape(room, header, len(senders))
        return room, senders

    def _senders_of(self, room: ClusterRoom, header: PayloadHeader) -> tuple[int, ...]:
        if header.kind in FROM_A_NODE:
            self._require_owner(room, header.sender, header.source)
            return (header.sender,)
        clusters, groups = room.activation.clusters, room.participants if header.kind == PARTIAL else room.members
        senders = groups.get(clusters.index(header.source), ()) if header.source in clusters else ()
        if header.kind not in OF_A_CLUSTER:
            raise ProtocolError("P001", f"unknown kind of payload '{header.kind}'", place=header.source)
        if header.kind == PARTIAL and room.activation.flow == HIERARCHICAL:
            above = room.topology.adjacency
            senders = tuple(n for n in senders if all(above.has_edge(n, to) for to in header.recipients))
        if not senders or header.source == self._cluster:
            raise RoutingError("P010", f"{header.source} owns nothing that makes a {header.kind}", place=header.source)
        return senders

    def _keep(self, room: ClusterRoom, posting: Posting) -> bool:
        held = room.postings.setdefault((posting.position, posting.kind), {})
        if posting.senders in held:
            return False
        held[posting.senders] = posting
        if posting.kind in FROM_A_NODE and len(room.activation.clusters) > 1:
            places = room.places.setdefault((posting.position, posting.kind), {})
            places.update({sender: (posting, row) for row, sender in enumerate(posting.senders)})
        self._store.put(_key_of(posting), posting.reference)
        return True

    def _drop(self, room: ClusterRoom, key: tuple[Position, str]) -> None:
        room.places.pop(key, None)
        for posting in room.postings.pop(key).values():
            self._store.discard(_key_of(posting))


def _key_of(posting: Posting) -> str:
    who = ",".join(str(n) for n in posting.senders[:4])
    return f"{object_key(posting.run_id, who, posting.round)}/{posting.attempt}/{posting.kind}"
