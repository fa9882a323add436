"""What the mediator tells an agent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from icrf.protocol.federations import Graph, NodeSpec, Resources, Rows, TensorSpec


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
    """Create (or keep) hosts and set up this cluster's nodes; answered by :class:`Activated`.

    Attributes:
        restore_round: start from the committed state of this round; 0 is the initial state.
        checkpoints: artifacts of the clusters that its nodes lived on then, with what they kept; none where they keep
            nothing. What else is in them is left aside.
        initial_graph: the graph that the federation was submitted with, where it has changed since.
    """

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
    peers: tuple[PeerAddress, ...]
    num_slots: int
    code_path: str = ""
    restore_round: int = 0
    checkpoints: tuple[str, ...] = ()
    rows: Rows = field(default_factory=Rows)
    initial_graph: Graph | None = None


@dataclass(frozen=True)
class LateUpdates:
    """Nodes that contribute their update of an earlier round, in which their clusters were late.

    Attributes:
        round: the round that they train in this one's stead: from its model, with its random numbers.
        nodes: bitmap of these nodes; all of a cluster's participants or none.
        factor: what they weigh, in 1/1024, see :mod:`icrf.staleness`.
    """

    round: int
    nodes: bytes
    factor: int


@dataclass(frozen=True)
class NextRound:
    """What the first attempt of the next round asks for, where that may differ from this round; see StartRound."""

    total_weight: int
    evaluate: bool
    participants: bytes = b""


@dataclass(frozen=True)
class StartRound:
    """Run one attempt of a round from the committed state `parent_hash`; answered by :class:`RoundReport`.

    Attributes:
        grid: exponent e per summed tensor, bound 2^e on the total of n*|w| (see ``update.py``).
        total_weight: sum of the participants' weights, sample counts or ones, over all clusters.
        evaluate: evaluate the global (or consensus) model after this round.
        participants: bitmap of the nodes that train in this round; empty: all that have the role.
        merge: hierarchical: the round ends with one model for all groups.
        late: those of them that bring an update of an earlier round, one item per round, ascending.
        kept: rounds whose updates clusters that do not take part still owe after this round, ascending; the aggregator
            keeps the models that they started from.
        adapt: decide on the graph of the rounds to come, after this one.
        profile: report where the time went.
        ahead: what comes after this round unless something comes in between. Whoever makes the global model may begin
            with it once that is made; the report waits until the same is asked for, and where something else is asked
            for, all of it is dropped.
    """

    run_id: str
    generation: int
    round: int
    attempt: int
    parent_hash: str
    grid: tuple[int, ...]
    total_weight: int
    evaluate: bool
    participants: bytes = b""
    merge: bool = False
    late: tuple[LateUpdates, ...] = ()
    kept: tuple[int, ...] = ()
    adapt: bool = False
    profile: bool = False
    ahead: NextRound | None = None

    def expected(self, parent_hash: str = "", grid: tuple[int, ...] = ()) -> StartRound | None:
        """What will be asked for next if this attempt is committed, from the state that it makes; None: not known."""
        if self.ahead is None:
            return None
        return replace(
            self,
            round=self.round + 1,
            attempt=1,
            parent_hash=parent_hash,
            grid=grid,
            total_weight=self.ahead.total_weight,
            evaluate=self.ahead.evaluate,
            participants=self.ahead.participants,
            ahead=None,
        )


@dataclass(frozen=True)
class Relink:
    """From the next round on nodes are linked like this; answered by :class:`Relinked`.

    Nodes and their states stay as they are; what belongs to an earlier `generation` is refused from now on.
    """

    run_id: str
    generation: int
    graph: Graph

    def applied_to(self, activation: Activate) -> Activate:
        """The activation in force from now on."""
        initial = activation.initial_graph or activation.graph
        return replace(activation, generation=self.generation, graph=self.graph, initial_graph=initial)


@dataclass(frozen=True)
class AbortAttempt:
    """Drop what belongs to this attempt; no answer."""

    run_id: str
    round: int
    attempt: int


@dataclass(frozen=True)
class SaveCheckpoint:
    """Upload this cluster's part of the committed state of `round`; answered by :class:`Checkpointed`."""

    run_id: str
    generation: int
    round: int


@dataclass(frozen=True)
class Dismiss:
    """Nothing is lost if a draining agent ends now."""

    incarnation: str


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
class MeasureLink:
    """Measure the way that payloads take to another cluster; answered by :class:`LinkMeasured`."""

    measurement: str
    peer: PeerAddress


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
    Reserve
    | Activate
    | StartRound
    | Relink
    | AbortAttempt
    | SaveCheckpoint
    | StoreModel
    | CallNode
    | SendMessage
    | MeasureLink
    | Release
    | Lease
    | Dismiss
    | Reject
)
