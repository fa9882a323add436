"""The mediator's core and the participants of rounds: weights, late and lost clusters, changes of the nodes. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from icrf.errors import IcrfError, make_error
from icrf.protocol import (
    CENTRALIZED,
    RECOVERING,
    AbortAttempt,
    Activate,
    Goodbye,
    HeldRun,
    Release,
    Reserve,
    RoundReport,
    RoundResult,
    SaveCheckpoint,
    StartRound,
    StoreModel,
    bitmap,
    nodes_of,
)

# ---------------------------------------------------------------- the mediator draws and weighs


ON_EU, ON_US = (2, 4), (1, 3)


def star_run(core: Any, **config: Any) -> Any:
    """A star whose first round is open: the server and nodes 2 and 4 live on eu, nodes 1 and 3 on us."""
    core.register("eu", "us", slots=5)
    run = core.submit(num_nodes=5, flow=CENTRALIZED, assignment_strategy="round_robin", **config)
    core.play(hold=(StartRound,))
    assert core.nodes_on(run.run_id, "us") == [*ON_US]
    return run


def starts(core: Any) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """The attempts that clusters were asked for since the last look: cluster, round, attempt, participants."""
    return [(c, s.round, s.attempt, nodes_of(s.participants)) for c, s in core.take(StartRound)]


def test_the_weights_of_a_round_are_those_of_its_participants(core: Any) -> None:
    run = star_run(core, sampled_clients=2, seed=3)
    seen = []
    for _ in range(3):
        (_, order), (_, other) = core.take(StartRound)
        assert order == other
        chosen = nodes_of(order.participants)
        assert order.total_weight == sum(10 + node for node in chosen)
        seen.append(chosen)
        for cluster in ("eu", "us"):
            core.report(cluster, core.round_report(cluster, order))
    results = [event.round for event in core.events(run) if event.round]
    assert [r.participant_nodes for r in results] == seen
    assert [r.participants for r in results] == [2, 2, 2]
    assert [row.row["participants_bitmap"] for row in core.commits(run)] == [r.participants_bitmap for r in results]


def test_a_restart_weighs_and_draws_as_before(core: Any) -> None:
    star_run(core, sampled_clients=2, seed=3)
    before = core.take(StartRound)
    again = core.restarted()
    again.orders = core.orders
    again.register("eu", "us", slots=5, held=(HeldRun(before[0][1].run_id, 1, 1, 1),))
    assert [(s.participants, s.total_weight, s.grid, s.attempt) for _, s in again.take(StartRound)] == [
        (s.participants, s.total_weight, s.grid, 2) for _, s in before
    ]


# ---------------------------------------------------------------- late clusters


def test_without_min_nodes_a_late_cluster_ends_the_run(core: Any) -> None:
    run = star_run(core)
    core.pass_time(105.0, beating=("eu", "us"))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", "F002")


def test_a_late_cluster_is_dropped_from_the_round_and_asked_again_in_the_next(core: Any) -> None:
    run = star_run(core, min_nodes=2)
    first = dict(core.take(StartRound))
    # eu holds the global model: it cannot report before us has sent its partial.
    core.pass_time(105.0, beating=("eu", "us"))
    assert [i for _, i in core.take(AbortAttempt)] == [AbortAttempt(run.run_id, 1, 1)] * 2
    assert core.store.rows("participants", (run.run_id, 1))[0].row == {
        "participants": bitmap(ON_EU, 5).hex(),
        "without": ["us"],
    }
    ((cluster, again),) = core.take(StartRound)
    assert (cluster, again.attempt, again.participants) == ("eu", 2, bitmap(ON_EU, 5))
    assert again.total_weight == sum(10 + node for node in ON_EU)
    core.report("us", core.round_report("us", first["us"]))
    assert core.commits(run) == []
    core.report("eu", core.round_report("eu", again))
    result = next(e.round for e in core.events(run) if e.round)
    assert (result.participant_nodes, result.bytes_by_cluster) == (ON_EU, {"eu": 100})
    texts = [e.text for e in core.events(run) if e.kind == "warning"]
    assert texts == ["round 1 goes on without us: 2 of 4 nodes take part", "us: round 1 came late and is dropped"]
    # Another attempt than the one that eu may have begun after the first of round 1.
    assert starts(core) == [("eu", 2, 2, ()), ("us", 2, 2, ())]


def test_a_late_coordinator_or_too_few_nodes_end_the_run(new_core: Any) -> None:
    for least, punctual in ((3, ()), (2, ("us",))):
        core = new_core()
        run = star_run(core, min_nodes=least)
        for cluster, order in core.take(StartRound):
            if cluster in punctual:
                core.report(cluster, core.round_report(cluster, order))
        core.pass_time(105.0, beating=("eu", "us"))
        assert (core.get(run).status, core.error(run).code) == ("FAILED", "F002")


def test_a_late_cluster_without_participants_changes_nothing_but_who_is_asked(core: Any) -> None:
    star_run(core, min_nodes=1, sampled_clients=1, seed=1)
    orders = dict(core.take(StartRound))
    (chosen,) = nodes_of(orders["us"].participants)
    assert chosen in ON_EU
    core.pass_time(105.0, beating=("eu", "us"))
    assert starts(core) == [("eu", 1, 2, (chosen,))]
    assert core.store.rows("participants") == []


# ---------------------------------------------------------------- lost clusters


def lose(core: Any) -> None:
    core.report("us", Goodbye("i-us", "stopped"))


def as_sent(core: Any, number: int, attempt: int) -> StartRound:
    """An attempt that clusters were asked for."""
    return [i for _, i in core.sent if isinstance(i, StartRound) and (i.round, i.attempt) == (number, attempt)][-1]


def test_an_excluded_cluster_is_done_without_and_comes_in_again_at_a_checkpoint(core: Any) -> None:
    run = star_run(core, min_nodes=2, on_cluster_loss="exclude")
    core.take(StartRound)
    lose(core)
    assert core.get(run).status == "RUNNING"
    assert starts(core) == [("eu", 1, 2, ON_EU)]
    core.register("us", slots=5)
    assert starts(core) == []
    core.take(AbortAttempt)
    core.report("eu", core.round_report("eu", as_sent(core, 1, 2)))
    # Between two rounds its state becomes durable; then all start from it under a new generation.
    ((cluster, order),) = core.take(SaveCheckpoint)
    assert (cluster, order.round, starts(core)) == ("eu", 1, [])
    core.report(cluster, core.answer(cluster, order))
    assert [(c, i.generation) for c, i in core.queue if isinstance(i, Reserve)] == [("eu", 2), ("us", 2)]
    left = core.play(hold=(Activate,))
    assert [(c, i.restore_round) for c, i in left if isinstance(i, Activate)] == [("eu", 1), ("us", 1)]


def test_waiting_ends_at_the_deadline_with_those_that_are_there(core: Any) -> None:
    run = star_run(core, min_nodes=2)
    core.take(StartRound)
    lose(core)
    assert core.get(run).status == "RECOVERING"
    core.pass_time(50.0, beating=("eu",))
    assert starts(core) == []
    core.pass_time(55.0, beating=("eu",))
    assert starts(core) == [("eu", 1, 2, ON_EU)]


def test_a_round_below_its_quorum_waits_for_the_lost_cluster(core: Any) -> None:
    run = star_run(core, min_nodes=1, sampled_clients=1, seed=1, on_cluster_loss="exclude", federated_learning_rounds=9)
    core.take(StartRound)
    lose(core)
    done = 0
    while core.get(run).status == "RUNNING":
        ((_, order),) = core.take(StartRound)
        assert set(nodes_of(order.participants)) <= set(ON_EU)
        core.report("eu", core.round_report("eu", order))
        done += 1
    assert done > 0
    assert (core.get(run).status, core.get(run).rounds_done) == ("RECOVERING", done)
    core.register("us", slots=5, held=(HeldRun(run.run_id, 1, 1, 1),))
    found = starts(core)
    assert [(c, r) for c, r, _, _ in found] == [("eu", done + 1), ("us", done + 1)]
    assert set(found[0][3]) <= set(ON_US)


def test_a_lost_coordinator_is_waited_for(core: Any) -> None:
    run = star_run(core, min_nodes=1, on_cluster_loss="exclude")
    core.take(StartRound)
    core.report("eu", Goodbye("i-eu", "stopped"))
    assert (core.get(run).status, starts(core)) == ("RECOVERING", [])
    core.pass_time(105.0, beating=("us",))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", "F002")


def test_a_run_that_did_without_a_cluster_completes(core: Any) -> None:
    run = star_run(core, min_nodes=2, on_cluster_loss="exclude")
    core.take(StartRound)
    lose(core)
    core.play()
    assert core.get(run).status == "COMPLETED"
    assert [e.round.participant_nodes for e in core.events(run) if e.round] == [ON_EU] * 3
    told = [e.text for e in core.events(run) if e.kind == "warning"]
    assert told == ["round 1 goes on without us: 2 of 4 nodes take part"]
    assert [c for c, i in core.sent if isinstance(i, StoreModel)] == ["eu"]
    # What it may still hold it is told to release.
    core.register("us", slots=5)
    assert [c for c, i in core.queue if isinstance(i, Release)] == ["us"]


# ---------------------------------------------------------------- what was decided is repeated


def test_a_restart_of_the_mediator_repeats_the_recorded_participants(core: Any) -> None:
    run = star_run(core, min_nodes=2)
    core.take(StartRound)
    core.pass_time(105.0, beating=("eu", "us"))
    assert starts(core) == [("eu", 1, 2, ON_EU)]
    again = core.restarted()
    again.orders = core.orders
    again.register("eu", "us", slots=5, held=(HeldRun(run.run_id, 1, 1, 2),))
    # us is there and asked again; its nodes stay out of this round, and take part in the next.
    assert starts(again) == [("eu", 1, 3, ON_EU), ("us", 1, 3, ON_EU)]
    for cluster in ("us", "eu"):
        again.report(cluster, again.round_report(cluster, as_sent(again, 1, 3)))
    assert starts(again) == [("eu", 2, 2, ()), ("us", 2, 2, ())]


def test_a_committed_round_is_repeated_with_its_participants_only(core: Any) -> None:
    run = star_run(core, min_nodes=2)
    core.take(StartRound)
    core.pass_time(105.0, beating=("eu", "us"))
    core.report("eu", core.round_report("eu", as_sent(core, 1, 2)))
    core.take(StartRound)
    for cluster in ("us", "eu"):
        core.report(cluster, core.round_report(cluster, as_sent(core, 2, 2)))
    core.take(StartRound)
    dead = make_error("U003", "its process died").to_json()
    core.report("eu", RoundReport(run.run_id, 1, 3, 1, error_json=dead, recovery="restore"))
    core.play(hold=(StartRound,))
    # From round 0 again: round 1 with those that were committed, round 2 with no less.
    assert starts(core) == [("eu", 1, 1, ON_EU), ("us", 1, 1, ON_EU)]
    for cluster in ("us", "eu"):
        core.report(cluster, core.round_report(cluster, as_sent(core, 1, 1)))
    assert starts(core) == [("eu", 2, 1, ()), ("us", 2, 1, ())]
    core.pass_time(105.0, beating=("eu", "us"))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", "F002")


def test_results_without_a_bitmap_have_no_nodes() -> None:
    assert RoundResult(1, 1, 1, 0, 0, 0, 0, {}, 0, 0, 3, "", "").participant_nodes == ()


# ---------------------------------------------------------------- an orderly end


def test_a_stop_ends_after_the_open_round_with_its_model(core: Any) -> None:
    run = star_run(core)
    core.advance(run, "stop")
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done) == ("COMPLETED", 1)
    assert core.advance(run, "stop") == core.get(run)


def test_a_stop_stores_what_is_committed_without_those_that_are_away(core: Any) -> None:
    run = star_run(core)
    for cluster in ("us", "eu"):
        core.report(cluster, core.round_report(cluster, as_sent(core, 1, 1)))
    core.take(StartRound)
    lose(core)
    assert core.get(run).status == "RECOVERING"
    core.advance(run, "stop")
    assert [c for c, i in core.queue if isinstance(i, StoreModel)] == ["eu"]
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done) == ("COMPLETED", 1)


def test_a_stop_is_remembered_by_the_next_life_of_the_mediator(core: Any) -> None:
    run = star_run(core)
    core.advance(run, "stop")
    again = core.restarted()
    again.orders = core.orders
    again.register("eu", "us", slots=5, held=(HeldRun(run.run_id, 1, 1, 1),))
    again.play()
    assert (again.get(run).status, again.get(run).rounds_done) == ("COMPLETED", 1)


def test_a_stop_before_the_first_round_cancels(core: Any) -> None:
    core.register("eu", "us", slots=5)
    run = core.submit(num_nodes=5, flow=CENTRALIZED, stage="activate", keep=True)
    core.play()
    core.advance(run, "stop")
    assert (core.get(run).status, core.error(run).code) == ("CANCELLED", "F003")


# ---------------------------------------------------------------- nodes that come and go


def change(core: Any, run: Any, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
    _, effects = core.mediator.change_nodes(run.run_id, add, remove, core.now)
    core.carry_out(effects)


def play_round(core: Any) -> tuple[int, ...]:
    """Let both clusters answer the open round; who took part."""
    orders = core.take(StartRound)
    for cluster, order in reversed(orders):
        core.report(cluster, core.round_report(cluster, order))
    return nodes_of(orders[0][1].participants) or (*ON_EU, *ON_US)


def test_removed_nodes_take_part_in_no_further_round_until_they_are_added(core: Any) -> None:
    run = star_run(core, federated_learning_rounds=5)
    change(core, run, remove=["client_0"])
    change(core, run, remove=["client_0"])  # harmless
    assert play_round(core) == (*ON_EU, *ON_US)  # was open
    assert play_round(core) == (2, 3, 4)
    change(core, run, add=["client_0"], remove=["client_2", "client_3"])
    assert play_round(core) == (2, 3, 4)
    assert play_round(core) == (1, 2)
    assert [w.key[1] for w in core.store.rows("members")] == [2, 4]
    # Whoever repeats these rounds finds who was in.
    again = core.restarted()
    again.orders = core.orders
    again.register("eu", "us", slots=5)
    again.play(hold=(StartRound,))
    assert [play_round(again) for _ in range(4)] == [(*ON_EU, *ON_US), (2, 3, 4), (2, 3, 4), (1, 2)]


def test_a_share_is_drawn_from_the_members(core: Any) -> None:
    run = star_run(core, client_fraction=0.5, federated_learning_rounds=9)
    change(core, run, remove=["client_0", "client_1"])
    play_round(core)
    drawn = [play_round(core) for _ in range(8)]
    assert {len(nodes) for nodes in drawn} == {1}
    assert {node for nodes in drawn for node in nodes} == {3, 4}


@pytest.mark.parametrize(
    ("remove", "config", "code", "what"),
    [
        (["client_0", "client_1", "client_2"], {"min_nodes": 2}, "F005", "1 nodes would take part in a round, 2 must"),
        (["client_0", "client_1", "client_2", "client_3"], {}, "F005", "0 nodes would take part"),
        (["client_9"], {}, "P012", "no node 'client_9'"),
    ],
)
def test_nodes_that_cannot_be_taken_out(core: Any, remove: list[str], config: Any, code: str, what: str) -> None:
    run = star_run(core, **config)
    with pytest.raises(IcrfError, match=what) as caught:
        change(core, run, remove=remove)
    assert caught.value.code == code
    assert play_round(core) == play_round(core) == (*ON_EU, *ON_US)


def test_waves_come_out_of_the_nodes_that_are_in(core: Any) -> None:
    run = star_run(core, federated_learning_rounds=5, activation="waves", wave_size=1, wave_period=2)
    change(core, run, remove=["client_0"])
    assert [play_round(core) for _ in range(3)] == [(1,), (2,), (2, 3)]
    change(core, run, add=["client_0"])
    assert play_round(core) == (2, 3)  # was open
    assert play_round(core) == (1, 2, 3)


def test_a_change_that_leaves_too_few_in_the_first_wave_is_refused(core: Any) -> None:
    run = star_run(core, activation="waves", wave_size=3, min_nodes=2)
    with pytest.raises(IcrfError, match="1 nodes would take part in a round, 2 must"):
        change(core, run, remove=["client_0", "client_1", "client_2"])


def test_neither_peers_nor_the_server_nor_a_chosen_schedule_can_be_changed(core: Any) -> None:
    core.register("eu", "us", slots=20)
    ring = core.submit(num_nodes=4)
    chosen = core.submit(num_nodes=5, flow=CENTRALIZED, schedule=(bitmap([1], 5).hex(),))
    star = core.submit(num_nodes=5, flow=CENTRALIZED)
    for run, keys, what in (
        (ring, {"remove": ["client_0"]}, "peers mix"),
        (chosen, {"remove": ["client_1"]}, "sampler or criterion was asked"),
        (star, {"add": ["server"]}, "without the role train"),
    ):
        with pytest.raises(IcrfError, match=what):
            change(core, run, **keys)


def test_a_change_of_nodes_comes_too_late_for_a_round_that_was_decided(core: Any) -> None:
    core.register("eu", "us")
    run = core.submit(flow=CENTRALIZED, num_nodes=6, min_nodes=1, federated_learning_rounds=2, round_deadline_s=60.0)
    core.play(hold=(StartRound,))
    for cluster, start in core.take(StartRound):
        if cluster == "eu":  # the server's
            core.report(cluster, core.round_report(cluster, start))
    core.pass_time(65.0, ("eu", "us"))
    (decided,) = {start.participants for _, start in core.take(StartRound)}
    core.pass_time(25.0, ("us",))
    assert core.get(run).status == RECOVERING
    _, effects = core.mediator.change_nodes(run.run_id, (), ("client_0",), core.now)
    core.carry_out(effects)
    assert core.events(run)[-1].text == "from round 2 on 4 nodes may take part"
    core.register("eu", held=(HeldRun(run.run_id, 1, 1, 2),))
    opened = [start for _, start in core.take(StartRound)]
    assert {(start.round, start.participants) for start in opened} == {(1, decided)}
