"""The mediator's core and late updates: who brings which earlier round, what it weighs, and what the journal says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icrf.errors import InternalError, WeightsError, make_error
from icrf.learning.layout import Layout
from icrf.protocol import (
    CENTRALIZED,
    AbortAttempt,
    Goodbye,
    HeldRun,
    LateUpdates,
    RoundReport,
    StartRound,
    TensorSpec,
    bitmap,
    nodes_of,
)
from icrf.spec import FederationConfig
from icrf.staleness import IN_TIME, factor, late_nodes, scaled
from icrf_agent.checkpoint import SERVER, merge_rows, model_of, pack_rows, split_rows, unpack_models, unpack_rows
from icrf_agent.host_late import EarlierModels, row_for
from icrf_agent.host_state import VersionedState

ON_EU, ON_US = (2, 4), (1, 3)
WEIGH = {"late_updates": "weigh", "staleness_exponent": 0.5, "max_staleness": 2, "min_nodes": 1}


def star_run(core: Any, **config: Any) -> Any:
    """A star whose first round is open: the server and nodes 2 and 4 live on eu, nodes 1 and 3 on us."""
    core.register("eu", "us", slots=5)
    keys = {**WEIGH, "federated_learning_rounds": 9, **config}
    run = core.submit(num_nodes=5, flow=CENTRALIZED, assignment_strategy="round_robin", **keys)
    core.play(hold=(StartRound,))
    return run


def answer(core: Any, orders: list[tuple[str, StartRound]]) -> StartRound:
    """Everybody reports, eu, which has to wait for the others, last; the order."""
    for cluster, order in sorted(orders, reverse=True):
        core.report(cluster, core.round_report(cluster, order))
    return orders[0][1]


def round_in_time(core: Any) -> StartRound:
    return answer(core, core.take(StartRound))


def round_without_us(core: Any) -> StartRound:
    """us misses the deadline of the open round, which is committed in its next attempt."""
    core.take(StartRound)
    core.pass_time(105.0, beating=("eu", "us"))
    core.take(AbortAttempt)
    return answer(core, core.take(StartRound))


def as_sent(core: Any, number: int) -> StartRound:
    """The newest attempt of a round that clusters were asked for."""
    return [i for _, i in core.sent if isinstance(i, StartRound) and i.round == number][-1]


def brought(order: StartRound) -> list[tuple[int, tuple[int, ...], int]]:
    return [(late.round, nodes_of(late.nodes), late.factor) for late in order.late]


# ---------------------------------------------------------------- weights


def test_weights_fall_with_age_and_stay_integers() -> None:
    assert [factor(s, 0.5) for s in (0, 1, 2, 3, 8)] == [1024, 724, 591, 512, 341]
    assert [factor(s, 0.0) for s in (1, 100)] == [IN_TIME, IN_TIME]
    assert [factor(s, 1.0) for s in (1, 3)] == [512, 256]
    assert factor(1000, 16.0) == 1
    late = late_nodes([LateUpdates(3, bitmap([1, 2], 5), 512), LateUpdates(4, bitmap([4], 5), 700)])
    assert [scaled(10, node, late) for node in range(1, 5)] == [5120, 5120, 10240, 7000]
    assert scaled(10, 1, {}) == 10


# ---------------------------------------------------------------- who brings what


def test_a_late_cluster_brings_the_round_it_missed_to_the_next_one(core: Any) -> None:
    run = star_run(core)
    first = round_without_us(core)
    assert (brought(first), first.kept, nodes_of(first.participants)) == ([], (1,), ON_EU)
    assert core.store.rows("participants", (run.run_id, 1))[0].row == {
        "participants": bitmap(ON_EU, 5).hex(),
        "without": ["us"],
        "late": bitmap(ON_US, 5).hex(),
    }
    second = round_in_time(core)
    assert (brought(second), second.kept, second.participants) == ([(1, ON_US, 724)], (), b"")
    assert second.total_weight == (12 + 14) * 1024 + (11 + 13) * 724
    third = round_in_time(core)
    assert (third.late, third.kept, third.total_weight) == ((), (), 12 + 14 + 11 + 13)
    results = [e.round for e in core.events(run) if e.round]
    assert [r.staleness for r in results] == [{}, {"client_0": 1, "client_2": 1}, {}]
    assert [row.row["staleness"] for row in core.commits(run)] == [r.staleness for r in results]
    told = [e.text for e in core.events(run) if " late " in e.text]
    assert told == ["round 2 has late updates of 2 nodes, of round 1: 1 behind, weight x 0.707"]


def test_whoever_misses_again_is_asked_for_the_same_round_until_it_is_too_old(core: Any) -> None:
    run = star_run(core)
    assert [round_without_us(core).kept for _ in range(2)] == [(1,), (1,)]
    third = round_in_time(core)
    assert brought(third) == [(1, ON_US, 591)]
    assert [round_without_us(core).kept for _ in range(3)] == [(4,), (4,), (4,)]
    seventh = round_in_time(core)
    assert (seventh.late, seventh.participants) == ((), b"")
    warnings = [e.text for e in core.events(run) if "too late" in e.text]
    assert warnings == ["us is too late: its updates of round 4 are dropped"]


def test_a_cluster_that_is_behind_does_nothing_else_and_its_drawn_nodes_wait(core: Any) -> None:
    star_run(core, sampled_clients=2, seed=3)
    while not (drawn := set(nodes_of(core.queue[0][1].participants))) & set(ON_US) or drawn <= set(ON_US):
        round_in_time(core)
    missed = drawn & set(ON_US)
    round_without_us(core)
    order = round_in_time(core)
    assert set(nodes_of(order.late[0].nodes)) == missed
    assert set(nodes_of(order.participants)) & set(ON_US) == missed


def test_a_lost_cluster_owes_nothing_and_one_that_owed_still_does(core: Any) -> None:
    run = star_run(core, on_cluster_loss="exclude", max_staleness=9)
    round_without_us(core)
    core.take(StartRound)
    core.report("us", Goodbye("i-us", "stopped"))
    assert core.store.rows("participants", (run.run_id, 2))[0].row.get("late") is None
    second = round_in_time(core)
    assert (second.late, second.kept, nodes_of(second.participants)) == ((), (1,), ON_EU)
    core.register("us", slots=5, held=(HeldRun(run.run_id, 1, 2, 1),))
    # Round 3 was decided without it, and is repeated so; then it brings what it owed when it was lost.
    assert core.get(run).rounds_done == 2
    core.take(StartRound)
    answer(core, [(cluster, as_sent(core, 3)) for cluster in ("eu", "us")])
    assert brought(round_in_time(core)) == [(1, ON_US, factor(3, 0.5))]


def test_removed_nodes_bring_nothing(core: Any) -> None:
    run = star_run(core)
    core.take(StartRound)
    _, effects = core.mediator.change_nodes(run.run_id, [], ["client_0"], core.now)
    core.carry_out(effects)
    core.pass_time(105.0, beating=("eu", "us"))
    answer(core, core.take(StartRound))
    order = round_in_time(core)
    assert (brought(order), nodes_of(order.participants)) == ([(1, (3,), 724)], (2, 3, 4))


# ---------------------------------------------------------------- what was decided is repeated


def test_a_restart_of_the_mediator_repeats_what_is_late(core: Any) -> None:
    run = star_run(core)
    round_without_us(core)
    ((_, before), _) = core.take(StartRound)
    again = core.restarted()
    again.orders = core.orders
    again.register("eu", "us", slots=5, held=(HeldRun(run.run_id, 1, 2, 1),))
    ((_, after), _) = again.take(StartRound)
    assert (after.late, after.kept, after.total_weight, after.grid) == (
        before.late,
        before.kept,
        before.total_weight,
        before.grid,
    )
    assert (before.attempt, after.attempt) == (1, 2)


def test_committed_rounds_are_repeated_with_their_late_updates(core: Any) -> None:
    run = star_run(core)
    first, second = round_without_us(core), round_in_time(core)
    core.take(StartRound)
    dead = make_error("U003", "its process died").to_json()
    core.report("eu", RoundReport(run.run_id, 1, 3, 1, error_json=dead, recovery="restore"))
    core.play(hold=(StartRound,))
    repeated = [round_in_time(core), round_in_time(core)]
    assert [o.generation for o in repeated] == [2, 2]
    for before, after in zip((first, second), repeated, strict=True):
        assert (after.late, after.kept, after.participants) == (before.late, before.kept, before.participants)


def test_without_the_policy_nothing_is_late(core: Any) -> None:
    run = star_run(core, late_updates="drop")
    first, second = round_without_us(core), round_in_time(core)
    assert (first.kept, second.late, second.total_weight) == ((), (), 50)
    assert "late" not in core.store.rows("participants", (run.run_id, 1))[0].row


# ---------------------------------------------------------------- the models they start from

LAYOUT = Layout((TensorSpec("w", (2,), "float32"),))


def start(number: int, attempt: int = 1, late: tuple[int, ...] = (), kept: tuple[int, ...] = ()) -> StartRound:
    updates = tuple(LateUpdates(r, bitmap([3 + k], 8), 512) for k, r in enumerate(late))
    return StartRound("run", 1, number, attempt, "", (0,), 10, False, late=updates, kept=kept)


def model(number: int) -> Any:
    return np.full(2, number, np.float32)


def test_the_aggregator_keeps_models_as_long_as_somebody_owes_their_round() -> None:
    server, earlier = VersionedState(model(0), recycle=True), EarlierModels()

    def attempt(order: StartRound) -> list[list[float]]:
        row = server.rebase(order)
        earlier.enter(order, server, 2)
        sent = np.atleast_2d(earlier.sent(order, row)).tolist()
        state = server.spare()
        state[:] = order.round
        server.stage(order, state)
        return sent

    assert attempt(start(1)) == [[0.0, 0.0]]
    assert attempt(start(2)) == [[1.0, 1.0]]
    assert attempt(start(2, 2, kept=(2,))) == [[1.0, 1.0]]
    assert attempt(start(3, kept=(2,))) == [[2.0, 2.0]]
    order = start(4, late=(2,), kept=(4,))
    assert attempt(order) == [[3.0, 3.0], [1.0, 1.0]]
    assert [row_for(order, nodes) for nodes in ((3,), (5, 6), (2, 3))] == [1, 0, 1]
    assert list(earlier.by_round) == [1, 3]
    assert attempt(start(5, late=(4,))) == [[4.0, 4.0], [3.0, 3.0]]
    attempt(start(6))
    assert dict(earlier.by_round) == {}
    with pytest.raises(InternalError, match="needs the model of round 2"):
        attempt(start(7, late=(3,)))


def test_checkpoints_carry_these_models_with_the_servers_rows() -> None:
    rows = {SERVER: model(7), model_of(3): model(3), model_of(12): model(12)}
    packed = merge_rows([pack_rows(rows, 7), pack_rows({"4": model(4)}, 7)], 7)
    server, other, none = split_rows(packed, 7, [[SERVER], ["4"], []])
    assert none == b""
    assert unpack_rows(LAYOUT, server, 7, [SERVER], 2).tolist() == [[7.0, 7.0]]
    assert {n: m.tolist() for n, m in unpack_models(LAYOUT, server, 7).items()} == {3: [3.0, 3.0], 12: [12.0, 12.0]}
    assert unpack_models(LAYOUT, other, 7) == {}
    with pytest.raises(WeightsError, match="somebody unknown"):
        split_rows(pack_rows({"model-x": model(1)}, 7), 7, [[SERVER]])


# ---------------------------------------------------------------- configuration

KEYS = {
    "federation_id": "fed",
    "schema": "TraditionalFederatedLearning",
    "federated_learning_topology": "star",
    "number_of_clients": 4,
    "late_updates": "weigh",
}


@pytest.mark.parametrize(
    ("keys", "code", "what"),
    [
        ({}, "C008", "contradicts min_nodes null"),
        ({"min_nodes": 2, "aggregation_strategy": "SCAFFOLD"}, "C012", "is not built yet"),
        ({"min_nodes": 2, "aggregation_strategy": "FedAdam"}, "C012", "drop with aggregation_strategy FedAdam"),
        (
            {"schema": "DecentralizedFederatedLearning", "federated_learning_topology": "ring", "min_nodes": 4},
            "C012",
            "with federated_learning_schema TraditionalFederatedLearning also weigh",
        ),
        ({"min_nodes": 2, "late_updates": "wait"}, "C010", "drop, weigh"),
        ({"min_nodes": 2, "max_staleness": 0}, "C0", "max_staleness"),
        ({"min_nodes": 2, "staleness_exponent": -0.5}, "C0", "staleness_exponent"),
    ],
)
def test_what_late_updates_contradict(keys: dict[str, Any], code: str, what: str) -> None:
    with pytest.raises(Exception) as caught:
        FederationConfig.from_mapping({**KEYS, **keys})
    assert code in str(caught.value) and what in str(caught.value)


@pytest.mark.parametrize("rule", [{}, {"aggregation_strategy": "FedProx", "mu": 0.1}])
def test_where_late_updates_can_be_weighed(rule: dict[str, Any]) -> None:
    config = FederationConfig.from_mapping({**KEYS, **rule, "min_nodes": 2})
    assert (config.late_updates, config.staleness_exponent, config.max_staleness) == ("weigh", 0.5, 4)
