"""The plan of a federation before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from icrf.comparison import COMPARED, alternatives, compare_plans
from icrf.console.plan_view import limit_text, show_plan
from icrf.console.terminal import Terminal
from icrf.errors import ConfigError, ConfigErrors, RoutingError, TopologyError
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    Capacity,
    ClusterInfo,
    Fingerprint,
    LinkBytes,
    MeasuredLink,
    NodeSpec,
    Resources,
    Submission,
    TensorSpec,
)
from icrf.topology import build_topology
from icrf_mediator.feasibility import slot_resources
from icrf_mediator.planning import HOST_BYTES, make_plan

AVX2 = Fingerprint("2.13", "AVX2", "on", 1, "cpu")
AVX512 = Fingerprint("2.13", "AVX512", "on", 1, "cpu")


def cluster(
    name: str, slots: int = 2, cpus: float = 2.0, gpus: float = 0.0, ray_nodes: int = 1, like: Fingerprint = AVX2
) -> ClusterInfo:
    machines = (Resources(cpus / ray_nodes, gpus / ray_nodes),) * ray_nodes
    return ClusterInfo(name, "x", Capacity(slots, cpus, gpus, 8 << 30, machines), like)


def submission(topology: str, num_nodes: int, flow: str = DECENTRALIZED, **config: Any) -> Submission:
    roles = ["train-eval"] * num_nodes
    ids = [f"client_{i}" for i in range(num_nodes)]
    if flow == CENTRALIZED:
        roles[0], ids = "aggregate", ["server", *ids[:-1]]
    return Submission(
        client_request_id="1",
        config_json=json.dumps({"federation_id": "fed", "federated_learning_rounds": 10, **config}),
        flow=flow,
        nodes=tuple(NodeSpec(i, role) for i, role in zip(ids, roles, strict=True)),
        graph=build_topology(topology, num_nodes, {}).to_graph(),
        layout=(TensorSpec("b", (10,), "float32"), TensorSpec("w", (9, 10), "float32")),
    )


def test_a_ring_over_two_clusters() -> None:
    plan, assignment = make_plan(submission("ring", 8, evaluate_every=3), [cluster("eu"), cluster("us")])
    assert plan.federation == "fed" and plan.flow == DECENTRALIZED and plan.strategy == "locality"
    assert plan.clusters == ("eu", "us") and assignment.clusters == (0, 0, 0, 0, 1, 1, 1, 1)
    assert plan.assignment == {f"client_{i}": "eu" if i < 4 else "us" for i in range(8)}
    assert (plan.num_edges, plan.cut_edges) == (8, 2)
    assert plan.links == (LinkBytes("eu", "us", 800), LinkBytes("us", "eu", 800))
    assert plan.num_parameters == 100
    assert plan.bytes_inter_cluster_per_round == 4 * 400
    assert plan.bytes_inter_cluster_per_evaluation == 800
    # Rounds 3, 6, 9 and the last one are evaluated.
    assert plan.bytes_inter_cluster_total == 10 * 1600 + 4 * 800
    assert plan.slem == pytest.approx(0.804738, abs=1e-6) and plan.slem_kind == "exact"
    assert plan.rounds_to_consensus == 64
    assert plan.slots == {"eu": 2, "us": 2}
    assert plan.feasible and plan.problems == ()
    assert set(plan.explanation) == set(plan.assignment)
    assert plan.peak_memory_bytes > 2 * HOST_BYTES


def test_a_star_over_three_clusters() -> None:
    plan, _ = make_plan(submission("star", 7, CENTRALIZED), [cluster("a"), cluster("b"), cluster("c")])
    assert plan.bytes_inter_cluster_per_round == 3 * 2 * 400
    assert plan.bytes_inter_cluster_per_evaluation == 0 and plan.bytes_inter_cluster_total == 24_000
    assert (plan.slem, plan.slem_kind, plan.rounds_to_consensus) == (-1.0, "none", -1)


def test_a_plan_tells_what_each_cluster_needs_and_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    clusters = [cluster("a"), cluster("b", like=AVX512), cluster("c", ray_nodes=1)]
    plan, _ = make_plan(submission("ring", 9), clusters)
    assert plan.memory.keys() == {"a", "b", "c"} and max(plan.memory.values()) == plan.peak_memory_bytes
    assert plan.lacking.keys() == {"b"} and "AVX512" in plan.lacking["b"] and not plan.feasible
    show_plan(Terminal(plain=True), plan)
    fits = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] in ("a ", "b ", "c ")]
    assert [line[5] for line in fits[:3]] == ["yes", "no", "yes"]
    assert make_plan(submission("ring", 9), [])[0].lacking == {}


def test_strategies_are_compared_on_the_same_clusters() -> None:
    clusters = [cluster("a"), cluster("b")]
    plans = compare_plans(lambda asked: make_plan(asked, clusters)[0], submission("ring", 8, seed=3))
    assert next(iter(plans)) == "locality" and {name: plan.strategy for name, plan in plans.items()} == {
        name: name for name in COMPARED
    }
    assert (plans["locality"].cut_edges, plans["capacity"].cut_edges, plans["round_robin"].cut_edges) == (2, 2, 8)
    assert min(plan.bytes_inter_cluster_total for plan in plans.values()) == (
        plans["locality"].bytes_inter_cluster_total
    )
    assert alternatives(plans)["round_robin"]["cut_edges"] == 8


def test_a_plan_made_again_moves_as_few_nodes_as_possible() -> None:
    ring = submission("ring", 12)
    before, _ = make_plan(ring, [cluster("a"), cluster("b"), cluster("c")])
    after, _ = make_plan(ring, [cluster("a"), cluster("c")], previous=before.assignment)
    moved = [node for node, where in after.assignment.items() if where != before.assignment[node]]
    assert moved == [node for node, where in before.assignment.items() if where == "b"]
    assert after.cut_edges == 2 and all("its cluster is gone" in after.explanation[node] for node in moved)


def test_slow_links_are_avoided() -> None:
    line = submission("line", 9)
    clusters = [cluster("a"), cluster("b"), cluster("c")]
    slow = [MeasuredLink("a", "b", 1e3, 1.0), MeasuredLink("b", "c", 1e8, 0.01), MeasuredLink("a", "c", 1e8, 0.01)]
    plan, _ = make_plan(line, clusters, measured=slow)
    assert {frozenset((link.source, link.target)) for link in plan.links} == {frozenset("ac"), frozenset("bc")}
    # Slow enough, it is worth two more cut edges not to close a ring over it.
    ring, _ = make_plan(submission("ring", 12), clusters, measured=slow)
    assert {frozenset((link.source, link.target)) for link in ring.links} == {frozenset("ac"), frozenset("bc")}
    assert ring.cut_edges == 4


def test_a_plan_tells_how_long_links_take(capsys: pytest.CaptureFixture[str]) -> None:
    clusters = [cluster("a"), cluster("b")]
    plan, _ = make_plan(submission("ring", 8), clusters, [MeasuredLink("a", "b", 1600.0, 1.0)])
    assert plan.links == (LinkBytes("a", "b", 800, 1.0), LinkBytes("b", "a", 800, 0.0))
    show_plan(Terminal(plain=True), plan)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "b", "800", "B", "1.000"] in shown and ["b", "a", "800", "B", "–"] in shown
    show_plan(Terminal(plain=True), make_plan(submission("ring", 8), clusters)[0])
    assert "seconds per round" not in capsys.readouterr().out


def test_a_plan_tells_how_many_models_a_server_learns(capsys: pytest.CaptureFixture[str]) -> None:
    for schema, expected in (("ClusterFederatedLearning", 3), ("TraditionalFederatedLearning", 1)):
        keys = {"federated_learning_schema": schema, "number_of_models": 3}
        plan, _ = make_plan(submission("star", 7, CENTRALIZED, **keys), [cluster("a")])
        assert plan.num_models == expected
        show_plan(Terminal(plain=True), plan)
        assert ("models        3, of which every client gets all and trains one" in capsys.readouterr().out) == (
            expected == 3
        )


def test_a_plan_tells_what_mixing_leads_to() -> None:
    plan, _ = make_plan(submission("ring", 8), [cluster("a")])
    assert plan.mixing is not None and plan.mixing.doubly_stochastic and plan.mixing.aperiodic
    assert (plan.mixing.limit, plan.mixing.slem) == ("mean", plan.slem)
    assert "approaches the mean" in limit_text(plan)
    plan, _ = make_plan(submission("line", 8, mixing="uniform"), [cluster("a")])
    assert plan.mixing is not None and not plan.mixing.column_stochastic and plan.mixing.limit == "weighted mean"
    assert "columns do not" in limit_text(plan)
    plan, _ = make_plan(submission("line", 8, mixing="push_sum"), [cluster("a")])
    assert plan.mixing is not None and plan.mixing.push_sum and "push-sum" in limit_text(plan)
    plan, _ = make_plan(submission("star", 8, CENTRALIZED), [cluster("a")])
    assert plan.mixing is None and limit_text(plan) == ""


def test_a_mediator_mixes_by_the_weights_that_came_and_loads_no_code() -> None:
    sent = submission("line", 2, mixing="somewhere:rule")
    swapping = replace(sent, graph=replace(sent.graph, weights=(1.0, 1.0), self_weights=(0.0, 0.0)))
    plan, _ = make_plan(swapping, [cluster("a")])
    assert plan.mixing is not None and not plan.mixing.aperiodic and plan.rounds_to_consensus == -1
    assert "no agreement: the mixing matrix is periodic" in limit_text(plan)
    with pytest.raises(ConfigError) as caught:
        make_plan(sent, [cluster("a")])
    assert caught.value.code == "C010"
    for weights, code in (((1.0,), "T010"), ((1.0, -1.0), "T013")):
        with pytest.raises(TopologyError) as refused:
            make_plan(replace(sent, graph=replace(sent.graph, weights=weights, self_weights=(0.0, 0.0))), [])
        assert refused.value.code == code


@pytest.mark.parametrize(("rounds", "every", "evaluations"), [(10, 1, 10), (10, 5, 2), (10, 99, 1), (0, 1, 0)])
def test_evaluated_rounds(rounds: int, every: int, evaluations: int) -> None:
    sent = submission("ring", 4, federated_learning_rounds=rounds, evaluate_every=every)
    plan, _ = make_plan(sent, [cluster("a"), cluster("b")])
    assert plan.bytes_inter_cluster_total == rounds * 1600 + evaluations * 800


def test_equal_input_gives_an_equal_plan() -> None:
    clusters = [cluster("a"), cluster("b"), cluster("c")]
    assert make_plan(submission("ring", 16), clusters) == make_plan(submission("ring", 16), clusters)


def test_slots_are_no_more_than_nodes_and_only_where_nodes_are() -> None:
    clusters = [cluster("a", slots=8), cluster("b", slots=8)]
    placement = {f"client_{i}": "b" for i in range(3)}
    plan, _ = make_plan(submission("ring", 3, placement=placement), clusters)
    assert plan.slots == {"b": 3} and plan.links == ()
    assert plan.explanation["client_0"] == "pinned to b"


def test_without_a_cluster() -> None:
    plan, assignment = make_plan(submission("ring", 4, placement={"client_0": "eu"}), [])
    assert not plan.feasible and plan.problems == ("no cluster is registered: start a fabric-agent",)
    assert assignment.clusters == () and plan.assignment == {} and plan.slots == {}
    assert plan.num_edges == 4 and plan.cut_edges == 0 and plan.slem > 0


@pytest.mark.parametrize(
    ("config", "clusters", "problem"),
    [
        (
            {"resources": {"num_cpus": 64}},
            [cluster("us-east")],
            "cluster us-east: 2 slots x 64 CPU = 128 CPU needed, 2 CPU in total",
        ),
        (
            {"resources": {"num_cpus": 1, "num_gpus": 0.5}},
            [cluster("a")],
            "cluster a: 2 slots x 0.5 GPU = 1 GPU needed, 0 GPU in total",
        ),
        (
            {"placement_group_strategy": "STRICT_SPREAD"},
            [cluster("a", slots=4, cpus=6, ray_nodes=3)],
            "cluster a: STRICT_SPREAD needs 4 slots of 1 CPU on a Ray node each, 3 fit; "
            "3 Ray nodes in total, the largest has 2 CPU",
        ),
        ({"device": "cuda"}, [cluster("a")], "cluster a: device cuda needs a GPU, 0 GPU in total"),
        ({}, [cluster("a", slots=0)], "cluster a: 1 slot needed, 0 slots in total"),
        (
            {},
            [cluster("a"), cluster("b", like=AVX512)],
            "clusters a and b: numeric fingerprint differs in cpu_capability, AVX2 against AVX512; "
            "determinism strict needs it equal",
        ),
    ],
)
def test_what_is_lacking_is_said_with_numbers(
    config: dict[str, Any], clusters: list[ClusterInfo], problem: str
) -> None:
    plan, _ = make_plan(submission("ring", 8, **config), clusters)
    assert plan.problems == (problem,) and not plan.feasible


def test_kinds_of_gpus_matter_to_who_computes_on_them() -> None:
    def gpus(name: str, kind: str) -> ClusterInfo:
        found = cluster(name, gpus=1)
        return replace(found, fingerprint=replace(found.fingerprint, device=kind))

    one, other, two_kinds = gpus("a", "cuda:T4"), gpus("b", "cuda:H100"), gpus("a", "cuda:H100+T4")
    assert make_plan(submission("ring", 4), [one, other, cluster("c")])[0].feasible
    plan, _ = make_plan(submission("ring", 4, device="cuda"), [one, other])
    differs = "numeric fingerprint differs in device, cuda:T4 against cuda:H100"
    assert plan.problems == (f"clusters a and b: {differs}; determinism strict needs it equal",)
    plan, _ = make_plan(submission("ring", 4, device="cuda"), [two_kinds])
    assert "differs within it, device cuda:H100+T4" in plan.problems[0]
    recorded = submission("ring", 4, device="cuda", determinism="recorded")
    assert make_plan(recorded, [two_kinds, other])[0].feasible


def test_mixed_fingerprints_matter_only_where_nodes_live_and_when_strict() -> None:
    clusters = [cluster("a"), cluster("b", like=AVX512)]
    assert make_plan(submission("ring", 4, determinism="recorded"), clusters)[0].feasible
    placement = {f"client_{i}": "a" for i in range(4)}
    assert make_plan(submission("ring", 4, placement=placement), clusters)[0].feasible


@pytest.mark.parametrize(
    ("config", "capacity", "num_slots", "expected"),
    [
        ({}, cluster("a", cpus=8), 2, (1.0, 0.0)),
        ({}, cluster("a", cpus=2), 3, (0.6666, 0.0)),
        ({"device": "cuda"}, cluster("a", cpus=8, gpus=1), 3, (1.0, 0.3333)),
        ({"device": "cuda"}, cluster("a", cpus=8, gpus=3), 4, (1.0, 0.5)),
        ({"device": "cuda"}, cluster("a", cpus=8, gpus=4), 2, (1.0, 1.0)),
        ({"device": "cpu"}, cluster("a", cpus=8, gpus=4), 2, (1.0, 0.0)),
        ({"resources": {"num_cpus": 3.0, "num_gpus": 0.25}}, cluster("a"), 2, (3.0, 0.25)),
    ],
)
def test_slot_resources(
    config: dict[str, Any], capacity: ClusterInfo, num_slots: int, expected: tuple[float, float]
) -> None:
    found = slot_resources(config, capacity, num_slots)
    assert (found.num_cpus, found.num_gpus) == pytest.approx(expected, abs=1e-12)


def test_memory_counts_the_coordinators_model_and_local_states() -> None:
    clusters = [cluster("a", slots=2)]
    star, _ = make_plan(submission("star", 5, CENTRALIZED), clusters)
    assert star.peak_memory_bytes == 2 * (HOST_BYTES + 3 * 400 + 800) + 400 + 800
    ring, _ = make_plan(submission("ring", 5), clusters)
    hosts = 2 * (HOST_BYTES + 3 * 400 + 800)
    assert (ring.peak_memory_bytes, ring.residents) == (hosts + 5 * 400 + 5 * 2 * 400, {"a": 5})
    few, _ = make_plan(submission("ring", 5, resident_nodes=1), clusters)
    assert (few.peak_memory_bytes, few.residents) == (hosts + 5 * 400 + 2 * 2 * 400, {"a": 2})
    together, _ = make_plan(submission("ring", 5, vectorize=4), clusters)
    assert together.peak_memory_bytes == ring.peak_memory_bytes + 2 * 2 * 4 * 400


@pytest.mark.parametrize(("megabytes", "active"), [(1, 2 * 1250), (None, 5000)])
def test_as_many_nodes_are_planned_to_be_active_as_memory_allows(megabytes: int | None, active: int) -> None:
    plan, _ = make_plan(submission("ring", 5000, resident_memory_mb=megabytes), [cluster("a")])
    assert plan.residents == {"a": active}


def test_what_is_wrong_with_the_submission_is_raised() -> None:
    with pytest.raises(ConfigErrors, match="C014"):
        make_plan(submission("ring", 4, placement={"client_0": "mars", "client_9": "a"}), [cluster("a")])
    with pytest.raises(ConfigError) as caught:
        make_plan(submission("ring", 4, assignment_strategy="nearest"), [cluster("a")])
    assert caught.value.code == "C010"
    with pytest.raises(RoutingError):
        make_plan(submission("line", 4, CENTRALIZED), [cluster("a")])
