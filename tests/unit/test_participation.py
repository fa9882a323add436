"""Who takes part in a round: the draw, users' samplers, and what crosses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf.errors import ConfigError
from icrf.exchange import MODEL, PARTIAL, ExchangePlan, compile_exchange
from icrf.participation import Participation, schedule
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    Submission,
    bitmap,
    nodes_of,
    sample_size,
)
from icrf.topology.hybrid import HybridAdjacencyMatrix

# ---------------------------------------------------------------- how many, and who


@given(st.sets(st.integers(0, 200)), st.integers(0, 7))
def test_a_bitmap_reads_back_as_its_nodes(nodes: set[int], more: int) -> None:
    assert nodes_of(bitmap(nodes, 201 + more)) == tuple(sorted(nodes))


@pytest.mark.parametrize(
    ("clients", "fraction", "number", "size"),
    [
        (100, 0.1, None, 10),
        (100, 0.29, None, 29),
        (10, 0.01, None, 1),
        (7, 0.5, None, 3),
        (5, 1.0, None, 5),
        (5, 1.0, 2, 2),
    ],
)
def test_a_share_of_the_clients_is_at_least_one(clients: int, fraction: float, number: int | None, size: int) -> None:
    assert sample_size(clients, fraction, number) == size


def rule(core: Any, num_nodes: int, flow: str = CENTRALIZED, **config: Any) -> Participation:
    submission = core.submission(num_nodes, flow)
    return Participation(submission, config)


def test_every_round_draws_anew_and_a_seed_repeats_its_draws(core: Any) -> None:
    one = rule(core, 101, client_fraction=0.1, seed=7)
    rounds = [nodes_of(one.of_round(number)) for number in range(1, 41)]
    assert all(len(drawn) == 10 and 0 not in drawn for drawn in rounds)
    assert len(set(rounds)) == 40
    assert len({node for drawn in rounds for node in drawn}) > 90
    again = rule(core, 101, client_fraction=0.1, seed=7)
    assert [nodes_of(again.of_round(number)) for number in range(1, 41)] == rounds
    assert rule(core, 101, client_fraction=0.1, seed=8).of_round(1) != one.of_round(1)


def test_the_draw_is_frozen(core: Any) -> None:
    # What journals and clusters rely on: another release must not draw otherwise.
    assert nodes_of(rule(core, 11, client_fraction=0.3, seed=0).of_round(1)) == (1, 4, 9)


def test_all_nodes_are_the_empty_set_of_bytes(core: Any) -> None:
    assert rule(core, 5).of_round(1) == b""
    assert rule(core, 5, DECENTRALIZED, sampled_clients=5).of_round(3) == b""


# ---------------------------------------------------------------- a sampler of one's own


@pytest.fixture
def user_code() -> Any:
    module = ModuleType("users_samplers")

    def newest(number: int, ids: Sequence[str], count: int, random_state: np.random.RandomState) -> list[str]:
        return [ids[(number + k) % len(ids)] for k in range(count)]

    def draws(number: int, ids: Sequence[str], count: int, random_state: np.random.RandomState) -> Any:
        return random_state.choice(ids, count, replace=False)

    def nobody(*_: Any) -> list[str]:
        return []

    def stranger(*_: Any) -> list[str]:
        return ["server"]

    def broken(*_: Any) -> list[str]:
        raise ZeroDivisionError("no clients left")

    for function in (newest, draws, nobody, stranger, broken):
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


IDS = ("server", "client_0", "client_1", "client_2")


def test_a_sampler_of_ones_own_decides_every_round(core: Any, user_code: Any) -> None:
    rows = schedule("users_samplers:newest", IDS, [(1, 2, 3)] * 3, lambda _: 2, seed=0)
    assert [nodes_of(bytes.fromhex(row)) for row in rows] == [(2, 3), (1, 3), (1, 2)]
    submission = core.submission(4, CENTRALIZED)
    found = Participation(Submission(**{**vars(submission), "schedule": rows}), {"client_fraction": 0.1})
    # After the last round that was configured its answers come again.
    assert [nodes_of(found.of_round(number)) for number in (1, 2, 3, 4)] == [(2, 3), (1, 3), (1, 2), (2, 3)]
    drawn = schedule("users_samplers:draws", IDS, [(1, 2, 3)] * 20, lambda _: 1, seed=4)
    assert drawn == schedule("users_samplers:draws", IDS, [(1, 2, 3)] * 20, lambda _: 1, seed=4)
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("name", "code", "what"),
    [
        ("nobody", "C018", "chose nobody"),
        ("stranger", "C018", "'server', which does not train"),
        ("broken", "C017", "no clients left"),
    ],
)
def test_an_unusable_sampler_is_named(user_code: Any, name: str, code: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule(f"users_samplers:{name}", IDS, [(1, 2, 3)] * 3, lambda _: 2, seed=0)
    assert caught.value.code == code and what in str(caught.value) and "round 1" in str(caught.value)


# ---------------------------------------------------------------- what crosses between clusters


def star(assignment: Sequence[int]) -> ExchangePlan:
    edges = [pair for i in range(1, len(assignment)) for pair in ((0, i), (i, 0))]
    roles = ["aggregate", *["train"] * (len(assignment) - 1)]
    return compile_exchange(CENTRALIZED, HybridAdjacencyMatrix.from_edges(len(assignment), edges), roles, assignment)


def test_a_cluster_without_participants_neither_receives_nor_sends() -> None:
    plan = star([0, 0, 1, 1, 2, 2]).of_round((1, 3))
    assert [(t.kind, t.source, t.target, t.recipients) for t in plan.transfers] == [
        (MODEL, 0, 1, (3,)),
        (PARTIAL, 1, 0, (0,)),
    ]
    assert [plan.local_participants(cluster) for cluster in range(3)] == [(1,), (3,), ()]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.data())
def test_the_plan_of_a_round_is_that_of_a_star_of_its_participants(assignment: list[int], data: Any) -> None:
    nodes = range(1, len(assignment))
    chosen = sorted(data.draw(st.sets(st.sampled_from(nodes), min_size=1)))
    roles = ["aggregate", *["train" if i in chosen else "eval" for i in nodes]]
    edges = [pair for i in nodes for pair in ((0, i), (i, 0))]
    only = compile_exchange(CENTRALIZED, HybridAdjacencyMatrix.from_edges(len(assignment), edges), roles, assignment)
    assert star(assignment).of_round(chosen) == only
