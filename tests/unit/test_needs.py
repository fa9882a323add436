"""What nodes need and slots have: candidates, shares, refusals, and the keys that say it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from icrf.errors import ConfigErrors
from icrf.protocol import Capacity, ClusterInfo, Fingerprint, Plan
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf_mediator.planning import make_plan

CPU = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
STRATEGIES = ("locality", "metis", "louvain", "capacity", "round_robin", "random")


def cluster(name: str, slots: int = 2, cpus: float = 2.0, gpus: float = 0.0, gb: int = 8, **parts: Any) -> ClusterInfo:
    capacity = Capacity(slots, cpus, gpus, gb * 10**9, quota=parts.pop("quota", 0))
    return ClusterInfo(name, "x", capacity, CPU, **parts)


def plan_of(clusters: list[ClusterInfo], nodes: int = 12, **keys: Any) -> Plan:
    config = {
        "federation_id": "fed",
        "federated_learning_schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "number_of_clients": nodes,
        "federated_learning_rounds": 2,
        "dataset_type": "digits",
        "model_type": "mlp",
        **keys,
    }
    return make_plan(build_submission(FederationConfig.from_mapping(config)), clusters)[0]


def sizes(plan: Plan) -> dict[str, int]:
    return dict(Counter(plan.assignment.values()))


def refusals(clusters: list[ClusterInfo], **keys: Any) -> list[Any]:
    with pytest.raises(ConfigErrors) as caught:
        plan_of(clusters, **keys)
    return list(caught.value.errors)


# ---------------------------------------------------------------- needs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_node_lives_only_where_a_slot_has_what_it_needs(strategy: str) -> None:
    clusters = [cluster("small", gb=4), cluster("middle", gb=8), cluster("large", gb=64)]
    needs = {"client_7": {"memory_mb": 20_000}, "client_8": {"memory_mb": 3_000}, "client_0": {"memory_mb": 1}}
    plan = plan_of(clusters, assignment_strategy=strategy, node_resources=needs)
    assert plan.assignment["client_7"] == "large" and plan.assignment["client_8"] in ("middle", "large")
    assert sizes(plan) == {"small": 4, "middle": 4, "large": 4}
    assert plan.explanation["client_7"] == "pinned to large; it needs 20000 MB"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cluster_that_no_node_may_live_on_takes_no_share(strategy: str) -> None:
    clusters = [cluster("small", gb=1), cluster("middle"), cluster("large", slots=4, cpus=4.0, gb=64)]
    plan = plan_of(clusters, assignment_strategy=strategy, node_resources={"client_*": {"memory_mb": 3_000}})
    assert sizes(plan) == {"middle": 4, "large": 8} and plan.feasible
    # What holds for all nodes alike is no pin: neighbours stay together.
    if strategy == "locality":
        assert plan.cut_edges == 2


@pytest.mark.parametrize("needy", [120, 160])
def test_nodes_with_a_choice_stay_with_their_neighbours(needy: int) -> None:
    clusters = [cluster("a"), cluster("b"), cluster("small", gb=1)]
    needs = {f"client_{i}": {"memory_mb": 3_000} for i in range(needy)}
    plan = plan_of(clusters, nodes=240, node_resources=needs)
    assert plan.cut_edges == 3 and sizes(plan) == {"a": 80, "b": 80, "small": 80}


def test_all_that_is_said_of_a_node_holds() -> None:
    clusters = [cluster("a", gb=8), cluster("b", gb=16), cluster("c", gb=64)]
    needs = {"client_*": {"memory_mb": 5_000}, "client_3": {"memory_mb": 10_000, "num_cpus": 1}}
    plan = plan_of(clusters, node_resources=needs, placement={"client_1": "b"})
    assert plan.assignment["client_3"] == "c" and plan.assignment["client_1"] == "b"
    assert sizes(plan) == {"b": 6, "c": 6}


def test_gpus_are_those_that_slots_take() -> None:
    clusters = [cluster("plain"), cluster("gpus", gpus=1)]
    needs = {"client_0": {"num_gpus": 0.5}}
    plan = plan_of(clusters, nodes=4, device="cuda", node_resources=needs)
    # Nobody computes on a GPU where there is none: that cluster takes no share, with needs and without.
    assert sizes(plan) == {"gpus": 4} == sizes(plan_of(clusters, nodes=4, device="cuda")) and plan.feasible
    (error,) = refusals(clusters, device="cuda", node_resources={"client_0": {"num_gpus": 1}})
    assert error.code == "C019" and "node client_0 needs 1 GPU: no slot of any cluster" in error.message
    assert error.allowed == "what a slot has (plain: 1 CPU, 4000 MB; gpus: 1 CPU, 0.5 GPU, 4000 MB)"
    # Without a device to compute on, slots take no GPU at all.
    assert refusals(clusters, node_resources=needs)[0].code == "C019"


def test_what_cannot_be_had_is_refused_all_at_once() -> None:
    clusters = [cluster("a"), cluster("b", gb=64)]
    needs = {"client_*": {"num_cpus": 2}, "mars": {"num_cpus": 1}, "x_*": {"num_cpus": 1}}
    assert [e.code for e in refusals(clusters, node_resources=needs)] == ["C014", "C014"]
    (error,) = refusals(clusters, node_resources={"client_*": {"num_cpus": 2}})
    assert "client_0 and 11 other nodes need 2 CPU" in error.message
    assert plan_of(clusters, nodes=2, node_resources={"client_*": {"num_cpus": 2}}, resources={"num_cpus": 2})
    needs = {"client_0": {"memory_mb": 9_000}}
    (error,) = refusals(clusters, node_resources=needs, placement={"client_0": "a"})
    assert error.code == "C019" and "of the clusters that the placement allows" in error.message


def test_a_cluster_that_does_not_tell_its_memory_is_not_refused_for_it() -> None:
    silent = cluster("silent", gb=0)
    assert sizes(plan_of([silent], node_resources={"client_1": {"memory_mb": 10**6}})) == {"silent": 12}


def test_a_cluster_that_is_away_is_waited_for_where_only_it_will_do() -> None:
    clusters = [cluster("here"), cluster("away", gb=64, alive=False)]
    plan = plan_of(clusters, node_resources={"client_3": {"memory_mb": 20_000}})
    assert [node for node, where in plan.assignment.items() if where == "away"] == ["client_3"]
    everybody = plan_of(clusters, node_resources={"client_*": {"memory_mb": 20_000}})
    assert sizes(everybody) == {"away": 12}


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shares_follow_the_slots_that_the_federation_can_have(strategy: str) -> None:
    def shares(clusters: list[ClusterInfo], **keys: Any) -> dict[str, int]:
        return sizes(plan_of(clusters, assignment_strategy=strategy, **keys))

    large, small = cluster("large", slots=6, cpus=6.0), cluster("small", slots=2)
    assert shares([large, small]) == {"large": 9, "small": 3}
    assert shares([cluster("large", slots=6, cpus=6.0, quota=2), small]) == {"large": 6, "small": 6}
    assert shares([large, small], max_slots_per_cluster=2) == {"large": 6, "small": 6}
    # Two slots of two CPUs fit on four.
    resources = {"num_cpus": 2}
    assert shares([cluster("large", slots=6, cpus=4.0), small], resources=resources) == {"large": 8, "small": 4}


def test_a_cluster_without_room_for_one_slot_takes_nothing_unless_all_are_like_that() -> None:
    clusters = [cluster("small"), cluster("large", slots=2, cpus=8.0)]
    plan = plan_of(clusters, resources={"num_cpus": 4})
    assert sizes(plan) == {"large": 12} and plan.feasible
    plan = plan_of(clusters, resources={"num_cpus": 64})
    assert sizes(plan) == {"small": 6, "large": 6} and not plan.feasible
    assert len(plan.problems) == 2


# ---------------------------------------------------------------- patterns in placement


def test_a_pattern_places_all_that_match_and_have_no_entry_of_their_own() -> None:
    clusters = [
        cluster("a", labels={"region": "eu"}),
        cluster("b", labels={"region": "eu", "disk": "ssd"}),
        cluster("c"),
    ]
    placement = {"client_*": {"region": "eu"}, "client_1?": {"disk": "ssd"}, "client_3": "c"}
    plan = plan_of(clusters, placement=placement)
    assert plan.assignment["client_3"] == "c" and plan.assignment["client_11"] == "b"
    assert {where for node, where in plan.assignment.items() if node != "client_3"} == {"a", "b"}


def test_patterns_that_leave_nothing_are_refused() -> None:
    clusters = [cluster("a"), cluster("b")]
    errors = refusals(clusters, placement={"client_*": "a", "client_1?": "b", "mars_*": "a"})
    assert [error.code for error in errors] == ["C014", "C014"]
    assert "node client_10: no cluster is left by all patterns" in errors[0].message
    assert "no node matches 'mars_*'" in errors[1].message


# ---------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("needs", "code", "place"),
    [
        ([1], "C006", "node_resources"),
        ({"client_0": 3}, "C006", "node_resources"),
        ({"client_0": {"num_gpus": -1}}, "C007", "node_resources.client_0.num_gpus"),
        ({"client_0": {"num_gpus": "one"}}, "C006", "node_resources.client_0.num_gpus"),
        ({"client_0": {"num_gpu": 1}}, "C005", "node_resources.client_0.num_gpu"),
        ({"client_0": {"memory_mb": 1.5}}, "C006", "node_resources.client_0.memory_mb"),
    ],
)
def test_needs_that_make_no_sense_are_refused_where_they_stand(needs: Any, code: str, place: str) -> None:
    (error,) = refusals([cluster("a")], node_resources=needs)
    assert (error.code, place in error.message) == (code, True), error
    assert code != "C005" or "num_gpus" in error.message
