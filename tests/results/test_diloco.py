"""Douillard et al. 2023 (arXiv 2311.08105): rare exchanges train as well as an exchange after every step."""

from __future__ import annotations

import pytest

from .bench import Row, needs_fashion_mnist, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_fashion_mnist]

STEPS, HORIZONS = 1000, (1, 10, 50)
HEADERS = 1.01


def test_an_exchange_every_fifty_steps_trains_as_well_with_a_fiftieth_of_the_bytes(row: Row) -> None:
    outcomes = {
        horizon: run(
            clusters=2,
            aggregation_strategy="DiLoCo",
            local_steps=horizon,
            federated_learning_rounds=STEPS // horizon,
            evaluate_every=STEPS // horizon,
            number_of_clients=4,
            dataset_type="fmnist",
            model_type="mlp",
            batch_size=32,
            optimizer="AdamW",
            learning_rate=0.0002,
            weight_decay=0.01,
        )
        for horizon in HORIZONS
    }
    losses = {horizon: found.curve("loss")[-1] for horizon, found in outcomes.items()}
    planned = {horizon: found.plan.bytes_inter_cluster_total for horizon, found in outcomes.items()}
    row(
        "DiLoCo, arXiv 2311.08105",
        f"Fashion-MNIST, 4 workers on 2 clusters, {STEPS} steps of AdamW each, H = 1, 10, 50",
        "8 workers, H = 500: as good as synchronous training with 500 times less communication",
        f"test loss {', '.join(f'{losses[h]:.4f}' for h in HORIZONS)}; "
        f"{', '.join(f'{planned[h]:,}' for h in HORIZONS)} bytes between clusters",
    )
    assert losses[50] == pytest.approx(losses[1], rel=0.05)
    for horizon, found in outcomes.items():
        assert planned[1] == horizon * planned[horizon]
        assert planned[horizon] < found.measured_bytes < HEADERS * planned[horizon]
