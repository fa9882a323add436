"""NIID-Bench (Li et al. 2021, arXiv 2102.02079) in short: the fewer labels a client has, the less FedAvg learns."""

from __future__ import annotations

from typing import Any

import pytest

from .bench import A_FIFTH, Row, needs_fashion_mnist, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_fashion_mnist]

ROUNDS = 15
# From the most to the least skewed, with the best accuracy that the baselines of Flower reproduce in 50 rounds of 10
# epochs on all 60,000 images.
SPLITS: dict[str, tuple[float, dict[str, Any]]] = {
    "1 label": (0.2839, {"data_distribution_kind": "pathological", "classes_per_node": 1}),
    "2 labels": (0.7810, {"data_distribution_kind": "pathological", "classes_per_node": 2}),
    "3 labels": (0.8243, {"data_distribution_kind": "pathological", "classes_per_node": 3}),
    "Dir(0.5)": (0.8809, {"data_distribution_kind": "dir", "dirichlet_beta": 0.5}),
    "IID": (0.8923, {"data_distribution_kind": "iid"}),
}


def best_accuracy(split: dict[str, Any]) -> float:
    outcome = run(
        **split,
        dataset_type=A_FIFTH,
        model_type="lenet",
        number_of_clients=10,
        federated_learning_rounds=ROUNDS,
        batch_size=32,
        learning_rate=0.01,
        momentum=0.9,
    )
    return max(outcome.curve())


def test_accuracy_follows_the_skew_of_the_labels(row: Row) -> None:
    found = {name: best_accuracy(split) for name, (_, split) in SPLITS.items()}
    row(
        "NIID-Bench, arXiv 2102.02079",
        f"a fifth of Fashion-MNIST, FedAvg, 10 clients, {ROUNDS} rounds of one epoch, LeNet-5; best accuracy for "
        + ", ".join(SPLITS),
        "all of it, 50 rounds of 10 epochs: " + ", ".join(f"{published:.2%}" for published, _ in SPLITS.values()),
        ", ".join(f"{accuracy:.2%}" for accuracy in found.values()),
    )
    accuracies = list(found.values())
    assert accuracies == sorted(accuracies) and len(set(accuracies)) == len(accuracies)
    assert found["1 label"] < found["2 labels"] - 0.15
