"""Lossy codecs around aggregation rules: what is sent, what is kept for later, what the rule gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icrf.errors import ConfigError, ConfigErrors
from icrf.learning.aggregation import ClientUpdate, MeanAggregator, RoundFacts, UpdateAggregator, build_aggregator
from icrf.lossy import to_bfloat16
from icrf.spec import FederationConfig
from icrf.update import ExactSum, choose_grid

Array = np.ndarray[Any, Any]
SIZE = 50


def rule(codec: str, name: str = "FedAvg", **keys: Any) -> MeanAggregator | UpdateAggregator:
    settings = {"inter_cluster_codec": codec, "top_k_fraction": 0.1, "optimizer": "SGD", **keys}
    return build_aggregator(name, settings)


def normal(seed: int, size: int = SIZE) -> Array:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def contributed(made: Any, received: Array, trained: Array, state: Array, **more: Any) -> tuple[Array, Array]:
    """What a node sends, and what it keeps."""
    after = state.copy()
    out = np.full(SIZE, np.nan, np.float32)
    return made.contribution(ClientUpdate(received, trained, 1, state, after, out, **more)).copy(), after


def test_top_k_sends_the_largest_entries_and_keeps_the_rest_for_later() -> None:
    made = rule("top_k")
    assert (made.rows.client, made.rows.up, made.rows.down) == (1, 1, 1)
    kept, owed, sent_so_far = np.zeros(SIZE, np.float32), np.zeros(SIZE), np.zeros(SIZE)
    for number in range(60):
        received, change = normal(1000 + number), np.float32(2.0**-4) * np.round(normal(number) * 8)
        received = np.round(received * 64) / np.float32(64)
        sent, kept = contributed(made, received, received + change, kept)
        assert np.count_nonzero(sent) <= 5
        assert not np.any((sent != 0) & (kept != 0))
        owed += change
        sent_so_far += sent
        # Nothing is ever lost: here every sum is exact.
        assert np.array_equal(sent_so_far + kept, owed)
    assert np.count_nonzero(sent_so_far) == SIZE


def test_bf16_rounds_what_is_sent_both_ways() -> None:
    made = rule("bf16")
    assert made.rows.client == 0
    received, trained = normal(1), normal(2)
    sent, _ = contributed(made, received, trained, np.empty(0, np.float32))
    assert sent.tobytes() == to_bfloat16(trained - received).tobytes()
    down = made.sent(received, [slice(0, 40)])
    assert down[:40].tobytes() == to_bfloat16(received[:40]).tobytes()
    assert down[40:].tobytes() == received[40:].tobytes()


@pytest.mark.parametrize("codec", ["top_k", "bf16"])
def test_what_is_not_learned_is_left_alone(codec: str) -> None:
    learned = [slice(0, 10), slice(20, SIZE)]
    trained = normal(2)
    trained[10:20] = 1_000.125
    state = np.zeros(SIZE if codec == "top_k" else 0, np.float32)
    sent, kept = contributed(rule(codec), np.zeros(SIZE, np.float32), trained, state, learned=learned)
    assert np.array_equal(sent[10:20], trained[10:20])
    assert not np.any(kept[10:20])
    if codec == "top_k":
        assert np.count_nonzero(sent[:10]) + np.count_nonzero(sent[20:]) == 4


def test_what_is_no_number_is_sent_to_be_found() -> None:
    for codec in ("top_k", "bf16"):
        trained = normal(3)
        trained[7] = np.nan
        state = np.zeros(SIZE if codec == "top_k" else 0, np.float32)
        sent, kept = contributed(rule(codec), np.zeros(SIZE, np.float32), trained, state)
        assert np.isnan(sent[7])
        assert np.isfinite(kept).all()


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "DiLoCo"])
def test_with_everything_sent_the_rule_gets_what_it_would_have_got(name: str) -> None:
    previous = normal(5)
    keys = {"top_k_fraction": 1.0, "mu": 0.1, "momentum": 0.9}
    states = {}
    for codec in ("none", "top_k"):
        made = rule(codec, name, **keys)
        assert isinstance(made, MeanAggregator)
        grid = choose_grid(made.expected([float(np.abs(previous).max())]), 30)
        total = ExactSum([SIZE], grid, 30)
        for node in range(3):
            state = np.zeros(made.rows.client * SIZE + made.rows.client_scalars, np.float32)
            total.add(contributed(made, previous, previous + normal(10 + node), state)[0], 10)
        before = made.first_state(previous)
        states[codec] = np.empty_like(before)
        made.finish(total, before, states[codec], RoundFacts(1, 3, 3))
    assert np.allclose(states["none"], states["top_k"], rtol=1e-5, atol=1e-6)


def test_rules_that_see_every_update_get_models() -> None:
    made, previous = rule("top_k", "Median", top_k_fraction=1.0), normal(5)
    assert isinstance(made, UpdateAggregator)
    trained = [normal(k) for k in range(3)]
    state = np.zeros(SIZE, np.float32)
    out = np.empty(SIZE, np.float32)
    made.combine([contributed(made, previous, t, state)[0] for t in trained], previous, out, RoundFacts(1, 3, 3))
    assert np.allclose(out, np.median(trained, axis=0), atol=1e-6)


@pytest.mark.parametrize("name", ["SCAFFOLD", "FedNova"])
def test_rules_whose_nodes_send_more_than_a_model_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"C008 inter_cluster_codec: .*whose nodes send more than a model"):
        rule("bf16", name, learning_rate=0.1)
    assert rule("zstd", name, learning_rate=0.1).rows.client <= 1


@pytest.mark.parametrize(
    "codec, keys, allowed",
    [
        ("bf16", {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy"}, "zstd with"),
        ("top_k", {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring"}, "zstd, bf16"),
        (
            "bf16",
            {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring", "mixing": "push_sum"},
            "zstd with mixing push_sum",
        ),
        ("top_k", {"late_updates": "weigh", "min_nodes": 2}, "zstd with late_updates weigh"),
        (
            "bf16",
            {"schema": "ClusterFederatedLearning", "number_of_models": 2},
            "zstd with ClusterFederatedLearning",
        ),
    ],
)
def test_combinations_without_code_are_refused_by_name(codec: str, keys: dict[str, Any], allowed: str) -> None:
    values = {
        "federation_id": "f",
        "schema": "TraditionalFederatedLearning",
        "federated_learning_topology": "star",
        **keys,
    }
    FederationConfig.from_mapping({**values, "inter_cluster_codec": "zstd"})
    with pytest.raises((ConfigError, ConfigErrors)) as error:
        FederationConfig.from_mapping({**values, "inter_cluster_codec": codec})
    assert f"C012 configuration: inter_cluster_codec: '{codec}' is not built yet; allowed: none, " in str(error.value)
    assert allowed in str(error.value)
