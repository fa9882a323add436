"""Which nodes are active in a round: waves, their conditions, and criteria of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.criterion import active_by_round, register_criterion
from icrf.errors import ConfigError, ConfigErrors
from icrf.participation import Participation
from icrf.protocol import CENTRALIZED, NodeSpec, nodes_of
from icrf.registry import KINDS
from icrf.spec import FederationConfig
from icrf.submission import build_submission
from icrf.waves import Condition, Waves

STAR = {"federation_id": "f", "schema": "TraditionalFederatedLearning", "federated_learning_topology": "star"}


def test_a_timetable_of_waves() -> None:
    waves = Waves(3, period=2)
    assert [waves.active(number) for number in range(1, 8)] == [3, 3, 6, 6, 9, 9, 12]


@pytest.mark.parametrize(
    ("text", "metrics", "holds"),
    [
        ("accuracy >= 0.6", {"accuracy": 0.6}, True),
        ("accuracy>0.6", {"accuracy": 0.6}, False),
        (" train_loss <= 1e-1 ", {"train_loss": 0.1}, True),
        ("train_loss < .5", {"train_loss": 0.4}, True),
        ("train_loss < .5", {"train_loss": float("nan")}, False),
        ("accuracy >= 0.6", {}, False),
    ],
)
def test_a_condition_compares_a_metric(text: str, metrics: dict[str, float], holds: bool) -> None:
    condition = Condition.parse(text)
    assert condition is not None and condition.holds(metrics) is holds


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 4), st.data())
def test_waves_follow_from_the_committed_rounds_however_often_these_are_told(
    met: list[bool], period: int, data: Any
) -> None:
    condition = Condition("m", ">=", 1.0)
    once, again = Waves(2, period, condition), Waves(2, period, condition)
    expected, last, wave = [], 1, 1
    for number, yes in enumerate(met, start=1):
        expected.append(2 * wave)
        assert once.active(number) == 2 * wave
        once.note(number, {"m": float(yes)})
        if yes and number + 1 - last >= period:
            last, wave = number + 1, wave + 1
    # A restore goes back: rounds are told again, with the metrics that they had.
    for number, yes in enumerate(met, start=1):
        for earlier in range(data.draw(st.integers(1, number)), number + 1):
            again.note(earlier, {"m": float(met[earlier - 1])})
        assert [again.active(r) for r in range(1, number + 1)] == expected[:number], yes


def test_a_share_of_the_clients_is_drawn_out_of_those_that_are_active(core: Any) -> None:
    config = {"client_fraction": 0.5, "activation": "waves", "wave_size": 4, "wave_period": 1}
    rule = Participation(core.submission(11, CENTRALIZED), config)
    drawn = [nodes_of(rule.of_round(number)) for number in (1, 2, 3)]
    assert [len(nodes) for nodes in drawn] == [2, 4, 5]
    assert max(drawn[0]) <= 4 and max(drawn[1]) <= 8
    assert rule.fewest(rule.clients) == 2 and not rule.is_constant


# ---------------------------------------------------------------- in a configuration


@pytest.mark.parametrize(
    ("keys", "code", "what"),
    [
        ({"activation": "waves"}, "C016", "wave_size is missing"),
        ({"activation": "wave"}, "C010", "Did you mean 'waves'"),
        ({"wave_condition": "accuracy = 0.6"}, "C007", "no condition"),
        ({"activation": "waves", "wave_size": 2, "min_nodes": 3}, "C008", "wave_size"),
        (
            {"activation": "waves", "wave_size": 2, "wave_condition": "loss < 1", "client_sampler": "a.b:c"},
            "C008",
            "before anything is measured",
        ),
        (
            {"activation": "waves", "wave_size": 4, "aggregation_strategy": "Krum", "num_byzantine": 1},
            "C008",
            "4 participants",
        ),
    ],
)
def test_what_contradicts_waves_is_named(keys: dict[str, Any], code: str, what: str) -> None:
    with pytest.raises(ConfigErrors, match=what) as caught:
        FederationConfig.from_mapping({**STAR, **keys})
    assert code in [error.code for error in caught.value.errors]


def test_members_of_a_hierarchy_are_always_active() -> None:
    keys = {"schema": "HierarchicalFederatedLearning", "federated_learning_topology": "hierarchy"}
    with pytest.raises(ConfigErrors, match="activation: 'waves' is not built yet"):
        FederationConfig.from_mapping({**STAR, **keys, "activation": "waves", "wave_size": 2})


# ---------------------------------------------------------------- a criterion of one's own


NODES = (NodeSpec("server", "aggregate-test"), *(NodeSpec(f"client_{i}", "train-eval") for i in range(4)))
KEYS = {"federated_learning_rounds": 3, "seed": 0, "placement": {"client_2": {"zone": "north"}}, "k_value": None}


@pytest.fixture
def user_code() -> Iterator[Any]:
    module = ModuleType("users_criteria")

    def by_turns(round_number: int, node_ids: tuple[str, ...]) -> list[str]:
        return [node_ids[round_number % 4], node_ids[0]]

    def large(num_samples: np.ndarray[Any, Any]) -> Any:
        return num_samples > 20

    def by_label(node_ids: tuple[str, ...], placement: dict[str, Any], roles: tuple[str, ...]) -> list[bool]:
        assert roles == ("train-eval",) * 4
        return [placement.get(node_id, {}).get("zone") == "north" for node_id in node_ids]

    def drawn(node_ids: tuple[str, ...], random_state: np.random.RandomState) -> list[str]:
        return list(random_state.choice(node_ids, 2, replace=False))

    def nobody(round_number: int) -> list[str]:
        return [] if round_number == 2 else ["client_0"]

    def stranger() -> list[str]:
        return ["server"]

    def broken(round_number: int) -> list[str]:
        raise ZeroDivisionError("no criterion")

    def by_weather(weather: str) -> list[str]:
        return []

    for function in (by_turns, large, by_label, drawn, nobody, stranger, broken, by_weather):
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def answers(name: str) -> list[tuple[int, ...]]:
    return active_by_round(f"users_criteria:{name}", NODES, lambda: np.array([0, 10, 30, 20, 40]), KEYS)


def test_a_criterion_decides_by_what_it_asks_for(user_code: Any) -> None:
    assert answers("by_turns") == [(1, 2), (1, 3), (1, 4)]
    assert answers("large") == [(2, 4)] * 3
    assert answers("by_label") == [(3,)] * 3
    assert answers("drawn") == answers("drawn") and len(set(answers("drawn"))) > 1


@pytest.mark.parametrize(
    ("name", "code", "what"),
    [
        ("nobody", "C018", "named nobody for round 2"),
        ("stranger", "C018", "named 'server', which does not train for round 1"),
        ("broken", "C017", "no criterion for round 1"),
        ("by_weather", "C017", "asks for parameter 'weather'"),
        ("gone", "C017", "no 'gone'"),
    ],
)
def test_an_unusable_criterion_is_named(user_code: Any, name: str, code: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        answers(name)
    assert (caught.value.code, caught.value.place) == (code, "activation")


def test_samplers_and_shares_choose_out_of_what_a_criterion_names(user_code: Any) -> None:
    def turns_of(**keys: Any) -> list[tuple[int, ...]]:
        data = {**STAR, "number_of_clients": 4, "federated_learning_rounds": 3, **keys}
        return [nodes_of(bytes.fromhex(row)) for row in build_submission(FederationConfig.from_mapping(data)).schedule]

    user_code.last = lambda number, ids, count, random_state: ids[-count:]
    by_turns = {"activation": "users_criteria:by_turns"}
    assert turns_of(**by_turns) == [(1, 2), (1, 3), (1, 4)]
    assert turns_of(**by_turns, sampled_clients=1, client_sampler="users_criteria:last") == [(2,), (3,), (4,)]
    assert all(
        len(turn) == 1 and turn[0] in (1, number + 1)
        for number, turn in enumerate(turns_of(**by_turns, client_fraction=0.5), start=1)
    )
    waves = {"activation": "waves", "wave_size": 1, "sampled_clients": 1, "client_sampler": "users_criteria:last"}
    assert turns_of(**waves) == [(1,), (2,), (3,)]


def test_criteria_are_plug_ins() -> None:
    assert "criterion" in KINDS
    register_criterion("first_only_of_this_test")(lambda node_ids: node_ids[:1])
    config = FederationConfig.from_mapping(
        {**STAR, "number_of_clients": 3, "federated_learning_rounds": 1, "activation": "first_only_of_this_test"}
    )
    assert build_submission(config).schedule == ("02",)
