"""The published files of Fashion-MNIST through the whole fabric; slow, and only where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icrf.learning.datasets import FASHION_MNIST_DIR, Dataset, load_dataset
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(FASHION_MNIST_DIR).is_dir(), reason="the package dataset-fashion-mnist is not installed"
    ),
]


def outcome(clusters: int, **keys: Any) -> tuple[str, float]:
    """Hash of the final model, and its accuracy."""
    config = FederationConfig.from_mapping(
        {
            "federation_id": "fashion",
            "schema": "TraditionalFederatedLearning",
            "federated_learning_topology": "star",
            "dataset_type": "fmnist",
            **keys,
        }
    )
    with InlineFabric(clusters) as fabric:
        info, rounds = completed(fabric, build_submission(config))
    return info.model_sha256, rounds[-1].metrics["accuracy"]


def test_two_layers_learn_from_twenty_equal_nodes_on_one_cluster_and_on_two() -> None:
    settings = {
        "model_type": "2nn",
        "number_of_clients": 20,
        "federated_learning_rounds": 2,
        "batch_size": 20,
        "learning_rate": 0.1,
        "evaluate_every": 2,
    }
    one, accuracy = outcome(1, **settings)
    assert accuracy > 0.65
    assert outcome(2, **settings) == (one, accuracy)


def a_tenth() -> Dataset:
    whole = load_dataset("fmnist")
    return Dataset(whole.train_x[:6000], whole.train_y[:6000], whole.test_x[:1000], whole.test_y[:1000], 10, "a tenth")


def test_batch_norm_learns_from_skewed_nodes() -> None:
    _, accuracy = outcome(
        2,
        dataset_type=f"{__name__}:a_tenth",
        model_type="resnet8_bn",
        data_distribution_kind="20",
        number_of_clients=10,
        federated_learning_rounds=2,
        batch_size=20,
        learning_rate=0.1,
        evaluate_every=2,
    )
    assert accuracy > 0.5
