"""What carries a cluster's hosts, topology manager and gateway, as the runtime sees it, and its record of a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from icrf.codecs import NONE
from icrf.errors import NodeError, RoutingError, RunError
from icrf.ports import ClusterFacts
from icrf.protocol import CENTRALIZED, DECENTRALIZED, Activate, Activated, Relink, Reserve, StartRound, nodes_that
from icrf_agent.checkpoint import SERVER, split_rows
from icrf_agent.host_nodes import HostSetup
from icrf_agent.kept import Kept, merged
from icrf_agent.mail import Mail
from icrf_agent.postings import Posting


class Actor(Protocol):
    """Something that lives elsewhere and can be called; raises IcrfErrors only.

    When its process dies, calls raise U003. It comes back empty and behind the same handle: by itself or, where
    processes are only played, with :meth:`Substrate.revive`.
    """

    async def call(self, method: str, *arguments: Any) -> Any: ...


@dataclass(frozen=True)
class Shared:
    """What all runs of a cluster share; no gateway where there is no other cluster."""

    manager: Actor
    gateway: Actor | None


class Substrate(Protocol):
    """Where hosts live. What it starts outlives the agent and is found again by name."""

    async def start(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        """Connect, and start the shared actors or take over living ones; the gateway is open."""

    async def reserve(self, request: Reserve) -> None:
        """Reserve the slots of a run, all or none, or keep an equal reservation; R001, R003."""

    async def create_host(self, setup: HostSetup, name: str, slot: int) -> Actor:
        """A host in slot `slot` of the run's reservation, named `name` in the run's namespace; a living one is kept."""

    async def find_host(self, run_id: str, name: str, slot: int) -> Actor | None:
        """The living host of that name and slot, or None; changes nothing."""

    async def keep_hosts(self, run_id: str, names: Collection[str]) -> None:
        """End the hosts of a run that have other names."""

    async def open_gateway(self, address: str) -> str:
        """Open a gateway that came back empty, at the `address` it had; harmless when it is open. Its address."""

    async def revive(self, actor: Actor, hung: bool) -> None:
        """Help an actor that does not answer to come back; one that is `hung` is killed first."""

    async def starved(self, lives: Collection[str]) -> frozenset[str]:
        """Which of these lives of hosts, all of them over, were ended because memory ran out, as far as it is known."""

    async def release(self, run_id: str) -> None:
        """Kill the run's hosts and give its slots back; harmless when nothing is there."""

    async def lost(self) -> str:
        """Returns, with the reason, when the cluster itself has died; every call in flight has raised U003 by then."""

    async def rebuild(self, cluster: str) -> tuple[ClusterFacts, Shared]:
        """Connect to what takes the lost cluster's place, and `start` there."""

    async def close(self) -> None:
        """End everything; harmless when called twice."""


@dataclass
class Tray:
    """What this cluster's hosts have posted in the attempt that runs.

    Attributes:
        position: its round and attempt; (0, 0) while none is open.
        begun: whether the topology manager knows that the attempt is open.
        postings: by kind and senders, the first of equal ones, in the order they came.
        untold: those of them that the topology manager has not been told.
        ahead: what was posted already for the attempt that is expected next.
        waiting: what the topology manager has been told and has not answered yet.
    """

    position: tuple[int, int] = (0, 0)
    begun: bool = False
    postings: dict[tuple[str, tuple[int, ...]], Posting] = field(default_factory=dict)
    untold: list[Posting] = field(default_factory=list)
    ahead: list[Posting] = field(default_factory=list)
    waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def open(self, position: tuple[int, int]) -> None:
        """Another attempt begins, with nothing posted but what was posted for it ahead."""
        ready = [posting for posting in self.ahead if posting.position == position]
        self.position, self.begun, self.waiting = position, False, []
        self.postings, self.untold, self.ahead = {}, [], []
        self.take(ready)

    def take(self, postings: Iterable[Posting]) -> None:
        """What hosts have made in a phase."""
        for posting in postings:
            if posting.position != self.position:
                self.ahead.append(posting)
            elif (posting.kind, posting.senders) not in self.postings:
                self.postings[posting.kind, posting.senders] = posting
                self.untold.append(posting)

    def has(self, kind: str) -> bool:
        """Whether anything of a kind was posted."""
        return any(posting.kind == kind for posting in self.postings.values())

    def is_of(self, start: StartRound) -> bool:
        """Whether this attempt is the open one."""
        return self.position == (start.round, start.attempt)


@dataclass
class Hosted:
    """A run on this cluster.

    Attributes:
        nodes: the node indices of each host, in slot order.
        setups: what each host was set up with, without states.
        lives: the life of each host that was set up.
        position: the newest round and attempt that were begun here.
        stateful: slots whose nodes have durable states of their own.
        has_mail: whether nodes exchange letters here, as far as it is known.
        lost_mail: whether some of that is gone, with the topology manager that had it.
        active: whether all hosts have been set up.
        quarantine: why a node may not run any more.
        setting_up: what setting up the hosts will have led to; None before it has begun, and for adopted runs.
        tray: what passes between the hosts in the open attempt.
    """

    activation: Activate
    nodes: list[tuple[int, ...]]
    setups: list[HostSetup]
    hosts: list[Actor] = field(default_factory=list)
    lives: list[str] = field(default_factory=list)
    position: tuple[int, int] = (0, 0)
    stateful: set[int] = field(default_factory=set)
    has_mail: bool = False
    lost_mail: bool = False
    active: bool = False
    quarantine: NodeError | None = None
    setting_up: asyncio.Future[Activated] | None = None
    tray: Tray = field(default_factory=Tray)

    def allow_active(self, most: int | None) -> None:
        """From now on, hosts that are set up keep no more of their nodes active at once; None changes nothing."""
        if most is not None:
            self.setups = [replace(setup, most_active=most) for setup in self.setups]

    @property
    def most_active(self) -> int | None:
        """How many nodes a host may keep active at once, since memory ran out; None: nothing of that kind happened."""
        return self.setups[0].most_active if self.setups else None

    def relink(self, order: Relink) -> None:
        """From now on the run has this graph under this generation; P003 if a later one is in force."""
        was = self.activation
        if order.generation < was.generation:
            over = f"generation {order.generation} of run {order.run_id[:8]} is over"
            raise RoutingError("P003", over, value=was.generation)
        self.activation = order.applied_to(was)
        self.setups = [replace(setup, activation=self.activation) for setup in self.setups]

    @cached_property
    def codec(self) -> str:
        """The configuration's ``inter_cluster_codec``."""
        return str(json.loads(self.activation.config_json).get("inter_cluster_codec", NONE))

    @cached_property
    def _slot_of(self) -> dict[int, int]:
        return {node: slot for slot, nodes in enumerate(self.nodes) for node in nodes}

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {node.id: index for index, node in enumerate(self.activation.nodes)}

    def index_of(self, node_id: str) -> int:
        """Index of a node; P012 when there is none of that name."""
        if node_id not in self._index_of:
            raise RoutingError("P012", f"no node '{node_id}'", value=node_id)
        return self._index_of[node_id]

    def host_of(self, index: int) -> Actor:
        """The host of a node; F005 when it lives on another cluster."""
        if index not in self._slot_of:
            owner = self.activation.clusters[self.activation.assignment[index]]
            raise RunError("F005", f"{self.activation.nodes[index].id} lives on cluster {owner}", value=owner)
        return self.hosts[self._slot_of[index]]

    def shares_host(self, index: int) -> bool:
        """Whether the host of a node runs others too."""
        return len(self.nodes[self._slot_of[index]]) > 1

    def host_label(self, slot: int) -> str:
        """What people call the host in a slot, see :func:`host_label`."""
        return host_label(self.activation, self.nodes[slot], slot)

    @cached_property
    def aggregators(self) -> tuple[int, ...]:
        """The nodes that make models for others, ascending; none among peers."""
        if self.activation.flow == DECENTRALIZED:
            return ()
        return nodes_that("aggregate", self.activation.nodes)

    @property
    def model_slot(self) -> int:
        """The slot whose host makes the global or consensus model, on the coordinator's cluster."""
        return self._slot_of[self.aggregators[0]] if self.aggregators else 0

    @property
    def model_host(self) -> Actor:
        """The host that makes the global or consensus model, on the coordinator's cluster."""
        return self.hosts[self.model_slot]

    @cached_property
    def aggregating_slots(self) -> tuple[int, ...]:
        """The slots whose hosts make new states: those with an aggregator, or among peers all."""
        makers = frozenset(self.aggregators)
        return tuple(slot for slot, nodes in enumerate(self.nodes) if not makers or makers & set(nodes))

    def keeps_state(self, slot: int) -> bool:
        """Whether a host keeps what rounds start from."""
        return slot in self.stateful or bool(self._keepers(slot))

    def _keepers(self, slot: int) -> list[str]:
        """Whose state the flow keeps on a host, as checkpoints name it."""
        nodes, flow = self.nodes[slot], self.activation.flow
        if flow != CENTRALIZED:
            return [str(node) for node in nodes if flow == DECENTRALIZED or node in self.aggregators]
        trains = [i for i in sorted(nodes) if "train" in self.activation.nodes[i].role_parts]
        clients = trains if self.activation.rows.clients_keep else []
        return [*([SERVER] if self.aggregators[0] in nodes else []), *(str(node) for node in clients)]

    def states_from(self, checkpoint: bytes) -> list[bytes]:
        """Each host's part of what the flow keeps; W010 if it is not there."""
        number, slots = self.activation.restore_round, range(len(self.nodes))
        return split_rows(checkpoint, number, [self._keepers(slot) if number else [] for slot in slots])

    def loaded(self, checkpoint: bytes) -> tuple[list[HostSetup], Mail]:
        """Each host's setup with its part of the state to restore, and the letters; W010 if a state is not there."""
        kept = Kept.unpack(checkpoint, self.activation.restore_round)
        loaded = []
        for slot, state in enumerate(self.states_from(kept.flow)):
            own = {index: kept.states[index] for index in self.nodes[slot] if index in kept.states}
            if own:
                self.stateful.add(slot)
            loaded.append(replace(self.setups[slot], state=state, node_states=own))
        self.has_mail = bool(kept.mail)
        return loaded, kept.mail

    def checkpoint_from(self, parts: Sequence[bytes], mail: Mail, round_number: int) -> bytes:
        """This cluster's checkpoint from those of its hosts that keep state, and its letters."""
        kept = merged([Kept.unpack(part, round_number) for part in parts], round_number)
        return replace(kept, mail=mail).pack(round_number)


def host_label(request: Activate, nodes: Sequence[int], slot: int) -> str:
    """The node's id where a node has a host of its own, else ``host-{slot}``."""
    return request.nodes[nodes[0]].id if len(nodes) == 1 else f"host-{slot}"


def host_name(request: Activate, nodes: Sequence[int], slot: int) -> str:
    """``{federation}/{node}`` where a node has a host of its own, else ``{federation}/host-{slot}``."""
    return f"{request.federation}/{host_label(request, nodes, slot)}"


def split_nodes(nodes: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Contiguous groups in index order whose sizes differ by one at most."""
    base, more = divmod(len(nodes), parts)
    sizes = [base + (k < more) for k in range(parts)]
    ends = [sum(sizes[: k + 1]) for k in range(parts)]
    return [tuple(nodes[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
