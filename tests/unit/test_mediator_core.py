"""The mediator's core: from submission to the end of a run, and the ids, queues and stages on the way. No I/O."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import ConfigError, ConfigErrors, IcrfError, ResourceError, RunError
from icrf.protocol import (
    CENTRALIZED,
    DECENTRALIZED,
    AbortAttempt,
    Activate,
    CallDone,
    CallNode,
    Fingerprint,
    Release,
    Released,
    Reserve,
    Reserved,
    SendMessage,
    StartRound,
    StoreModel,
    Warned,
)

OTHER = Fingerprint("2.13", "AVX512", "on", 1, "cpu")
NAMES = ("eu", "us")


def statuses(core: Any, run: Any) -> list[str]:
    return [e.status for e in core.events(run) if e.kind == "status"]


def rounds_sent(core: Any) -> list[StartRound]:
    return [i for _, i in core.sent if isinstance(i, StartRound)]


# ---------------------------------------------------------------- submission


def test_a_run_goes_through_its_statuses_and_ends_once(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    assert core.play() == []
    info = core.get(run)
    assert (info.status, info.rounds_done, info.error_json, info.model_sha256) == ("COMPLETED", 3, "", "ab" * 32)
    assert info.clusters == NAMES and info.accuracy == 0.5 and info.bytes_inter_cluster == 600
    wanted = ["QUEUED", "RESERVING", "RESERVED", "ACTIVATING", "READY", "RUNNING", "COMPLETED"]
    assert statuses(core, run) == wanted
    assert [e.kind for e in core.events(run)].count("end") == 1 and core.events(run)[-1].kind == "end"
    assert core.events(run) == core.live
    assert [c.free_slots for c in core.mediator.clusters()] == [2, 2]


def test_the_same_request_is_the_same_run(core: Any) -> None:
    core.register(*NAMES)
    submission = core.submission()
    first = core.submit(submission)
    writes = len(core.sent)
    again, effects = core.mediator.submit(submission, "another-id", core.now)
    assert again.run_id == first.run_id and again == core.get(first)
    assert (effects.writes, effects.sends, len(core.sent)) == ([], [], writes)
    core.play()
    assert core.submit(submission).status == "COMPLETED"
    assert len(core.mediator.list_runs()) == 1


def test_what_is_submitted_is_in_the_journal_before_anything_is_sent(core: Any) -> None:
    core.register(*NAMES)
    _, effects = core.mediator.submit(core.submission(), "run-1", core.now)
    tables = Counter(write.table for write in effects.writes)
    assert tables["submissions"] == 1 and tables["runs"] >= 1 and tables["assignments"] == 1
    assert [type(i) for _, i in effects.sends] == [Reserve, Reserve]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"config_json": "{"}, "C001"),
        ({"config_json": "[]"}, "C006"),
        ({"config_json": "{}"}, "C016"),
        ({"config_json": json.dumps({"federation_id": 7})}, "C006"),
        ({"stage": "fly"}, "C010"),
        ({"flow": "chaotic"}, "C010"),
        ({"nodes": ()}, "C008"),
    ],
)
@pytest.mark.parametrize("clusters", [(), NAMES])
def test_a_submission_that_cannot_run_is_refused_whole(
    core: Any, change: dict[str, Any], code: str, clusters: tuple[str, ...]
) -> None:
    core.register(*clusters)
    with pytest.raises(IcrfError) as caught:
        core.submit(replace(core.submission(), **change))
    assert caught.value.code == code
    assert core.mediator.list_runs() == [] and core.store.rows("submissions") == []


def test_what_can_never_fit_is_r001_and_names_what_lacks_where(core: Any) -> None:
    core.register("eu", slots=4)
    core.register("us")
    with pytest.raises(ResourceError) as caught:
        core.submit(resources={"num_cpus": 8})
    assert caught.value.code == "R001"
    assert "cluster us: 1 slots x 8 CPU = 8 CPU needed, 2 CPU in total" in caught.value.message
    assert core.mediator.list_runs() == []


def test_strict_determinism_refuses_a_mix_and_names_the_field(core: Any) -> None:
    core.register("eu")
    core.register("us", fingerprint=OTHER)
    with pytest.raises(ResourceError) as caught:
        core.submit()
    assert caught.value.code == "R004"
    assert "eu and us" in caught.value.message and "cpu_capability, AVX2 against AVX512" in caught.value.message


def test_recorded_determinism_takes_a_mix_and_records_it(core: Any) -> None:
    core.register("eu")
    core.register("us", fingerprint=OTHER)
    run = core.submit(determinism="recorded")
    core.play()
    assert core.get(run).status == "COMPLETED"
    (warning,) = [e.text for e in core.events(run) if e.kind == "warning"]
    assert "cpu_capability is AVX2 on eu, AVX512 on us" in warning
    for row in core.commits(run):
        assert {c: f["cpu_capability"] for c, f in row.row["fingerprints"].items()} == {"eu": "AVX2", "us": "AVX512"}


def test_a_pin_to_an_unknown_cluster_is_told_at_once(core: Any) -> None:
    core.register(*NAMES)
    with pytest.raises(ConfigErrors, match=r"C014 placement\.client_0: node client_0: cluster 'eu-wst' not in fabric"):
        core.submit(placement={"client_0": "eu-wst"})


# ---------------------------------------------------------------- assignment


def test_pins_decide_where_nodes_live_and_only_used_clusters_take_part(core: Any) -> None:
    core.register("asia", "eu", "us")
    run = core.submit(placement={"client_0": "us", "client_1": "eu", "client_2": "us", "client_3": "eu"})
    core.play()
    assert core.get(run).clusters == ("eu", "us")
    order = core.orders[run.run_id, "us"]
    assert [order.clusters[c] for c in order.assignment] == ["us", "eu", "us", "eu"]
    assert [peer.cluster for peer in order.peers] == ["eu", "us"]
    assert {cluster for cluster, i in core.sent if isinstance(i, Reserve)} == {"eu", "us"}
    row = core.store.rows("assignments", (run.run_id,))[0].row
    assert (row["clusters"], row["assignment"]) == (["eu", "us"], [1, 0, 1, 0])


def test_a_label_selector_is_a_pin_too(core: Any) -> None:
    core.register("eu", labels={"gpu": "no"})
    core.register("us", labels={"gpu": "yes"})
    run = core.submit(placement={f"client_{i}": {"gpu": "yes"} for i in range(4)})
    core.play()
    assert core.get(run).clusters == ("us",)


@pytest.mark.parametrize(("flow", "where"), [(CENTRALIZED, "us"), (DECENTRALIZED, "us")])
def test_the_first_or_aggregating_node_names_the_coordinator(core: Any, flow: str, where: str) -> None:
    core.register(*NAMES)
    first = "server" if flow == CENTRALIZED else "client_0"
    core.submit(flow=flow, placement={first: where})
    core.play()
    assert [cluster for cluster, i in core.sent if isinstance(i, StoreModel)] == [where]


# ---------------------------------------------------------------- reservation and the queue


def test_one_failed_reservation_gives_everything_back(core: Any) -> None:
    core.register("asia", "eu", "us")
    run = core.submit(num_nodes=6)
    core.take(Reserve)
    core.report("asia", Reserved(run.run_id, 1))
    core.report("eu", Reserved(run.run_id, 1, ResourceError("R001", "2 slots will never be free").to_json()))
    assert core.get(run).status == "FAILED"
    assert core.error(run).code == "R001" and "cluster eu" in str(core.error(run))
    assert {cluster for cluster, i in core.queue if isinstance(i, Release)} == {"asia", "eu", "us"}
    core.report("us", Reserved(run.run_id, 1))
    assert [c.free_slots for c in core.mediator.clusters()] == [0, 0, 0]
    core.play()
    assert [c.free_slots for c in core.mediator.clusters()] == [2, 2, 2]
    assert not any(isinstance(i, Activate) for _, i in core.sent)


def test_a_reservation_error_of_a_cluster_without_part_in_the_run_is_ignored(core: Any) -> None:
    core.register("asia", "eu", "us")
    run = core.submit(placement={f"client_{i}": "eu" for i in range(4)})
    core.report("us", Reserved(run.run_id, 1, ResourceError("R003", "no").to_json()))
    assert core.get(run).status == "RESERVING"


def test_runs_queue_for_slots_first_come_first_served(core: Any) -> None:
    core.register(*NAMES)
    first, second, third = core.submit(), core.submit(), core.submit(num_nodes=2)
    core.play(hold=(StartRound,))
    assert [core.get(r).status for r in (first, second, third)] == ["RUNNING", "QUEUED", "QUEUED"]
    since = "since 2001-09-09 02:03:20 UTC"
    assert core.get(second).waiting_for == f"2 slots on eu (0 of 2 free; held by fed (run {first.run_id[:8]}) {since})"
    assert core.get(third).waiting_for.startswith("1 slots on eu (0 of 2 free")
    core.cancel(first)
    core.take(StartRound, AbortAttempt)
    (one, order), other = core.take(Release)
    core.report(one, core.answer(one, order))
    assert core.get(second).status == "QUEUED"
    core.report(*[other[0], core.answer(*other)])
    assert [core.get(r).status for r in (first, second, third)] == ["CANCELLED", "RESERVING", "QUEUED"]
    core.play()
    assert [core.get(r).status for r in (second, third)] == ["COMPLETED", "COMPLETED"]


def test_a_run_before_any_cluster_waits_for_one(core: Any) -> None:
    run = core.submit()
    assert core.get(run).status == "QUEUED"
    assert core.get(run).waiting_for == "a cluster to register (start a fabric-agent)"
    core.register("eu")
    core.play()
    assert core.get(run).status == "COMPLETED" and core.get(run).clusters == ("eu",)


def test_a_queued_run_that_turns_out_impossible_fails_and_lets_others_pass(core: Any) -> None:
    wrong, right = core.submit(placement={"client_0": "mars"}), core.submit()
    core.register("eu")
    core.play()
    assert (core.get(wrong).status, core.error(wrong).code) == ("FAILED", "C011")
    assert core.get(right).status == "COMPLETED"


@pytest.mark.parametrize("leave", ["cancel", "finish"])
def test_leaving_the_queue_lets_the_next_one_in(core: Any, leave: str) -> None:
    core.register("eu")
    core.register("us", slots=2)
    first = core.submit(placement={f"client_{i}": "eu" for i in range(4)})
    second = core.submit()
    third = core.submit(placement={f"client_{i}": "us" for i in range(4)})
    assert core.get(third).status == "QUEUED"
    getattr(core, leave)(second)
    assert core.get(second).status == "CANCELLED" and core.get(third).status == "RESERVING"
    core.play()
    assert (core.get(first).status, core.get(third).status) == ("COMPLETED", "COMPLETED")


def test_an_agent_without_a_connection_gets_no_new_run(core: Any) -> None:
    core.register("eu", "us")
    core.mediator.disconnected("us", "i-us")
    run = core.submit(placement={"client_0": "us"})
    assert core.get(run).waiting_for == "cluster us to come back"
    core.register("us")
    core.play()
    assert core.get(run).status == "COMPLETED"


# ---------------------------------------------------------------- stages


def test_a_held_run_stops_at_each_stage_for_as_long_as_it_likes(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(stage="reserve", keep=True)
    core.play()
    assert core.get(run).status == "RESERVED"
    core.pass_time(10_000.0, beating=NAMES)
    assert core.get(run).status == "RESERVED"
    core.advance(run, "activate")
    core.play()
    core.pass_time(10_000.0, beating=NAMES)
    assert core.get(run).status == "READY" and rounds_sent(core) == []
    core.advance(run, "run", 2)
    core.play()
    core.pass_time(10_000.0, beating=NAMES)
    assert (core.get(run).status, core.get(run).rounds_done) == ("IDLE", 2)
    core.advance(run, "reserve")
    core.advance(run, "run", 2)
    assert core.play() == [] and core.get(run).rounds_done == 2
    core.advance(run, "run", 5)
    core.play()
    assert core.get(run).rounds_done == 5 and core.get(run).rounds_planned == 5
    core.finish(run)
    core.finish(run)
    core.play()
    assert core.get(run).status == "COMPLETED"
    assert sum(isinstance(i, StoreModel) for _, i in core.sent) == 1
    assert core.finish(run) == core.cancel(run) == core.get(run)


def test_finish_during_the_rounds_ends_the_run_after_them(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(keep=True)
    core.play(hold=(StartRound,))
    core.finish(run)
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done) == ("COMPLETED", 3)


def test_a_run_that_stores_its_model_takes_no_more_rounds(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    core.play(hold=(StoreModel,))
    assert core.get(run).waiting_for.startswith("the model from")
    core.advance(run, "run")
    with pytest.raises(RunError, match="F005"):
        core.advance(run, "run", 9)
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done) == ("COMPLETED", 3)


@pytest.mark.parametrize(("stage", "match"), [("fly", "unknown stage 'fly'"), ("run", "is COMPLETED")])
def test_advance_says_why_it_cannot(core: Any, stage: str, match: str) -> None:
    core.register(*NAMES)
    run = core.submit(keep=stage == "fly")
    core.play()
    with pytest.raises(RunError, match=match) as caught:
        core.advance(run, stage)
    assert caught.value.code == "F005"


# ---------------------------------------------------------------- ids


def test_a_unique_prefix_names_a_run_and_nothing_else_does(core: Any) -> None:
    for run_id in ("aa11", "aa22", "bb33"):
        core.mediator.submit(core.submission(), run_id, core.now)
    assert core.mediator.get("bb").run_id == "bb33" and core.mediator.get("aa1").run_id == "aa11"
    with pytest.raises(RunError, match="ambiguous; allowed: aa11, aa22") as caught:
        core.mediator.get("aa")
    assert caught.value.code == "F004"
    for unknown in ("", "cc", "aa111"):
        with pytest.raises(RunError) as caught:
            core.mediator.get(unknown)
        assert caught.value.code == "F001"


def test_runs_are_listed_newest_first(core: Any) -> None:
    core.register(*NAMES)
    runs = []
    for _ in range(3):
        runs.append(core.submit())
        core.play()
        core.time_s += 1.0
    assert [r.run_id for r in core.mediator.list_runs()] == [r.run_id for r in reversed(runs)]


# ---------------------------------------------------------------- calls and messages


def test_a_call_goes_to_the_cluster_of_the_node_and_its_answer_back(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(keep=True, placement={"client_0": "us", "client_1": "eu"})
    core.play()
    core.carry_out(core.mediator.call_node(run.run_id, "client_0", "predict", b"x", "call-1"))
    ((cluster, order),) = core.take(CallNode)
    assert cluster == "us" and (order.node_id, order.method, order.arguments) == ("client_0", "predict", b"x")
    core.report("eu", CallDone(run.run_id, "call-1", "call/call-1"))
    core.report("us", CallDone("another", "call-1", "call/call-1"))
    assert core.answers == []
    done = CallDone(run.run_id, "call-1", "call/call-1")
    core.report("us", done)
    core.report("us", done)
    assert core.answers == [done]


def test_a_message_is_one_instruction_per_cluster(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(keep=True, placement={f"client_{i}": NAMES[i % 2] for i in range(4)})
    core.play()
    everyone = [f"client_{i}" for i in range(4)]
    used, effects = core.mediator.send_message(run.run_id, everyone, b"hello", ["c0", "c1", "c2", "c3"])
    assert used == ["c0", "c1"]
    assert [(c, i.call_id, i.recipients) for c, i in effects.sends] == [("eu", "c0", (0, 2)), ("us", "c1", (1, 3))]
    assert all(isinstance(i, SendMessage) for _, i in effects.sends)


def test_calls_need_live_nodes_that_exist(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(stage="reserve", keep=True)
    core.play()
    with pytest.raises(RunError, match=r"F005 .*nodes are not live"):
        core.mediator.call_node(run.run_id, "client_0", "m", b"", "c")
    core.advance(run, "activate")
    core.play()
    with pytest.raises(IcrfError, match="P012 no node 'client_9'"):
        core.mediator.call_node(run.run_id, "client_9", "m", b"", "c")
    with pytest.raises(IcrfError, match="P012"):
        core.mediator.send_message(run.run_id, ["client_0", "client_9"], b"", ["c", "d"])


@pytest.mark.parametrize(("event", "code"), [("cancel", "F005"), ("lose", "A003")])
def test_a_call_is_answered_although_its_node_is_gone(core: Any, event: str, code: str) -> None:
    core.register("eu")
    run = core.submit(keep=True)
    core.play()
    core.carry_out(core.mediator.call_node(run.run_id, "client_0", "m", b"", "c"))
    if event == "cancel":
        core.cancel(run)
    else:
        core.pass_time(30.0)
    (answer,) = core.answers
    assert answer.call_id == "c" and json.loads(answer.error_json)["code"] == code


def test_an_agents_warning_reaches_the_events_with_its_cluster(core: Any) -> None:
    core.register("eu")
    run = core.submit()
    core.report("eu", Warned(run.run_id, "the disk is nearly full"))
    core.report("eu", Warned("unknown", "nobody hears this"))
    assert [e.text for e in core.events(run) if e.kind == "warning"] == ["eu: the disk is nearly full"]


def test_a_running_run_keeps_its_slots_whatever_an_agent_claims_to_have_released(core: Any) -> None:
    core.register("eu")
    run = core.submit()
    core.play(hold=(StartRound,))
    core.report("eu", Released(run.run_id, 1))
    assert core.mediator.clusters()[0].free_slots == 0
    core.play()
    assert core.get(run).status == "COMPLETED" and core.mediator.clusters()[0].free_slots == 2


def test_only_recent_runs_keep_their_events_in_memory(core: Any) -> None:
    core.register("eu")
    runs = []
    for _ in range(70):
        runs.append(core.submit(num_nodes=2, federated_learning_rounds=1))
        core.play()
        core.time_s += 1.0
    kept = [core.mediator.events(r.run_id)[1] is not None for r in runs]
    assert kept == [False] * 6 + [True] * 64
    assert all(info.status == "COMPLETED" for info in core.mediator.list_runs())
    assert len(core.store.rows("events", (runs[0].run_id,))) == len(core.events(runs[-1]))


def test_configuration_errors_are_of_their_class(core: Any) -> None:
    with pytest.raises(ConfigError):
        core.submit(replace(core.submission(), config_json="nonsense"))
