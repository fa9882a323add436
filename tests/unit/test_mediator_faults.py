"""The mediator's core when things go wrong: cancels, losses, deadlines, senseless reports, restarts. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import ResourceError, RunError, make_error
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    TERMINAL,
    AbortAttempt,
    Activate,
    Activated,
    CallNode,
    Checkpointed,
    ClusterProfile,
    Goodbye,
    HeldRun,
    MetricSum,
    ModelStored,
    PhaseSpan,
    Reject,
    Release,
    Released,
    Reserve,
    Reserved,
    SaveCheckpoint,
    SendMessage,
    StartRound,
    StoreModel,
)

NAMES = ("eu", "us")
# What to keep the agents from answering, so that a run stays in a status.
STOPS: dict[str, tuple[type, ...]] = {
    "RESERVING": (Reserve,),
    "ACTIVATING": (Activate,),
    "RUNNING": (StartRound,),
    "STORING": (StoreModel,),
}


def brought_to(core: Any, status: str, **config: Any) -> Any:
    """A run in the given status; STORING is RUNNING while the model is on its way."""
    if status == "QUEUED":
        return core.submit(**config)
    core.register(*NAMES)
    stages = {"RESERVED": "reserve", "READY": "activate"}
    run = core.submit(keep=status == "IDLE", stage=stages.get(status, "run"), **config)
    core.play(hold=STOPS.get(status, ()))
    assert core.get(run).status == {"STORING": "RUNNING"}.get(status, status)
    return run


EVERYWHERE = ["QUEUED", "RESERVING", "RESERVED", "ACTIVATING", "READY", "RUNNING", "IDLE", "STORING"]


def asked_checkpoints(core: Any) -> list[int]:
    """The rounds whose checkpoints were asked of `eu`, in order."""
    return [i.round for cluster, i in core.sent if cluster == "eu" and isinstance(i, SaveCheckpoint)]


def test_a_checkpoint_that_fails_is_made_up_for_at_the_next_commit(core: Any) -> None:
    core.register(*NAMES)
    core.submit(federated_learning_rounds=8, checkpoint_every=2)
    core.play(hold=(SaveCheckpoint, StartRound))
    refusal = json.dumps(make_error("F006", "no state").to_dict())
    for _ in range(7):
        for cluster, order in core.take(SaveCheckpoint):
            failed = refusal if order.round == 2 else ""
            core.report(cluster, Checkpointed(order.run_id, order.generation, order.round, "a", error_json=failed))
        core.play_round()
    assert asked_checkpoints(core) == [2, 3, 5, 7]


def test_no_checkpoint_is_asked_of_the_last_round_whose_model_is_stored_at_once(core: Any) -> None:
    core.register(*NAMES)
    core.submit(federated_learning_rounds=4, checkpoint_every=2)
    core.play()
    assert asked_checkpoints(core) == [2]


def test_a_checkpoint_that_a_recovery_cut_short_is_asked_again(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(federated_learning_rounds=5, checkpoint_every=2)
    core.play(hold=(SaveCheckpoint, StartRound))
    core.play_round()
    core.play_round()
    (_, start), _ = core.take(StartRound)
    assert start.round == 3 and asked_checkpoints(core) == [2]
    core.take(SaveCheckpoint)
    died = make_error("U003", "a host died").to_json()
    core.report("us", core.round_report("us", start, error_json=died, recovery="retry"))
    core.play(hold=(SaveCheckpoint, StartRound))
    core.play_round()
    assert core.get(run).rounds_done == 3 and asked_checkpoints(core) == [2, 3]


@pytest.mark.parametrize("status", EVERYWHERE)
def test_a_cancel_ends_a_run_for_good_and_releases_what_it_holds(core: Any, status: str) -> None:
    run = brought_to(core, status)
    orders = core.take(Reserve, Activate, StartRound, StoreModel)
    info = core.cancel(run)
    assert (info.status, core.error(run).code, info.waiting_for) == ("CANCELLED", "F003", "")
    released = sorted(cluster for cluster, i in core.queue if isinstance(i, Release))
    assert released == ([] if status == "QUEUED" else list(NAMES))
    if status == "RUNNING":
        assert [i for _, i in core.queue if isinstance(i, AbortAttempt)] == [AbortAttempt(run.run_id, 1, 1)] * 2
    before, journal = core.events(run), core.store.rows("runs")
    for cluster, order in orders:  # too late
        core.report(cluster, core.answer(cluster, order))
    core.play()
    core.pass_time(10_000.0, beating=NAMES)
    assert core.cancel(run) == core.finish(run) == info
    assert core.events(run) == before and core.store.rows("runs") == journal
    assert [e.kind for e in before].count("end") == 1
    assert all(c.free_slots == 2 for c in core.mediator.clusters())


# ---------------------------------------------------------------- lost clusters


@pytest.mark.parametrize("status", [s for s in EVERYWHERE if s != "QUEUED"])
@pytest.mark.parametrize("how", ["lease", "goodbye"])
def test_a_lost_cluster_fails_the_run_and_is_named(core: Any, status: str, how: str) -> None:
    run = brought_to(core, status, on_cluster_loss="fail")
    if how == "lease":
        core.pass_time(25.0, beating=("eu",))
    else:
        core.report("us", Goodbye("i-us", "stopped"))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", "A003")
    assert "cluster us was lost" in str(core.error(run))
    assert core.dropped == ["us"]
    assert "eu" in [cluster for cluster, i in core.queue if isinstance(i, Release)]
    core.play(hold=(Reserve, Activate, StartRound, StoreModel))
    assert [(c.name, c.free_slots) for c in core.mediator.clusters()] == [("eu", 2)]


def test_the_round_of_the_loss_is_told(core: Any) -> None:
    brought_to(core, "RUNNING", on_cluster_loss="fail")
    core.report("us", Goodbye("i-us", "stopped"))
    assert core.error(core.mediator.list_runs()[0]).message == "cluster us was lost in round 1"


def test_a_lost_cluster_does_not_touch_runs_elsewhere(core: Any) -> None:
    core.register(*NAMES)
    here = core.submit(placement={f"client_{i}": "eu" for i in range(4)})
    core.report("us", Goodbye("i-us", "stopped"))
    core.play()
    assert core.get(here).status == "COMPLETED"


def test_a_cluster_that_returns_is_told_what_to_release(core: Any) -> None:
    run = brought_to(core, "RUNNING", on_cluster_loss="fail")
    core.pass_time(25.0, beating=("eu",))
    core.take(Release, StartRound, AbortAttempt)
    core.register("us", incarnation="i-us")
    assert core.take(Release) == [("us", Release(run.run_id, 1))]
    core.report("us", Released(run.run_id, 1))
    core.register("us")
    assert core.take(Release) == []


def test_a_lease_that_no_tick_saw_expire_ends_its_runs_too(core: Any) -> None:
    run = brought_to(core, "RUNNING", on_cluster_loss="fail")
    core.time_s += 25.0
    assert core.register("us", incarnation="another") is None
    assert (core.get(run).status, core.error(run).code) == ("FAILED", "A003")
    # The new agent's stream stands; that of "eu", whose lease ran out as well, is closed.
    assert core.dropped == ["eu"]
    assert [c.incarnation for c in core.mediator.clusters()] == ["another"]


@pytest.mark.parametrize(("status", "kind"), [("RUNNING", StartRound), ("STORING", StoreModel)])
def test_an_agent_that_reconnects_hears_again_what_it_owes(core: Any, status: str, kind: type) -> None:
    run = brought_to(core, status)
    (cluster, order), *_ = core.take(kind)
    core.mediator.disconnected(cluster, f"i-{cluster}")
    core.register(cluster, held=(HeldRun(run.run_id, 1, order.round, 1),))
    again = replace(order, attempt=2) if isinstance(order, StartRound) else order
    ((to, asked), *_) = core.take(kind)
    assert (to, asked) == (cluster, again)
    core.report(cluster, core.answer(cluster, asked))
    core.take(Release)
    core.register(cluster, held=(HeldRun(run.run_id, 1, order.round, 2),))
    # Answered in the meantime; what is owed now is the release of a run that is over.
    if kind is StoreModel:
        assert core.take(kind) == [] and core.take(Release) == [(cluster, Release(run.run_id, 1))]


# ---------------------------------------------------------------- deadlines


@pytest.mark.parametrize(
    ("status", "after_s", "doing"), [("RESERVING", 90.0, "reserving"), ("ACTIVATING", 300.0, "activating")]
)
def test_a_deadline_names_who_is_late(core: Any, status: str, after_s: float, doing: str) -> None:
    run = brought_to(core, status)
    (cluster, order), *_ = core.take(Reserve, Activate)
    core.report(cluster, core.answer(cluster, order))
    core.pass_time(after_s - 5.0, beating=NAMES)
    assert core.get(run).status == status
    core.pass_time(5.0, beating=NAMES)
    late = next(name for name in NAMES if name != cluster)
    assert core.get(run).status == "FAILED" and core.error(run).code == "F002"
    assert core.error(run).message == f"{doing} took too long on {late}"


def test_a_round_has_the_configured_deadline(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(round_deadline_s=30)
    core.play(hold=(StartRound,))
    core.play(late=("us",))
    assert core.get(run).waiting_for == "round 1 on us"
    core.pass_time(30.0, beating=NAMES)
    assert core.error(run).message == "round 1 took too long on us"
    assert "round_deadline_s" in core.error(run).hint


# ---------------------------------------------------------------- stale and senseless reports


def test_stale_reports_change_nothing(core: Any) -> None:
    run = brought_to(core, "RUNNING")
    (cluster, start), _ = core.queue
    good = core.round_report(cluster, start)
    journal = [core.store.rows(t) for t in ("attempts", "commits", "runs", "events")]
    error = make_error("U001", "boom").to_json()
    for stale in (
        replace(good, generation=0),
        replace(good, generation=2),
        replace(good, attempt=2),
        replace(good, round=2, error_json=error),
        replace(good, round=0, overflow=(0,)),
        replace(good, run_id="unknown"),
        replace(good, generation=2, error_json=error),
        Reserved(run.run_id, 1, error),
        Activated(run.run_id, 1, error_json=error),
        ModelStored(run.run_id, 1, 0, "model.safetensors", "cd" * 32),
    ):
        core.report(cluster, stale)
    core.register("mars")
    core.report("mars", replace(good, error_json=error))
    assert journal == [core.store.rows(t) for t in ("attempts", "commits", "runs", "events")]
    core.play()
    assert core.get(run).status == "COMPLETED" and core.get(run).model_sha256 == "ab" * 32


def test_only_the_coordinator_can_say_that_the_model_is_stored(core: Any) -> None:
    run = brought_to(core, "STORING")
    ((cluster, order),) = core.take(StoreModel)
    other = next(name for name in NAMES if name != cluster)
    core.report(other, ModelStored(run.run_id, 1, 3, "model.safetensors", "cd" * 32))
    core.report(cluster, ModelStored(run.run_id, 1, 2, "model.safetensors", "cd" * 32))
    assert core.get(run).status == "RUNNING"
    core.report(cluster, core.answer(cluster, order))
    assert (core.get(run).status, core.get(run).model_sha256) == ("COMPLETED", "ab" * 32)


@pytest.mark.parametrize("status", ["RESERVING", "ACTIVATING", "RUNNING"])
def test_an_agents_error_ends_the_run_with_that_error_and_its_cluster(core: Any, status: str) -> None:
    run = brought_to(core, status)
    (cluster, order), *_ = core.queue
    answer = core.answer(cluster, order)
    core.report(cluster, replace(answer, error_json=ResourceError("R001", "no room", hint="wait").to_json()))
    assert core.get(run).status == "FAILED"
    error = core.error(run)
    assert (type(error), error.message, error.hint) == (ResourceError, f"cluster {cluster}: no room", "wait")


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({"overflow": (7,)}, "P001"),
        ({"overflow": (-1,)}, "P001"),
        ({"absmax": (1.0,)}, "P001"),
        ({"absmax": (1.0, float("inf"))}, "W020"),
        ({"state_hashes": b"x"}, "P001"),
        ({"participants": b"\xff\xff"}, "P001"),
        ({"metric_sums": {"train_loss": MetricSum("1.5", 2)}}, "P001"),
        ({"metric_sums": {"train_loss": MetricSum("1", 0)}}, "P001"),
        ({"metrics": {"loss": float("nan")}}, "P001"),
        ({"node_metrics": {"client_0": {"loss": float("inf")}}}, "P001"),
        ({"profile": ClusterProfile({"host-0": {"train": float("nan")}})}, "P001"),
        ({"profile": ClusterProfile({}, (PhaseSpan("train", 0.0, float("inf")),))}, "P001"),
    ],
)
def test_a_senseless_round_report_fails_the_run_and_nothing_else(core: Any, parts: dict[str, Any], code: str) -> None:
    run = brought_to(core, "RUNNING")
    (cluster, start), _ = core.queue
    core.report(cluster, core.round_report(cluster, start, **parts))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", code)
    assert f"cluster {cluster}" in str(core.error(run))
    core.play()
    second = core.submit()
    core.play()
    assert core.get(second).status == "COMPLETED"


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({"num_samples": ((99, 5),)}, "P001"),
        ({"num_samples": ((0, 2**31),)}, "W030"),
        ({"num_samples": ()}, "X001"),
        ({"absmax": ()}, "P001"),
        ({"model_hash": "xyz"}, "P001"),
    ],
)
def test_a_senseless_activation_fails_the_run(core: Any, parts: dict[str, Any], code: str) -> None:
    core.register("eu")
    run = core.submit(flow=CENTRALIZED)
    ((cluster, order),) = core.play(hold=(Activate,))
    core.report(cluster, replace(core.answer(cluster, order), **parts))
    assert (core.get(run).status, core.error(run).code) == ("FAILED", code)


def test_a_fenced_incarnation_is_rejected_and_not_heard(core: Any) -> None:
    run = brought_to(core, "RUNNING")
    (cluster, start), _ = core.queue
    core.report(cluster, core.round_report(cluster, start), incarnation="older")
    ((to, reject),) = core.take(Reject)
    assert to == cluster and json.loads(reject.error_json)["code"] == "A002"
    assert core.store.rows("attempts") == []
    core.play()
    assert core.get(run).status == "COMPLETED"


# ---------------------------------------------------------------- restart


def test_after_a_restart_finished_runs_are_there_and_others_go_on(core: Any) -> None:
    core.register(*NAMES)
    done = core.submit()
    core.play()
    submission = core.submission(keep=True)
    open_run = core.submit(submission)
    core.play()
    waiting = core.submit(placement={"client_0": "eu"})
    core.time_s += 5.0

    after = core.restarted()
    assert after.get(done) == core.get(done) and after.events(done) == core.events(done)
    assert [after.get(run).status for run in (open_run, waiting)] == ["RECOVERING", "QUEUED"]
    for run in (open_run, waiting):
        assert after.events(run)[: len(core.events(run))] == core.events(run)
    assert after.submit(submission).run_id == open_run.run_id
    assert after.mediator.get(done.run_id[:8]).run_id == done.run_id
    with pytest.raises(RunError, match=r"F005 run .* is COMPLETED"):
        after.advance(done, "run", 9)

    # The agents outlived the mediator and still hold what the open run has.
    after.register(*NAMES, held=(HeldRun(open_run.run_id, 1, 3, 1),))
    after.play()
    assert after.get(open_run).status == "IDLE"
    after.finish(open_run)
    after.play()
    assert [after.get(run).status for run in (open_run, waiting)] == ["COMPLETED", "COMPLETED"]
    assert after.take(Release) == []

    again = after.restarted()
    assert again.mediator.list_runs() == after.mediator.list_runs()
    assert again.take(Release) == []


# ---------------------------------------------------------------- any schedule

ACTIONS = ["answer", "answer", "answer", "repeat", "cancel", "finish", "lose", "return", "time", "overflow", "error"]


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), max_size=40), st.booleans())
def test_any_schedule_of_faults_keeps_the_invariants(
    new_core: Callable[..., Any], schedule: list[tuple[str, int]], centralized: bool
) -> None:
    core = new_core()
    core.register(*NAMES)
    flow = CENTRALIZED if centralized else DECENTRALIZED
    runs = [core.submit(flow=flow), core.submit(flow=flow, keep=True)]
    answered: list[tuple[str, Any]] = []
    for action, k in schedule:
        run, name = runs[k % 2], NAMES[k % 2]
        if action in ("answer", "overflow", "error") and core.queue:
            cluster, order = core.queue.pop(k % len(core.queue))
            answer = core.answer(cluster, order) if not isinstance(order, CallNode | SendMessage) else None
            if answer is None or cluster not in {c.name for c in core.mediator.clusters()}:
                continue
            if isinstance(order, StartRound) and action == "overflow":
                answer = replace(answer, overflow=(k % 2,))
            elif action == "error" and hasattr(answer, "error_json"):
                answer = replace(answer, error_json=make_error("U001", "boom").to_json())
            core.report(cluster, answer)
            answered.append((cluster, answer))
        elif action == "repeat" and answered:
            core.report(*answered[k % len(answered)])
        elif action in ("cancel", "finish"):
            getattr(core, action)(run)
        elif action == "lose":
            core.report(name, Goodbye(f"i-{name}", "stopped"))
        elif action == "return":
            core.register(name)
        elif action == "time":
            core.pass_time(5.0 * k, beating=NAMES)
    core.register(*NAMES)
    core.play()
    for run in runs:
        core.finish(run)
    core.play()
    core.pass_time(1_000.0, beating=NAMES)
    core.play()
    for run in runs:
        check_invariants(core, run)
    assert [c.free_slots for c in core.mediator.clusters()] == [2, 2]


def check_invariants(core: Any, run: Any) -> None:
    info, events = core.get(run), core.events(run)
    assert info.status in TERMINAL
    assert [e.status for e in events if e.kind == "status" and e.status in TERMINAL] == [info.status]
    assert [e.kind for e in events].count("end") == 1 and events[-1].kind == "end"
    rows = [write.row for write in core.commits(run)]
    assert [row["number"] for row in rows] == list(range(1, info.rounds_done + 1))
    assert all(b["parent_sha256"] == a["model_sha256"] for a, b in pairwise(rows))
    assert (info.status == "COMPLETED") == (info.error_json == "")
    if info.status == "COMPLETED":
        assert info.rounds_done == 3
    (row,) = core.store.rows("runs", (run.run_id,))
    assert (row.row["status"], row.row["rounds_done"]) == (info.status, info.rounds_done)
