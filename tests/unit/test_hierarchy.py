"""Groups: who is in which, what their rounds exchange, and where they live."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import ConfigError, ConfigErrors, RoutingError
from icrf.exchange import CONSENSUS, MERGED, MODEL, PARTIAL, ExchangePlan, compile_exchange
from icrf.protocol import HIERARCHICAL, Capacity, ClusterInfo, Fingerprint
from icrf.spec import FederationConfig
from icrf.submission import build_submission, default_nodes
from icrf.topology import Hierarchy, HybridAdjacencyMatrix, group_clients, hierarchy_of_groups
from icrf_mediator.assignment import assign_groups
from icrf_mediator.planning import check_submission

FINGERPRINT = Fingerprint("2", "AVX2", "on", 1, "cpu")
HIERARCHY = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy"}


def config_of(**keys: Any) -> FederationConfig:
    return FederationConfig.from_mapping({"federation_id": "x", **HIERARCHY, **keys})


def roles_of(groups: Sequence[int]) -> list[str]:
    return ["aggregate-test", *["train-eval"] * len(groups), *["aggregate-test"] * max(groups)]


def hierarchy_of(groups: Sequence[int]) -> Hierarchy:
    return Hierarchy.of(hierarchy_of_groups(groups), roles_of(groups))


# ---------------------------------------------------------------- graph


@given(st.lists(st.integers(0, 3), min_size=4, max_size=20).filter(lambda g: set(g) == {0, 1, 2, 3}))
def test_a_graph_of_groups_tells_the_groups_again(groups: list[int]) -> None:
    found = hierarchy_of(groups)
    num_clients = len(groups)
    assert found.aggregators == (0, *range(num_clients + 1, num_clients + 4)) and found.root == 0
    assert [found.aggregators.index(found.group_of[i + 1]) for i in range(num_clients)] == groups
    assert sorted(node for members in found.members.values() for node in members) == list(range(1, num_clients + 1))


@pytest.mark.parametrize(
    ("roles", "edges", "message"),
    [
        (["train", "train"], [(0, 1)], "C008 .*no node aggregates"),
        (["aggregate-train", "train"], [(0, 1)], "C008 .*0 aggregates and trains"),
        (["aggregate", "train", "aggregate"], [(0, 1), (1, 2), (0, 2)], "C008 .*1 sends to 2 aggregators"),
        (["aggregate", "train", "train"], [(0, 1), (1, 2)], "C008 .*2 sends to 0 aggregators"),
        (["aggregate", "train", "aggregate"], [(0, 1), (0, 2)], "C008 .*nobody trains in the group of 2"),
        (["aggregate", "train", "aggregate", "train"], [(0, 1), (2, 3), (1, 3)], "P011 .*2->0, 0->2"),
    ],
)
def test_what_is_no_hierarchy_is_refused(roles: list[str], edges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises((ConfigError, RoutingError), match=message):
        Hierarchy.of(HybridAdjacencyMatrix.from_edges(len(roles), edges), roles)


def test_an_edge_of_one_direction_is_refused() -> None:
    one_way = HybridAdjacencyMatrix.from_edges(2, [(1, 0)], symmetric=False)
    with pytest.raises(RoutingError, match=r"P011 .*0->1"):
        Hierarchy.of(one_way, ["aggregate", "train"])


def test_clients_have_the_indices_that_they_have_in_a_star() -> None:
    nodes = default_nodes(config_of(number_of_clients=4, number_of_groups=3), HIERARCHICAL)
    assert [node.id for node in nodes] == ["server_0", *(f"client_{i}" for i in range(4)), "server_1", "server_2"]


# ---------------------------------------------------------------- groupings


@given(st.integers(1, 40), st.data())
def test_contiguous_groups_differ_by_one_at_most(num_clients: int, data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, num_clients))
    groups = group_clients("contiguous", num_clients, num_groups, {})
    sizes = np.bincount(groups)
    assert list(groups) == sorted(groups) and len(sizes) == num_groups and sizes.max() - sizes.min() <= 1


@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.data())
def test_planted_communities_are_found(num_groups: int, seed: int, data: st.DataObject) -> None:
    """Clients of one community have labels of their own, in whatever shares and numbers."""
    random = np.random.default_rng(seed)
    planted = [*range(num_groups), *data.draw(st.lists(st.integers(0, num_groups - 1), max_size=15))]
    counts = np.zeros((len(planted), 3 * num_groups), dtype=np.int64)
    for client, group in enumerate(planted):
        counts[client, 3 * group : 3 * group + 3] = random.integers(20, 40, 3) * (1 + client % 4)
    groups = group_clients("labels", len(planted), num_groups, {"label_counts": counts})
    assert list(groups) == planted
    scaled = group_clients("labels", len(planted), num_groups, {"label_counts": 7 * counts})
    assert scaled == groups


def test_equal_clients_are_grouped_all_the_same() -> None:
    counts = np.ones((6, 3), dtype=np.int64)
    groups = group_clients("labels", 6, 3, {"label_counts": counts})
    assert set(groups) == {0, 1, 2}
    assert groups == group_clients("labels", 6, 3, {"label_counts": counts * 5})


@pytest.mark.parametrize(
    ("name", "num_groups", "message"),
    [
        ("contiguous", 5, "C008 .*number_of_groups 5 > 4 clients"),
        ("contigous", 2, "C010 .*contiguous"),
        (f"{__name__}:one_too_few", 2, "C018 group_by: .*returned 3 groups for 4 clients"),
        (f"{__name__}:raises", 2, "C017 group_by: .*:raises' raised ZeroDivisionError"),
        (f"{__name__}:asks_for_more", 2, "C017 .*no_such_thing"),
    ],
)
def test_a_grouping_that_cannot_be_used_is_refused(name: str, num_groups: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        group_clients(name, 4, num_groups, {})


def one_too_few(num_clients: int) -> list[int]:
    return [i % 2 for i in range(num_clients - 1)]


def raises(num_clients: int) -> list[int]:
    return [num_clients // 0]


def asks_for_more(no_such_thing: int) -> list[int]:
    return [no_such_thing]


# ---------------------------------------------------------------- what crosses


def plan_of(groups: Sequence[int], assignment: Sequence[int]) -> ExchangePlan:
    return compile_exchange(HIERARCHICAL, hierarchy_of_groups(groups), roles_of(groups), assignment)


def kinds(plan: ExchangePlan) -> list[tuple[str, int, int, int]]:
    return [(t.kind, t.sender, t.source, t.target) for t in plan.transfers]


def test_whole_groups_send_nothing_until_they_are_merged() -> None:
    plan = plan_of([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1, 1])
    assert plan.transfers == ()
    assert (plan.coordinator, plan.publishing, plan.aggregating, plan.installing) == (0, {0, 1}, {0, 1}, frozenset())
    merged = plan.merged()
    assert kinds(merged) == [(CONSENSUS, -1, 1, 0), (MERGED, 0, 0, 1)]
    assert merged.transfers[1].recipients == (7, 8)
    assert (merged.aggregating, merged.installing) == ({0}, {0, 1})
    assert merged.payload_bytes(100) == 8 * 100 + 4 * 100


def test_a_divided_group_exchanges_within_its_rounds_and_two_do_so_side_by_side() -> None:
    """Clients of both groups live away from their aggregators, on the cluster of the other one."""
    plan = plan_of([0, 1, 0, 1], [0, 0, 0, 1, 1, 1])
    assert kinds(plan) == [(MODEL, 0, 0, 1), (MODEL, 5, 1, 0), (PARTIAL, -1, 1, 0), (PARTIAL, -1, 0, 1)]
    assert [t.recipients for t in plan.transfers if t.kind == PARTIAL] == [(0,), (5,)]
    assert kinds(plan.merged())[2:] == [(CONSENSUS, -1, 1, 0), (MERGED, 0, 0, 1)]


# ---------------------------------------------------------------- where groups live


def clusters_of(*slots: int) -> list[ClusterInfo]:
    return [ClusterInfo(f"c{k}", "i", Capacity(n, n, 0.0, 1 << 30), FINGERPRINT) for k, n in enumerate(slots)]


def homes_of(groups: Sequence[int], slots: Sequence[int], pins: dict[int, set[int]] | None = None) -> list[int] | None:
    hierarchy = hierarchy_of(groups)
    num_nodes = len(groups) + len(hierarchy.aggregators)
    found = assign_groups(hierarchy, [f"n{i}" for i in range(num_nodes)], clusters_of(*slots), pins or {})
    return None if found is None else list(found.clusters)


@given(
    st.lists(st.integers(0, 7), min_size=8, max_size=30).filter(lambda g: set(g) == set(range(8))),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_groups_stay_whole_and_shares_are_fair_up_to_a_group(groups: list[int], slots: list[int]) -> None:
    homes = homes_of(groups, slots)
    assert homes is not None
    hierarchy = hierarchy_of(groups)
    for aggregator, members in hierarchy.members.items():
        assert {homes[node] for node in members} == {homes[aggregator]}
    largest = 1 + max(len(members) for members in hierarchy.members.values())
    usable = [n for n in slots if n] or slots
    for cluster, number in enumerate(slots):
        share = len(homes) * (number / sum(usable) if sum(slots) else 1 / len(slots))
        assert homes.count(cluster) <= share + 1 + largest
        assert not sum(slots) or number or cluster not in homes


def test_pins_are_kept_and_draw_their_group_along() -> None:
    groups = [0, 0, 0, 1, 1, 1]
    assert homes_of(groups, [1, 1], {2: {1}}) == [1, 1, 1, 1, 0, 0, 0, 0]
    # Two against one: the group goes with the majority, the third stays where it is pinned.
    assert homes_of(groups, [1, 1], {1: {0}, 2: {1}, 3: {1}}) == [1, 0, 1, 1, 0, 0, 0, 0]


def test_groups_stay_where_they_were_as_long_as_there_is_room() -> None:
    hierarchy, ids = hierarchy_of([0, 0, 0, 1, 1, 1, 2, 2, 2]), [f"n{i}" for i in range(12)]
    before = assign_groups(hierarchy, ids, clusters_of(1, 1), {})
    assert before is not None
    gone = [-1 if cluster == 1 else 0 for cluster in before.clusters]
    alone = assign_groups(hierarchy, ids, clusters_of(1), {}, gone)
    assert alone is not None and set(alone.clusters) == {0}
    joined = assign_groups(hierarchy, ids, clusters_of(1, 1, 1), {}, before.clusters)
    assert joined is not None
    moved = [node for node in range(12) if joined.clusters[node] != before.clusters[node]]
    assert sorted({joined.clusters[node] for node in moved}) == [2] and len(moved) == 4
    again = assign_groups(hierarchy, ids, clusters_of(1, 1, 1), {}, joined.clusters)
    assert again is not None and again.clusters == joined.clusters


def test_fewer_groups_than_clusters_are_divided_as_any_graph() -> None:
    assert homes_of([0, 0, 1, 1], [1, 1, 1]) is None


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("keys", "codes"),
    [
        ({}, []),
        ({"federated_learning_topology": "star"}, ["C008"]),
        ({"schema": "TraditionalFederatedLearning"}, ["C008"]),
        ({"schema": "DecentralizedFederatedLearning"}, ["C008"]),
        ({"schema": "ClusterFederatedLearning"}, ["C008"]),
        ({"schema": "ClusterFederatedLearning", "group_by": "labels"}, []),
        ({"schema": "ClusterFederatedLearning", "group_by": "labels", "number_of_models": 2}, ["C008"]),
        ({"schema": "ClusterFederatedLearning", "group_by": "labels", "aggregation_strategy": "Krum"}, ["C012"]),
        ({"number_of_groups": 11}, ["C008"]),
        ({"aggregation_strategy": "FedAvgM"}, ["C012"]),
        ({"client_fraction": 0.5, "min_nodes": 2}, ["C012", "C012"]),
        ({"sampled_clients": 3}, ["C012"]),
        ({"client_sampler": "a.b:c"}, ["C012"]),
        ({"group_by": "lables"}, ["C010"]),
        ({"global_every": 0}, ["C007"]),
    ],
)
def test_what_contradicts_a_hierarchy_is_refused_by_name(keys: dict[str, Any], codes: list[str]) -> None:
    try:
        config_of(**keys)
    except ConfigErrors as caught:
        assert [error.code for error in caught.errors] == codes
    else:
        assert not codes


def test_a_mediator_refuses_a_hierarchy_without_its_period() -> None:
    submission = build_submission(config_of())
    check_submission(submission)
    config = json.loads(submission.config_json)
    for value, code in ((None, "C016"), ("2", "C006"), (0, "C007")):
        broken = {k: v for k, v in config.items() if k != "global_every"}
        broken |= {} if value is None else {"global_every": value}
        with pytest.raises(ConfigError, match=code):
            check_submission(dataclasses.replace(submission, config_json=json.dumps(broken)))
