"""The plan of a federation: placement, traffic, mixing, memory and feasibility, before anything runs.

Pure: the same submission and clusters give the same plan on every mediator. All that is wrong with the resources comes
back as sentences in the plan; only what is wrong with the submission itself is raised.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from icrf.errors import ConfigError
from icrf.exchange import ExchangePlan, compile_exchange
from icrf.participation import Participation
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    HIERARCHICAL,
    STAGES,
    ClusterInfo,
    LinkBytes,
    MeasuredLink,
    Plan,
    Submission,
    element_type,
    nodes_of,
    nodes_that,
    shared_size,
)
from icrf.residency import host_budget, resident_nodes
from icrf.topology import STATIC, Hierarchy, HybridAdjacencyMatrix, check_mixing, mixing_matrix
from icrf_mediator.assignment import (
    Assignment,
    Hints,
    Pins,
    assign,
    assign_groups,
    link_costs,
    link_seconds,
    resolve_pins,
)
from icrf_mediator.coded_bytes import coded_bytes
from icrf_mediator.feasibility import lacking
from icrf_mediator.needs import candidates, explained

# The one schema that learns several models. A mediator reads configurations without their specification: the SDK that
# submits them may be of another version.
_CLUSTERED = "ClusterFederatedLearning"
# A host with torch imported and one optimizer step made (measured), before any model.
HOST_BYTES = 360 * 1_000_000

_FLOAT32, _FLOAT64 = 4, 8

# Of so many rounds a plan looks at the participants, where they change; of fewer in large federations.
_SAMPLED_ROUNDS, _SAMPLED_NODES = 256, 2_000_000

# What the mediator itself reads of a configuration, beside what only a plan depends on.
_NEEDED: dict[str, tuple[type, ...]] = {
    "federation_id": (str,),
    "federated_learning_rounds": (int,),
    "evaluate_every": (int,),
    "round_deadline_s": (int, float),
    "placement_group_strategy": (str,),
}

_NEEDED_OF_GROUPS: dict[str, tuple[type, ...]] = {"global_every": (int,)}


@dataclass(frozen=True)
class _Settings:
    """The keys of the resolved configuration that a plan depends on."""

    federation_id: str
    rounds: int
    evaluate_every: int
    global_every: int
    assignment_strategy: str
    placement: Mapping[str, str | Mapping[str, str]]
    seed: int
    max_slots: int | None
    mixing: str
    adaptation: str
    adaptation_period: int
    number_of_models: int
    resident_nodes: int | None
    resident_memory_mb: int | None
    width: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> _Settings:
        clustered = config.get("federated_learning_schema") == _CLUSTERED
        return cls(
            federation_id=config.get("federation_id", ""),
            rounds=config.get("federated_learning_rounds", 1),
            evaluate_every=config.get("evaluate_every", 1),
            global_every=config.get("global_every", 1),
            assignment_strategy=config.get("assignment_strategy") or "locality",
            placement=config.get("placement") or {},
            seed=config.get("seed") or 0,
            max_slots=config.get("max_slots_per_cluster"),
            mixing=config.get("mixing") or "metropolis_hastings",
            adaptation=config.get("topology_adaptation_strategy") or STATIC,
            adaptation_period=config.get("adaptation_period", 1),
            number_of_models=config.get("number_of_models") or 1 if clustered else 1,
            resident_nodes=config.get("resident_nodes"),
            resident_memory_mb=config.get("resident_memory_mb"),
            width=width if isinstance(width := config.get("vectorize"), int) else 0,
        )

    @property
    def num_evaluations(self) -> int:
        """Every `evaluate_every` rounds and after the last one."""
        if self.evaluate_every < 1:
            return min(1, self.rounds)
        return -(-self.rounds // self.evaluate_every)

    @property
    def num_adaptations(self) -> int:
        """Rounds that decide on the next graph."""
        return 0 if self.adaptation == STATIC else self.rounds // max(1, self.adaptation_period)

    def total(self, per_round: int, per_evaluation: int, per_adaptation: int) -> int:
        """Bytes of the whole run."""
        beside = per_evaluation * self.num_evaluations + per_adaptation * self.num_adaptations
        return per_round * self.rounds + beside

    @property
    def num_merges(self) -> int:
        """Rounds of a hierarchy that end with one model for all groups: every so many do, and the last one."""
        return -(-self.rounds // max(1, self.global_every))


def make_plan(
    submission: Submission,
    clusters: Sequence[ClusterInfo],
    measured: Sequence[MeasuredLink] = (),
    previous: Mapping[str, str] | None = None,
) -> tuple[Plan, Assignment]:
    """Plan a federation on these clusters.

    The assignment's cluster indices are positions in `clusters` and in ``plan.clusters``.

    Args:
        measured: the links between clusters, as far as they are known.
        previous: node id -> name of its cluster until now, of which as few nodes as possible move.

    Raises:
        ConfigErrors: C014 for every pin that names no node or no cluster, C019 for nodes that no cluster has room for.
        ConfigError: C001 unreadable configuration, C008 not one aggregator, C010 unknown strategy or mixing rule.
        RoutingError: P011 a participant without edges to the aggregator.
        TopologyError: T004 a directed graph that the mixing rule does not take, T007 a mixing matrix that is not
            stochastic, T0xx a malformed graph.
    """
    assignment = assign_nodes(submission, clusters, measured, previous)
    return plan_of(submission, clusters, assignment, measured), assignment


def assign_nodes(
    submission: Submission,
    clusters: Sequence[ClusterInfo],
    measured: Sequence[MeasuredLink] = (),
    previous: Mapping[str, str] | None = None,
    *,
    improve: bool = False,
    stay: bool = False,
) -> Assignment:
    """The part of a plan that is decided: where nodes live. See :func:`make_plan`.

    Args:
        improve: whether nodes may also move where that makes less cross.
        stay: whether all nodes stay whose cluster is there, whatever shares demand.
    """
    if not clusters:
        return Assignment((), ())
    config = _parse(submission.config_json)
    settings, node_ids = _Settings.from_config(config), [node.id for node in submission.nodes]
    adjacency = HybridAdjacencyMatrix.from_graph(submission.graph)
    hints = replace(_hints(submission, settings, clusters, measured, previous), improve=improve)
    clusters, pins = candidates(config, node_ids, clusters, resolve_pins(settings.placement, node_ids, clusters))
    if not stay:
        return _assign(submission, settings.assignment_strategy, adjacency, clusters, pins, hints)
    held = {node: {home} for node, home in enumerate(hints.previous) if home >= 0 and home in pins.get(node, {home})}
    found = _assign(submission, settings.assignment_strategy, adjacency, clusters, {**pins, **held}, hints)
    why = ["stays: its cluster is there" if node in held else text for node, text in enumerate(found.explanation)]
    return Assignment(found.clusters, tuple(why))


def plan_of(
    submission: Submission,
    clusters: Sequence[ClusterInfo],
    assignment: Assignment,
    measured: Sequence[MeasuredLink] = (),
) -> Plan:
    """What an assignment leads to. See :func:`make_plan`."""
    config = _parse(submission.config_json)
    settings = _Settings.from_config(config)
    adjacency = HybridAdjacencyMatrix.from_graph(submission.graph)
    node_ids = [node.id for node in submission.nodes]
    # Without a cluster the rest of the plan is that of one imaginary cluster, across which nothing crosses.
    owners = assignment.clusters or (0,) * adjacency.num_nodes
    exchange = compile_exchange(submission.flow, adjacency, [n.role for n in submission.nodes], owners, submission.rows)
    num_parameters = shared_size(submission.layout)
    per_adaptation = exchange.adaptation_bytes(num_parameters, _itemsize(submission))
    return Plan(
        federation=settings.federation_id,
        flow=submission.flow,
        clusters=tuple(cluster.name for cluster in clusters),
        assignment={i: clusters[c].name for i, c in zip(node_ids, assignment.clusters, strict=False)},
        num_edges=adjacency.cut_edges(np.arange(adjacency.num_nodes)),
        cut_edges=adjacency.cut_edges(owners),
        num_parameters=num_parameters,
        strategy=settings.assignment_strategy,
        explanation=dict(zip(node_ids, explained(config, node_ids, assignment.explanation), strict=False)),
        tensors=dict(Counter(tensor.rule for tensor in submission.layout)),
        num_models=settings.number_of_models if submission.flow == CENTRALIZED else 1,
        **_crossed(submission, config, settings, clusters, exchange, per_adaptation, measured),
        **_room(config, settings, clusters, assignment, exchange, num_parameters),
        **_mixed(submission, settings),
        **_adapted(settings, per_adaptation),
        **coded_bytes(exchange, submission.layout, config),
        **_grouped(submission, exchange, adjacency, num_parameters),
    )


def check_submission(submission: Submission) -> None:
    """Refuse what no mediator can run, before anything is kept of it.

    Raises:
        ConfigError: C001, C006, C016, C010 about the configuration or the stage; C008 no node trains, or communities of
            other nodes.
    """
    config = _parse(submission.config_json)
    for key, kinds in {**_NEEDED, **(_NEEDED_OF_GROUPS if submission.flow == HIERARCHICAL else {})}.items():
        if key not in config:
            raise ConfigError("C016", f"{key} is missing", place="config_json", hint="submit a resolved configuration")
        if not isinstance(config[key], kinds) or isinstance(config[key], bool):
            raise ConfigError("C006", f"{key}: {type(config[key]).__name__}", place="config_json", value=config[key])
    if submission.flow == HIERARCHICAL and config["global_every"] < 1:
        raise ConfigError("C007", "global_every < 1", place="config_json", value=config["global_every"])
    if submission.stage not in STAGES:
        raise ConfigError("C010", f"no such stage: {submission.stage!a}", place="stage", allowed=", ".join(STAGES))
    if submission.communities and len(submission.communities) != len(submission.nodes):
        found, nodes = len(submission.communities), len(submission.nodes)
        raise ConfigError("C008", f"communities of {found} nodes for {nodes}", place="communities")
    if not nodes_that("train", submission.nodes):
        raise ConfigError("C008", "no node trains", place="nodes")


# ---------------------------------------------------------------- parts of the plan


def _hints(
    submission: Submission,
    settings: _Settings,
    clusters: Sequence[ClusterInfo],
    measured: Sequence[MeasuredLink],
    previous: Mapping[str, str] | None,
) -> Hints:
    names = [cluster.name for cluster in clusters]
    index = {name: k for k, name in enumerate(names)}
    payload = shared_size(submission.layout) * _itemsize(submission)
    return Hints(
        seed=settings.seed,
        previous=tuple(index.get(previous.get(node.id, ""), -1) for node in submission.nodes) if previous else (),
        costs=link_costs(names, measured, payload),
        communities=submission.communities,
    )


def _assign(
    submission: Submission,
    strategy: str,
    adjacency: HybridAdjacencyMatrix,
    clusters: Sequence[ClusterInfo],
    pins: Pins,
    hints: Hints,
) -> Assignment:
    """Where nodes live; groups of a hierarchy are kept whole where the strategy is to keep neighbours together."""
    if submission.flow == HIERARCHICAL and strategy == "locality":
        hierarchy = Hierarchy.of(adjacency, [node.role for node in submission.nodes])
        whole = assign_groups(hierarchy, [node.id for node in submission.nodes], clusters, pins, hints.previous)
        if whole is not None:
            return whole
    return assign(strategy, adjacency, clusters, pins, hints)


def _crossed(
    submission: Submission,
    config: Mapping[str, Any],
    settings: _Settings,
    clusters: Sequence[ClusterInfo],
    exchange: ExchangePlan,
    per_adaptation: int,
    measured: Sequence[MeasuredLink],
) -> dict[str, Any]:
    """What a plan says about the bytes between clusters."""
    num_parameters = shared_size(submission.layout)
    # Whether and when a condition will hold nobody knows yet: as if it always did.
    participation = Participation(submission, {**config, "wave_condition": None})
    links = _links(exchange, participation, settings, num_parameters, _itemsize(submission))
    per_round, per_evaluation = sum(links.values()), exchange.evaluation_bytes(num_parameters)
    ends = [(clusters[a].name, clusters[b].name, size) for (a, b), size in links.items()]
    return {
        "links": tuple(LinkBytes(*end, link_seconds(measured, *end)) for end in ends),
        "bytes_inter_cluster_per_round": per_round,
        "bytes_inter_cluster_per_evaluation": per_evaluation,
        "bytes_inter_cluster_total": settings.total(per_round, per_evaluation, per_adaptation),
    }


def _room(
    config: Mapping[str, Any],
    settings: _Settings,
    clusters: Sequence[ClusterInfo],
    assignment: Assignment,
    exchange: ExchangePlan,
    num_parameters: int,
) -> dict[str, Any]:
    """What a plan says about slots, memory and whether it fits."""
    slots = _slots(assignment, clusters, settings.max_slots)
    residents = _residents(exchange, settings, slots, clusters, num_parameters)
    memory = _peak_memory(exchange, slots, clusters, num_parameters, residents, settings.width)
    lacks = lacking(config, clusters, slots)
    return {
        "peak_memory_bytes": max(memory.values(), default=0),
        "memory": memory,
        "slots": slots,
        "residents": residents,
        "feasible": not lacks,
        "problems": tuple(problem for problems in lacks.values() for problem in problems),
        "lacking": {name: "; ".join(problems) for name, problems in lacks.items() if name},
    }


def _mixed(submission: Submission, settings: _Settings) -> dict[str, Any]:
    """What a plan says about the mixing matrix of peers."""
    if submission.flow != DECENTRALIZED:
        return {"slem": -1.0, "slem_kind": "none", "rounds_to_consensus": -1}
    found = check_mixing(mixing_matrix(submission.graph, settings.mixing))
    same = {name: getattr(found, name) for name in ("slem", "slem_kind", "rounds_to_consensus")}
    return {**same, "mixing": found}


def _grouped(
    submission: Submission, exchange: ExchangePlan, adjacency: HybridAdjacencyMatrix, num_parameters: int
) -> dict[str, Any]:
    """What a plan says about the groups of a hierarchy."""
    if submission.flow != HIERARCHICAL:
        return {}
    names, itemsize = [node.id for node in submission.nodes], _itemsize(submission)
    hierarchy = Hierarchy.of(adjacency, [node.role for node in submission.nodes])
    return {
        "groups": {names[node]: names[aggregator] for node, aggregator in hierarchy.group_of.items()},
        "bytes_inter_cluster_within_groups": exchange.payload_bytes(num_parameters, itemsize),
        "bytes_inter_cluster_per_merge": exchange.merged().payload_bytes(num_parameters, itemsize),
    }


def _adapted(settings: _Settings, per_adaptation: int) -> dict[str, Any]:
    """What a plan says about a graph that changes."""
    if settings.adaptation == STATIC:
        return {}
    return {
        "adaptation": settings.adaptation,
        "adaptation_period": settings.adaptation_period,
        "bytes_inter_cluster_per_adaptation": per_adaptation,
    }


def _links(
    exchange: ExchangePlan, participation: Participation, settings: _Settings, num_parameters: int, itemsize: int
) -> dict[tuple[int, int], int]:
    """Payload bytes per round over each link: the mean over the rounds, whose payloads are known beforehand."""
    rounds = settings.rounds
    if exchange.flow == HIERARCHICAL:
        merged = exchange.merged().links(num_parameters, itemsize)
        within = exchange.links(num_parameters, itemsize)
        share = settings.num_merges / rounds
        every = sorted({**within, **merged})
        return {link: round(within.get(link, 0) * (1 - share) + merged.get(link, 0) * share) for link in every}
    if participation.is_constant or exchange.flow != CENTRALIZED:
        return exchange.links(num_parameters, itemsize)
    looked_at = max(1, min(rounds, _SAMPLED_ROUNDS, _SAMPLED_NODES // len(participation.clients)))
    totals: Counter[tuple[int, int]] = Counter(dict.fromkeys(exchange.links(num_parameters, itemsize), 0))
    for number in range(1, looked_at + 1):
        chosen = nodes_of(participation.of_round(number)) or participation.clients
        totals.update(exchange.of_round(chosen).links(num_parameters, itemsize))
    return {link: round(size / looked_at) for link, size in totals.items()}


def _parse(config_json: str) -> Mapping[str, Any]:
    try:
        config = json.loads(config_json)
    except json.JSONDecodeError as error:
        raise ConfigError("C001", f"configuration is not JSON: {error}", place="config_json") from error
    if not isinstance(config, dict):
        raise ConfigError("C006", "configuration is not a mapping", place="config_json", value=type(config).__name__)
    return config


def _itemsize(submission: Submission) -> int:
    return np.dtype(element_type(submission.layout)).itemsize if submission.layout else _FLOAT32


def _slots(assignment: Assignment, clusters: Sequence[ClusterInfo], most: int | None) -> dict[str, int]:
    """Slots per cluster that hosts a node: as many as it and the federation allow, no more than nodes, at least one."""
    counts = Counter(assignment.clusters)
    return {
        clusters[c].name: max(1, min(clusters[c].capacity.most_slots, counts[c], most or counts[c]))
        for c in sorted(counts)
    }


def _kept_bytes(exchange: ExchangePlan, num_parameters: int) -> int:
    """What a participant keeps in memory from round to round: its rows, the committed and the next ones."""
    rows = exchange.rows.client + (exchange.flow == DECENTRALIZED)
    return 2 * _FLOAT32 * (rows * num_parameters + exchange.rows.client_scalars)


def _residents(
    exchange: ExchangePlan,
    settings: _Settings,
    slots: Mapping[str, int],
    clusters: Sequence[ClusterInfo],
    num_parameters: int,
) -> dict[str, int]:
    """How many nodes of each cluster will be active at once, by what is kept of them; their data is not counted."""
    found = {}
    for index, cluster in enumerate(clusters):
        if cluster.name in slots:
            num_slots, here = slots[cluster.name], len(exchange.local_nodes(index))
            # Clusters that do not tell how much memory they have say 0.
            budget = host_budget(settings.resident_memory_mb, cluster.capacity.memory_bytes or None, num_slots)
            each = resident_nodes(
                settings.resident_nodes, -(-here // num_slots), _kept_bytes(exchange, num_parameters), budget
            )
            found[cluster.name] = min(here, each * num_slots)
    return found


def _peak_memory(
    exchange: ExchangePlan,
    slots: Mapping[str, int],
    clusters: Sequence[ClusterInfo],
    num_parameters: int,
    residents: Mapping[str, int],
    width: int = 0,
) -> dict[str, int]:
    """An estimate of the largest memory that each cluster needs, Ray itself and the data sets not counted.

    Per slot: a host with torch, and of the model (4 bytes a parameter) the weights, the gradients and the received
    rows, plus its partial sum (8 bytes); where nodes train together, weights and gradients of `width` more.
    Centralized adds on the coordinator the server's state and the sum.
    Decentralized adds the updates of all local nodes in the object store, hierarchical the committed and the next state
    of every local aggregator. Of the nodes that are active at once come the rows that they keep, committed and next.
    All add the payloads that arrive from other clusters in a round.
    """
    rows = exchange.rows
    model, partial = _FLOAT32 * num_parameters, _FLOAT64 * num_parameters * rows.up
    arriving: Counter[int] = Counter()
    for transfer in exchange.merging or exchange.transfers + exchange.evaluation + exchange.adaptation:
        arriving[transfer.target] += exchange.transfer_bytes(transfer, num_parameters)
    peak: dict[str, int] = {}
    for index, cluster in enumerate(clusters):
        if cluster.name not in slots:
            continue
        needed = slots[cluster.name] * (HOST_BYTES + (2 + rows.down + 2 * width) * model + partial) + arriving[index]
        keeping = residents[cluster.name]
        if exchange.flow == CENTRALIZED:
            needed += rows.server * model + partial if index == exchange.coordinator else 0
            keeping = min(keeping, len(exchange.local_participants(index)))
        elif exchange.flow == DECENTRALIZED:
            needed += model * len(exchange.local_nodes(index))
            if index == exchange.coordinator:
                # What a decision on the next graph looks at: all rows, as one matrix.
                needed += _FLOAT32 * rows.gathered * len(exchange.assignment)
        else:
            needed += 2 * model * len(set(exchange.local_nodes(index)) & set(exchange.aggregators)) + partial
        peak[cluster.name] = needed + keeping * _kept_bytes(exchange, num_parameters)
    return peak
