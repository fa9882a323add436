"""Shapley values: games with known values, the axioms, the estimate, and the clients of a federation."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import icrf
from icrf.client import Fabric
from icrf.errors import ConfigError, RunError
from icrf.federation.contribution import CoalitionGame, contributions
from icrf.federation.node import FederatedNode
from icrf.learning.contribution import Contributions, shapley
from icrf.learning.datasets import load_dataset
from icrf.spec import FederationConfig
from icrf.testing.inline import InlineFabric


def glove(coalition: frozenset[int]) -> float:
    """Players 0 and 1 have a left glove, player 2 a right one; a pair is worth 1."""
    return float(2 in coalition and len(coalition) > 1)


def airport(coalition: frozenset[int]) -> float:
    """A runway as long as the largest plane needs: costs 1, 2, 3."""
    return float(max((1 + player for player in coalition), default=0))


@pytest.mark.parametrize(
    ("game", "expected"), [(glove, (1 / 6, 1 / 6, 2 / 3)), (airport, (1 / 3, 5 / 6, 11 / 6))], ids=["glove", "airport"]
)
def test_games_with_known_values(game: Any, expected: tuple[float, ...]) -> None:
    found = shapley(3, game)
    assert found.values == pytest.approx(expected, abs=1e-15)
    assert found == Contributions(found.values, (0.0, 0.0, 0.0), True, 8)


games = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.floats(-100, 100), min_size=1 << n, max_size=1 << n).map(lambda table: (n, table))
)


@settings(max_examples=60, derandomize=True, database=None)
@given(games)
def test_the_axioms(game: tuple[int, list[float]]) -> None:
    n, table = game

    def value(coalition: frozenset[int]) -> float:
        return table[sum(1 << player for player in coalition)]

    found = shapley(n, value).values
    assert math.fsum(found) == pytest.approx(table[-1] - table[0], abs=1e-9)  # efficiency
    # A dummy that joins adds nothing and gets nothing; the others keep what they had.
    with_dummy = shapley(n + 1, lambda s: value(s - {n})).values
    assert with_dummy[n] == 0.0 and with_dummy[:n] == pytest.approx(found, abs=1e-9)
    # Two players that are alike get the same, to the last bit.
    twins = shapley(n + 1, lambda s: value(s - {n, 0} | ({0} if len(s & {n, 0}) else set()))).values
    assert twins[0] == twins[n]


def test_the_estimate_has_errors_that_hold_and_adds_up() -> None:
    weights = np.random.RandomState(0).rand(15)

    def saturating(coalition: frozenset[int]) -> float:
        return 1 - math.exp(-sum(float(weights[i]) for i in coalition))

    exact = shapley(12, saturating)
    estimate = shapley(12, saturating, permutations=400, seed=3, max_exact=6)
    assert exact.exact and not estimate.exact and estimate.evaluations < exact.evaluations
    off = [abs(a - b) / e for a, b, e in zip(estimate.values, exact.values, estimate.errors, strict=True)]
    assert max(off) < 4 and 0.3 < math.sqrt(sum(x * x for x in off) / 12) < 2
    large = shapley(15, saturating, permutations=50)
    assert not large.exact and large.evaluations <= 15 * 50 + 1
    assert math.fsum(large.values) == pytest.approx(saturating(frozenset(range(15))), abs=1e-12)
    assert shapley(15, saturating, permutations=50) == large
    assert shapley(15, saturating, permutations=50, seed=1) != large


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"num_players": 0}, "C007"),
        ({"num_players": 3, "permutations": 3}, "C007"),
        ({"num_players": 3, "max_exact": 13}, "C007"),
        ({"num_players": 3, "utility": lambda s: math.nan}, "C009"),
    ],
)
def test_what_is_no_game_is_refused(arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shapley(**{"utility": glove, **arguments})
    assert caught.value.code == code


# ---------------------------------------------------------------- a federation

SHUFFLED, TWINS = 2, (4, 5)
SIX = FederationConfig.from_mapping(
    {
        "federation_id": "fair",
        "schema": "TraditionalFederatedLearning",
        "federated_learning_topology": "star",
        "number_of_clients": 6,
        "federated_learning_rounds": 3,
        "batch_size": 32,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "shuffle": False,
    }
)


class Client(FederatedNode):
    """One client has wrong labels, two have the same data."""

    def setup(self) -> None:
        features, labels = self.train_data
        if self.id == f"client_{SHUFFLED}":
            labels = labels[torch.randperm(len(labels))]
        if self.id in [f"client_{twin}" for twin in TWINS]:
            data = load_dataset("digits")
            features, labels = torch.tensor(data.train_x[:240]), torch.tensor(data.train_y[:240])
        self.context.train_data = features, labels


def test_a_client_with_wrong_labels_ranks_last_and_twins_tie() -> None:
    game = CoalitionGame(SIX, Client, "accuracy")
    utilities: dict[frozenset[int], float] = {}

    def remembered(coalition: frozenset[int]) -> float:
        return utilities.setdefault(coalition, game(coalition))

    exact = shapley(6, remembered)
    assert exact.exact and exact.evaluations == 64
    assert min(range(6), key=lambda i: exact.values[i]) == SHUFFLED
    assert exact.values[TWINS[0]] == pytest.approx(exact.values[TWINS[1]], abs=1e-12)
    whole, nobody = utilities[frozenset(range(6))], utilities[frozenset()]
    assert math.fsum(exact.values) == pytest.approx(whole - nobody) and whole > 0.75 > nobody
    estimate = shapley(6, utilities.__getitem__, permutations=200, max_exact=5)
    assert max(abs(a - b) for a, b in zip(exact.values, estimate.values, strict=True)) < 0.02


def test_contributions_of_a_small_federation() -> None:
    config = FederationConfig.from_mapping({**SIX.model_dump(), "number_of_clients": 2})
    found = icrf.contributions(config)
    assert (found.exact, found.evaluations, len(found.values)) == (True, 4, 2)
    assert contributions(config) == found
    assert contributions(config, metric="loss").values[0] < 0  # a loss falls


def test_the_clients_are_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_clients", sys.modules[__name__])
    plain = {**SIX.model_dump(), "number_of_clients": 3, "federated_learning_rounds": 1}
    named = FederationConfig.from_mapping({**plain, "client_template": "my_clients:Client"})
    assert contributions(named) == contributions(FederationConfig.from_mapping(plain), client_template=Client)
    assert contributions(named) != contributions(FederationConfig.from_mapping(plain))
    with pytest.raises(ConfigError, match="C008 server_template"):
        contributions(FederationConfig.from_mapping({**plain, "server_template": "my_clients:Client"}))


def test_the_game_of_all_clients_is_the_federation() -> None:
    with InlineFabric(2) as inline:
        run = Fabric(inline.port).submit(SIX).result()
    alone = CoalitionGame(SIX, FederatedNode, "accuracy")(frozenset(range(6)))
    assert alone == pytest.approx(run.info.accuracy, abs=0.005)


def test_contributions_of_other_federations_are_refused() -> None:
    ring = {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring", "federation_id": "peers"}
    with pytest.raises(ConfigError, match="C008"):
        contributions(FederationConfig.from_mapping(ring))
    small = FederationConfig.from_mapping({**SIX.model_dump(), "number_of_clients": 2, "federated_learning_rounds": 1})
    with pytest.raises(ConfigError, match="C010 metric: metric 'f1' unknown"):
        contributions(small, metric="f1")

    with pytest.raises(ConfigError, match="C008 client_fraction: coalitions train with all"):
        contributions(FederationConfig.from_mapping({**small.model_dump(), "client_fraction": 0.5}))

    class Chatty(FederatedNode):
        def train(self, **kwargs: Any) -> dict[str, float]:
            self.send("hello", {})
            return {}

    with pytest.raises(RunError, match="F005 client_0"):
        contributions(small, client_template=Chatty)
