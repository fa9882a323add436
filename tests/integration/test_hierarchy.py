"""Rounds within groups and one model for all of them every so many rounds, on a whole fabric without Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf import FederatedBase
from icrf.client import Fabric
from icrf.errors import ConfigError, RunError
from icrf.federation.node import FederatedNode
from icrf.learning.partition import PARTITIONERS
from icrf.protocol import COMPLETED, Plan
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, facts, follow, follow_until

HIERARCHY = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy"}
STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
NUM_CLIENTS = 6
NODES = ["server_0", *(f"client_{i}" for i in range(NUM_CLIENTS)), "server_1", "server_2"]
HEADERS = 1.05


def config_of(**keys: Any) -> FederationConfig:
    data = {
        "federation_id": "hier",
        "number_of_clients": NUM_CLIENTS,
        "federated_learning_rounds": 5,
        "number_of_groups": 3,
        "global_every": 3,
        "batch_size": 64,
        "learning_rate": 0.1,
        "data_distribution_kind": "dir",
        **HIERARCHY,
        **keys,
    }
    return FederationConfig.from_mapping(data)


@cache
def alone(global_every: int = 3) -> tuple[str, list[Any]]:
    with InlineFabric(1) as fabric:
        info, rounds = completed(fabric, build_submission(config_of(global_every=global_every)))
    return info.model_sha256, [facts(r) for r in rounds]


# ---------------------------------------------------------------- equal bits, and what they are


@pytest.mark.parametrize("strategy", ["locality", "round_robin"])
@pytest.mark.parametrize("clusters", [2, 3])
def test_every_round_has_the_same_bits_on_any_number_of_clusters(clusters: int, strategy: str) -> None:
    with InlineFabric(clusters, num_slots=clusters) as fabric:
        info, rounds = completed(fabric, build_submission(config_of(assignment_strategy=strategy)))
    assert len(info.clusters) == clusters
    assert (info.model_sha256, [facts(r) for r in rounds]) == alone()


def test_any_placement_of_any_node_gives_the_same_bits() -> None:
    @settings(max_examples=8, derandomize=True, database=None)
    @given(st.lists(st.integers(1, 4), min_size=len(NODES), max_size=len(NODES)), st.integers(1, 3))
    def check(owners: list[int], num_slots: int) -> None:
        placement = {node: f"local-{owner}" for node, owner in zip(NODES, owners, strict=True)}
        with InlineFabric(4, num_slots=num_slots) as fabric:
            info, rounds = completed(fabric, build_submission(config_of(placement=placement)))
        assert (info.model_sha256, [facts(r) for r in rounds]) == alone()

    check()


def test_a_model_for_all_groups_every_third_round_and_at_the_end() -> None:
    model, rounds = alone()
    consensus = {number: sha256 for number, _, _, _, sha256, *_ in rounds if sha256}
    assert sorted(consensus) == [3, 5]
    assert consensus[5] == model
    assert len({r[2] for r in rounds}) == 5
    assert [r[5] for r in rounds] == [NUM_CLIENTS] * 5


@pytest.mark.parametrize("keys", [{}, {"aggregation_sample_scaling": False}, {"clip_norm": 0.2, "evaluate_every": 2}])
def test_merging_in_every_round_is_federated_averaging_bit_by_bit(keys: dict[str, Any]) -> None:
    with InlineFabric(3) as fabric:
        star, plain = completed(fabric, build_submission(config_of(**keys, **STAR)))
        grouped, rounds = completed(fabric, build_submission(config_of(**keys, global_every=1)))
    assert [r.consensus_sha256 for r in rounds] == [r.model_sha256 for r in plain]
    assert [r.metrics for r in rounds] == [r.metrics for r in plain]
    assert grouped.model_sha256 == star.model_sha256


def test_one_group_is_federated_averaging_whatever_the_period() -> None:
    with InlineFabric(2) as fabric:
        star, _ = completed(fabric, build_submission(config_of(**STAR)))
        grouped, _ = completed(fabric, build_submission(config_of(number_of_groups=1)))
    assert grouped.model_sha256 == star.model_sha256


class Traced(FederatedNode):
    """Remembers what it started from and what it made of it, by (round, node)."""

    seen: ClassVar[dict[tuple[int, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}

    def train(self, **kwargs: Any) -> dict[str, float]:
        before = self.context.model.snapshot()
        metrics = super().train(**kwargs)
        self.seen[self.round, self.context.index] = (before, self.context.model.snapshot())
        return metrics


def test_a_group_starts_from_the_mean_of_its_own_members_until_the_groups_are_merged() -> None:
    Traced.seen.clear()
    submission = build_submission(config_of(client_template="local:Traced", federated_learning_rounds=4))
    with InlineFabric(2, templates={"local:Traced": Traced}) as fabric:
        run_id = fabric.port.submit(submission).run_id
        follow(fabric, run_id)
        (activation,) = fabric.store.rows("activations", (run_id,))
    samples, seen = dict(activation.row["samples"]), Traced.seen

    def mean_of(number: int, nodes: tuple[int, ...]) -> np.ndarray[Any, Any]:
        total = sum(samples[i] * seen[number, i][1].astype(np.float64) for i in nodes)
        return np.asarray(total / sum(samples[i] for i in nodes))

    everybody = tuple(range(1, NUM_CLIENTS + 1))
    for number, groups in ((2, [(1, 2), (3, 4), (5, 6)]), (3, [(1, 2), (3, 4), (5, 6)]), (4, [everybody])):
        starts = []
        for group in groups:
            starts += [seen[number, i][0] for i in group]
            expected = mean_of(number - 1, group)
            assert all(np.abs(seen[number, i][0] - expected).max() <= 1e-6 * np.abs(expected).max() for i in group)
        assert len({start.tobytes() for start in starts}) == len(groups)


def test_metrics_within_groups_are_the_mean_weighted_by_samples() -> None:
    class Known(FederatedNode):
        def evaluate(self, phase: str = "test") -> dict[str, float]:
            return {"score": float(self.context.index)}

    submission = build_submission(config_of(server_template="local:Known", federated_learning_rounds=3))
    with InlineFabric(2, templates={"local:Known": Known}) as fabric:
        run_id = fabric.port.submit(submission).run_id
        _, rounds = follow(fabric, run_id)
        (activation,) = fabric.store.rows("activations", (run_id,))
    samples = dict(activation.row["samples"])
    above = {1: 0, 2: 0, 3: 7, 4: 7, 5: 8, 6: 8}
    mean = sum(above[node] * count for node, count in samples.items()) / sum(samples.values())
    assert [r.metrics["score"] for r in rounds] == [pytest.approx(mean, rel=1e-9), pytest.approx(mean, rel=1e-9), 0.0]


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(("clusters", "groups"), [(2, 2), (3, 3), (2, 3)])
def test_whole_groups_exchange_nothing_until_they_are_merged(clusters: int, groups: int) -> None:
    submission = build_submission(config_of(number_of_groups=groups))
    with InlineFabric(clusters) as fabric:
        plan: Plan = fabric.port.plan(submission)
        _, rounds = completed(fabric, submission)
    homes = {
        group: {plan.assignment[n] for n in (*_members(plan, group), group)} for group in set(plan.groups.values())
    }
    assert all(len(home) == 1 for home in homes.values())
    # One model down and one exact partial up for each cluster but the root's.
    per_merge = (clusters - 1) * (4 + 8) * plan.num_parameters
    assert (plan.bytes_inter_cluster_within_groups, plan.bytes_inter_cluster_per_merge) == (0, per_merge)
    assert plan.bytes_inter_cluster_total == pytest.approx(2 * per_merge, abs=len(rounds) * clusters)
    for r in rounds:
        expected = per_merge if r.number in (3, 5) else 0
        assert expected <= r.bytes_inter_cluster <= expected * HEADERS


def test_a_divided_group_costs_a_model_and_a_partial_per_cluster_and_round() -> None:
    placement = {"server_0": "local-1", "client_0": "local-2", "client_1": "local-3"}
    placement |= {node: "local-1" for node in NODES if node not in placement}
    submission = build_submission(config_of(placement=placement))
    with InlineFabric(3) as fabric:
        plan: Plan = fabric.port.plan(submission)
        _, rounds = completed(fabric, submission)
    # Models to two clusters, partials from both; in merging rounds as well, for no aggregator is away from the root.
    per_round = 2 * (4 + 8) * plan.num_parameters
    assert (plan.bytes_inter_cluster_within_groups, plan.bytes_inter_cluster_per_merge) == (per_round, per_round)
    assert all(per_round <= r.bytes_inter_cluster <= per_round * HEADERS for r in rounds)


def _members(plan: Plan, aggregator: str) -> list[str]:
    return [node for node, above in plan.groups.items() if above == aggregator]


# ---------------------------------------------------------------- crashes, and runs that end otherwise


@pytest.mark.parametrize(("cluster", "slot"), [("local-1", 0), ("local-2", 0), ("local-2", 1)])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_killed_host_changes_no_bit(cluster: str, slot: int, number: int) -> None:
    """In a round within groups, in one that merges them, and in the last; rounds 2 and 4 have checkpoints."""
    reached, goes_on = threading.Event(), threading.Event()

    class Waits(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            if self.round == number and not reached.is_set():
                reached.set()
                goes_on.wait()
            return super().train(**kwargs)

    submission = build_submission(config_of(client_template="local:Waits", checkpoint_every=2))
    with InlineFabric(2, templates={"local:Waits": Waits}) as fabric:
        run_id = fabric.port.submit(submission).run_id
        reached.wait()
        fabric.substrates[cluster].kill_host(run_id, slot)
        goes_on.set()
        info, rounds = follow(fabric, run_id)
    assert (info.status, info.error_json) == (COMPLETED, "")
    assert [r.model_sha256 for r in rounds] == [fact[2] for fact in alone()[1]]
    assert info.model_sha256 == alone()[0]


def test_a_new_mediator_merges_where_the_old_one_did() -> None:
    """What was the last round for the old mediator merged; after the restart, and a loss of state, it does so again."""
    with InlineFabric(2) as fabric:
        submission = build_submission(config_of(federated_learning_rounds=2, checkpoint_every=0), keep=True)
        run_id = fabric.port.submit(submission).run_id
        assert [bool(r.consensus_sha256) for r in follow_until(fabric, run_id, 2)] == [False, True]
        fabric.port.advance(run_id, "run", 4)
        follow_until(fabric, run_id, 4)
        fabric.restart_mediator()
        fabric.substrates["local-2"].kill_host(run_id, 1)
        fabric.port.advance(run_id, "run", 7)
        rounds = follow_until(fabric, run_id, 7)
    assert [bool(r.consensus_sha256) for r in rounds] == [False, True, True, True, False, True, True]
    assert rounds[-1].generation > 1


def test_a_run_that_is_stopped_within_groups_ends_with_a_model_for_all() -> None:
    reached, goes_on = threading.Event(), threading.Event()

    class Waits(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            if self.round == 4 and not reached.is_set():
                reached.set()
                goes_on.wait()
            return super().train(**kwargs)

    submission = build_submission(
        config_of(client_template="local:Waits", federated_learning_rounds=50, global_every=10)
    )
    with InlineFabric(2, templates={"local:Waits": Waits}) as fabric:
        run_id = fabric.port.submit(submission).run_id
        reached.wait()
        fabric.port.advance(run_id, "stop")
        goes_on.set()
        info, rounds = follow(fabric, run_id)
    assert info.status == COMPLETED
    assert [r.number for r in rounds if r.consensus_sha256] == [5] and len(rounds) == 5
    assert info.model_sha256 == rounds[-1].consensus_sha256


def test_a_target_is_reached_by_the_model_for_all_groups_only() -> None:
    keys = {"target_accuracy": 0.2, "federated_learning_rounds": 9, "global_every": 4}
    with InlineFabric(2) as fabric:
        info, rounds = completed(fabric, build_submission(config_of(**keys)))
    assert rounds[2].metrics["accuracy"] >= 0.2
    assert info.rounds_to_target == len(rounds) == 4
    assert info.model_sha256 == rounds[-1].consensus_sha256


def test_members_of_groups_can_neither_leave_nor_join() -> None:
    with InlineFabric(2) as fabric:
        submission = build_submission(config_of(federated_learning_rounds=2), keep=True)
        run_id = fabric.port.submit(submission).run_id
        follow_until(fabric, run_id, 2)
        with pytest.raises(RunError, match=r"F005 .*every member of a group"):
            fabric.port.change_nodes(run_id, remove=["client_0"])


def test_a_federation_in_a_programs_hands_has_a_server_per_group() -> None:
    config = config_of(federated_learning_rounds=3)
    with InlineFabric(2) as inline:
        base = FederatedBase(config, fabric=Fabric(inline.port))
        base.train(blocking=True)
        models = base.pull_version(["server_0", "server_1", "server_2"])
        assert sorted(base.test()) == ["server_0", "server_1", "server_2"]
        base.stop()
    assert isinstance(models, list)
    first, *others = [model["model"] for model in models]
    assert all(np.array_equal(first[name], other[name]) for other in others for name in first)


# ---------------------------------------------------------------- communities


def by_communities(labels: np.ndarray, num_parts: int, seed: int, beta: float) -> list[np.ndarray]:
    """Client k has the digits of community k mod 3: 0-2, 3-5 or 6-9."""
    groups = [np.flatnonzero(np.isin(labels, digits)) for digits in ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9])]
    pieces = [np.array_split(group, len(range(k, num_parts, 3))) for k, group in enumerate(groups)]
    return [pieces[k % 3][k // 3] for k in range(num_parts)]


@pytest.fixture
def planted() -> Iterator[dict[str, Any]]:
    PARTITIONERS.add("by_communities", by_communities)
    yield {"data_distribution_kind": "by_communities", "number_of_clients": 9, "group_by": "labels"}
    del PARTITIONERS._objects["by_communities"]


def test_communities_are_those_that_were_planted_and_live_together(planted: dict[str, Any]) -> None:
    submission = build_submission(config_of(**planted))
    clustered = build_submission(config_of(**planted, schema="ClusterFederatedLearning"))
    assert (clustered.flow, clustered.nodes, clustered.graph) == (submission.flow, submission.nodes, submission.graph)
    found = []
    for clusters in (1, 2, 3):
        with InlineFabric(clusters) as fabric:
            plan: Plan = fabric.port.plan(submission)
            info, rounds = completed(fabric, submission)
        found.append([info.model_sha256, *(facts(r) for r in rounds)])
        assert plan.bytes_inter_cluster_within_groups == 0
        assert len(set(plan.assignment.values())) == clusters
    assert {group: _members(plan, group) for group in set(plan.groups.values())} == {
        f"server_{k}": [f"client_{i}" for i in range(9) if i % 3 == k] for k in range(3)
    }
    assert found[0] == found[1] == found[2]


def test_a_communitys_model_is_worth_more_to_its_members(planted: dict[str, Any]) -> None:
    keys = {
        **planted,
        "evaluate_clients": True,
        "federated_learning_rounds": 8,
        "global_every": 8,
        "number_of_epochs": 3,
    }
    found = {}
    with InlineFabric(1) as fabric:
        for group_by in ("labels", "contiguous"):
            _, rounds = completed(fabric, build_submission(config_of(**{**keys, "group_by": group_by})))
            found[group_by] = [r.metrics for r in rounds]
    # What clients measure on their own data in the last round is what rounds within groups have made.
    own, mixed = (found[group_by][-1]["eval_accuracy"] for group_by in ("labels", "contiguous"))
    assert own > mixed + 0.1
    assert found["labels"][-2]["accuracy"] < found["contiguous"][-2]["accuracy"]


def test_a_grouping_of_ones_own_is_asked_where_the_federation_is_submitted(planted: dict[str, Any]) -> None:
    keys = {**planted, "group_by": f"{__name__}:alternating", "number_of_groups": 2}
    submission = build_submission(config_of(**keys))
    with InlineFabric(2) as fabric:
        plan: Plan = fabric.port.plan(submission)
    assert _members(plan, "server_1") == [f"client_{i}" for i in range(1, 9, 2)]
    with pytest.raises(ConfigError, match=r"C018 group_by: .*left group 3 empty"):
        build_submission(config_of(**{**keys, "number_of_groups": 4}))


def alternating(num_clients: int, num_groups: int, client_ids: tuple[str, ...]) -> list[int]:
    """A user's own grouping; it makes three groups of four that are asked for."""
    assert client_ids[0] == "client_0"
    return [i % min(num_groups, 3) for i in range(num_clients)]
