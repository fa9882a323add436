"""What a federation is, what a cluster offers, and the plan that brings them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

PROTOCOL_VERSION = 1

# How far a submitted federation goes by itself, and what `advance` asks for.
STAGES = ("reserve", "activate", "run")
# What `advance` also takes: no further rounds, the model is stored and the run ends.
STOP = "stop"

# Status of a run. The last three are terminal.
QUEUED, RECOVERING, RESERVING, RESERVED, ACTIVATING, READY, RUNNING, IDLE = (
    "QUEUED",
    "RECOVERING",
    "RESERVING",
    "RESERVED",
    "ACTIVATING",
    "READY",
    "RUNNING",
    "IDLE",
)
COMPLETED, FAILED, CANCELLED = "COMPLETED", "FAILED", "CANCELLED"
TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED})

CENTRALIZED, DECENTRALIZED, HIERARCHICAL = "centralized", "decentralized", "hierarchical"


# How the tensors of several nodes become one: as the aggregation rule or the mixing says (parameters); by the weighted
# mean (buffers of floats); by the mean rounded to the nearest integer; not at all.
AGGREGATED, MEAN, ROUNDED, PRIVATE = "aggregated", "mean", "rounded", "private"
# Stands between the kinds of GPUs in a fingerprint.
KINDS_APART = "+"
# Elements of the flat buffer that an integer takes, see ``learning/layout.py``.
LIMBS = 2


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model. `dtype` is a NumPy name such as ``float32``, `rule` one of the four above."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str = AGGREGATED

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers or booleans."""
        return "int" in self.dtype or self.dtype == "bool"

    @property
    def num_elements(self) -> int:
        """Elements of the flat buffer that it takes."""
        return math.prod(self.shape) * (LIMBS if self.is_integer and self.rule in (ROUNDED, PRIVATE) else 1)


def shared_tensors(layout: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that nodes send and average, in name order."""
    return tuple(tensor for tensor in layout if tensor.rule != PRIVATE)


def shared_size(layout: Sequence[TensorSpec]) -> int:
    """Elements of a model or an update on its way."""
    return sum(tensor.num_elements for tensor in shared_tensors(layout))


def element_type(layout: Sequence[TensorSpec]) -> str:
    """The dtype of a model or an update on its way: that of its first floats."""
    return next((tensor.dtype for tensor in layout if tensor.rule in (AGGREGATED, MEAN)), layout[0].dtype)


@dataclass(frozen=True)
class NodeSpec:
    """One node; its index is its position. `role` is dash-separated, e.g. ``train-eval``."""

    id: str
    role: str

    @property
    def role_parts(self) -> frozenset[str]:
        """What it does: ``train``, ``eval``, ``test`` and ``aggregate``, or some of them."""
        return parts_of(self.role)


def parts_of(role: str) -> frozenset[str]:
    """The parts of a dash-separated role."""
    return frozenset(role.split("-"))


def nodes_that(part: str, nodes: Sequence[NodeSpec]) -> tuple[int, ...]:
    """The indices of the nodes that do `part`, e.g. ``train``, ascending."""
    return tuple(i for i, node in enumerate(nodes) if part in node.role_parts)


@dataclass(frozen=True)
class Graph:
    """A directed graph in CSR form: node i may send to ``indices[indptr[i]:indptr[i+1]]`` (ascending).

    Attributes:
        weights: per edge, in the order of `indices`, what its receiver multiplies the sender's state with; empty where
            the configuration's mixing rule follows from the graph alone.
        self_weights: per node, what it multiplies its own state with; empty in the same case.
    """

    num_nodes: int
    indptr: tuple[int, ...]
    indices: tuple[int, ...]
    weights: tuple[float, ...] = ()
    self_weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rows:
    """What an aggregation rule moves and keeps, in rows; a row has as many elements as the model has parameters.

    Attributes:
        down: rows that go from the aggregator to every cluster, the model first.
        up: rows of a contribution, and so of a partial sum.
        scalars: numbers that follow the rows of a contribution.
        server: rows of the aggregator's committed state; its first `down` ones are sent.
        client: rows that every participant keeps from round to round.
        client_scalars: numbers that it keeps after them.
        every_update: contributions travel one by one, because the rule has to see each of them.
        nodes_keep: nodes are of a class of the user's own, and may have a state of their own.
        gathered: numbers per peer that go to the coordinator in a round that decides on the next graph, see
            :mod:`icrf.topology.adaptation`.
    """

    down: int = 1
    up: int = 1
    scalars: int = 0
    server: int = 1
    client: int = 0
    client_scalars: int = 0
    every_update: bool = False
    nodes_keep: bool = False
    gathered: int = 0

    @property
    def clients_keep(self) -> bool:
        """Whether participants keep anything from round to round."""
        return bool(self.client or self.client_scalars)

    @property
    def anybody_keeps(self) -> bool:
        """Whether anything but the server's state lasts from round to round, or may."""
        return self.clients_keep or self.nodes_keep

    def with_private(self, layout: Sequence[TensorSpec]) -> Rows:
        """The same where participants also keep the private tensors of a model."""
        private = sum(tensor.num_elements for tensor in layout if tensor.rule == PRIVATE)
        return replace(self, client_scalars=self.client_scalars + private)

    def num_summed(self, num_tensors: int) -> int:
        """Tensors with a grid of their own in a contribution: those of every row, and the numbers as one more."""
        return self.up * num_tensors + (self.scalars > 0)


@dataclass(frozen=True)
class Submission:
    """What the SDK submits: everything is resolved, so that the mediator runs no user code.

    Attributes:
        client_request_id: the same id submitted twice is one federation.
        config_json: the resolved configuration.
        flow: ``centralized`` (one aggregating node), ``decentralized`` (every node mixes with its neighbours) or
            ``hierarchical`` (groups with an aggregating node each; the first of these is the root).
        layout: the model's tensors in name order, which is the order of the flat buffer.
        keep: stay allocated after the configured rounds until ``finish``.
        stage: how far to go without being asked, one of :data:`STAGES`.
        code_path: folder of the user's own modules, put on the path of local hosts; empty for none.
        rows: what the aggregation rule moves and keeps.
        schedule: who takes part in rounds 1, 2, ... as bitmaps in hexadecimal, and from the start again; empty: the
            mediator draws the participants.
        profile: tell with each round where its time went; changes nothing else.
        communities: community per node by what its data look like, for placement, -1 for a node in none; empty where
            placement does not look at data.
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
    rows: Rows = field(default_factory=Rows)
    schedule: tuple[str, ...] = ()
    profile: bool = False
    communities: tuple[int, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one slot takes."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """What a cluster offers.

    Attributes:
        num_slots: how many hosts the agent allows at once.
        ray_nodes: what each of its Ray nodes has; empty: one has all of it.
        quota: how many slots one federation may hold at once, all of its runs together; 0: all of them.
    """

    num_slots: int
    num_cpus: float
    num_gpus: float
    memory_bytes: int
    ray_nodes: tuple[Resources, ...] = ()
    quota: int = 0

    @property
    def machines(self) -> tuple[Resources, ...]:
        """What each Ray node has, at least one."""
        return self.ray_nodes or (Resources(self.num_cpus, self.num_gpus),)

    @property
    def most_slots(self) -> int:
        """How many slots one federation gets at most."""
        return min(self.num_slots, self.quota) if self.quota else self.num_slots


@dataclass(frozen=True)
class Fingerprint:
    """What decides the bits of float arithmetic; ``strict`` determinism wants it equal on all clusters.

    Attributes:
        device: ``cpu``, or ``cuda:`` and the kinds of a cluster's GPUs with :data:`KINDS_APART` between them.
    """

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
class MixingReport:
    """What a mixing matrix W can do.

    Attributes:
        connected: every node reaches every other if directions are ignored.
        strongly_connected: every node's state reaches every other node.
        symmetric: W_ij = W_ji within 1e-9.
        row_stochastic: rows sum to 1 within 1e-9, with no weight below 0.
        column_stochastic: columns do.
        doubly_stochastic: both do.
        aperiodic: no group of nodes swaps its states in a cycle for ever.
        push_sum: columns sum to 1 and rows do not; a mass per node makes up for it.
        limit: what all nodes approach if nothing is trained: ``mean``, ``weighted mean``, or ``none``.
        slem: second-largest eigenvalue modulus.
        slem_kind: ``exact``, ``closed-form`` or ``estimate``.
        spectral_gap: 1 - slem.
        rounds_to_consensus: rounds until the disagreement falls below 1e-6 of itself; -1 if never.
        problem: why the nodes never agree, or may not be mixed like this, a sentence; empty if they do.
    """

    connected: bool
    strongly_connected: bool
    symmetric: bool
    row_stochastic: bool
    column_stochastic: bool
    doubly_stochastic: bool
    aperiodic: bool
    push_sum: bool
    limit: str
    slem: float
    slem_kind: str
    spectral_gap: float
    rounds_to_consensus: int
    problem: str = ""


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
        mixing: what the mixing matrix can do; None for a centralized flow.
        links: (from cluster, to cluster, payload bytes per round).
        groups: node id -> id of its aggregator; empty where there is one aggregator, or none.
        bytes_inter_cluster_within_groups: payload bytes of one round of a hierarchy within its groups.
        bytes_inter_cluster_per_merge: payload bytes of one that ends with one model for all groups.
        num_parameters: elements of a model on its way.
        residents: cluster name -> nodes that are expected to be active at once there; its hosts measure and decide.
        tensors: rule -> how many tensors of the model follow it.
        num_models: models that the server learns and sends to every client that takes part; 1 but for a clustered
            federation with one server.
        adaptation: the strategy by which the graph changes between rounds; empty where it stays as it is. What depends
            on the graph is said of the one that the run starts with.
        adaptation_period: rounds from one decision on the graph to the next; 0 where it stays as it is.
        bytes_inter_cluster_per_adaptation: payload bytes that such a decision adds.
        memory: cluster name -> peak memory that it needs, an estimate; `peak_memory_bytes` is the largest of these.
        lacking: cluster name -> what it lacks, in a sentence or more; those that are not named have what it takes.
        codec: the configuration's ``inter_cluster_codec``. All other bytes are those without it.
        bytes_coded_per_round: a bound on the payload bytes of a round under it, without evaluation and messages; how
            much less it will be depends on the values. 0 for ``none``.
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
    mixing: MixingReport | None = None
    tensors: dict[str, int] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    bytes_inter_cluster_within_groups: int = 0
    bytes_inter_cluster_per_merge: int = 0
    num_models: int = 1
    adaptation: str = ""
    adaptation_period: int = 0
    bytes_inter_cluster_per_adaptation: int = 0
    residents: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    codec: str = "none"
    bytes_coded_per_round: int = 0


@dataclass(frozen=True)
class LinkBytes:
    """Payload bytes of one round over one directed link between clusters.

    Attributes:
        seconds_per_round: how long they take at least, by what was measured; 0: the link was not.
    """

    source: str
    target: str
    bytes_per_round: int
    seconds_per_round: float = 0.0


@dataclass(frozen=True)
class MeasuredLink:
    """What was measured from one cluster to another, on the way that payloads take.

    Attributes:
        source, target: names of the clusters.
        bytes_per_s: bandwidth; > 0 unless measuring failed.
        rtt_s: time from sending the smallest payload to hearing that it was processed, >= 0.
        relayed: whether payloads go through the mediator; else from gateway to gateway.
        measured_at: wall time, in seconds since 1970.
        error_json: why there is no figure; empty where there is.
    """

    source: str
    target: str
    bytes_per_s: float
    rtt_s: float
    relayed: bool = False
    measured_at: float = 0.0
    error_json: str = ""
