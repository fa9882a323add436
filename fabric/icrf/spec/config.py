"""One federation as its author describes it: every key of a configuration, typed, documented and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from icrf.errors import ConfigError, ConfigErrors
from icrf.spec.checks import find_contradictions
from icrf.spec.choices import CLUSTERED, TRADITIONAL
from icrf.spec.complaints import problems_of
from icrf.spec.documents import dump_yaml
from icrf.spec.fields import (
    DEFAULT_ROUND_DEADLINE_S,
    UNION_TAGS,
    ClientRole,
    Count,
    CountOrZero,
    Deadline,
    FederationId,
    Names,
    NeedsByNode,
    Nodes,
    Placement,
    Share,
    SlotShare,
    Template,
    Text,
    Width,
)
from icrf.spec.layers import Layers, canonical_key, read_layers, resolve_paths
from icrf.spec.problems import Places, Problem, describe

# Stand-ins for required keys that are wrong, so that the other keys can still be checked against each other.
_STAND_INS = {
    "federation_id": "x",
    "federated_learning_schema": TRADITIONAL,
    "federated_learning_topology": "star",
}


def _one_name_per_schema(value: Any) -> Any:
    return TRADITIONAL if value == "StarFederatedLearning" else value


class FederationConfig(BaseModel):
    """A federation. Frozen, complete and valid; build it with :meth:`from_yaml` or :meth:`from_mapping`.

    Every way of building it raises :class:`icrf.errors.ConfigErrors` with all that is wrong at once (C0xx), each with
    its place. ``schema`` is accepted for ``federated_learning_schema``. Settings of an alternative that was not chosen
    (``k_value`` with a ring, ``dirichlet_beta`` with iid data) are kept and not used, but those of another aggregation
    rule (``mu`` with FedAvg) are refused.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    # ---- what is federated
    federation_id: FederationId
    """Name of the federation; it names actors and folders. Runs of it have ids of their own."""
    federated_learning_schema: Annotated[Text, BeforeValidator(_one_name_per_schema)]
    """Who aggregates: ``TraditionalFederatedLearning`` (one server; ``StarFederatedLearning`` is the same),
    ``ClusterFederatedLearning`` (one server with several models, of which every client trains the one that suits its
    data best; with topology ``hierarchy``, communities by data), ``HierarchicalFederatedLearning`` (a server per group,
    see hierarchy.md) or ``DecentralizedFederatedLearning`` (every node mixes with its neighbours)."""
    federated_learning_topology: Text
    """The graph: ``star`` with a server, ``hierarchy`` with a server per group; for peers any other, see
    topologies.md."""
    k_value: Nodes | None = None
    """Neighbours per node of ``k_connected``, ``random_regular`` and ``small_world``."""
    adjacency_matrix_file_name: Text | None = None
    """CSV file of the matrix for ``custom``, relative to the configuration's folder."""
    directed: bool = False
    """Edges have one direction: ``ring``, ``erdos_renyi``, ``custom`` and topologies of your own. Needs ``mixing``
    ``push_sum`` or a matrix or rule of your own."""
    torus_rows: Nodes | None = None
    """Rows of ``torus``; null: as square as possible."""
    branching_factor: Nodes = 2
    """Children per node of ``tree``."""
    rewire_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of edges that ``small_world`` moves to a random node."""
    edge_probability: Share | None = None
    """Probability of each edge of ``erdos_renyi``; null: 2 ln(n) / n."""
    allow_no_consensus: bool = False
    """Accept a graph or a mixing matrix with which the nodes can never agree."""

    # ---- nodes and rounds
    number_of_clients: Nodes = 10
    """Nodes that train, the server not counted."""
    client_fraction: Share = 1.0
    """Share of the clients that takes part in a round, in (0, 1]; at least one client does."""
    sampled_clients: Nodes | None = None
    """How many clients take part in a round, instead of a share; null: as ``client_fraction`` says."""
    client_sampler: Text = "uniform"
    """Who is chosen: ``uniform`` draws, anew for every round; or a registered name or ``module:attr`` of a function."""
    activation: Text = "all"
    """Which clients are active, so that they may be chosen: ``all``; ``waves``, the first ``wave_size`` of them and as
    many more with every wave; or those that a criterion names, a registered name or ``module:attr`` of a function (see
    participation.md)."""
    wave_size: Nodes | None = None
    """Clients of a wave, in node order."""
    wave_period: Count = 1
    """Rounds from one wave to the next, or at the least where there is a ``wave_condition``."""
    wave_condition: Text | None = None
    """What a committed round must have measured for the next wave to come, e.g. ``accuracy >= 0.6``; null: nothing."""
    min_nodes: Nodes | None = None
    """Fewest participants that make a round valid when others are late or lost; null: all of them. Star only."""
    number_of_groups: Nodes = 2
    """Groups of a hierarchy, each with a server of its own."""
    group_by: Text = "contiguous"
    """Who forms a group: ``contiguous`` numbers, ``labels`` (communities of clients with similar labels), or a
    registered name or ``module:attr`` of a function."""
    global_every: Count = 2
    """Rounds of a hierarchy from one model for all groups to the next; those between stay within the groups."""
    client_role: ClientRole = "train-eval-test"
    """What clients do: a dash-separated subset of ``train``, ``eval``, ``test``, ``aggregate``."""
    client_template: Template | None = None
    """``module:attr`` of a ``FederatedNode`` subclass for the clients; null: the built-in one."""
    server_template: Template | None = None
    """``module:attr`` of a ``FederatedNode`` subclass for the server; null: the built-in one."""
    federated_learning_rounds: Count = 10
    """Rounds to run."""
    number_of_epochs: CountOrZero = 1
    """Passes over the local data per round; 0 trains nothing (pure gossip)."""
    local_steps: Count | None = None
    """Optimizer steps per round, in place of ``number_of_epochs``; null: as many as the epochs have batches."""
    batch_size: Count = 16
    """Samples per optimizer step."""
    target_accuracy: Share | None = None
    """Stop after the evaluated round in which test accuracy first reaches this share, in (0, 1]."""

    # ---- model and data
    model_type: Text = "mlp"
    """A built-in model or ``module:attr`` of a function that builds one."""
    dataset_type: Text = "digits"
    """A built-in dataset or ``module:attr`` of a function that loads one."""
    metrics: Names = Field(default_factory=list)
    """What an evaluation measures besides ``accuracy`` and ``loss`` (see docs/models.md)."""
    data_dir: Text | None = None
    """Folder of data files for datasets that need one (``mnist``, ``fmnist``, ``cifar10``) or file of a table,
    relative to the configuration's folder."""
    target_column: Text | None = None
    """Tables: the column with the class."""
    categorical_columns: Names = Field(default_factory=list)
    """Tables: columns that are categories even where they look like numbers."""
    ignored_columns: Names = Field(default_factory=list)
    """Tables: columns that are left out."""
    group_column: Text | None = None
    """Tables: the column with a sample's natural id, for ``natural``; it is no feature."""
    data_distribution_kind: Text = "iid"
    """How samples are dealt to the nodes: ``iid``, ``dir``, ``20``, ``50``, ``90``, ``shards``, ``pathological``,
    ``quantity``, ``natural`` (see docs/data.md), a registered name or ``module:attr``."""
    dirichlet_beta: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    """Concentration of ``dir`` and ``quantity``; the smaller, the more the nodes' labels or sizes differ."""
    classes_per_node: Annotated[int, Field(ge=1, le=100_000)] = 2
    """Classes that a node holds with ``pathological``."""
    shards_per_node: Annotated[int, Field(ge=1, le=100_000)] = 2
    """Shards that a node gets with ``shards``."""
    shuffle: bool = True
    """Shuffle each node's data in every epoch."""

    # ---- local training
    optimizer: Text = "SGD"
    """A class of ``torch.optim``."""
    learning_rate: Annotated[float, Field(ge=0, le=1e6)] = 0.05
    """Step size of the optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of ``SGD`` and ``RMSprop``, in [0, 1)."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """L2 penalty (decoupled in ``AdamW``)."""
    keep_optimizer_state: bool = False
    """Peers keep their optimizer's state (momentum, moments) from round to round; false: it starts afresh in every
    round. ``SGD``, ``Adam`` and ``AdamW``."""
    vectorize: Width = "off"
    """How many nodes of a host train together, in one ``torch.func.vmap``: ``off`` (one after the other), a width, or
    ``auto``: decided from the specification before the run, and written down as a number or ``off``. Results differ
    from those of another width, or of ``off``, in their last bits; see models.md."""

    # ---- aggregation
    aggregation_strategy: Text = "FedAvg"
    """How a server combines updates: a built-in rule, a registered name or ``module:attr`` of an ``Aggregator``. Peers,
    who have no server, mix as ``mixing`` says."""
    mu: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Weight of the proximal term of ``FedProx``."""
    server_learning_rate: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Step size of the server; null: 1 for ``FedAvgM``, ``SCAFFOLD`` and ``FedNova``, 0.7 for ``DiLoCo``, 0.1 for
    ``FedAdagrad``, ``FedAdam`` and ``FedYogi``."""
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the server in ``FedAvgM`` and ``DiLoCo``, in [0, 1)."""
    server_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment in ``FedAdam`` and ``FedYogi``, in [0, 1)."""
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment in ``FedAdam`` and ``FedYogi``, in [0, 1)."""
    tau: Annotated[float, Field(gt=0, le=1e6)] = 1e-3
    """Adaptivity of ``FedAdagrad``, ``FedAdam`` and ``FedYogi``: what is added to the root of the second moment."""
    num_byzantine: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Participants f that may send anything; ``TrimmedMean``, ``Krum`` and ``MultiKrum`` need it."""
    num_selected: Count | None = None
    """Updates that ``MultiKrum`` averages; null: as many as it may, participants - f - 2."""
    clip_norm: Annotated[float, Field(gt=0, le=1e12)] | None = None
    """Scale every node's change of the model down to this L2 norm before it is sent to a server; null: never, as among
    peers."""
    number_of_models: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Models of ``ClusterFederatedLearning``, one for each group of clients with similar data."""
    first_choice: Text = "drawn"
    """Which of them a client trains in the first round: ``drawn`` by chance, evenly; or the one of lowest ``loss``,
    as in all later rounds."""
    aggregation_sample_scaling: bool = True
    """Weight updates by the nodes' sample counts; false: every node counts the same."""
    private_keys: Names = Field(default_factory=list)
    """Patterns (``bn*``) of the names of tensors that stay with their node and are never averaged (FedBN)."""
    mixing: Text = "metropolis_hastings"
    """How the mixing matrix of a decentralized round follows from the adjacency matrix, see topologies.md."""
    mixing_matrix_file_name: Text | None = None
    """CSV file of the weights for ``mixing: custom``, relative to the configuration's folder."""

    # ---- where it runs
    assignment_strategy: Text = "locality"
    """How nodes are spread over clusters, in shares that follow their slots: ``locality`` cuts as few edges as it can,
    ``metis`` and ``louvain`` divide the graph in one way alone, ``capacity`` keeps the order of the nodes,
    ``round_robin`` deals them out, ``random`` draws by the seed. See docs/assignment.md."""
    placement: Placement = Field(default_factory=dict)
    """Nodes that must be somewhere: node id -> cluster name, or node id -> {label: value} that its cluster carries. A
    pattern such as ``client_*`` stands for all nodes that match and have no entry of their own."""
    node_resources: NeedsByNode = Field(default_factory=dict)
    """What nodes need of their slot: node id or pattern -> ``{num_cpus, num_gpus, memory_mb}``. They are placed only on
    clusters whose slots have it; what a slot has follows from ``resources``. See docs/assignment.md."""
    placement_group_strategy: Text = "PACK"
    """How Ray spreads a cluster's slots over its machines: ``PACK``, ``SPREAD``, ``STRICT_PACK``, ``STRICT_SPREAD``."""
    resources: SlotShare = "uniform"
    """What one slot takes: ``uniform`` (an equal share), or ``{num_cpus, num_gpus}``."""
    max_slots_per_cluster: Count | None = None
    """Most slots that the federation takes on one cluster, which leaves the rest to others; null: as many as the
    cluster's agent lets one federation have, but no more than it has nodes there."""
    queue_deadline_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    """Seconds that a run may wait for room, in line or because another program holds what it needs, before it fails
    with who has it; null: as long as it takes."""
    resident_nodes: Nodes | None = None
    """Most nodes of one host that are active at once, the least recently used making room first; what is kept of the
    others lies on the host's disk. null: as many as ``resident_memory_mb`` allows."""
    resident_memory_mb: Count | None = None
    """Megabytes that the active nodes of one host may take, measured while they are set up; null: an equal share of
    half the memory that is free on the machine then."""
    topology_adaptation_strategy: Text = "static"
    """How the graph of peers changes between rounds: ``static``, ``cosine_similarity``, ``random_rewire``,
    ``prune_unavailable``, ``densify``, ``sparsify``, a registered name or ``module:attr`` (see docs/topologies.md)."""
    adaptation_period: Count = 1
    """Rounds from one change of the graph to the next, where it is not ``static``."""
    adaptation_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the edges that ``random_rewire`` moves, ``densify`` adds or ``sparsify`` removes each time."""
    clustering_period: CountOrZero = 0
    """Re-plan the assignment every so many rounds, and move nodes where less crosses then, or where clusters have come
    or gone; 0: never (see docs/assignment.md)."""
    do_cluster: bool = False
    """Place nodes by the similarity of their label distributions: communities come first, cut edges second."""
    label_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Scale of the Laplace noise on each count of the histograms that ``do_cluster`` compares; drawn by the seed."""

    # ---- policy of a round
    round_deadline_s: Deadline = DEFAULT_ROUND_DEADLINE_S
    """Seconds that one attempt of a round may take; null means the default."""
    on_cluster_loss: Text = "wait"
    """What happens to a run whose cluster is lost: ``wait`` for its return (up to ``round_deadline_s``, then without
    it where ``min_nodes`` allows), ``reassign`` its nodes to other clusters, ``exclude``: go on at once without its
    nodes, or ``fail``."""
    late_updates: Text = "drop"
    """What becomes of the updates of a cluster that missed a round's deadline: ``drop``, or ``weigh``: its nodes bring
    them to a later round, with a weight that falls with every round of delay. Star with ``min_nodes``, FedAvg and
    FedProx."""
    staleness_exponent: Annotated[float, Field(ge=0, le=16)] = 0.5
    """With ``late_updates: weigh``: an update that is s rounds late weighs ``(1 + s)^-staleness_exponent`` of what it
    would weigh in time; 0: as much."""
    max_staleness: Count = 4
    """With ``late_updates: weigh``: how many rounds late an update may be; after that it is dropped."""
    inter_cluster_codec: Text = "none"
    """How payloads between clusters are made smaller: ``none``; ``zstd``, packed without loss; ``bf16``, packed after
    models and their changes were rounded to bfloat16; ``top_k``, packed after every node has kept all but the largest
    entries of its change for later (error feedback). The last two change what is learned, and that equally on any
    number of clusters (see codecs.md)."""
    top_k_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With ``inter_cluster_codec: top_k``: the share of a change's entries that a node sends."""
    evaluate_every: Count = 1
    """Rounds between evaluations; a consensus model is made only then and at the end."""
    evaluate_clients: bool = False
    """Evaluated rounds also measure clients: role ``eval`` on their own data, role ``test`` on what is held out."""
    checkpoint_every: CountOrZero = 10
    """Rounds between durable checkpoints: a run whose state was lost goes back to the newest one; 0: to its start."""
    store_node_models: bool = False
    """Decentralized: also keep every node's own model in the results."""

    # ---- reproducibility
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """One integer that decides all randomness of the run."""
    device: Text = "cpu"
    """Where models and data lie while nodes compute: ``cpu``, or ``cuda``, a part of a GPU per host (see gpu.md)."""
    determinism: Text = "strict"
    """``strict`` refuses clusters of different numeric fingerprint, ``recorded`` writes the difference down."""

    @property
    def num_models(self) -> int:
        """How many models the federation learns: one, but for a clustered one."""
        clustered = self.federated_learning_schema == CLUSTERED
        return self.number_of_models if clustered and self.number_of_models else 1

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a file, with ``ICRF_<KEY>`` variables of the environment over it."""
        return cls.from_layers(read_layers(path, cls.model_fields))

    @classmethod
    def from_layers(cls, layers: Layers) -> Self:
        """Build from values whose origins are known; errors of reading and of checking come together."""
        try:
            config = cls.model_validate(layers.values, context=layers.places)
        except ConfigErrors as invalid:
            raise ConfigErrors([*layers.errors, *invalid.errors]) from invalid
        if layers.errors:
            raise ConfigErrors(layers.errors)
        return config

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], source: str = "configuration", base_dir: str | Path = ".") -> Self:
        """Build from plain values.

        Args:
            data: keys and values as they would stand in a file.
            source: what errors call this mapping.
            base_dir: folder that relative paths in it start from.
        """
        problems = [p for p in (_duplicate_alias(data),) if p]
        if problems:
            raise Places(source).errors(problems)
        values = {canonical_key(key): value for key, value in data.items()}
        return cls.model_validate(resolve_paths(values, Path(base_dir)), context=Places(source))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "configuration") -> Self:
        """The inverse of :meth:`to_json`; paths are taken as they stand."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigErrors([ConfigError("C001", f"not readable as JSON: {error}", place=source)]) from error
        if not isinstance(data, dict):
            raise Places(source).errors([not_a_mapping(data)])
        return cls.model_validate(data, context=Places(source))

    def to_json(self) -> str:
        """All keys, resolved, as canonical JSON: equal configurations give equal text."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_yaml(self) -> str:
        """All keys, resolved, as YAML in the order of their definition."""
        return dump_yaml(self.model_dump())

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors_at_once(cls, data: Any, build: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(data, Mapping):
            return build(data)
        places = info.context if isinstance(info.context, Places) else Places("")
        values = {canonical_key(key): value for key, value in data.items() if key not in places.unreadable}
        problems: list[Problem] = []
        try:
            config = build(values)
        except ValidationError as error:
            problems = problems_of(error, cls, UNION_TAGS)
            wrong = {problem.path[0] for problem in problems} | places.unreadable
            problems = [p for p in problems if p.path[0] not in places.unreadable]
            rest = {key: value for key, value in values.items() if key not in wrong}
            config = build({**rest, **{key: _STAND_INS[key] for key in wrong & _STAND_INS.keys()}})
        else:
            wrong = set(places.unreadable)
        sound = {key: getattr(config, key) for key in cls.model_fields if key not in wrong}
        problems += find_contradictions(sound)
        if problems:
            raise places.errors(problems)
        return config


def _duplicate_alias(data: Mapping[str, Any]) -> Problem | None:
    keys = [key for key in data if canonical_key(key) == "federated_learning_schema"]
    if len(keys) < 2:
        return None
    return Problem("C004", (keys[1],), f"duplicate key: '{keys[1]}' is the same as '{keys[0]}'")


def not_a_mapping(value: object) -> Problem:
    """The complaint about a configuration that is no mapping at all."""
    return Problem("C006", (), f"expected keys and values, got {describe(value)}", allowed="key: value")
