"""What an agent tells the mediator."""

from __future__ import annotations

from dataclasses import dataclass, field

from icrf.protocol.federations import Capacity, Fingerprint, Graph
from icrf.protocol.profiles import ClusterProfile


@dataclass(frozen=True)
class HeldRun:
    """A run whose nodes are live on a cluster: the generation they have, and the last attempt that was begun."""

    run_id: str
    generation: int
    round: int
    attempt: int


@dataclass(frozen=True)
class Register:
    """First message of an agent on every connection; answered by :class:`Lease` or :class:`Reject`.

    Attributes:
        agent_id: stays the same over restarts on the same state folder, whose lock makes it the only one.
        incarnation: one life of the agent's process.
        held: the runs that are live on the cluster.
    """

    cluster: str
    incarnation: str
    protocol_version: int
    software_version: str
    capacity: Capacity
    fingerprint: Fingerprint
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""
    agent_id: str = ""
    held: tuple[HeldRun, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """Keeps the lease; answered by :class:`Lease`."""

    incarnation: str


@dataclass(frozen=True)
class Draining:
    """The agent wants to leave: finish the open rounds, make their state durable, then :class:`Dismiss` it."""

    incarnation: str


@dataclass(frozen=True)
class ClusterReset:
    """The cluster itself was rebuilt: nothing that lived on it is left, and it may have another size and address."""

    incarnation: str
    reason: str
    capacity: Capacity
    address: str = ""


@dataclass(frozen=True)
class Goodbye:
    """The agent leaves in order; its cluster name is free at once."""

    incarnation: str
    reason: str


@dataclass(frozen=True)
class Reserved:
    """Outcome of :class:`Reserve`; `error_json` is empty on success."""

    run_id: str
    generation: int
    error_json: str = ""


@dataclass(frozen=True)
class Activated:
    """Outcome of :class:`Activate`.

    Attributes:
        num_samples: (node index, training samples) of this cluster's nodes.
        absmax: largest absolute value per summed tensor that the initial state on this cluster makes expect.
        state_hashes: 32 bytes per node of this cluster in index order (decentralized).
        model_hash: hex sha256 of the initial global model (coordinator only).
    """

    run_id: str
    generation: int
    num_samples: tuple[tuple[int, int], ...] = ()
    absmax: tuple[float, ...] = ()
    state_hashes: bytes = b""
    model_hash: str = ""
    error_json: str = ""


@dataclass(frozen=True)
class RoundReport:
    """One cluster's part of one attempt of a round.

    Attributes:
        participants: bitmap over node indices, bit i of byte i//8, of the nodes that trained here.
        overflow: tensor numbers whose values left the grid; the attempt is void and is run with a coarser one.
        absmax: largest absolute value per summed tensor that the new state makes expect.
        metric_sums: name -> (numerator as decimal integer in units of 2^-40, weight); exact in any grouping.
        metrics: evaluation of the global model (coordinator of an evaluated round).
        node_metrics: node id -> name -> value, of the nodes that trained here (evaluated rounds, up to 256 nodes).
        model_hash: hex sha256 of the new global or consensus model (coordinator, when there is one).
        state_hashes: 32 bytes per node of this cluster in index order (decentralized).
        bytes_inter_cluster: gateway bytes received by this cluster for this attempt, headers included.
        bytes_saved: bytes of data that `inter_cluster_codec` has kept out of those.
        bytes_intra_cluster: payload bytes that moved between hosts of this cluster.
        recovery: what an error asks for: ``retry`` (committed states are intact here: run the round again),
            ``restore`` (some are lost: go back to the last checkpoint), or empty (the error is the run's).
        graph: that of the rounds to come (coordinator of a round that decides on it).
        profile: where the time went, if that was asked.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    participants: bytes = b""
    overflow: tuple[int, ...] = ()
    absmax: tuple[float, ...] = ()
    metric_sums: dict[str, MetricSum] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    model_hash: str = ""
    state_hashes: bytes = b""
    bytes_inter_cluster: int = 0
    bytes_intra_cluster: int = 0
    train_s: float = 0.0
    exchange_s: float = 0.0
    error_json: str = ""
    recovery: str = ""
    node_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    graph: Graph | None = None
    bytes_saved: int = 0
    profile: ClusterProfile | None = None


@dataclass(frozen=True)
class Relinked:
    """Outcome of :class:`Relink`; `error_json` is empty on success."""

    run_id: str
    generation: int
    error_json: str = ""


@dataclass(frozen=True)
class MetricSum:
    """An exact sum of per-node metrics: `numerator` is an integer in units of 2^-40, weighted by samples."""

    numerator: str
    weight: int


@dataclass(frozen=True)
class Checkpointed:
    """Outcome of :class:`SaveCheckpoint`."""

    run_id: str
    generation: int
    round: int
    artifact: str = ""
    sha256: str = ""
    error_json: str = ""


@dataclass(frozen=True)
class ModelStored:
    """Outcome of :class:`StoreModel`."""

    run_id: str
    generation: int
    round: int
    artifact: str = ""
    sha256: str = ""
    error_json: str = ""


@dataclass(frozen=True)
class CallDone:
    """Outcome of :class:`CallNode` or :class:`SendMessage`; the value is the blob `artifact`."""

    run_id: str
    call_id: str
    artifact: str = ""
    error_json: str = ""


@dataclass(frozen=True)
class LinkMeasured:
    """Outcome of :class:`MeasureLink`; see ``MeasuredLink`` for the figures."""

    measurement: str
    bytes_per_s: float = 0.0
    rtt_s: float = 0.0
    error_json: str = ""


@dataclass(frozen=True)
class Released:
    """Outcome of :class:`Release`."""

    run_id: str
    generation: int


@dataclass(frozen=True)
class Warned:
    """Something a user should see in the run's event stream."""

    run_id: str
    text: str


Report = (
    Register
    | Heartbeat
    | Draining
    | ClusterReset
    | Goodbye
    | Reserved
    | Activated
    | RoundReport
    | Relinked
    | Checkpointed
    | ModelStored
    | CallDone
    | LinkMeasured
    | Released
    | Warned
)
