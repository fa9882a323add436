"""The ports of the fabric: what each side may expect of the other, whatever adapter was injected.

One cluster and many differ only in the adapters behind these Protocols. Every port has one contract test suite
in ``tests/contract`` that runs against each of its adapters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from icrf.errors import IcrfError
from icrf.exchange import Transfer
from icrf.protocol import (
    Activate,
    Activated,
    Capacity,
    ClusterInfo,
    Fingerprint,
    Graph,
    HeldRun,
    Instruction,
    MeasuredLink,
    PeerAddress,
    Plan,
    Relink,
    Report,
    Reserve,
    RunEvent,
    RunInfo,
    StartRound,
    Submission,
)


class Clock(Protocol):
    """Time. `monotonic_s` decides leases and deadlines; `wall_s` is for display only."""

    def monotonic_s(self) -> float: ...

    def wall_s(self) -> float: ...


class MediatorPort(Protocol):
    """SDK -> mediator. Blocking calls; adapters: in-process and gRPC.

    Every method raises :class:`icrf.errors.IcrfError` subclasses only. An unknown run id raises F001; a run id may be
    abbreviated to any unique prefix (F004 when ambiguous). Calls are safe to repeat: `submit` by its
    ``client_request_id``, `cancel`, `advance`, `change_nodes` and `finish` because asking twice for a state reached is
    no error.
    """

    def submit(self, submission: Submission) -> RunInfo:
        """Accept a federation. MUST be durable before it returns. Same request id: the same run."""

    def plan(self, submission: Submission) -> Plan:
        """Dry run against the clusters registered now. Changes nothing."""

    def get(self, run_id: str) -> RunInfo: ...

    def list_runs(self) -> list[RunInfo]:
        """All runs, newest first."""

    def clusters(self) -> list[ClusterInfo]:
        """Registered clusters by name."""

    def links(self) -> list[MeasuredLink]:
        """What was last measured between clusters that are registered now, by source and target."""

    def measure_links(self) -> list[MeasuredLink]:
        """Measure every link between clusters that are connected, each way, and return what `links` says then; A005
        if there are fewer than two. A link that cannot be measured carries its error. Plans made from now on go by
        the figures. While somebody else's measuring goes on, waits for that."""

    def watch(self, run_id: str, after_seq: int = 0) -> Iterator[RunEvent]:
        """Events with seq > `after_seq`, past ones first, then live; ends after the ``end`` event."""

    def cancel(self, run_id: str) -> RunInfo:
        """Ask for the end of a run; a finished run is returned unchanged."""

    def advance(self, run_id: str, stage: str, rounds: int = 0) -> RunInfo:
        """Let a held run go on: to ``reserve`` or ``activate``, or ``run`` until `rounds` rounds are committed in
        total (0: as configured). ``stop`` ends it in order and soon: after the open round its model is stored, and
        nobody who is away is waited for. Returns at once; follow with `watch` or `get`."""

    def change_nodes(self, run_id: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> RunInfo:
        """From the next round on, other nodes of the specification may take part. Repeating is harmless."""

    def finish(self, run_id: str) -> RunInfo:
        """End a kept run: store its model and release its resources. Returns at once."""

    def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        """Call a node's method wherever it lives; values in ``icrf.values`` form. Blocks until the result."""

    def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        """Deliver a message of the supervisor to these nodes; returns when it is in their mailboxes."""

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        """The bytes of an artifact (``model.safetensors``) in chunks of at most 1 MiB; F006 if unknown."""

    def close(self) -> None:
        """Release the connection; harmless when called twice."""


class AgentLink(Protocol):
    """Agent -> mediator: the control stream the agent dials out. Asynchronous; adapters: in-process and gRPC.

    One owner task calls `run`; other tasks of the same loop may call `report` and `upload` at any time.
    """

    async def run(self, register: Callable[[], Report], deliver: Callable[[Instruction], None]) -> None:
        """Register and then pass every instruction to `deliver` in order, until `close`.

        A lost connection is retried for ever with jitter and registers again; a :class:`Reject` is delivered like any
        instruction and ends the call."""

    def report(self, report: Report) -> None:
        """Queue a report for the mediator; reports arrive in order. Never blocks."""

    async def upload(self, run_id: str, artifact: str, chunks: Iterator[bytes]) -> str:
        """Stream an artifact to the mediator's blob store; returns its hex sha256 once it is durable."""

    async def download(self, run_id: str, artifact: str) -> bytes:
        """An artifact from the mediator's blob store; F006 when there is none."""

    async def close(self) -> None: ...


class AgentPort(Protocol):
    """Mediator -> one agent. `send` queues an instruction; it never blocks and never raises; order is kept."""

    def send(self, instruction: Instruction) -> None: ...

    def disconnect(self) -> None: ...


@dataclass(frozen=True)
class ClusterFacts:
    """What a runtime found when it started."""

    capacity: Capacity
    fingerprint: Fingerprint
    gateway_address: str = ""


@dataclass(frozen=True)
class PayloadHeader:
    """Identifies one payload between clusters. `sender` is a node index, or -1 for a cluster's partial.

    kind: ``model`` (global model, or that of a group, float32), ``merged`` (the global model for the aggregators of a
    hierarchy), ``update`` (one node's parameters), ``partial`` and ``consensus`` (exact sums, float64), ``message`` (an
    encoded user message, uint8), ``probe`` (of no run, to measure a link by). Recipients of a model or an update are
    the sender's neighbours on the receiving cluster; of a partial and a message they are listed.

    coding: how the array travels: "" as it is, ``packed`` (:mod:`icrf.wire.packing`), or ``delta``: packed against an
    earlier array of the same sender, whose identity `base` is.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    kind: str
    sender: int
    source: str
    target: str
    dtype: str
    num_elements: int
    weight: int = 0
    recipients: tuple[int, ...] = ()
    coding: str = ""
    base: str = ""


@dataclass(frozen=True)
class Arrival:
    """A payload that came in: its header, the bytes it took on the wire, headers included, and how many bytes of data
    its coding has saved (fewer than none where packing made it larger)."""

    header: PayloadHeader
    wire_bytes: int
    saved_bytes: int = 0


@dataclass(frozen=True)
class PhaseReport:
    """What one host says after a phase; see ``RoundReport`` for the fields.

    Attributes:
        node_states: whether nodes of the host have a durable state of their own.
        seconds: of a whole cluster's report: host -> part -> seconds in all phases of the attempt so far.
    """

    nodes: tuple[int, ...] = ()
    overflow: tuple[int, ...] = ()
    absmax: tuple[float, ...] = ()
    metric_sums: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    node_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    model_hash: str = ""
    state_hashes: bytes = b""
    bytes_intra_cluster: int = 0
    node_states: bool = False
    graph: Graph | None = None
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFile:
    """A model as safetensors bytes and the hex sha256 over its tensors' bytes in name order."""

    safetensors: bytes
    sha256: str


@dataclass(frozen=True)
class LinkSpeed:
    """What was measured on the way to another cluster, see :class:`icrf.protocol.MeasuredLink`."""

    bytes_per_s: float
    rtt_s: float


class ClusterRuntime(Protocol):
    """Agent -> the cluster that computes. Adapters: Ray, and inline (no Ray, for tests and simulation).

    Every method may raise an IcrfError (never anything of Ray's). `run_id` keys everything; nothing of one run is
    visible to another. All methods are idempotent for equal arguments, so that an agent may repeat them.
    """

    async def start(self) -> ClusterFacts:
        """Connect and start what is shared by all runs: topology manager, gateway."""

    async def reserve(self, request: Reserve) -> None:
        """All bundles or none; R001 if they can never fit, R003 if not within the deadline."""

    async def activate(self, request: Activate, checkpoint: bytes = b"") -> Activated:
        """Create the hosts (live ones are kept) and set up this cluster's nodes; U001 carries a node's own traceback.

        With ``request.restore_round`` > 0 the state is that of `checkpoint`, out of what earlier `checkpoint` calls
        returned for that round on the clusters that the nodes lived on then (empty where they keep no state); what it
        has of others is left aside. An earlier generation of the run on this cluster is over; a repeated call of the
        same one waits for the first."""

    async def adopt(self, request: Activate) -> HeldRun | None:
        """After a restart of the agent: take over the hosts of a run that were activated with `request`.

        Returns what they hold, or None unless every one of them is alive with that generation set up. Changes nothing
        on the cluster."""

    async def checkpoint(self, run_id: str, round_number: int) -> bytes:
        """This cluster's part of the committed state of a round; F006 when it is no longer (or not) here, W0xx never.

        Centralized: the coordinator's global model, empty elsewhere. Decentralized: the states of all nodes here. In
        any case what nodes keep themselves, and the letters that wait for them."""

    async def recover(self, run_id: str, error: IcrfError) -> str:
        """After a step of a run failed with `error`: bring back what died, as far as it can be.

        Restarts hosts, topology manager and gateway, and links and sets them up again. Returns ``retry`` when the
        committed states of this cluster are intact, ``restore`` when some are lost, and an empty string when the
        error is no death: then it is the run's own."""

    async def lost(self) -> str:
        """Returns, with the reason, when the cluster itself has died (Ray's head); never returns otherwise."""

    async def rebuild(self) -> ClusterFacts:
        """After `lost`: connect to a new (or revived) cluster and start what `start` starts; all runs are gone."""

    async def publish_model(self, run_id: str, start: StartRound, ahead: bool = False) -> None:
        """Every aggregator here publishes the model of the round before to its participants (edges are checked).

        Args:
            ahead: nobody has asked for the attempt yet: the round before may still be repeated.
        """

    async def train(self, run_id: str, start: StartRound, ahead: bool = False) -> PhaseReport:
        """Every host trains its nodes from the state of the round before and publishes what they send."""

    async def send_payload(self, run_id: str, start: StartRound, transfer: Transfer) -> None:
        """Send a published model, update or partial to the gateway of another cluster; returns when accepted."""

    async def aggregate(self, run_id: str, start: StartRound) -> PhaseReport:
        """Centralized: merge the partials into the new global model (coordinator only). Decentralized: every host
        mixes its nodes, and, if the round is evaluated, the cluster's consensus partial is published; if it decides on
        the next graph, what the decision asks for is published too. Hierarchical:
        every aggregator here makes its group's model; where the round merges, the root makes the one for all."""

    async def install(self, run_id: str, start: StartRound) -> PhaseReport:
        """Hierarchical: every aggregator here takes over the model for all groups."""

    async def evaluate(self, run_id: str, start: StartRound) -> PhaseReport:
        """Coordinator of a decentralized run: merge the consensus partials and evaluate the consensus model."""

    async def adapt(self, run_id: str, start: StartRound) -> PhaseReport:
        """Coordinator of a decentralized run: decide on the graph of the rounds to come."""

    async def relink(self, request: Relink) -> Activate:
        """Between two rounds: link the nodes of a run like this, under a new generation.

        Returns the activation that is in force now; P003 if a later generation is. A repeated call completes what an
        earlier one has left undone."""

    async def abort(self, run_id: str, round_number: int, attempt: int, leave_off: bool = False) -> None:
        """Drop everything of that attempt. Late results and payloads of it are refused from now on.

        Args:
            leave_off: whoever trains for it does not begin with another node.
        """

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Payloads as they come in, each once."""
        yield  # type: ignore[misc]

    async def final_model(self, run_id: str, round_number: int) -> ModelFile:
        """The committed global or consensus model of that round; F006 where there is none."""

    async def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes: ...

    async def send_message(self, run_id: str, recipients: Sequence[int], message: bytes) -> None: ...

    async def measure(self, peer: PeerAddress) -> LinkSpeed:
        """Measure the way that payloads take to another cluster, within bounded bytes and time; P030 if none get
        there."""

    async def release(self, run_id: str) -> None:
        """Kill the run's hosts, free its objects, remove its placement group; harmless when nothing is there."""

    async def close(self) -> None:
        """End everything this runtime started; harmless when called twice."""


class PayloadTransport(Protocol):
    """Gateway -> gateway. Blocking, thread-safe; adapters: in-process, gRPC direct, gRPC through the relay.

    A payload is sent in chunks of about 1 MiB, each with its index and an xxh3 checksum. `send` returns only after
    the receiver has verified and processed it; P030 when the peer cannot be reached within the deadline, P02x for a
    corrupted or truncated payload, or the IcrfError that the receiver's `receive` raised (for instance P011).
    """

    def serve(
        self,
        receive: Callable[[PayloadHeader, np.ndarray[Any, Any], int], None],
        allocate: Callable[[PayloadHeader], np.ndarray[Any, Any]] = ...,
    ) -> str:
        """Start accepting: `receive(header, array, wire_bytes)` is called in a worker thread per payload and owns the
        one-dimensional array, which `allocate(header)` has made unless the payload is coded; what that raises is the
        sender's answer. Returns the address that peers can dial, or an empty string if none."""

    def send(self, header: PayloadHeader, array: np.ndarray[Any, Any], peer: PeerAddress, timeout_s: float) -> None:
        """Send a one-dimensional, contiguous array; it is only read."""

    def forget(self, run_id: str) -> None:
        """Nothing more of this run will come: drop what is kept of payloads that were broken off."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Write:
    """One durable fact. `table` names the record, `key` its identity within the table, `row` plain values."""

    table: str
    key: tuple[str | int, ...]
    row: Mapping[str, Any]


class FederationStore(Protocol):
    """The mediator's journal. Adapters: in memory, SQLite.

    Tables (key): ``submissions``, ``runs`` and ``goals`` (run_id), ``assignments`` and ``activations`` (run_id,
    generation), ``attempts`` (run_id, round, attempt, cluster), ``commits`` and ``checkpoints`` (run_id, round),
    ``graphs`` (run_id, round), ``relinks`` (run_id, generation), ``events`` (run_id, seq), ``links`` (source,
    target), ``meta`` (name).
    """

    def apply(self, writes: Sequence[Write]) -> None:
        """All of them or none, durable on return; an equal key replaces the row. ``commits`` rows never change: writing
        a different row for an existing commit raises F005."""

    def rows(self, table: str, prefix: tuple[str | int, ...] = ()) -> list[Write]:
        """Rows whose key starts with `prefix`, ordered by key."""

    def close(self) -> None: ...


class BlobStore(Protocol):
    """Artifacts, checkpoints and models as bytes. Adapters: in memory, folder."""

    def writer(self, run_id: str, artifact: str) -> BlobWriter:
        """A sink for one artifact; nothing is visible before `commit`. Committing again replaces."""

    def read(self, run_id: str, artifact: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        """Chunks of the artifact; F006 (raised at the call, not at the first chunk) when unknown."""

    def delete_run(self, run_id: str, prefix: str = "") -> None: ...


class BlobWriter(Protocol):
    """See :class:`BlobStore`."""

    def write(self, chunk: bytes) -> None: ...

    def commit(self) -> str:
        """Make it durable and visible; returns the hex sha256."""

    def abort(self) -> None: ...
