"""Models with running statistics, counters and private keys: the same bits on any number of clusters."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from icrf import values
from icrf.errors import IcrfError, error_from_json
from icrf.federation.node import FederatedNode
from icrf.protocol import IDLE, TERMINAL, Plan, RoundResult
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, follow

STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
RING = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}
HIERARCHY = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy"}
NUM_CLIENTS = 6
BATCHES = -(-240 // 32)


def with_batch_norm(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(input_shape[0], 32),
            norm=nn.BatchNorm1d(32),
            relu=nn.ReLU(),
            output=nn.Linear(32, num_classes),
        )
    )


class Numbering(FederatedNode):
    """Counts to a number of its own; the numbers straddle what one element of the flat buffer holds."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        number = (2_000_000, 2_000_000, 2_190_000, 2_190_000, 5_200_000, 5_200_001)[self.context.index - 1]
        self.model.norm.num_batches_tracked.fill_(number)
        return {}


class Diverging(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        self.model.norm.running_mean.fill_(np.inf)
        return {}


class Reshaping(FederatedNode):
    def train(self, **kwargs: Any) -> dict[str, float]:
        self.model.norm.num_batches_tracked = self.model.norm.num_batches_tracked.float()
        return {}


class Growing(FederatedNode):
    """One node makes a layer wider, after others and before others of its host."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        found = super().train(**kwargs)
        if self.id == "client_1":
            self.model.hidden.weight.data = torch.zeros([size + 1 for size in self.model.hidden.weight.shape])
        return found


class Remembering(FederatedNode):
    """Keeps a copy of its private tensors in its state: both must be of the same round, whatever happens."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        norm = self.model.norm
        if self.state:
            np.testing.assert_array_equal(self.state["mean"], norm.running_mean.numpy())
            assert self.state["batches"] == norm.num_batches_tracked
        found = super().train(**kwargs)
        self.state.update(mean=norm.running_mean.numpy().copy(), batches=int(norm.num_batches_tracked))
        return found


class Counting(FederatedNode):
    """Trains as long as it has not trained often: what it remembers decides what it does."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        self.state["trained"] = self.state.get("trained", 0) + 1
        return super().train(epochs=self.state["trained"])


def config_of(**keys: Any) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": "typed",
            "number_of_clients": NUM_CLIENTS,
            "federated_learning_rounds": 3,
            "learning_rate": 0.1,
            "batch_size": 32,
            "model_type": f"{__name__}:with_batch_norm",
            "evaluate_every": 3,
            **keys,
        }
    )


def run_on(clusters: int, config: FederationConfig) -> tuple[list[RoundResult], Mapping[str, Any], Plan, int]:
    """Rounds, final model by name, plan, and bytes between clusters."""
    submission = build_submission(config)
    with InlineFabric(clusters) as fabric:
        plan = fabric.port.plan(submission)
        info, rounds = completed(fabric, submission)
        model = b"".join(fabric.port.fetch(info.run_id, "model.safetensors"))
    return rounds, safetensors.numpy.load(model), plan, info.bytes_inter_cluster


def hashes(rounds: list[RoundResult]) -> list[Any]:
    return [(r.model_sha256, r.consensus_sha256, sorted(r.metrics.items())) for r in rounds]


@pytest.mark.parametrize(
    "keys",
    [
        STAR,
        RING,
        HIERARCHY,
        *({**schema, "private_keys": ["norm.*"]} for schema in (STAR, RING)),
        {**STAR, "private_keys": ["norm.*"], "sampled_clients": 2},
        {**STAR, "aggregation_strategy": "SCAFFOLD", "private_keys": ["norm.*"]},
        {**STAR, "aggregation_strategy": "DiLoCo", "optimizer": "AdamW", "learning_rate": 0.003},
        {**STAR, "aggregation_strategy": "Median"},
    ],
    ids=["star", "ring", "hierarchy", "FedBN", "ring private", "FedBN sampled", "FedBN SCAFFOLD", "DiLoCo", "Median"],
)
def test_typed_states_have_the_same_bits_on_any_number_of_clusters(keys: dict[str, Any]) -> None:
    config = config_of(**keys)
    one, model, _, _ = run_on(1, config)
    assert [r.number for r in one] == [1, 2, 3]
    for clusters in (2, 3):
        many, there, plan, crossed = run_on(clusters, config)
        assert hashes(many) == hashes(one)
        assert {name: array.tobytes() for name, array in there.items()} == {
            name: array.tobytes() for name, array in model.items()
        }
        attempts = sum(r.attempt for r in many)
        planned = plan.bytes_inter_cluster_per_round * attempts + plan.bytes_inter_cluster_per_evaluation
        assert 0.999 * planned <= crossed <= 1.1 * planned


def test_merged_groups_have_the_statistics_that_a_star_has() -> None:
    _, star, _, _ = run_on(1, config_of(**STAR))
    _, grouped, _, _ = run_on(2, config_of(**HIERARCHY, global_every=1))
    assert {name: array.tobytes() for name, array in grouped.items()} == {
        name: array.tobytes() for name, array in star.items()
    }


@pytest.mark.parametrize(
    "rule", [{"aggregation_strategy": "Median"}, {"aggregation_strategy": "TrimmedMean", "num_byzantine": 1}]
)
def test_a_robust_integer_is_the_median_of_the_integers(rule: dict[str, Any]) -> None:
    """Not that of the parts which stand for it: those of 5,200,000 are larger in one and smaller in the other."""
    keys = {"client_template": f"{__name__}:Numbering", "federated_learning_rounds": 1}
    _, model, _, _ = run_on(2, config_of(**STAR, **rule, **keys))
    assert model["norm.num_batches_tracked"] == 2_190_000


def test_running_statistics_are_learnt_and_counters_stay_integers() -> None:
    rounds, model, plan, _ = run_on(1, config_of(**STAR))
    assert plan.tensors == {"aggregated": 6, "mean": 2, "rounded": 1}
    assert model["norm.num_batches_tracked"].dtype == np.int64 and model["norm.num_batches_tracked"] == 3 * BATCHES
    assert model["norm.running_mean"].dtype == np.float32 and np.abs(model["norm.running_mean"]).max() > 0.1
    # The test set is evaluated with the averaged statistics: with those of the beginning it would be guessed.
    assert rounds[-1].metrics["accuracy"] > 0.8


@pytest.mark.parametrize("schema", [STAR, RING], ids=["star", "ring"])
def test_private_keys_stay_with_their_node(schema: dict[str, Any]) -> None:
    """FedBN (Li et al. 2021, arXiv 2102.07623)."""
    config = config_of(**schema, private_keys=["norm.*"], data_distribution_kind="pathological")
    submission = build_submission(config, keep=True)
    with InlineFabric(2) as fabric:
        plan = fabric.port.plan(submission)
        run_id = fabric.port.submit(submission).run_id
        for event in fabric.port.watch(run_id):
            assert event.status not in TERMINAL, fabric.port.get(run_id).error_json
            if event.status == IDLE:
                break
        models = [
            values.decode(fabric.port.call_node(run_id, node, "pull_version", values.encode([[], {}])))["model"]
            for node in (f"client_{i}" for i in range(NUM_CLIENTS))
        ]
        fabric.port.cancel(run_id)
    assert plan.tensors == {"aggregated": 4, "private": 5}
    assert plan.num_parameters == 64 * 32 + 32 + 32 * 10 + 10
    means = np.array([model["norm.running_mean"] for model in models])
    assert np.abs(means - means[0]).max(axis=1)[1:].min() > 0.01
    assert all(model["norm.num_batches_tracked"] > 0 for model in models)


@pytest.mark.parametrize(
    "rule",
    [
        {"aggregation_strategy": "FedAdam", "server_learning_rate": 0.02},
        {"aggregation_strategy": "FedAvgM", "server_learning_rate": 0.5},
        {"aggregation_strategy": "FedNova"},
        {"aggregation_strategy": "SCAFFOLD"},
        {"clip_norm": 0.01},
    ],
    ids=lambda rule: str(next(iter(rule.values()))),
)
def test_buffers_are_averaged_whatever_the_rule_does_with_parameters(rule: dict[str, Any]) -> None:
    """Adam's step of a running variance could make it negative, and half a batch is no batch."""
    once = {"federated_learning_rounds": 1, "evaluate_every": 1, "learning_rate": 0.001}
    _, plain, _, _ = run_on(1, config_of(**STAR, **once))
    _, model, _, _ = run_on(1, config_of(**STAR, **once, **rule))
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        np.testing.assert_array_equal(model[name], plain[name])
    if rule.get("aggregation_strategy") not in ("SCAFFOLD", None):
        assert not np.array_equal(model["output.weight"], plain["output.weight"])


@pytest.mark.parametrize("schema", [STAR, RING], ids=["star", "ring"])
@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_private_tensors_and_durable_state_come_back_together(cluster: str, schema: dict[str, Any]) -> None:
    template = f"{__name__}:Remembering"
    more = {"federated_learning_rounds": 5, "evaluate_every": 5, "checkpoint_every": 2, "private_keys": ["norm.*"]}
    submission = build_submission(config_of(**schema, **more, client_template=template))

    def model_hashes(kill_after: int) -> list[str]:
        found: dict[int, str] = {}
        with InlineFabric(2) as fabric:
            run_id = fabric.port.submit(submission).run_id
            for event in fabric.port.watch(run_id):
                if event.round and event.round.number == kill_after and kill_after not in found:
                    fabric.agents[cluster]._runtime._run(run_id).hosts[0].process.kill()  # type: ignore[attr-defined]
                if event.round:
                    found[event.round.number] = event.round.model_sha256
            info = fabric.port.get(run_id)
        assert info.status == "COMPLETED", info.error_json
        return [*found.values(), info.model_sha256]

    assert model_hashes(kill_after=3) == model_hashes(kill_after=0)


@pytest.mark.parametrize("schema", [STAR, RING], ids=["star", "ring"])
def test_every_node_counts_one_where_models_are_private_in_part(schema: dict[str, Any]) -> None:
    rounds, model, _, _ = run_on(2, config_of(**schema, private_keys=["norm.*"]))
    own = [found["accuracy"] for found in rounds[-1].node_metrics.values() if "accuracy" in found]
    assert len(own) == NUM_CLIENTS and rounds[-1].metrics["accuracy"] == pytest.approx(np.mean(own))
    assert rounds[-1].metrics["accuracy"] > 0.7 and "accuracy" not in rounds[0].metrics
    assert sorted(model) == ["hidden.bias", "hidden.weight", "output.bias", "output.weight"]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("Diverging", r"W020.*non-finite values in norm.running_mean"),
        ("Reshaping", r"W010.*client_\d.*'norm.num_batches_tracked' differs.*float32 \(\).*int64 \(\)"),
        ("Growing", r"W010 client_1 on local-\d, hidden\.weight: parameter 'hidden\.weight' was replaced"),
    ],
)
@pytest.mark.parametrize("keys", [STAR, RING], ids=["star", "ring"])
def test_what_must_not_be_averaged_is_refused_by_name(keys: dict[str, Any], template: str, error: str) -> None:
    submission = build_submission(config_of(**keys, client_template=f"{__name__}:{template}"))
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(submission).run_id
        info, _ = follow(fabric, run_id)
    assert info.status == "FAILED"
    assert re.search(error, str(error_from_json(info.error_json)))


def test_nodes_of_clusters_without_participants_keep_their_states() -> None:
    """One client a round: the clusters of the others still count the round."""
    keys = {"sampled_clients": 1, "checkpoint_every": 1, "client_template": f"{__name__}:Counting"}
    one, _, _, _ = run_on(1, config_of(**STAR, **keys, federated_learning_rounds=4))
    two, _, _, _ = run_on(3, config_of(**STAR, **keys, federated_learning_rounds=4))
    assert hashes(one) == hashes(two)


def test_a_state_that_could_miss_a_round_is_refused() -> None:
    submission = build_submission(config_of(**STAR, min_nodes=3, client_template=f"{__name__}:Counting"))
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(submission).run_id
        error = str(error_from_json(follow(fabric, run_id)[0].error_json))
    assert re.search(r"U002.*client_\d keeps a state, and rounds may go on without its cluster", error)


def test_private_keys_are_refused_where_they_cannot_be_kept_or_do_not_exist() -> None:
    with pytest.raises(IcrfError, match=r"C008 min_nodes: min_nodes 3 contradicts private_keys"):
        build_submission(config_of(**STAR, private_keys=["norm.*"], min_nodes=3))
    with pytest.raises(IcrfError, match=r"C010 private_keys: no tensor of the model is called 'bn\*'"):
        build_submission(config_of(**RING, private_keys=["bn*"]))
