"""Moves among all else that comes: messages, refusals, runs in line, and what is left of old checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import make_error
from icrf.protocol import (
    CENTRALIZED,
    STOP,
    CallDone,
    CallNode,
    Capacity,
    Checkpointed,
    ClusterReset,
    Goodbye,
    Report,
    Reserve,
    Reserved,
    RunInfo,
    SaveCheckpoint,
    SendMessage,
    StartRound,
)

BOTH = ("eu", "us")
ALL = ("eu", "us", "za")
STAYED = "nodes stay where they are: they were called, or sent messages"


def say(core: Any, run: RunInfo) -> list[tuple[str, Report]]:
    """A supervisor's message to one node and a call to another; what their clusters will answer."""
    calls = [f"call-{len(core.sent)}-{k}" for k in range(2)]
    core.carry_out(core.mediator.send_message(run.run_id, ["client_0"], b"hello", calls[:1])[1])
    core.carry_out(core.mediator.call_node(run.run_id, "client_5", "send", b"", calls[1]))
    return [(cluster, CallDone(run.run_id, order.call_id)) for cluster, order in core.take(SendMessage, CallNode)]


def test_what_nodes_were_told_after_their_checkpoint_is_not_left_behind(core: Any) -> None:
    core.register(*BOTH)
    run = core.ring(clustering_period=2, checkpoint_every=1, keep=True, stage="activate")
    core.play()
    core.advance(run, "run", 2)
    core.play()
    for cluster, answer in say(core, run):
        core.report(cluster, answer)
    core.register("za")
    core.advance(run, "run", 6)
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {3}
    assert core.get(run).clusters == BOTH and any(text.startswith(STAYED) for text in core.texts(run))
    core.up_to(run, 5)
    assert set(core.get(run).clusters) == set(ALL)  # after round 4, whose checkpoint has it


@pytest.mark.parametrize("acknowledged", [True, False])
def test_what_nodes_are_told_during_the_checkpoint_of_a_move_is_not_left_behind(core: Any, acknowledged: bool) -> None:
    run = core.before_a_move()
    core.register("za")
    if not acknowledged:
        before = say(core, run)
    core.play_round()
    if acknowledged:
        assert len(core.take(SaveCheckpoint)) == 2  # they have been read out
        saved = [(name, Checkpointed(run.run_id, 1, 2, f"checkpoint/2.1/{name}")) for name in BOTH]
        for cluster, answer in [*say(core, run), *saved]:
            core.report(cluster, answer)
    assert core.get(run).clusters == BOTH and any(text.startswith(STAYED) for text in core.texts(run))
    assert {order.round for _, order in core.queue if isinstance(order, StartRound)} == {3}
    for cluster, answer in [] if acknowledged else before:
        core.report(cluster, answer)
    core.up_to(run, 5)
    assert set(core.get(run).clusters) == set(ALL)


def test_what_nodes_were_told_before_the_checkpoint_goes_along(core: Any) -> None:
    run = core.before_a_move()
    core.register("za")
    for cluster, answer in say(core, run):
        core.report(cluster, answer)
    core.up_to(run, 3)
    assert set(core.get(run).clusters) == set(ALL)


@pytest.mark.parametrize("restarts", [False, True])
def test_nodes_go_on_where_they_lived_if_the_new_cluster_has_no_room_after_all(core: Any, restarts: bool) -> None:
    run = core.before_a_move()
    before = core.homes(run)
    core.register("za")
    core.play_round()
    core.play(hold=(Reserve,))
    if restarts:
        again = core.restarted()
        again.orders = core.orders
        again.register(*ALL)
        core = again
    refused = make_error("R003", "no CPUs").to_json()
    for cluster, order in core.take(Reserve):
        error = refused if cluster == "za" else ""
        core.report(cluster, Reserved(order.run_id, order.generation, error))
    core.report("za", Goodbye("i-za", "done"))
    core.play()
    assert core.get(run).status == "QUEUED"
    if restarts:
        again = core.restarted()
        again.orders = core.orders
        again.register(*BOTH)
        core = again
    assert core.homes(run) == before
    core.pass_time(25.0, beating=BOTH)
    core.completed(run)
    assert core.last_homes(run) == before


def test_a_run_that_is_stopped_moves_no_nodes(core: Any) -> None:
    run = core.before_a_move()
    core.register("za")
    core.play_round()
    core.advance(run, STOP)
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done, core.get(run).clusters) == ("COMPLETED", 2, BOTH)
    assert not [text for text in core.texts(run) if "nodes move" in text]


def on(cluster: str) -> dict[str, str]:
    """Two nodes that fill a cluster."""
    return {"client_0": cluster, "client_1": cluster}


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_run_that_has_lost_a_cluster_is_in_line_by_its_age(core: Any, is_durable: bool) -> None:
    core.register("eu")
    core.register("us", labels={"disk": "fast"})
    star = {"federated_learning_rounds": 6, "on_cluster_loss": "reassign", "checkpoint_every": 1 if is_durable else 0}
    run = core.submit(core.submission(6, CENTRALIZED, placement={"server": "eu", "client_0": {"disk": "fast"}}, **star))
    core.up_to(run, 3)
    core.register("za", labels={"disk": "fast"})
    core.time_s += 1.0
    other = core.submit(core.submission(2, placement=on("za"), keep=True))
    core.up_to(run, 3)
    core.pass_time(25.0, beating=("eu", "za"))
    core.play(hold=(StartRound,))
    assert "2 slots on za (0 of 2 free" in core.get(run).waiting_for
    later = core.submit(core.submission(2, placement=on("za"), keep=True))
    core.cancel(other)
    core.play(hold=(StartRound, SaveCheckpoint))
    assert core.get(later).status == "QUEUED"
    core.completed(run)
    assert set(core.last_homes(run)) == {"eu", "za"}
    assert core.get(later).status == "IDLE"


def test_a_run_in_line_that_came_first_goes_before_one_that_has_lost_a_cluster(core: Any) -> None:
    core.register("za")
    other = core.submit(core.submission(2, placement=on("za"), keep=True))
    core.play()
    earlier = core.submit(core.submission(2, placement=on("za"), keep=True))
    core.time_s += 1.0
    core.register("eu", labels={"disk": "fast"})
    run = core.ring(on_cluster_loss="reassign", placement={"client_*": {"disk": "fast"}})
    core.play(hold=(StartRound,))
    core.register("za", labels={"disk": "fast"})
    core.pass_time(25.0, beating=("za",))
    assert "2 slots on za (0 of 2 free" in core.get(run).waiting_for
    core.cancel(other)
    core.play(hold=(StartRound,))
    assert core.get(earlier).status == "RUNNING" and core.get(run).status == "RECOVERING"


def left_over(core: Any, run: RunInfo, artifacts: list[str]) -> list[str]:
    """Of these artifacts of a run those that nothing has deleted."""
    return [a for a in artifacts if not any(r == run.run_id and a.startswith(name) for r, name in core.deletes)]


def test_nothing_is_left_of_checkpoints_that_were_given_up(core: Any) -> None:
    core.register(*BOTH)
    run = core.ring(checkpoint_every=1)
    written = []
    for number in range(1, 5):
        while core.get(run).rounds_done < number:
            core.play(hold=(StartRound, SaveCheckpoint))
            core.play_round()
        asked = core.take(SaveCheckpoint)
        for cluster, order in asked[:1]:
            written.append(core.answer(cluster, order).artifact)
            core.report(cluster, core.answer(cluster, order))
        core.report("us", ClusterReset(Capacity(2, 2.0, 0.0, 1 << 33), "", "Ray died"))
        if number % 2:
            for cluster, order in asked[1:]:
                written.append(core.answer(cluster, order).artifact)
                core.report(cluster, core.answer(cluster, order))
    core.up_to(run, 6)
    durable = {row.key[1]: row.row["artifacts"].values() for row in core.store.rows("checkpoints", (run.run_id,))}
    kept = {artifact for number in sorted(durable)[-2:] for artifact in durable[number]}
    assert len(kept) == 4 and not set(left_over(core, run, written)) - kept
    assert not {artifact for _, name in core.deletes for artifact in kept if artifact.startswith(name)}
    core.completed(run)
    assert (run.run_id, "checkpoint/") in core.deletes
    late = "checkpoint/5.9/us"
    core.deletes.clear()
    core.report("us", Checkpointed(run.run_id, 9, 5, late))
    assert not left_over(core, run, [late])


def test_checkpoints_of_before_nodes_could_move_are_gone_back_to(core: Any) -> None:
    run = core.before_a_loss()
    for write in core.store.rows("checkpoints", (run.run_id,)):
        row = {name: value for name, value in write.row.items() if name != "generation"}
        core.store.apply([replace(write, row=row)])
    again = core.restarted()
    again.orders = core.orders
    again.register("us", "za")
    again.pass_time(25.0, beating=("us", "za"))
    again.play(hold=(StartRound,))
    assert {order.round for _, order in again.queue if isinstance(order, StartRound)} == {3}
    again.completed(run)
