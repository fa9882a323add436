"""What ``inter_cluster_codec`` saves, and what it costs: digits on two clusters, the table of docs/codecs.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest

from .bench import PEERS, Outcome, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEADER = (
    "graph",
    "`inter_cluster_codec`",
    "test accuracy",
    "bytes between clusters",
    "of that without",
    "bound of the plan per round",
)
SEEDS = (0, 1, 2)
STAR = {"federated_learning_topology": "star"}
RING = {**PEERS, "federated_learning_topology": "ring"}
LOSSY = 0.02


def measured(graph: dict[str, Any], **keys: Any) -> list[Outcome]:
    return [
        run(
            clusters=2,
            seed=seed,
            number_of_clients=10,
            federated_learning_rounds=40,
            number_of_epochs=1,
            evaluate_every=40,
            dataset_type="digits",
            model_type="2nn",
            data_distribution_kind="dir",
            **graph,
            **keys,
        )
        for seed in SEEDS
    ]


def test_bytes_and_accuracy_of_every_codec(write_table: Callable[..., None]) -> None:
    codecs: dict[str, dict[str, Any]] = {
        "`none`": {"inter_cluster_codec": "none"},
        "`zstd`": {"inter_cluster_codec": "zstd"},
        "`bf16`": {"inter_cluster_codec": "bf16"},
        "`top_k`, 10 %": {"inter_cluster_codec": "top_k", "top_k_fraction": 0.1},
        "`top_k`, 1 %": {"inter_cluster_codec": "top_k", "top_k_fraction": 0.01},
    }
    rows: list[tuple[str, ...]] = []
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for shown, graph in (("star", STAR), ("ring", RING)):
        for name, keys in codecs.items():
            if shown == "ring" and "top_k" in name:
                continue
            outcomes = measured(graph, **keys)
            accuracy = mean(outcome.curve()[-1] for outcome in outcomes)
            crossed = sum(outcome.measured_bytes for outcome in outcomes) // len(outcomes)
            found[shown, name] = accuracy, crossed
            share = crossed / found[shown, "`none`"][1]
            bound = outcomes[0].plan.bytes_coded_per_round or outcomes[0].plan.bytes_inter_cluster_per_round
            rows.append((shown, name, f"{accuracy:.2%}", f"{crossed:,}", f"{share:.1%}", f"{bound:,}"))
            print("\n" + " | ".join(rows[-1]))  # noqa: T201 - what was measured, for those who run with -s
    write_table("ICRF_CODECS_TABLE", "scripts/results -k test_codecs", HEADER, rows)
    for shown in ("star", "ring"):
        full, size = found[shown, "`none`"]
        assert found[shown, "`zstd`"][0] == full
        assert found[shown, "`zstd`"][1] < 0.9 * size
        assert abs(found[shown, "`bf16`"][0] - full) < LOSSY
        assert found[shown, "`bf16`"][1] < 0.5 * size
    full, size = found["star", "`none`"]
    assert found["star", "`top_k`, 10 %"][0] > full - LOSSY
    assert found["star", "`top_k`, 1 %"][1] < 0.1 * size
