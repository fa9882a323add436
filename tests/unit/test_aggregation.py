"""Aggregation rules by themselves: recurrences against torch.optim and by hand, closed forms, bad participants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import ConfigError, ConfigErrors
from icrf.learning.aggregation import (
    AGGREGATORS,
    Aggregator,
    ClientUpdate,
    MeanAggregator,
    RoundFacts,
    UpdateAggregator,
    build_aggregator,
    clip_update,
    register_aggregator,
)
from icrf.learning.aggregation.averaging import effective_steps
from icrf.learning.aggregation.robust import krum_scores
from icrf.preconditions import fewest_updates
from icrf.protocol import Rows
from icrf.spec import FederationConfig
from icrf.update import ExactSum, choose_grid

Array = np.ndarray[Any, Any]
SETTINGS: dict[str, Any] = {"learning_rate": 0.1, "mu": 0.01, "num_byzantine": 1, "optimizer": "SGD"}
RULES = ("FedAvg", "FedProx", "SCAFFOLD", "FedNova", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "DiLoCo")
ROBUST = ("Median", "TrimmedMean", "Krum", "MultiKrum")
STAR = {
    "federation_id": "rules",
    "schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 8,
}
SIZES = (3, 5)
SIZE = sum(SIZES)


def rule_of(name: str, **more: Any) -> Any:
    return build_aggregator(name, {**SETTINGS, **more})


def contribute(rule: Aggregator, server: Array, trained: Array, steps: int) -> Array:
    """What a participant with a fresh state sends."""
    rows = rule.rows
    kept = np.zeros(rows.client * SIZE + rows.client_scalars, trained.dtype)
    out = np.empty(rows.up * SIZE + rows.scalars, trained.dtype)
    received = server[: rows.down * SIZE]
    return rule.contribution(ClientUpdate(received, trained, steps, kept, kept.copy(), out)).copy()


def exact_sum(rule: Aggregator, server: Array, total_weight: int) -> ExactSum:
    model = server[:SIZE]
    maxima = [float(abs(part).max()) for part in np.split(model, np.cumsum(SIZES)[:-1])]
    sizes = (*SIZES * rule.rows.up, *([rule.rows.scalars] if rule.rows.scalars else []))
    return ExactSum(sizes, choose_grid(rule.expected(maxima), total_weight), total_weight)


def advance(rule: MeanAggregator, server: Array, models: Sequence[Array], weights: Sequence[int], number: int) -> Array:
    """One round of a rule without local terms."""
    total = exact_sum(rule, server, sum(weights))
    for model, weight in zip(models, weights, strict=True):
        assert total.add(contribute(rule, server, model, 3), weight) == ()
    out = np.empty_like(server)
    rule.finish(total, server, out, RoundFacts(number, len(models), len(models)))
    return out


def models_of(seed: int, count: int, dtype: str = "float64") -> list[Array]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=SIZE).astype(dtype) for _ in range(count)]


# ---------------------------------------------------------------- means


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_means_have_equal_bits_in_any_grouping_and_order(name: str, dtype: str) -> None:
    rule = rule_of(name, momentum=0.9) if name in ("FedNova", "DiLoCo") else rule_of(name)
    models, weights = models_of(1, 6, dtype), [3, 1, 7, 2, 9, 4]
    server = rule.first_state(models_of(2, 1, dtype)[0])
    parts = [contribute(rule, server, model, steps) for steps, model in enumerate(models, 1)]

    def finish(total: ExactSum) -> bytes:
        out = np.empty_like(server)
        rule.finish(total, server, out, RoundFacts(2, 6, 6))
        return out.tobytes()

    alone = exact_sum(rule, server, sum(weights))
    for part, weight in zip(parts, weights, strict=True):
        alone.add(part, weight)
    expected = finish(alone)

    @settings(max_examples=25, derandomize=True, database=None)
    @given(st.permutations(range(6)), st.lists(st.integers(0, 2), min_size=6, max_size=6), st.permutations(range(3)))
    def check(order: list[int], groups: list[int], arrival: list[int]) -> None:
        partials = [exact_sum(rule, server, sum(weights)) for _ in range(3)]
        for index in order:
            partials[groups[index]].add(parts[index], weights[index])
        total = exact_sum(rule, server, sum(weights))
        for group in arrival:
            total.merge(partials[group])
        assert finish(total) == expected

    check()


def test_a_server_step_of_one_without_momentum_is_fedavg_bit_by_bit() -> None:
    models, weights = models_of(3, 5, "float32"), [5, 1, 2, 8, 3]
    start = models_of(4, 1, "float32")[0]
    expected = advance(rule_of("FedAvg"), start, models, weights, 1)
    for name in ("FedAvgM", "DiLoCo", "SCAFFOLD"):
        rule = rule_of(name, server_learning_rate=1.0, server_momentum=0.0)
        state = advance(rule, rule.first_state(start), models, weights, 1)
        assert state[:SIZE].tobytes() == expected.tobytes()


OPTIMIZERS = {
    "FedAvgM": ({"server_learning_rate": 0.7, "server_momentum": 0.8}, "SGD", {"lr": 0.7, "momentum": 0.8}),
    "DiLoCo": (
        {"server_learning_rate": 0.7, "server_momentum": 0.9},
        "SGD",
        {"lr": 0.7, "momentum": 0.9, "nesterov": True},
    ),
    "FedAdagrad": ({"server_learning_rate": 0.1, "tau": 1e-3}, "Adagrad", {"lr": 0.1, "eps": 1e-3}),
    "FedAdam": (
        {"server_learning_rate": 0.1, "server_beta1": 0.8, "server_beta2": 0.95, "tau": 1e-3},
        "Adam",
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_server_optimizer_is_that_of_torch_on_the_negative_pseudo_gradient(name: str) -> None:
    keys, optimizer, options = OPTIMIZERS[name]
    rule = rule_of(name, **keys)
    start = models_of(5, 1)[0]
    server, parameter = rule.first_state(start), torch.nn.Parameter(torch.tensor(start))
    stepper = getattr(torch.optim, optimizer)([parameter], **options)
    for number in range(1, 5):
        models, weights = models_of(10 + number, 4), [1, 2, 3, 4]
        server = advance(rule, server, models, weights, number)
        mean = sum(w * m for w, m in zip(weights, models, strict=True)) / 10
        parameter.grad = parameter.detach() - torch.tensor(mean)
        stepper.step()
        np.testing.assert_allclose(server[:SIZE], parameter.detach().numpy(), rtol=0, atol=1e-9)


def test_adam_and_yogi_by_hand() -> None:
    """Their second moments part in the second round."""
    start, targets = 1.0, [0.5, 0.7, 0.1]
    for name in ("FedAdam", "FedYogi"):
        rule = rule_of(name, server_learning_rate=0.1, server_beta1=0.9, server_beta2=0.99, tau=1e-3)
        server = rule.first_state(np.full(SIZE, start))
        x, m, v = start, 0.0, 0.0
        for t, target in enumerate(targets, 1):
            g = x - target
            m = 0.9 * m + 0.1 * g
            v = 0.99 * v + 0.01 * g * g if name == "FedAdam" else v - 0.01 * g * g * np.sign(v - g * g)
            x -= 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
            server = advance(rule, server, [np.full(SIZE, target)] * 2, [1, 1], t)
            np.testing.assert_allclose(server[:SIZE], x, rtol=0, atol=1e-7)


def test_effective_steps_are_those_of_the_recurrence() -> None:
    for steps in (1, 2, 7, 30):
        assert effective_steps(steps, 0.0) == steps
        velocity = np.zeros(steps)
        entered = np.zeros(steps)
        for k in range(steps):
            velocity = 0.9 * velocity
            velocity[k] += 1.0
            entered += velocity
        assert effective_steps(steps, 0.9) == pytest.approx(entered.sum(), rel=1e-12)


def test_fednova_with_equal_steps_is_fedavg() -> None:
    models, weights = models_of(6, 4), [1, 2, 3, 4]
    start = models_of(7, 1)[0]
    for momentum in (0.0, 0.9):
        found = advance(rule_of("FedNova", momentum=momentum), start, models, weights, 1)
        np.testing.assert_allclose(found, advance(rule_of("FedAvg"), start, models, weights, 1), atol=1e-9)


def test_fednova_takes_out_how_many_steps_a_node_made() -> None:
    """Two nodes with the same gradient 1 and 1 and 9 steps: the mean change is that of 5 steps, from either side."""
    rule, start = rule_of("FedNova"), np.zeros(SIZE)
    total = exact_sum(rule, start, 2)
    for steps in (1, 9):
        total.add(contribute(rule, start, np.full(SIZE, -0.1 * steps), steps), 1)
    out = np.empty(SIZE)
    rule.finish(total, start, out, RoundFacts(1, 2, 2))
    np.testing.assert_allclose(out, -0.5, atol=1e-9)


def test_control_variates_move_by_the_share_that_took_part() -> None:
    rule = rule_of("SCAFFOLD", learning_rate=0.5)
    start = rule.first_state(np.ones(SIZE))
    total = exact_sum(rule, start, 2)
    for model in (0.0, -2.0):
        total.add(contribute(rule, start, np.full(SIZE, model), 2), 1)
    out = np.empty_like(start)
    rule.finish(total, start, out, RoundFacts(1, 2, 8))
    np.testing.assert_allclose(out[:SIZE], -1.0)
    # Gradients 1/(2*0.5) and 3/(2*0.5), of two nodes out of eight.
    np.testing.assert_allclose(out[SIZE:], 0.25 * 2.0)


# ---------------------------------------------------------------- every update


def combine(name: str, updates: Sequence[Array], **more: Any) -> Array:
    out = np.empty_like(updates[0])
    facts = RoundFacts(1, len(updates), len(updates))
    rule_of(name, **more).combine(updates, np.zeros_like(out), out, facts)
    return out


def test_the_median_and_the_trimmed_mean_by_hand() -> None:
    columns = np.array([[1.0, 9.0], [2.0, 8.0], [3.0, 100.0], [4.0, -7.0], [50.0, 6.0]])
    assert combine("Median", columns).tolist() == [3.0, 8.0]
    assert combine("Median", columns[:4]).tolist() == [2.5, 8.5]
    np.testing.assert_allclose(combine("TrimmedMean", columns, num_byzantine=1), [3.0, 23.0 / 3])
    np.testing.assert_allclose(combine("TrimmedMean", columns, num_byzantine=0), columns.mean(axis=0))


@pytest.mark.parametrize("name", ["Median", "TrimmedMean", "Krum", "MultiKrum"])
def test_a_robust_rule_stays_with_the_honest_where_the_mean_is_carried_off(name: str) -> None:
    draw = np.random.default_rng(8)
    honest = [draw.normal(size=SIZE) for _ in range(7)]
    updates = [honest[0], np.full(SIZE, 1e6), *honest[1:4], np.full(SIZE, 1e6), *honest[4:], np.full(SIZE, 1e6)]
    found = combine(name, updates, num_byzantine=3)
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    assert ((low <= found) & (found <= high)).all()
    assert np.abs(np.mean(updates, axis=0)).min() > 1e5
    if name == "Krum":
        assert any((found == update).all() for update in honest)


def test_krum_scores_by_hand() -> None:
    updates = [np.array([x]) for x in (0.0, 1.0, 3.0, 100.0, 2.5)]
    # Two nearest others each: n - f - 2 with f = 1.
    np.testing.assert_allclose(krum_scores(updates, 1), [1 + 6.25, 1 + 2.25, 0.25 + 4, 97.0**2 + 97.5**2, 0.25 + 2.25])
    assert combine("Krum", updates, num_byzantine=1).tolist() == [2.5]
    assert combine("MultiKrum", updates, num_byzantine=1).tolist() == [1.75]
    assert combine("MultiKrum", updates, num_byzantine=0, num_selected=3).tolist() == [6.5 / 3]


@pytest.mark.parametrize(("name", "fewest"), [("TrimmedMean", 5), ("Krum", 7), ("MultiKrum", 7)])
def test_too_few_participants_are_refused(name: str, fewest: int) -> None:
    assert fewest_updates(name, 2) == fewest
    updates = [np.full(SIZE, float(k)) for k in range(fewest)]
    combine(name, updates, num_byzantine=2)
    with pytest.raises(ConfigError, match=r"C008.*cannot tolerate 2 of"):
        combine(name, updates[:-1], num_byzantine=2)


def test_too_many_selected_are_refused() -> None:
    rule_of("MultiKrum", num_selected=4).require(7)
    with pytest.raises(ConfigError, match=r"C008.*num_selected"):
        rule_of("MultiKrum", num_selected=5).require(7)


# ---------------------------------------------------------------- clipping


def test_clipping_scales_long_changes_only() -> None:
    base = np.arange(SIZE, dtype=np.float32)
    near = base + np.float32(0.25)
    kept = near.copy()
    clip_update(base, near, 1.0)
    assert near.tobytes() == kept.tobytes()
    far = base + np.float32(3.0)
    clip_update(base, far, 1.0)
    assert np.linalg.norm(far.astype(np.float64) - base) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(far - base, 1.0 / np.sqrt(SIZE), rtol=1e-5)


# ---------------------------------------------------------------- the registry


def test_rules_take_settings_by_name_and_null_is_their_default() -> None:
    assert rule_of("FedAvgM", server_learning_rate=None, server_momentum=0.5).learning_rate == 1.0
    assert rule_of("DiLoCo", server_learning_rate=None).learning_rate == 0.7
    assert {*RULES, *ROBUST} <= set(AGGREGATORS.names())
    for name in (*RULES, *ROBUST):
        assert isinstance(rule_of(name), UpdateAggregator if name in ROBUST else MeanAggregator)
        assert rule_of(name).rows.every_update == (name in ROBUST)


@register_aggregator("test-forgetful")
class Forgetful(UpdateAggregator):
    """Does not say that it needs every update."""

    rows = Rows(server=2)


@register_aggregator("test-more-than-models")
class MoreThanModels(UpdateAggregator):
    rows = Rows(every_update=True, scalars=1)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"C017.*scalars 1.*allowed: up 1 and scalars 0"):
        rule_of("test-more-than-models")
    with pytest.raises(ConfigError, match=r"C010.*FedAwg.*FedAvg"):
        rule_of("FedAwg")
    with pytest.raises(ConfigError, match=r"C017.*made a value of type list"):
        rule_of("builtins:list")
    with pytest.raises(ConfigError, match=r"C017.*every_update False"):
        rule_of("test-forgetful")
    with pytest.raises(ConfigError, match=r"C017.*TypeError"):
        build_aggregator("FedProx", {"mu": None})
    with pytest.raises(ConfigError, match=r"C008.*cannot be kept"):
        rule_of("DiLoCo", optimizer="RMSprop")
    for name in ("SCAFFOLD", "FedNova"):
        with pytest.raises(ConfigError, match=r"C008.*needs local SGD"):
            rule_of(name, optimizer="Adam")
    with pytest.raises(ConfigError, match=r"C008.*clip_norm"):
        rule_of("SCAFFOLD", clip_norm=1.0)


def test_a_registered_rule_is_found() -> None:
    @register_aggregator("test-half-way")
    class HalfWay(MeanAggregator):
        def advance(self, mean: Any, previous: Any, out: Any, facts: RoundFacts) -> None:
            out[0][:] = 0.5 * (previous[0] + mean[0])

    found = advance(rule_of("test-half-way"), np.ones(SIZE), [np.full(SIZE, 4.0)] * 2, [1, 1], 1)
    assert found.tolist() == [2.5] * SIZE
    assert replace(HalfWay().rows, up=1) == HalfWay.rows


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"aggregation_strategy": "FedProx"}, "C016.*mu is missing"),
        ({"aggregation_strategy": "Krum"}, "C016.*num_byzantine is missing"),
        ({"aggregation_strategy": "Krum", "num_byzantine": 3}, "C008.*Krum needs 9 for it"),
        ({"aggregation_strategy": "MultiKrum", "num_byzantine": 3}, "C008.*MultiKrum needs 9 for it"),
        ({"aggregation_strategy": "TrimmedMean", "num_byzantine": 4}, "C008.*TrimmedMean needs 9 for it"),
        ({"aggregation_strategy": "MultiKrum", "num_byzantine": 2, "num_selected": 5}, "C008.*num_selected 5"),
        ({"aggregation_strategy": "SCAFFOLD", "optimizer": "Adam"}, "C008.*optimizer Adam contradicts"),
        ({"aggregation_strategy": "FedNova", "optimizer": "AdamW"}, "C008.*optimizer AdamW contradicts"),
        ({"aggregation_strategy": "DiLoCo", "optimizer": "RMSprop"}, "C008.*optimizer RMSprop contradicts"),
        ({"aggregation_strategy": "SCAFFOLD", "clip_norm": 1.0}, "C008.*clip_norm contradicts"),
        ({"aggregation_strategy": "Bulyan"}, "C012.*not built"),
        ({"clip_norm": 0}, "C007.*clip_norm"),
    ],
)
def test_what_cannot_work_is_refused_in_the_configuration(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigErrors, match=complaint):
        FederationConfig.from_mapping({**STAR, **keys})
