"""Two nodes on quadratic curves: where local steps lead is known in closed form, and the whole fabric must lead there.

Client i descends on a_i/2 (x - b_i)^2. After K steps of size eta it has gone the share 1 - r_i of its way to b_i, with
r_i = (1 - eta a_i)^K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icrf.federation.node import FederatedNode
from icrf.learning.datasets import DATASETS, Dataset
from icrf.learning.models import register_model
from icrf.protocol import RoundResult
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.testing.inline import InlineFabric
from icrf.testing.runs import completed

CURVES = ((1.0, 0.0), (3.0, 1.0))
ETA, START, OPTIMUM = 0.1, 5.0, 0.75


class Quadratic(FederatedNode):
    """Descends on a/2 (x - b)^2, another curve at each of two nodes."""

    def loss(self, scores: Any, labels: Any) -> Any:
        curvature, centre = CURVES[self.context.index - 1]
        return 0.5 * curvature * torch.square(scores.mean() - centre)


class Teller(FederatedNode):
    """A server that says where the model is."""

    def evaluate(self, phase: str = "test") -> dict[str, float]:
        return {"x": float(next(self.model.parameters()).detach()[0])}


@pytest.fixture(scope="module")
def fabric() -> Iterator[InlineFabric]:
    with InlineFabric(2, templates={"local:Quadratic": Quadratic, "local:Teller": Teller}) as opened:
        yield opened


class Point(nn.Module):
    """One float64 number, whatever the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((1,), START, dtype=torch.float64))

    def forward(self, features: Any) -> Any:
        return self.x.expand(len(features), 1)


@register_model("test-point")
def point() -> nn.Module:
    return Point()


@register_model("test-point-near-zero")
def point_near_zero() -> nn.Module:
    made = Point()
    with torch.no_grad():
        made.x.fill_(1e-7)
    return made


@DATASETS.register("test-two-samples")
def two_samples(data_dir: str = "") -> Dataset:
    features, labels = np.zeros((2, 1), np.float32), np.zeros(2, np.int64)
    return Dataset(features, labels, features, labels, 1, "test-two-samples")


def run_curves(fabric: InlineFabric, steps: int, rounds: int, **keys: Any) -> list[RoundResult]:
    common = {
        "federation_id": "drift",
        "schema": "TraditionalFederatedLearning",
        "federated_learning_topology": "star",
        "number_of_clients": 2,
        "federated_learning_rounds": rounds,
        "local_steps": steps,
        "learning_rate": ETA,
        "model_type": "test-point",
        "dataset_type": "test-two-samples",
        "client_template": "local:Quadratic",
        "server_template": "local:Teller",
    }
    config = FederationConfig.from_mapping({**common, **keys})
    return completed(fabric, build_submission(config))[1]


def descend(fabric: InlineFabric, steps: int, rounds: int, **keys: Any) -> list[float]:
    """Where x is after each round."""
    return [r.metrics["x"] for r in run_curves(fabric, steps, rounds, **keys)]


FEDAVG_LIMITS = {
    1: 0.750000000,
    2: 0.728571429,
    5: 0.670133071,
    10: 0.598711121,
    20: 0.532162627,
    50: 0.501291768,
}
SCAFFOLD_ROUNDS = {1: 100, 2: 49, 5: 23, 10: 24, 20: 53}


@pytest.mark.parametrize("steps", FEDAVG_LIMITS)
def test_fedavg_drifts_to_where_theory_says(fabric: InlineFabric, steps: int) -> None:
    found = descend(fabric, steps, 20 + 90 // steps)[-1]
    r = [(1 - ETA * a) ** steps for a, _ in CURVES]
    limit = sum((1 - s) * b for s, (_, b) in zip(r, CURVES, strict=True)) / sum(1 - s for s in r)
    assert limit == pytest.approx(FEDAVG_LIMITS[steps], abs=1e-9)
    assert found == pytest.approx(limit, abs=1e-8)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_fedprox_drifts_less_and_to_where_theory_says(fabric: InlineFabric, steps: int, mu: float) -> None:
    found = descend(fabric, steps, 40 + 80 // steps, aggregation_strategy="FedProx", mu=mu)[-1]
    shares = [(1 - (1 - ETA * (a + mu)) ** steps) / (a + mu) for a, _ in CURVES]
    pulls = [share * a for share, (a, _) in zip(shares, CURVES, strict=True)]
    limit = sum(p * b for p, (_, b) in zip(pulls, CURVES, strict=True)) / sum(pulls)
    assert found == pytest.approx(limit, abs=1e-8)
    if steps > 1:
        assert abs(found - OPTIMUM) < abs(FEDAVG_LIMITS[steps] - OPTIMUM) - 0.001


@pytest.mark.parametrize("steps", SCAFFOLD_ROUNDS)
def test_scaffold_reaches_the_optimum_in_the_rounds_that_theory_says(fabric: InlineFabric, steps: int) -> None:
    rounds = SCAFFOLD_ROUNDS[steps]
    path = descend(fabric, steps, rounds, aggregation_strategy="SCAFFOLD")
    assert abs(path[rounds - 1] - OPTIMUM) < 1e-9 <= abs(path[rounds - 2] - OPTIMUM)


def test_fedadam_is_the_recurrence_stepped_by_hand(fabric: InlineFabric) -> None:
    keys = {"server_learning_rate": 0.3, "server_beta1": 0.9, "server_beta2": 0.99, "tau": 1e-3}
    path = descend(fabric, 4, 6, aggregation_strategy="FedAdam", **keys)
    x, m, v = START, 0.0, 0.0
    for t, found in enumerate(path, 1):
        ends = [b + (1 - ETA * a) ** 4 * (x - b) for a, b in CURVES]
        g = x - sum(ends) / 2
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x -= 0.3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-3)
        assert found == pytest.approx(x, abs=1e-9)


def test_nodes_forget_what_an_attempt_without_result_has_left(fabric: InlineFabric) -> None:
    """The first round leaves its grid and is repeated: no control variate moves twice."""
    found = run_curves(fabric, 5, 3, model_type="test-point-near-zero", aggregation_strategy="SCAFFOLD")
    assert found[0].attempt > 1
    x, c, variates = 1e-7, 0.0, [0.0, 0.0]
    for result in found:
        ends = [x, x]
        for k, (a, b) in enumerate(CURVES):
            for _ in range(5):
                ends[k] -= ETA * (a * (ends[k] - b) + c - variates[k])
        variates = [v - c + (x - y) / (5 * ETA) for v, y in zip(variates, ends, strict=True)]
        x, c = sum(ends) / 2, sum(variates) / 2
        assert result.metrics["x"] == pytest.approx(x, abs=1e-10)


def test_clipping_bounds_every_step(fabric: InlineFabric) -> None:
    """Both nodes want to move by more: the model moves by clip_norm until it is near."""
    path = descend(fabric, 5, 6, clip_norm=0.25)
    assert path == pytest.approx([START - 0.25 * k for k in range(1, 7)], abs=1e-9)
