"""The control messages of the fabric as frozen values, free of protobuf, Ray and I/O.

Everything that the SDK, the mediator and the agents tell each other is one of these. They are small: tensors
travel as payloads between gateways (see ``exchange.py``), never in here. ``icrf.wire`` turns each of them into
the protobuf message of the same name, field by field.

Words: a *node index* is the position in the specification and the only canonical order; a *generation* fences
an assignment; an *attempt* is one try of a round.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PROTOCOL_VERSION = 1

# How far a submitted federation goes by itself, and what `advance` asks for.
STAGES = ("reserve", "activate", "run")

# Status of a run. The last three are terminal.
QUEUED, RESERVING, RESERVED, ACTIVATING, READY, RUNNING, IDLE = (
    "QUEUED",
    "RESERVING",
    "RESERVED",
    "ACTIVATING",
    "READY",
    "RUNNING",
    "IDLE",
)
COMPLETED, FAILED, CANCELLED = "COMPLETED", "FAILED", "CANCELLED"
TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED})

CENTRALIZED, DECENTRALIZED = "centralized", "decentralized"


# ---------------------------------------------------------------- what a federation is


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model. `dtype` is a NumPy name such as ``float32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class NodeSpec:
    """One node; its index is its position. `role` is dash-separated, e.g. ``train-eval``."""

    id: str
    role: str


@dataclass(frozen=True)
class Graph:
    """A directed graph in CSR form: node i may send to ``indices[indptr[i]:indptr[i+1]]`` (ascending)."""

    num_nodes: int
    indptr: tuple[int, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Submission:
    """What the SDK submits: everything is resolved, so that the mediator runs no user code.

    Attributes:
        client_request_id: the same id submitted twice is one federation.
        config_json: the resolved configuration.
        flow: ``centralized`` (one aggregating node) or ``decentralized`` (every node mixes with its neighbours).
        layout: the model's tensors in name order, which is the order of the flat buffer.
        keep: stay allocated after the configured rounds until ``finish``.
        stage: how far to go without being asked, one of :data:`STAGES`.
        code_path: folder of the user's own modules, put on the path of local hosts; empty for none.
    """

    client_request_id: str
    config_json: str
    flow: str
    nodes: tuple[NodeSpec, ...]
    graph: Graph
    layout: tuple[TensorSpec, ...]
    keep: bool = False
    stage: str = "run"
    code_path: str = ""


@dataclass(frozen=True)
class Resources:
    """What one slot takes."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What a cluster offers. `num_slots` is how many hosts the agent allows at once."""

    num_slots: int
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    num_ray_nodes: int = 1


@dataclass(frozen=True)
class Fingerprint:
    """What decides the bits of float arithmetic; ``strict`` determinism wants it equal on all clusters."""

    torch_version: str
    cpu_capability: str
    mkldnn: str
    num_threads: int
    device: str


@dataclass(frozen=True)
class ClusterInfo:
    """A registered cluster as users see it."""

    name: str
    incarnation: str
    capacity: Capacity
    fingerprint: Fingerprint
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""
    alive: bool = True
    free_slots: int = 0


@dataclass(frozen=True)
class Plan:
    """A dry run: where nodes go and what crosses.

    Attributes:
        assignment: node id -> cluster name.
        bytes_inter_cluster_per_round: payload bytes of one round without evaluation, headers not counted.
        bytes_inter_cluster_per_evaluation: payload bytes that an evaluation adds (consensus partials).
        slem: second-largest eigenvalue modulus of the mixing matrix; -1 for a centralized flow.
        slem_kind: ``exact``, ``closed-form``, ``estimate`` or ``none``.
        rounds_to_consensus: rounds until the disagreement falls below 1e-6; -1 if never or centralized.
        problems: why it is not feasible, one sentence each.
        links: (from cluster, to cluster, payload bytes per round).
    """

    federation: str
    flow: str
    clusters: tuple[str, ...]
    assignment: dict[str, str]
    num_edges: int
    cut_edges: int
    links: tuple[LinkBytes, ...]
    bytes_inter_cluster_per_round: int
    bytes_inter_cluster_per_evaluation: int
    bytes_inter_cluster_total: int
    slem: float
    slem_kind: str
    rounds_to_consensus: int
    peak_memory_bytes: int
    slots: dict[str, int]
    feasible: bool
    problems: tuple[str, ...]
    num_parameters: int
    strategy: str
    explanation: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkBytes:
    """Payload bytes of one round over one directed link between clusters."""

    source: str
    target: str
    bytes_per_round: int


# ---------------------------------------------------------------- mediator -> agent


@dataclass(frozen=True)
class Reserve:
    """Reserve `num_slots` bundles in one detached placement group; answered by :class:`Reserved`."""

    run_id: str
    generation: int
    federation: str
    num_slots: int
    resources: Resources
    strategy: str
    deadline_s: float


@dataclass(frozen=True)
class PeerAddress:
    """Where a cluster's gateway can be dialled; an empty address means: through the mediator's relay."""

    cluster: str
    address: str


@dataclass(frozen=True)
class Activate:
    """Create hosts and set up this cluster's nodes; answered by :class:`Activated`."""

    run_id: str
    generation: int
    federation: str
    config_json: str
    flow: str
    nodes: tuple[NodeSpec, ...]
    graph: Graph
    layout: tuple[TensorSpec, ...]
    clusters: tuple[str, ...]
    assignment: tuple[int, ...]
    coordinator: int
    peers: tuple[PeerAddress, ...]
    num_slots: int
    code_path: str = ""


@dataclass(frozen=True)
class StartRound:
    """Run one attempt of a round from the committed state `parent_hash`; answered by :class:`RoundReport`.

    Attributes:
        grid: exponent e per tensor, bound 2^e on the total of n*|w| (see ``update.py``).
        consensus_grid: the same for the consensus mean of a decentralized evaluation.
        total_weight: sum of the participants' sample counts over all clusters.
        evaluate: evaluate the global (or consensus) model after this round.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    parent_hash: str
    grid: tuple[int, ...]
    total_weight: int
    evaluate: bool


@dataclass(frozen=True)
class AbortAttempt:
    """Drop what belongs to this attempt; no answer."""

    run_id: str
    round: int
    attempt: int


@dataclass(frozen=True)
class StoreModel:
    """Upload the committed global or consensus model of `round`; answered by :class:`ModelStored`."""

    run_id: str
    generation: int
    round: int


@dataclass(frozen=True)
class CallNode:
    """Call a method of a node; the result is uploaded as blob ``call/{call_id}``, then :class:`CallDone`."""

    run_id: str
    generation: int
    call_id: str
    node_id: str
    method: str
    arguments: bytes


@dataclass(frozen=True)
class SendMessage:
    """Put a message of the federation itself (the supervisor) into the mailboxes of these nodes."""

    run_id: str
    generation: int
    call_id: str
    recipients: tuple[int, ...]
    message: bytes


@dataclass(frozen=True)
class Release:
    """Kill the run's hosts and remove its placement group; answered by :class:`Released`."""

    run_id: str
    generation: int


@dataclass(frozen=True)
class Lease:
    """Answer to a heartbeat or a registration: the cluster is owned by this agent for `ttl_s` more seconds."""

    ttl_s: float
    heartbeat_s: float


@dataclass(frozen=True)
class Reject:
    """The agent may not (any longer) serve its cluster; it stops with this error (a dict of ``IcrfError``)."""

    error_json: str


Instruction = (
    Reserve | Activate | StartRound | AbortAttempt | StoreModel | CallNode | SendMessage | Release | Lease | Reject
)


# ---------------------------------------------------------------- agent -> mediator


@dataclass(frozen=True)
class Register:
    """First message of an agent; answered by :class:`Lease` or :class:`Reject`."""

    cluster: str
    incarnation: str
    protocol_version: int
    software_version: str
    capacity: Capacity
    fingerprint: Fingerprint
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


@dataclass(frozen=True)
class Heartbeat:
    """Keeps the lease; answered by :class:`Lease`."""

    incarnation: str


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
        absmax: largest absolute value per tensor of the initial state on this cluster.
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
        absmax: largest absolute value per tensor of the new state.
        metric_sums: name -> (numerator as decimal integer in units of 2^-40, weight); exact in any grouping.
        metrics: evaluation of the global model (coordinator of an evaluated round).
        model_hash: hex sha256 of the new global or consensus model (coordinator, when there is one).
        state_hashes: 32 bytes per node of this cluster in index order (decentralized).
        bytes_inter_cluster: gateway bytes received by this cluster for this attempt, headers included.
        bytes_intra_cluster: payload bytes that moved between hosts of this cluster.
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
    aggregate_s: float = 0.0
    error_json: str = ""


@dataclass(frozen=True)
class MetricSum:
    """An exact sum of per-node metrics: `numerator` is an integer in units of 2^-40, weighted by samples."""

    numerator: str
    weight: int


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
    Register | Heartbeat | Goodbye | Reserved | Activated | RoundReport | ModelStored | CallDone | Released | Warned
)


# ---------------------------------------------------------------- mediator -> SDK


@dataclass(frozen=True)
class RunInfo:
    """One run as `get` and `list` show it. Times are seconds since the epoch, for display only."""

    run_id: str
    federation: str
    status: str
    flow: str
    rounds_done: int
    rounds_planned: int
    clusters: tuple[str, ...]
    created_at: float
    finished_at: float = 0.0
    waiting_for: str = ""
    error_json: str = ""
    model_sha256: str = ""
    config_json: str = ""
    accuracy: float = -1.0
    bytes_inter_cluster: int = 0
    rounds_to_target: int = 0


@dataclass(frozen=True)
class RoundResult:
    """One committed round.

    Attributes:
        participants: how many nodes contributed.
        metrics: ``train_loss`` always; ``accuracy`` and ``loss`` in evaluated rounds.
        model_sha256: hash of the global model; decentralized: the Merkle root over the node states.
        consensus_sha256: hash of the consensus model where one was made.
    """

    number: int
    attempt: int
    generation: int
    wall_s: float
    train_s: float
    exchange_s: float
    commit_s: float
    metrics: dict[str, float]
    bytes_inter_cluster: int
    bytes_intra_cluster: int
    participants: int
    model_sha256: str
    parent_sha256: str
    consensus_sha256: str = ""
    bytes_by_cluster: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunEvent:
    """One item of a run's event stream; `seq` counts from 1 without gaps within a run."""

    run_id: str
    seq: int
    at: float
    kind: str  # "status", "waiting", "round", "warning", "end"
    text: str = ""
    status: str = ""
    round: RoundResult | None = None
