"""From a configuration to a :class:`icrf.protocol.Submission`: everything is resolved on the user's machine.

The mediator runs no user code, so nodes, graph, flow and the model's layout are settled here. What cannot work, such as
a model that does not take the data, is refused here too, before anything was started anywhere.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from icrf.codecs import TOP_K
from icrf.criterion import active_by_round
from icrf.errors import ConfigError, TopologyError
from icrf.participation import UNIFORM, schedule, waves_of
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    HIERARCHICAL,
    STAGES,
    Graph,
    NodeSpec,
    Rows,
    Submission,
    TensorSpec,
    nodes_of,
    nodes_that,
    sample_size,
    shared_size,
)
from icrf.seeds import model_seed
from icrf.spec import FederationConfig
from icrf.spec.choices import WITH_SERVER, in_groups
from icrf.spec.participation_checks import fewest_participants
from icrf.topology import (
    STATIC,
    Adapter,
    Hierarchy,
    HybridAdjacencyMatrix,
    build_topology,
    group_clients,
    hierarchy_of_groups,
    label_communities,
    mixing_matrix,
    require_connected,
    require_consensus,
    wants_labels,
    wants_samples,
    weigh,
)
from icrf.waves import ALL, WAVES

SERVER_ID = "server"
SERVER_ROLE = "aggregate-test"
ROLE_PARTS = frozenset({"train", "eval", "test", "aggregate"})


def build_submission(
    config: FederationConfig,
    *,
    nodes: Sequence[NodeSpec] | None = None,
    adjacency: HybridAdjacencyMatrix | np.ndarray[Any, Any] | None = None,
    keep: bool = False,
    stage: str = "run",
    code_path: str = "",
    client_request_id: str | None = None,
    profile: bool = False,
) -> Submission:
    """Resolve a configuration.

    Args:
        nodes: the nodes in index order; by default those of :func:`default_nodes`.
        adjacency: the graph as a matrix over `nodes`; by default the configuration's topology.
        keep: stay allocated after the configured rounds.
        stage: how far to go without being asked, one of :data:`icrf.protocol.STAGES`.
        code_path: folder of the user's own modules; on the path while ``module:attr`` names are loaded.
        client_request_id: makes a repeated submission the same run; a fresh one by default.
        profile: have every round tell where its time went, see :mod:`icrf.profiling`; changes nothing else.

    Raises:
        ConfigError: C008 for roles that the flow cannot use, C010 or C017 for names that cannot be loaded, C018 if the
            model does not take the data, or for a sampler's answer that cannot be used.
        TopologyError: T0xx for a graph that cannot be used.
        WeightsError: W011 for a model with tensors that have no aggregation rule.
    """
    if stage not in STAGES:
        raise ConfigError("C010", f"no such stage: {stage!r}", place="stage", allowed=", ".join(STAGES))
    flow = flow_of(config)
    chosen = tuple(nodes) if nodes is not None else default_nodes(config, flow)
    check_roles(chosen, flow)
    with on_path(code_path):
        layout = resolve_layout(config, len(nodes_that("train", chosen)))
        graph = _weighted(config, chosen, _graph(config, chosen, adjacency), flow)
        rows = resolve_rows(config, chosen, layout, turns := _schedule(config, chosen))
        config = resolve_vectorize(config, chosen, layout, turns)
        communities = _communities(config, chosen) if config.do_cluster else ()
    return Submission(
        client_request_id=client_request_id or uuid.uuid4().hex,
        config_json=config.to_json(),
        flow=flow,
        nodes=chosen,
        graph=graph,
        layout=layout,
        keep=keep,
        stage=stage,
        code_path=code_path,
        rows=rows,
        schedule=turns,
        profile=profile,
        communities=communities,
    )


def flow_of(config: FederationConfig) -> str:
    """``hierarchical`` where one node of each group aggregates, ``centralized`` for the other schemas with a server,
    ``decentralized`` for all others."""
    schema = config.federated_learning_schema
    if in_groups(schema, config.federated_learning_topology):
        return HIERARCHICAL
    return CENTRALIZED if schema in WITH_SERVER else DECENTRALIZED


def default_nodes(config: FederationConfig, flow: str) -> tuple[NodeSpec, ...]:
    """The server at index 0 if centralized, then ``client_0``, ``client_1``, ...; in a hierarchy ``server_0``, the
    clients, and then the servers of the other groups, so that clients are the same nodes as in a star."""
    clients = tuple(NodeSpec(f"client_{i}", config.client_role) for i in range(config.number_of_clients))
    if flow == HIERARCHICAL:
        first, *others = (NodeSpec(f"{SERVER_ID}_{k}", SERVER_ROLE) for k in range(config.number_of_groups))
        return (first, *clients, *others)
    return (NodeSpec(SERVER_ID, SERVER_ROLE), *clients) if flow == CENTRALIZED else clients


def check_roles(nodes: Sequence[NodeSpec], flow: str) -> None:
    """Raise C008 unless ids are unique, roles are made of known parts and fit the flow."""
    seen: set[str] = set()
    for index, node in enumerate(nodes):
        place = f"nodes[{index}]"
        if not node.id or node.id in seen:
            raise ConfigError("C008", f"node id {node.id!r} is {'used twice' if node.id else 'empty'}", place=place)
        seen.add(node.id)
        unknown = [part for part in node.role.split("-") if part not in ROLE_PARTS]
        if unknown:
            raise ConfigError(
                "C010",
                f"node {node.id}: no such role: {unknown[0]!r}",
                place=f"{place}.role",
                value=node.role,
                allowed="dash-separated parts of " + ", ".join(sorted(ROLE_PARTS)),
            )
    aggregating = [nodes[i].id for i in nodes_that("aggregate", nodes)]
    if flow == CENTRALIZED and len(aggregating) != 1:
        raise ConfigError(
            "C008",
            f"a centralized federation needs exactly one node with the role aggregate, not {len(aggregating)}",
            place="nodes",
            value=", ".join(aggregating[:5]) or None,
        )
    if not nodes_that("train", nodes):
        raise ConfigError(
            "C008", "no node trains", place="nodes", hint="give at least one node a role such as train-eval"
        )


def check_configuration(config: FederationConfig, *, code_path: str = "") -> None:
    """Refuse a configuration whose roles, topology, model or data cannot work, as a submission would.

    Raises:
        ConfigError, TopologyError: see :func:`build_submission`.
    """
    flow = flow_of(config)
    nodes = default_nodes(config, flow)
    check_roles(nodes, flow)
    with on_path(code_path):
        matrix = _graph(config, nodes, None)
        layout = resolve_layout(config, len(nodes_that("train", nodes)))
        _weighted(config, nodes, matrix, flow)
        resolve_rows(config, nodes, layout, turns := _schedule(config, nodes))
        resolve_vectorize(config, nodes, layout, turns)


def _graph(
    config: FederationConfig, nodes: Sequence[NodeSpec], adjacency: HybridAdjacencyMatrix | np.ndarray[Any, Any] | None
) -> HybridAdjacencyMatrix:
    together = not config.allow_no_consensus
    parameters: Mapping[str, Any] = {**config.model_dump(), "node_ids": tuple(n.id for n in nodes)}
    if adjacency is None and flow_of(config) == HIERARCHICAL:
        matrix = hierarchy_of_groups(_groups(config, nodes, parameters))
    elif adjacency is None:
        matrix = build_topology(config.federated_learning_topology, len(nodes), parameters, connected=together)
    elif isinstance(adjacency, HybridAdjacencyMatrix):
        matrix = adjacency
    else:
        matrix = HybridAdjacencyMatrix.from_dense(np.asarray(adjacency))
    if matrix.num_nodes != len(nodes):
        raise TopologyError(
            "T010", f"matrix {matrix.num_nodes}×{matrix.num_nodes} for {len(nodes)} nodes", place="adjacency"
        )
    if together:
        require_connected(matrix, place="adjacency")
    return matrix


def _groups(config: FederationConfig, nodes: Sequence[NodeSpec], parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """The group of each client, from the configuration and, where the grouping looks at it, the data."""
    clients = [nodes[i].id for i in nodes_that("train", nodes)]
    more: dict[str, Any] = {"client_ids": tuple(clients)}
    if wants_labels(config.group_by):
        more["label_counts"] = _label_counts(config, len(clients))
    return group_clients(config.group_by, len(clients), config.number_of_groups, {**parameters, **more})


def _communities(config: FederationConfig, nodes: Sequence[NodeSpec]) -> tuple[int, ...]:
    """The community of each node by its labels; -1 for one that does not train."""
    trains = [i for i, node in enumerate(nodes) if "train" in node.role.split("-")]
    found = [-1] * len(nodes)
    counts = _label_counts(config, len(trains))
    for node, community in zip(trains, label_communities(counts, config.seed, config.label_noise), strict=True):
        found[node] = community
    return tuple(found)


def _label_counts(config: FederationConfig, num_parts: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Training samples per node that trains and label."""
    labels, parts = _dealt(config, num_parts)
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def _weighted(config: FederationConfig, nodes: Sequence[NodeSpec], matrix: HybridAdjacencyMatrix, flow: str) -> Graph:
    """The graph with what its nodes mix by; T012 where they could never agree."""
    if flow == HIERARCHICAL:
        Hierarchy.of(matrix, [node.role for node in nodes], [node.id for node in nodes])
    if flow != DECENTRALIZED:
        return matrix.to_graph()
    parameters = {**config.model_dump(), "node_ids": tuple(n.id for n in nodes)}
    if wants_samples(config.mixing):
        parameters["num_samples"] = _sample_counts(config, nodes)
    graph = weigh(matrix, config.mixing, parameters)
    place = config.mixing_matrix_file_name if config.mixing == "custom" else f"mixing {config.mixing!r}"
    weights = mixing_matrix(graph, config.mixing)
    require_consensus(weights, allow_no_consensus=config.allow_no_consensus, place=place or "mixing")
    return graph


def _sample_counts(config: FederationConfig, nodes: Sequence[NodeSpec]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Training samples per node, as the hosts deal them; 0 for a node that does not train."""
    trains = nodes_that("train", nodes)
    _, parts = _dealt(config, len(trains))
    counts = np.zeros(len(nodes), dtype=np.int64)
    counts[list(trains)] = [len(part) for part in parts]
    return counts


def _dealt(
    config: FederationConfig, num_parts: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[np.ndarray[Any, np.dtype[np.int64]]]]:
    """The training labels, and the samples that hosts deal to each node that trains."""
    from icrf.learning import configured_dataset, configured_partition  # noqa: PLC0415 - torch takes seconds

    dataset = configured_dataset(config)
    parts = configured_partition(config, dataset, num_parts)
    return np.asarray(dataset.train_y), [parts[k] for k in range(num_parts)]


def _schedule(config: FederationConfig, nodes: Sequence[NodeSpec]) -> tuple[str, ...]:
    """What the user's own criterion and sampler choose; empty where the mediator draws."""
    built_in = config.activation in (ALL, WAVES)
    if config.client_sampler == UNIFORM and built_in:
        return ()
    keys, rounds = config.model_dump(), config.federated_learning_rounds
    active: Sequence[Sequence[int]]
    if built_in:
        clients = nodes_that("train", nodes)
        waves = waves_of(keys)
        counts = [len(clients) if waves is None else waves.active(number) for number in range(1, rounds + 1)]
        active = [clients[:count] for count in counts]
    else:
        active = active_by_round(config.activation, nodes, lambda: _sample_counts(config, nodes), keys)

    def size(number: int) -> int:
        return sample_size(number, config.client_fraction, config.sampled_clients)

    return schedule(config.client_sampler, [node.id for node in nodes], active, size, config.seed)


def resolve_layout(config: FederationConfig, num_parts: int) -> tuple[TensorSpec, ...]:
    """Build model and data once, deal the data out to `num_parts` nodes, and return the model's tensors.

    Raises:
        ConfigError: C010 or C017 for names that cannot be loaded, C008 for a split that does not exist, C015 for files
            that are missing or broken, C018 for a model that does not take the data, or that always starts alike where
            several are learned.
        WeightsError: W010, W011 for a model with tensors that have no aggregation rule.
    """
    from icrf.learning import (  # noqa: PLC0415 - torch takes seconds
        Layout,
        build_model,
        check_fit,
        check_starts,
        configured_dataset,
        configured_partition,
        require_metrics,
    )

    require_metrics(config.metrics)
    dataset = configured_dataset(config)
    seeds = [model_seed(config.seed, number) for number in range(min(2, config.num_models))]
    modules = [build_model(config.model_type, dataset.input_shape, dataset.num_classes, seed) for seed in seeds]
    check_fit(modules[0], dataset)
    check_starts(modules, config.model_type)
    configured_partition(config, dataset, num_parts)
    return Layout.of_module(modules[0], config.private_keys).tensors


def resolve_rows(
    config: FederationConfig, nodes: Sequence[NodeSpec], layout: Sequence[TensorSpec], turns: Sequence[str] = ()
) -> Rows:
    """What the aggregation rule moves, and what it and the nodes keep.

    Args:
        layout: the model's tensors.
        turns: who takes part in which round, see :class:`icrf.protocol.Submission`.

    Raises:
        ConfigError: C008 if the rule does not work with as few participants as a round may have, or has nodes keep what
            the rounds that a cluster misses would change; C010, C016 or C017 about the strategy by which graphs change.
    """
    from icrf.learning import build_aggregator  # noqa: PLC0415 - torch takes seconds
    from icrf.learning.training import optimizer_rows  # noqa: PLC0415

    nodes_keep = config.client_template is not None
    if flow_of(config) != CENTRALIZED:
        kept = optimizer_rows(config.optimizer, config.momentum) if config.keep_optimizer_state else (0, 0)
        gathered = _num_gathered(config, layout)
        return Rows(client=kept[0], client_scalars=kept[1], nodes_keep=nodes_keep, gathered=gathered)
    rule = build_aggregator(config.aggregation_strategy, config.model_dump(), config.num_models)
    rule.require(_fewest_participants(config, nodes, turns))
    rows = rule.rows.with_private(layout)
    if rows.clients_keep and config.min_nodes is not None:
        other = f"aggregation_strategy {config.aggregation_strategy}" if rule.rows.clients_keep else "private_keys"
        if config.inter_cluster_codec == TOP_K:
            other = f"inter_cluster_codec {TOP_K}"
        raise ConfigError(
            "C008",
            f"min_nodes {config.min_nodes} contradicts {other}",
            place="min_nodes",
            allowed="null",
            hint="its nodes keep what each round changes, so that no round can do without a cluster",
        )
    return replace(rows, nodes_keep=nodes_keep)


def _num_gathered(config: FederationConfig, layout: Sequence[TensorSpec]) -> int:
    """Numbers per node that a decision on the next graph needs."""
    if config.topology_adaptation_strategy == STATIC:
        return 0
    adapter = Adapter(config.topology_adaptation_strategy, config.model_dump(), shared_size(layout))
    return adapter.num_gathered


def resolve_vectorize(
    config: FederationConfig, nodes: Sequence[NodeSpec], layout: Sequence[TensorSpec], turns: Sequence[str] = ()
) -> FederationConfig:
    """The configuration with a width, or ``off``, for ``vectorize``, the same wherever it runs.

    Args:
        layout, turns: as in :func:`resolve_rows`.

    Raises:
        ConfigError: C008 for a model that nodes cannot train together.
    """
    if config.vectorize == "off":
        return config
    from icrf.learning import Layout, build_model, configured_dataset, resolved_width  # noqa: PLC0415 - as above

    dataset = configured_dataset(config)
    found = resolved_width(
        config,
        build_model(config.model_type, dataset.input_shape, dataset.num_classes, model_seed(config.seed, 0)),
        dataset,
        participants=_fewest_chosen(config, nodes, turns),
        most_samples=int(max(_sample_counts(config, nodes))),
        num_elements=Layout(tuple(layout)).row_size,
    )
    return config.model_copy(update={"vectorize": found})


def _fewest_participants(config: FederationConfig, nodes: Sequence[NodeSpec], turns: Sequence[str]) -> int:
    """How few nodes may contribute to a round."""
    return _fewest_chosen(config, nodes, turns) if config.min_nodes is None else config.min_nodes


def _fewest_chosen(config: FederationConfig, nodes: Sequence[NodeSpec], turns: Sequence[str]) -> int:
    """How many nodes are chosen for the round that has the fewest."""
    if turns:
        return min(len(nodes_of(bytes.fromhex(turn))) for turn in turns)
    return fewest_participants(config.model_dump(), len(nodes_that("train", nodes)))


@contextmanager
def on_path(folder: str) -> Iterator[None]:
    """`folder` first on ``sys.path`` for the duration; nothing for an empty name."""
    if not folder:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
