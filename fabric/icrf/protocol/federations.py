"""What a federation is, what a cluster offers, and the plan that brings them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

PROTOCOL_VERSION = 1

# How far a submitted federation goes by itself, and what `advance` asks for.
STAGES = ("reserve", "activate", "run")

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

CENTRALIZED, DECENTRALIZED = "centralized", "decentralized"


# How the tensors of several nodes become one: the weighted mean; the mean rounded to the nearest integer; not at all.
MEAN, ROUNDED, PRIVATE = "mean", "rounded", "private"
# Elements of the flat buffer that an integer takes, see ``learning/layout.py``.
LIMBS = 2


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model. `dtype` is a NumPy name such as ``float32``, `rule` one of the three above."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str = MEAN

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers or booleans."""
        return "int" in self.dtype or self.dtype == "bool"

    @property
    def num_elements(self) -> int:
        """Elements of the flat buffer that it takes."""
        return math.prod(self.shape) * (LIMBS if self.is_integer and self.rule != MEAN else 1)


def shared_tensors(layout: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The tensors that nodes send and average, in name order."""
    return tuple(tensor for tensor in layout if tensor.rule != PRIVATE)


def shared_size(layout: Sequence[TensorSpec]) -> int:
    """Elements of a model or an update on its way."""
    return sum(tensor.num_elements for tensor in shared_tensors(layout))


def element_type(layout: Sequence[TensorSpec]) -> str:
    """The dtype of a model or an update on its way: that of its first floats."""
    return next((tensor.dtype for tensor in layout if tensor.rule == MEAN), layout[0].dtype)


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
        num_parameters: elements of a model on its way.
        tensors: rule -> how many tensors of the model follow it.
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
    tensors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkBytes:
    """Payload bytes of one round over one directed link between clusters."""

    source: str
    target: str
    bytes_per_round: int
