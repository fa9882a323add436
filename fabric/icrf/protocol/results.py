"""What the mediator tells the SDK about runs and rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from icrf.protocol.participants import nodes_of
from icrf.protocol.profiles import RoundProfile


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
        model_sha256: hash of the global model, or of all where there are several; decentralized: the Merkle root over
            the node states.
        node_metrics: node id -> name -> value of what each node reported: in evaluated rounds of federations of up to
            256 nodes; `metrics` has the averages, weighted by samples, of all of them.
        consensus_sha256: hash of the consensus model where one was made.
        participants_bitmap: which nodes contributed, in hexadecimal: bit i % 8 of byte i // 8 is node i.
        bytes_saved: bytes of data that `inter_cluster_codec` has kept out of `bytes_inter_cluster`.
        edges_added, edges_removed: directed edges that the rounds to come have more than this one, and less.
        staleness: node id -> how many rounds ago the round was whose update it contributed; only nodes that were late.
        profile: where the time went, if the run was submitted so.
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
    participants_bitmap: str = ""
    node_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    staleness: dict[str, int] = field(default_factory=dict)
    edges_added: int = 0
    edges_removed: int = 0
    bytes_saved: int = 0
    profile: RoundProfile | None = None

    @property
    def participant_nodes(self) -> tuple[int, ...]:
        """Indices of the nodes that contributed, ascending."""
        return nodes_of(bytes.fromhex(self.participants_bitmap))


@dataclass(frozen=True)
class RunEvent:
    """One item of a run's event stream; `seq` counts from 1 without gaps within a run."""

    run_id: str
    seq: int
    at: float
    kind: str  # "status", "waiting", "round", "move", "warning", "end"
    text: str = ""
    status: str = ""
    round: RoundResult | None = None
