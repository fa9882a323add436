"""Where a run goes on when clusters come or are lost, or when less crosses elsewhere, as the mediator decides it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from icrf.errors import make_error
from icrf.protocol import (
    CENTRALIZED,
    Activate,
    Activated,
    Checkpointed,
    Draining,
    Fingerprint,
    HeldRun,
    Release,
    Released,
    Reserve,
    RunInfo,
    SaveCheckpoint,
    StartRound,
)

BOTH = ("eu", "us")
ALL = ("eu", "us", "za")


def on_one_cluster(core: Any) -> RunInfo:
    """A run on a single cluster in its third round."""
    core.register("eu")
    run = core.ring(on_cluster_loss="reassign", checkpoint_every=1)
    core.up_to(run, 3)
    return run


def lose(core: Any, *names: str) -> None:
    """Time until their leases are over; the others live on."""
    left = tuple(name for name in ALL if name not in names)
    core.pass_time(25.0, beating=left)


# ---------------------------------------------------------------- by choice


def test_a_cluster_that_has_joined_gets_nodes_between_two_rounds(core: Any) -> None:
    run = core.before_a_move()
    before = core.homes(run)
    core.register("za")
    core.up_to(run, 3)
    after = core.homes(run)
    assert Counter(before) == {"eu": 3, "us": 3} and Counter(after) == {"eu": 2, "us": 2, "za": 2}
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2
    assert any(text.startswith("2 of 6 nodes move: ") and "-> za (client_" in text for text in core.texts(run))
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {3}
    assert set(core.get(run).clusters) == set(ALL)
    core.completed(run)


def test_nodes_go_on_from_what_the_clusters_kept_that_they_lived_on(core: Any) -> None:
    run = core.before_a_move()
    before = core.homes(run)
    core.register("za")
    core.up_to(run, 3)
    after = core.homes(run)
    for cluster in ALL:
        order = core.orders[run.run_id, cluster]
        sources = {before[node] for node, home in enumerate(after) if home == cluster}
        assert order.checkpoints == tuple(f"checkpoint/2.1/{name}" for name in sorted(sources))
        assert (order.generation, order.restore_round) == (2, 2)


def test_a_star_takes_its_servers_state_along_and_nothing_else(core: Any) -> None:
    core.register(*BOTH)
    run = core.submit(core.submission(6, CENTRALIZED, federated_learning_rounds=6, clustering_period=2))
    core.up_to(run, 2)
    server = core.homes(run)[0]
    core.register("za")
    core.up_to(run, 3)
    home = core.homes(run)[0]
    found = {cluster: core.orders[run.run_id, cluster].checkpoints for cluster in ALL}
    assert found == {cluster: (f"checkpoint/2.1/{server}",) if cluster == home else () for cluster in ALL}
    core.completed(run)


def test_where_nothing_is_better_elsewhere_nothing_happens(core: Any) -> None:
    core.register(*BOTH)
    run = core.ring(clustering_period=1)
    core.completed(run)
    assert {order.generation for _, order in core.sent if isinstance(order, Activate)} == {1}
    assert not [order for _, order in core.sent if isinstance(order, SaveCheckpoint)]


@pytest.mark.parametrize("period", [0, 2])
def test_a_round_after_which_nodes_may_move_announces_no_next_one(core: Any, period: int) -> None:
    core.register("eu")
    core.submit(core.submission(6, CENTRALIZED, federated_learning_rounds=6, clustering_period=period))
    core.play()
    announces = {order.round: order.ahead is not None for _, order in core.sent if isinstance(order, StartRound)}
    assert announces == {number: number < 6 and not (period and number % period == 0) for number in range(1, 7)}


def test_nodes_stay_where_a_new_cluster_has_no_room_for_them(core: Any) -> None:
    run = core.before_a_move()
    core.register("za")
    other = core.submit(core.submission(4, placement={f"client_{n}": "za" for n in range(4)}, keep=True))
    core.up_to(run, 3)
    assert core.get(run).clusters == BOTH
    assert any("nodes stay where they are: 2 slots on za (0 of 2 free" in text for text in core.texts(run))
    core.finish(other)
    core.completed(run)


def test_nobody_who_is_in_line_for_a_cluster_is_overtaken(core: Any) -> None:
    run = core.before_a_move()
    waiting = core.submit(core.submission(4, placement={"client_0": "eu"}))
    core.register("za")
    assert core.get(waiting).status == "QUEUED" and "eu" in core.get(waiting).waiting_for
    core.up_to(run, 3)
    assert core.get(run).clusters == BOTH
    wanted = f"za is wanted by fed (run {waiting.run_id[:8]}), which is in line"
    assert any(wanted in text for text in core.texts(run))
    core.play()
    assert {core.get(one).status for one in (run, waiting)} == {"COMPLETED"}


def test_a_checkpoint_that_fails_leaves_nodes_where_they_are(core: Any) -> None:
    run = core.before_a_move()
    core.register("za")
    core.play_round()
    error = make_error("F006", "no state").to_json()
    for cluster, order in core.take(SaveCheckpoint):
        core.report(cluster, Checkpointed(order.run_id, order.generation, order.round, error_json=error))
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {3}
    assert core.get(run).clusters == BOTH
    core.completed(run)
    assert "za" in core.get(run).clusters  # after round 4


def test_a_checkpoint_that_takes_too_long_leaves_nodes_where_they_are(core: Any) -> None:
    run = core.before_a_move()
    core.register("za")
    core.play_round()
    core.pass_time(120.0, beating=ALL)
    assert any("did not become durable in time" in text for text in core.texts(run))
    assert core.get(run).status == "RUNNING" and core.get(run).clusters == BOTH


def test_a_cluster_that_computes_other_bits_gets_no_nodes(core: Any) -> None:
    run = core.before_a_move()
    core.register("za", fingerprint=Fingerprint("2.13", "AVX512", "on", 1, "cpu"))
    core.completed(run)
    assert core.get(run).clusters == BOTH


@pytest.mark.parametrize("held", [SaveCheckpoint, Reserve, Activate, StartRound])
def test_a_mediator_that_is_restarted_during_a_move_goes_on(core: Any, held: type) -> None:
    run = core.before_a_move()
    core.register("za")
    core.play_round()
    core.play(hold=(held, StartRound))
    again = core.restarted()
    alive = [HeldRun(run.run_id, 1, 2, 1)] if held in (SaveCheckpoint, Reserve) else []
    again.orders = core.orders
    again.register(*BOTH, held=tuple(alive))
    again.register("za")
    again.completed(run)
    assert set(again.get(run).clusters) == set(ALL)
    starts = [order for _, order in again.sent if isinstance(order, StartRound)]
    assert min(order.round for order in starts) == 3  # no round is repeated


# ---------------------------------------------------------------- a lost cluster


def test_a_lost_cluster_is_given_up_two_seconds_after_its_lease(core: Any) -> None:
    run = core.before_a_loss()
    lost = core.homes(run)[0]
    left = tuple(name for name in ALL if name != lost)
    core.pass_time(20.0, beating=left)
    assert core.get(run).status == "RECOVERING" and set(core.get(run).clusters) == set(ALL)
    before = core.homes(run)
    core.time_s += 2.0
    core.carry_out(core.mediator.tick(core.now))
    after = core.homes(run)
    assert core.get(run).status == "RESERVING" and lost not in after
    assert all(b in (a, lost) for a, b in zip(after, before, strict=True))
    core.play(hold=(StartRound,))
    started = {order.round for _, order in core.queue if isinstance(order, StartRound) and order.generation == 2}
    assert started == {3}  # the newest checkpoint is that of round 2
    core.completed(run)


def test_a_cluster_that_is_back_within_two_seconds_keeps_its_nodes(core: Any) -> None:
    run = core.before_a_loss()
    before = core.homes(run)
    core.pass_time(20.0, beating=("us", "za"))
    core.register("eu", held=(HeldRun(run.run_id, 1, 4, 1),))
    core.pass_time(30.0, beating=ALL)
    core.completed(run)
    assert core.last_homes(run) == before


def test_the_old_owner_is_fenced_and_then_free_for_others(core: Any) -> None:
    run = core.before_a_loss()
    old = [order for cluster, order in core.take(StartRound) if cluster == "eu"]
    lose(core, "eu")
    core.play(hold=(StartRound,))
    report = core.round_report("eu", old[0])
    assert not core.report("eu", report).writes
    core.register("eu", held=(HeldRun(run.run_id, 1, 4, 1),))
    assert [order.run_id for cluster, order in core.queue if isinstance(order, Release) and cluster == "eu"] == [
        run.run_id
    ]
    assert not core.report("eu", report).writes
    core.completed(run)
    assert "eu" not in core.get(run).clusters
    later = core.submit(core.submission(4, placement={"client_0": "eu"}))
    core.play()
    assert core.get(later).status == "COMPLETED"


def test_nodes_do_not_come_back_before_the_old_owner_has_released_them(core: Any) -> None:
    core.register(*ALL)
    run = core.ring(on_cluster_loss="reassign", clustering_period=1)
    core.up_to(run, 2)
    lose(core, "eu")
    core.up_to(run, 2)
    core.register("eu", held=(HeldRun(run.run_id, 1, 2, 1),))
    core.play_round()
    core.play(hold=(Release, StartRound))
    assert "eu" not in core.get(run).clusters
    for cluster, order in core.take(Release):
        core.report(cluster, Released(order.run_id, order.generation))
    core.play_round()
    core.play(hold=(StartRound,))
    assert "eu" in core.get(run).clusters
    core.completed(run)


def test_pinned_nodes_wait_for_their_cluster_and_say_so(core: Any) -> None:
    core.register(*ALL)
    run = core.ring(on_cluster_loss="reassign", checkpoint_every=2, placement={"client_4": "eu"})
    core.up_to(run, 4)
    lose(core, "eu")
    assert core.get(run).status == "RECOVERING"
    waiting = core.get(run).waiting_for
    assert waiting.startswith("cluster eu to come back; its nodes cannot move: ") and "client_4" in waiting
    core.register("eu")
    core.completed(run)
    assert core.last_homes(run)[4] == "eu"


def test_nobody_else_moves_to_a_larger_cluster_that_has_joined(core: Any) -> None:
    core.register(*BOTH)
    run = core.ring(on_cluster_loss="reassign")
    core.up_to(run, 2)
    before = core.homes(run)
    core.register("za", slots=16)
    lose(core, "us")
    core.completed(run)
    after = core.last_homes(run)
    assert {node for node in range(6) if before[node] != after[node]} == {n for n in range(6) if before[n] == "us"}
    assert "za" in after


def test_nodes_that_were_placed_by_labels_go_to_another_cluster_with_them(core: Any) -> None:
    core.register("eu", labels={"gpu": "yes"})
    core.register("us")
    core.register("za", labels={"gpu": "yes"})
    run = core.ring(on_cluster_loss="reassign", placement={"client_4": {"gpu": "yes"}})
    core.up_to(run, 2)
    home = core.homes(run)[4]
    lose(core, home)
    core.completed(run)
    assert {home, core.last_homes(run)[4]} == {"eu", "za"}


def test_a_full_cluster_is_left_aside_and_the_runs_own_take_the_nodes(core: Any) -> None:
    core.register(*BOTH)
    run = core.ring(on_cluster_loss="reassign")
    core.up_to(run, 2)
    core.register("za")
    core.submit(core.submission(4, placement={f"client_{n}": "za" for n in range(4)}, keep=True))
    lose(core, "us")
    core.completed(run)
    assert set(core.last_homes(run)) == {"eu"}


def test_a_run_whose_only_cluster_is_lost_goes_to_one_that_computes_the_same(core: Any) -> None:
    run = on_one_cluster(core)
    core.register("us", fingerprint=Fingerprint("2.13", "AVX512", "on", 1, "cpu"))
    lose(core, "eu")
    assert "no other cluster that computes the same bits" in core.get(run).waiting_for
    core.register("za")
    core.pass_time(1.0, beating=ALL)
    core.completed(run)
    assert set(core.last_homes(run)) == {"za"}


def test_nodes_wait_for_room_and_move_when_there_is_some(core: Any) -> None:
    run = on_one_cluster(core)
    core.register("us")
    other = core.submit(core.submission(4, placement={"client_0": "us"}, keep=True))
    core.up_to(run, 3)
    lose(core, "eu")
    assert "2 slots on us (0 of 2 free" in core.get(run).waiting_for
    core.cancel(other)
    core.play(hold=(StartRound,))
    core.pass_time(1.0, beating=ALL)
    core.completed(run)
    assert set(core.last_homes(run)) == {"us"}


def test_a_cluster_that_leaves_in_order_hands_its_nodes_over_at_once(core: Any) -> None:
    core.register(*ALL)
    run = core.ring(on_cluster_loss="reassign")
    core.up_to(run, 3)
    core.report("eu", Draining("i-eu"))
    core.play_round()
    core.play(hold=(StartRound,))
    core.carry_out(core.mediator.tick(core.now))
    core.play(hold=(StartRound,))
    assert "eu" not in core.get(run).clusters
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {4}  # nothing is repeated
    core.completed(run)


def test_a_cluster_that_was_lost_while_the_mediator_was_away_is_given_up_after_a_lease(core: Any) -> None:
    run = core.before_a_loss()
    again = core.restarted()
    again.orders = core.orders
    again.register("us", "za", held=(HeldRun(run.run_id, 1, 4, 1),))
    again.pass_time(20.0, beating=("us", "za"))
    assert again.get(run).status == "RECOVERING"
    again.pass_time(5.0, beating=("us", "za"))
    again.completed(run)
    assert set(again.last_homes(run)) == {"us", "za"}


def test_a_move_that_is_cut_short_by_another_loss_goes_elsewhere_again(core: Any) -> None:
    run = core.before_a_loss()
    lose(core, "eu")
    core.play(hold=(Activate, StartRound))
    core.pass_time(25.0, beating=("za",))
    core.completed(run)
    assert set(core.last_homes(run)) == {"za"}


def star_that_loses_clients(core: Any) -> RunInfo:
    """Of a star, in its fourth round, a cluster is lost that keeps nothing."""
    core.register(*ALL)
    run = core.submit(
        core.submission(6, CENTRALIZED, federated_learning_rounds=6, on_cluster_loss="reassign", checkpoint_every=0)
    )
    core.up_to(run, 4)
    lost = next(name for name in ALL if name != core.homes(run)[0])
    core.take(StartRound)
    lose(core, lost)
    assert core.get(run).status == "RECOVERING" and core.get(run).waiting_for.startswith("the state of round 3")
    return run


def test_where_no_state_is_lost_no_round_is_repeated(core: Any) -> None:
    run = star_that_loses_clients(core)
    core.play(hold=(StartRound,))
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {4}
    core.completed(run)


@pytest.mark.parametrize("answers", [True, False])
def test_where_the_state_cannot_be_saved_rounds_are_repeated(core: Any, answers: bool) -> None:
    run = star_that_loses_clients(core)
    ((server, order),) = core.take(SaveCheckpoint)
    if answers:
        error = make_error("F006", "no state").to_json()
        core.report(server, Checkpointed(order.run_id, order.generation, order.round, error_json=error))
    left = tuple(name for name in ALL if name in core.mediator._members.names())
    core.pass_time(5.0 if answers else 70.0, beating=left)
    core.play(hold=(StartRound,))
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {1}
    core.completed(run)


def test_with_wait_nobody_moves(core: Any) -> None:
    core.register(*ALL)
    run = core.ring(checkpoint_every=2)
    core.up_to(run, 4)
    lose(core, "eu")
    assert core.get(run).status == "RECOVERING" and set(core.get(run).clusters) == set(ALL)
    assert core.get(run).waiting_for == "cluster eu to come back"


def test_what_a_cluster_sets_up_for_nodes_that_have_moved_on_is_not_taken(core: Any) -> None:
    run = core.before_a_loss()
    lose(core, "eu")
    core.play(hold=(Activate, StartRound))
    held = core.take(Activate)
    assert {order.generation for _, order in held} == {2}
    assert not core.report("us", Activated(run.run_id, 1)).writes
    for cluster, order in held:
        core.report(cluster, core.answer(cluster, order))
    core.completed(run)
