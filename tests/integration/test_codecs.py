"""``inter_cluster_codec`` on a whole fabric without Ray: whatever it does to values, placement changes no bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from icrf.errors import ConfigError
from icrf.protocol import RoundResult
from icrf.run_folder import summarize
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing import SocketFabric
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed, facts, follow_until

NUM_CLIENTS = 6
STAR = {"federated_learning_schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PEERS = {
    "federated_learning_schema": "DecentralizedFederatedLearning",
    "federated_learning_topology": "ring",
}


def configured(codec: str, **more: Any) -> FederationConfig:
    return FederationConfig.from_mapping(
        {
            "federation_id": "codecs",
            **STAR,
            "number_of_clients": NUM_CLIENTS,
            "federated_learning_rounds": 4,
            "number_of_epochs": 1,
            "dataset_type": "digits",
            "model_type": "mlp",
            "evaluate_every": 2,
            "inter_cluster_codec": codec,
            **more,
        }
    )


def outcome(codec: str, clusters: int, **more: Any) -> tuple[str, list[RoundResult]]:
    with InlineFabric(clusters) as fabric:
        info, rounds = completed(fabric, build_submission(configured(codec, **more)))
    assert len(info.clusters) == clusters
    return info.model_sha256, rounds


@cache
def alone(codec: str, **more: Any) -> tuple[str, list[Any]]:
    model, rounds = outcome(codec, 1, **more)
    return model, [facts(r) for r in rounds]


def crossed(rounds: list[RoundResult]) -> int:
    return sum(r.bytes_inter_cluster for r in rounds)


@pytest.mark.parametrize("clusters", [2, 3])
@pytest.mark.parametrize(
    "codec, more",
    [
        ("zstd", {}),
        ("bf16", {}),
        ("top_k", {"top_k_fraction": 0.05}),
        ("top_k", {"aggregation_strategy": "FedAdam", "client_fraction": 0.5}),
        ("top_k", {"aggregation_strategy": "Median"}),
        ("bf16", {"aggregation_strategy": "DiLoCo", "momentum": 0.9, "learning_rate": 0.01}),
        ("zstd", PEERS),
        ("bf16", PEERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))[:40],
)
def test_a_codec_gives_the_same_bits_on_any_number_of_clusters(codec: str, more: dict[str, Any], clusters: int) -> None:
    model, rounds = outcome(codec, clusters, **more)
    assert (model, [facts(r) for r in rounds]) == alone(codec, **more)
    assert sum(r.bytes_saved for r in rounds) > 0.1 * crossed(rounds) > 0


# ---------------------------------------------------------------- crashes

PINS = {"server": "local-1", "client_0": "local-2", "client_1": "local-1"}


@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_what_nodes_have_kept_back_survives_the_loss_of_their_hosts(cluster: str) -> None:
    """The entries that top_k has left out are restored with the model: the hashes are those of a quiet run."""
    more: dict[str, Any] = {"checkpoint_every": 2, "federated_learning_rounds": 6, "top_k_fraction": 0.02}
    expected = outcome("top_k", 1, **more)[1]
    more |= {"federated_learning_rounds": 3, "placement": PINS}
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(build_submission(configured("top_k", **more), keep=True)).run_id
        follow_until(fabric, run_id, 3)
        for slot in range(2):
            fabric.substrates[cluster].kill_host(run_id, slot)
        fabric.port.advance(run_id, "run", 6)
        found = follow_until(fabric, run_id, 6)
    assert [r.model_sha256 for r in found] == [r.model_sha256 for r in expected]
    assert found[-1].generation > 1


@pytest.mark.parametrize("codec", ["zstd", "bf16", "top_k"])
@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
def test_a_gateway_that_has_lost_what_models_are_packed_against_gets_them_whole(codec: str, cluster: str) -> None:
    expected = outcome(codec, 1, federated_learning_rounds=6)[1]
    more = {"federated_learning_rounds": 3, "placement": PINS}
    with InlineFabric(2) as fabric:
        run_id = fabric.port.submit(build_submission(configured(codec, **more), keep=True)).run_id
        follow_until(fabric, run_id, 3)
        fabric.substrates[cluster].kill_gateway()
        fabric.port.advance(run_id, "run", 6)
        found = follow_until(fabric, run_id, 6)
    assert [r.model_sha256 for r in found] == [r.model_sha256 for r in expected]


def test_min_nodes_contradicts_what_nodes_keep_back() -> None:
    with pytest.raises(ConfigError, match="min_nodes 2 contradicts inter_cluster_codec top_k"):
        build_submission(configured("top_k", min_nodes=2))


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "codec, more",
    [
        ("zstd", {}),
        ("bf16", {}),
        ("top_k", {"top_k_fraction": 0.01}),
        ("top_k", {"aggregation_strategy": "Median", "top_k_fraction": 0.01}),
        ("zstd", PEERS),
        ("bf16", PEERS),
    ],
)
def test_the_plan_has_a_bound_that_no_round_passes(codec: str, more: dict[str, Any]) -> None:
    submission = build_submission(configured(codec, evaluate_every=100, **more))
    with InlineFabric(2) as fabric:
        plan = fabric.port.plan(submission)
        info, rounds = completed(fabric, submission)
    headers = 600 * NUM_CLIENTS
    assert plan.codec == codec
    within = rounds[:-1]  # the last one is evaluated
    assert all(r.bytes_inter_cluster <= plan.bytes_coded_per_round + headers for r in within)
    # What was sent and what was saved is what would have been sent.
    for r in within:
        assert 0 < r.bytes_inter_cluster + r.bytes_saved - plan.bytes_inter_cluster_per_round < headers
    assert summarize(info, rounds)["bytes_saved"] == sum(r.bytes_saved for r in rounds)


@pytest.mark.parametrize("relay", [False, True], ids=["direct", "relayed"])
def test_what_is_counted_is_what_passes_the_sockets(relay: bool) -> None:
    model, rounds = alone("top_k", top_k_fraction=0.05)
    with SocketFabric(2, relay=relay) as fabric:
        info, found = completed(fabric, build_submission(configured("top_k", top_k_fraction=0.05)))
        passed = fabric.payload_bytes()
    assert (info.model_sha256, [facts(r) for r in found]) == (model, rounds)
    if not relay:
        assert passed == pytest.approx(crossed(found), rel=0.05)
    assert sum(r.bytes_saved for r in found) > 2 * crossed(found)


def test_without_a_codec_nothing_is_said_of_one() -> None:
    submission = build_submission(configured("none"))
    with InlineFabric(2) as fabric:
        plan = fabric.port.plan(submission)
        info, rounds = completed(fabric, submission)
    assert (plan.codec, plan.bytes_coded_per_round) == ("none", 0)
    assert all(r.bytes_saved == 0 for r in rounds)
    assert "bytes_saved" not in summarize(info, rounds)


def test_a_lossless_codec_changes_no_bit_and_a_lossy_one_does() -> None:
    hashes = {codec: alone(codec)[0] for codec in ("none", "zstd", "bf16", "top_k")}
    assert hashes["none"] == hashes["zstd"]
    assert len(set(hashes.values())) == 3


@pytest.mark.parametrize("codec, more", [("top_k", {}), ("bf16", PEERS)], ids=["star", "ring"])
def test_nodes_that_take_turns_keep_what_they_have_left_out(codec: str, more: dict[str, Any]) -> None:
    """Rows of nodes that are not active lie on disk."""
    model, rounds = outcome(codec, 2, resident_nodes=1, **more)
    assert (model, [facts(r) for r in rounds]) == alone(codec, **more)
