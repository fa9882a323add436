"""What the tests of published results share: data, runs through the fabric's public face, and rows of the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from icrf.client import Fabric
from icrf.learning.datasets import FASHION_MNIST_DIR, Dataset, load_dataset
from icrf.protocol import Plan, RoundResult
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric

# Keeps a row of the table: paper, setting, figure of the paper, ours.
Row = Callable[[str, str, str, str], None]

MNIST_DIR = os.environ.get("ICRF_MNIST_DIR", "")
needs_fashion_mnist = pytest.mark.skipif(
    not Path(FASHION_MNIST_DIR).is_dir(), reason="the package dataset-fashion-mnist is not installed"
)
STAR = {"schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}
PEERS = {"schema": "DecentralizedFederatedLearning"}


def first_samples(num_train: int, num_test: int) -> Dataset:
    """The first training and test images of Fashion-MNIST."""
    whole, train, test = load_dataset("fmnist"), slice(num_train), slice(num_test)
    return Dataset(whole.train_x[train], whole.train_y[train], whole.test_x[test], whole.test_y[test], 10, "a cut")


def two_thousand() -> Dataset:
    """2,000 images to train on and 2,000 that are held out."""
    return first_samples(2_000, 2_000)


TWO_THOUSAND = f"{__name__}:two_thousand"


@dataclass(frozen=True)
class Outcome:
    """A completed run: its plan, and its committed rounds in order."""

    plan: Plan
    rounds: tuple[RoundResult, ...]

    def curve(self, name: str = "accuracy") -> list[float]:
        """A metric in the rounds that have it."""
        return [r.metrics[name] for r in self.rounds if name in r.metrics]

    def rounds_to(self, accuracy: float) -> int | None:
        """The first round whose test accuracy is at least so much."""
        return next((r.number for r in self.rounds if r.metrics.get("accuracy", 0.0) >= accuracy), None)

    @property
    def measured_bytes(self) -> int:
        """Bytes that crossed between clusters, headers included."""
        return sum(r.bytes_inter_cluster for r in self.rounds)


def run(clusters: int = 1, templates: Mapping[str, type] | None = None, **keys: Any) -> Outcome:
    """Run a federation, a star unless the keys say otherwise, on so many clusters inside this process."""
    config = FederationConfig.from_mapping({"federation_id": "results", **STAR, **keys})
    with InlineFabric(clusters, templates=templates) as inline:
        fabric = Fabric(inline.port)
        submission = build_submission(config)
        plan = fabric.plan(submission)
        return Outcome(plan, fabric.submit(submission).result().rounds)


def show_rounds(found: int | None, limit: int) -> str:
    """How many rounds it took, for people."""
    return f"> {limit}" if found is None else str(found)
