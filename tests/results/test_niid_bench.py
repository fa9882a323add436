"""NIID-Bench (Li et al. 2021, arXiv 2102.02079) in short: the fewer labels a client has, the less FedAvg learns."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from .bench import Row, needs_fashion_mnist, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_fashion_mnist]

ROUNDS, SEEDS = 20, (0, 1)
# From the most to the least skewed, with the best accuracy that the baselines of Flower reproduce in 50 rounds of 10
# epochs of a CNN.
SPLITS: dict[str, tuple[float, dict[str, Any]]] = {
    "1 label": (0.2839, {"data_distribution_kind": "pathological", "classes_per_node": 1}),
    "2 labels": (0.7810, {"data_distribution_kind": "pathological", "classes_per_node": 2}),
    "3 labels": (0.8243, {"data_distribution_kind": "pathological", "classes_per_node": 3}),
    "Dir(0.5)": (0.8809, {"data_distribution_kind": "dir", "dirichlet_beta": 0.5}),
    "IID": (0.8923, {"data_distribution_kind": "iid"}),
}


def best_accuracy(split: dict[str, Any], seed: int) -> float:
    outcome = run(
        **split,
        dataset_type="fmnist",
        model_type="mlp",
        number_of_clients=10,
        federated_learning_rounds=ROUNDS,
        batch_size=64,
        learning_rate=0.01,
        momentum=0.9,
        seed=seed,
    )
    return max(outcome.curve())


def test_accuracy_follows_the_skew_of_the_labels(row: Row) -> None:
    # Which labels meet at a client is drawn, and matters: the mean over draws.
    found = {name: fmean(best_accuracy(split, seed) for seed in SEEDS) for name, (_, split) in SPLITS.items()}
    row(
        "NIID-Bench, arXiv 2102.02079",
        f"Fashion-MNIST, FedAvg, 10 clients, {ROUNDS} rounds of one epoch, MLP; best accuracy, "
        f"mean of {len(SEEDS)} seeds, for {', '.join(SPLITS)}",
        "CNN, 50 rounds of 10 epochs: " + ", ".join(f"{published:.2%}" for published, _ in SPLITS.values()),
        ", ".join(f"{accuracy:.2%}" for accuracy in found.values()),
    )
    accuracies = list(found.values())
    assert accuracies == sorted(accuracies) and len(set(accuracies)) == len(accuracies)
    assert found["1 label"] < found["2 labels"] - 0.05
