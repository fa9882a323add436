"""Yin et al. 2018 (arXiv 1803.01498): the trimmed mean learns in spite of attackers that the plain mean follows."""

from __future__ import annotations

from typing import Any

import pytest

from icrf.federation.node import FederatedNode

from .bench import Row, needs_fashion_mnist, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_fashion_mnist]

CLIENTS, ATTACKERS, SCALE, ROUNDS = 10, 2, 5.0, 10


class Flipping(FederatedNode):
    """The first nodes send their change of the model with its sign flipped, and larger."""

    def train(self, **kwargs: Any) -> dict[str, float]:
        before = self.context.model.flat.copy()
        metrics = super().train(**kwargs)
        if self.id in [f"client_{k}" for k in range(ATTACKERS)]:
            self.context.model.load(before - SCALE * (self.context.model.flat - before))
        return metrics


def accuracy(rule: str, attacked: bool) -> float:
    outcome = run(
        clusters=2,
        templates={"local:Flipping": Flipping},
        client_template="local:Flipping" if attacked else None,
        aggregation_strategy=rule,
        num_byzantine=ATTACKERS if rule == "TrimmedMean" else None,
        dataset_type="fmnist",
        model_type="mlp",
        number_of_clients=CLIENTS,
        federated_learning_rounds=ROUNDS,
        evaluate_every=ROUNDS,
        batch_size=32,
        learning_rate=0.05,
    )
    return outcome.curve()[-1]


def test_the_mean_collapses_and_the_trimmed_mean_does_not(row: Row) -> None:
    clean, mean, trimmed = accuracy("FedAvg", False), accuracy("FedAvg", True), accuracy("TrimmedMean", True)
    row(
        "trimmed mean, arXiv 1803.01498",
        f"Fashion-MNIST IID, {CLIENTS} clients, {ATTACKERS} of which send -{SCALE:g} times their change; accuracy "
        f"after {ROUNDS} rounds of the mean without attackers, the mean with them, the trimmed mean with them",
        "no figure for this attack; the bound holds for fewer attackers than are trimmed",
        f"{clean:.2%}, {mean:.2%}, {trimmed:.2%}",
    )
    assert mean < 0.2
    assert trimmed > clean - 0.03
