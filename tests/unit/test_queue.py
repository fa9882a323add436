"""The line for room on clusters: who goes first, what those who wait are told, and that two never wait for each other.

No Ray, no clock but the test's: the cores of one mediator, or of two that know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from icrf.errors import ResourceError
from icrf.protocol import (
    Capacity,
    Dismiss,
    Draining,
    Goodbye,
    HeldRun,
    Release,
    Released,
    Reserve,
    Reserved,
    Resources,
    StartRound,
)
from icrf_mediator.run_queue import MAX_PAUSE_S, pause_s

NAMES = ("eu", "us")
NO_ROOM = ResourceError("R003", "2 slots were not free within 60 s", hint="held by another program")


def everything_on(cluster: str, num_nodes: int = 4) -> dict[str, Any]:
    return {"num_nodes": num_nodes, "placement": {f"client_{i}": cluster for i in range(num_nodes)}}


def status(core: Any, *runs: Any) -> list[str]:
    return [core.get(run).status for run in runs]


def refuse(core: Any, cluster: str = "us", error: ResourceError = NO_ROOM) -> None:
    """All open reservations are made, but that of one cluster is not."""
    for name, order in core.take(Reserve):
        found = error.to_json() if name == cluster else ""
        core.report(name, Reserved(order.run_id, order.generation, found))


# ---------------------------------------------------------------- a reservation that is not made in time


def test_what_other_clusters_have_reserved_is_given_back_before_the_next_try(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    refuse(core)
    assert status(core, run) == ["QUEUED"] and core.get(run).clusters == ()
    assert [c.free_slots for c in core.mediator.clusters()] == [0, 0]
    released = core.take(Release)
    assert [(cluster, order.generation) for cluster, order in released] == [("eu", 1), ("us", 1)]
    core.pass_time(MAX_PAUSE_S, beating=NAMES)
    assert core.take(Reserve) == []
    core.report("eu", Released(run.run_id, 1))
    assert core.get(run).waiting_for == (
        "us to take back what was reserved; another try: cluster us: 2 slots were not free within 60 s "
        "(held by another program)"
    )
    core.report("us", Released(run.run_id, 1))
    asked = [(cluster, order.generation) for cluster, order in core.queue if isinstance(order, Reserve)]
    assert asked == [("eu", 2), ("us", 2)]
    core.play()
    assert status(core, run) == ["COMPLETED"]
    assert [c.free_slots for c in core.mediator.clusters()] == [2, 2]


def test_a_refused_run_rests_and_says_why(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    for generation in (1, 2, 3):
        refuse(core)
        core.play()
        assert status(core, run) == ["QUEUED"]
        assert core.get(run).waiting_for.startswith("another try: cluster us: 2 slots were not free")
        core.pass_time(pause_s(run.run_id, generation - 1) + core.policy.heartbeat_s, beating=NAMES)
        assert status(core, run) == ["RESERVING"]
    core.play()
    assert status(core, run) == ["COMPLETED"]


def test_pauses_grow_to_a_limit_and_differ_from_run_to_run() -> None:
    for tries in (0, 3, 100):
        pauses = {pause_s(f"run-{k}", tries) for k in range(50)}
        assert len(pauses) == 50 and min(pauses) >= 0 and max(pauses) <= min(MAX_PAUSE_S, 4.0 * 2**tries)
    assert pause_s("a", 5) == pause_s("a", 5)


def test_a_run_that_has_rounds_behind_it_goes_on_from_them(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    core.play(hold=(StartRound,))
    core.play_round()
    core.play(hold=(StartRound,))
    core.pass_time(30.0, beating=("eu",))
    core.take(StartRound)
    core.register("us", incarnation="i-us")
    refuse(core)
    core.play()
    assert status(core, run) == ["QUEUED"] and core.get(run).rounds_done == 1
    core.pass_time(60.0, beating=NAMES)
    core.play()
    assert status(core, run) == ["COMPLETED"]
    assert [row.key[1] for row in core.commits(run)] == [1, 2, 3]


@pytest.mark.parametrize("refused", [False, True])
def test_patience_ends_with_who_has_the_room(core: Any, refused: bool) -> None:
    core.register(*NAMES)
    first = None if refused else core.submit()
    run = core.submit(queue_deadline_s=300.0)
    if refused:
        refuse(core)
    core.play(hold=(StartRound, Reserve))
    for _ in range(6):
        core.pass_time(60.0, beating=NAMES)
        refuse(core)
        core.play(hold=(StartRound, Reserve))
    assert status(core, run) == ["FAILED"]
    error = core.error(run)
    assert (error.code, error.place) == ("R003", "queue_deadline_s")
    held = "cluster us: 2 slots were not free" if first is None else f"held by fed (run {first.run_id[:8]})"
    assert "no room within 300 s" in error.message and held in error.message


def test_patience_does_not_end_a_run_that_has_its_slots(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(queue_deadline_s=1.0, stage="reserve", keep=True)
    core.play()
    core.pass_time(100.0, beating=NAMES)
    assert status(core, run) == ["RESERVED"]


@pytest.mark.parametrize("held", [True, False])
def test_a_restarted_mediator_keeps_a_refused_run_in_line(core: Any, held: bool) -> None:
    core.register(*NAMES)
    run = core.submit()
    refuse(core)
    later = core.restarted()
    assert status(later, run) == ["QUEUED"]
    kept = (HeldRun(run.run_id, 0, 0, 0),) if held else ()
    later.register(*NAMES, held=kept)
    assert {order.generation for _, order in later.take(Reserve)} == set()
    assert {cluster for cluster, order in later.queue if isinstance(order, Release)} == set(NAMES)
    later.play(hold=(Reserve,))
    assert {order.generation for _, order in later.queue} == {2}
    later.play()
    assert status(later, run) == ["COMPLETED"]


def test_a_cluster_that_goes_while_it_gives_back_holds_nobody_up(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    refuse(core)
    core.take(Release)
    core.report("eu", Released(run.run_id, 1))
    core.pass_time(30.0, beating=("eu",))
    assert core.get(run).waiting_for == "cluster us to register"
    core.register("us", held=(HeldRun(run.run_id, 0, 0, 0),))
    core.play()
    core.pass_time(60.0, beating=NAMES)
    core.play()
    assert status(core, run) == ["COMPLETED"]


def test_a_cancelled_run_leaves_the_line_and_what_it_gives_back_is_free(core: Any) -> None:
    core.register(*NAMES)
    run, behind = core.submit(), core.submit()
    refuse(core)
    core.take(Release)
    core.cancel(run)
    core.play()
    assert status(core, run, behind) == ["CANCELLED", "COMPLETED"]
    assert [c.free_slots for c in core.mediator.clusters()] == [2, 2]


# ---------------------------------------------------------------- the line


def test_nobody_overtakes_on_a_cluster_and_nobody_waits_for_others_clusters(core: Any) -> None:
    core.register("asia", *NAMES)
    on_eu = core.submit(**everything_on("eu"))
    both = core.submit(placement={"client_0": "eu", "client_1": "eu", "client_2": "us", "client_3": "us"})
    small = core.submit(**everything_on("us", 2))
    elsewhere = core.submit(**everything_on("asia"))
    core.play(hold=(StartRound,))
    assert status(core, on_eu, both, small, elsewhere) == ["RUNNING", "QUEUED", "QUEUED", "RUNNING"]
    assert core.get(small).waiting_for == f"its turn on us, behind fed (run {both.run_id[:8]})"
    texts = [event.text for event in core.events(small) if event.kind == "waiting"]
    assert texts == [core.get(small).waiting_for]
    core.play()
    assert status(core, on_eu, both, small, elsewhere) == ["COMPLETED"] * 4


def test_a_run_that_rests_keeps_its_place_in_line(core: Any) -> None:
    core.register(*NAMES)
    first = core.submit()
    refuse(core)
    core.play()
    second = core.submit(federation_id="other")
    assert status(core, first, second) == ["QUEUED", "QUEUED"]
    assert core.get(second).waiting_for == f"its turn on eu, behind fed (run {first.run_id[:8]})"
    core.pass_time(60.0, beating=NAMES)
    core.play()
    assert status(core, first, second) == ["COMPLETED", "COMPLETED"]


@pytest.mark.parametrize("gone", ["for good", "until it comes back"])
def test_who_waits_for_a_cluster_that_is_away_keeps_nobody_from_the_others(core: Any, gone: str) -> None:
    core.register(*NAMES)
    first = core.submit()
    refuse(core)
    core.play()
    if gone == "for good":
        core.report("us", Goodbye("i-us", "stopped"))
    else:
        core.mediator.disconnected("us", "i-us")
    second = core.submit(**everything_on("eu", 2), federation_id="other")
    core.play()
    assert status(core, first, second) == ["QUEUED", "COMPLETED"]
    assert core.get(first).waiting_for.startswith("cluster us to ")
    core.register("us")
    core.pass_time(MAX_PAUSE_S, beating=NAMES)
    core.play()
    assert status(core, first) == ["COMPLETED"]


def test_nothing_new_is_placed_on_a_cluster_whose_agent_leaves(core: Any) -> None:
    core.register("us", slots=8)
    busy = core.submit(**everything_on("us", 2), resources={"num_cpus": 1.0}, max_slots_per_cluster=2)
    core.play(hold=(StartRound,))
    core.report("us", Draining("i-us"))
    fresh = core.submit(**everything_on("us", 2), resources={"num_cpus": 1.0}, max_slots_per_cluster=2)
    assert core.take(Reserve) == [] and status(core, fresh) == ["QUEUED"]
    assert core.get(fresh).waiting_for == "cluster us to come back (its agent is leaving)"
    core.take(Dismiss)
    core.report("us", Goodbye("i-us", "stopped"))
    core.register("us", slots=8)
    core.play()
    assert status(core, busy, fresh) == ["COMPLETED", "COMPLETED"]


@pytest.mark.parametrize(
    ("each", "lack"),
    [
        (Resources(1.5), "2 slots x 1.5 CPU on eu (1 of 4 CPU free"),
        (Resources(0.5, 0.5), "2 slots x 0.5 GPU on eu (0 of 1 GPU free"),
    ],
)
def test_processors_are_counted_like_slots(core: Any, each: Resources, lack: str) -> None:
    core.register("eu", capacity=Capacity(8, 4.0, 1.0, 0))
    share = {"num_cpus": each.num_cpus, "num_gpus": each.num_gpus}
    first, second = (core.submit(num_nodes=2, resources=share) for _ in range(2))
    assert status(core, first, second) == ["RESERVING", "QUEUED"]
    assert core.get(second).waiting_for.startswith(lack)
    core.play()
    assert status(core, first, second) == ["COMPLETED", "COMPLETED"]


def test_who_holds_what_since_when_outlives_the_mediator(core: Any) -> None:
    core.register(*NAMES)
    first = core.submit()
    core.play(hold=(StartRound,))
    core.time_s += 3600.0
    later = core.restarted()
    later.register(*NAMES, held=(HeldRun(first.run_id, 1, 1, 1),))
    second = later.submit(client_request_id="another")
    assert "since 2001-09-09 02:03:20 UTC" in later.get(second).waiting_for


# ---------------------------------------------------------------- quotas


def test_a_federation_takes_its_quota_and_leaves_the_rest_to_others(core: Any) -> None:
    core.register("eu", capacity=Capacity(4, 4.0, 0.0, 0, quota=2))
    first, again = core.submit(), core.submit()
    other = core.submit(federation_id="other")
    orders = core.take(Reserve)
    assert [(order.federation, order.num_slots) for _, order in orders] == [("fed", 2), ("other", 2)]
    core.queue += orders
    assert status(core, first, again, other) == ["RESERVING", "QUEUED", "RESERVING"]
    text = f"2 slots on eu, where a federation may hold 2: it has 2 by fed (run {first.run_id[:8]}) since"
    assert core.get(again).waiting_for.startswith(text)
    core.play()
    assert status(core, first, again, other) == ["COMPLETED"] * 3


def test_a_federation_may_ask_for_less_than_it_gets(core: Any) -> None:
    core.register("eu", capacity=Capacity(4, 4.0, 0.0, 0))
    first, second = (core.submit(max_slots_per_cluster=2, federation_id=name) for name in ("a", "b"))
    assert [order.num_slots for _, order in core.queue if isinstance(order, Reserve)] == [2, 2]
    assert status(core, first, second) == ["RESERVING", "RESERVING"]


# ---------------------------------------------------------------- two fabrics on the same clusters


@dataclass
class Sites:
    """Clusters that two fabrics share: slots go to whoever comes, and a reservation waits until its deadline."""

    slots: int
    taken: dict[str, dict[str, int]] = field(default_factory=dict)
    waiting: list[tuple[float, Any, str, Reserve]] = field(default_factory=list)

    def reserve(self, core: Any, cluster: str, order: Reserve) -> None:
        self.waiting.append((core.time_s + order.deadline_s, core, cluster, order))
        self.look()

    def release(self, core: Any, cluster: str, order: Release) -> None:
        self.taken.get(cluster, {}).pop(order.run_id, None)
        self.waiting = [one for one in self.waiting if (one[2], one[3].run_id) != (cluster, order.run_id)]
        core.report(cluster, Released(order.run_id, order.generation))
        self.look()

    def look(self) -> None:
        """Serve whom there is room for, and those whose time is over."""
        waiting, self.waiting = self.waiting, []
        for until_s, core, cluster, order in waiting:
            here = self.taken.setdefault(cluster, {})
            if sum(here.values()) + order.num_slots <= self.slots:
                here[order.run_id] = order.num_slots
                core.report(cluster, Reserved(order.run_id, order.generation))
            elif core.time_s >= until_s:
                core.report(cluster, Reserved(order.run_id, order.generation, NO_ROOM.to_json()))
            else:
                self.waiting.append((until_s, core, cluster, order))


def serve(sites: Sites, core: Any) -> None:
    """Answer what a core has asked."""
    while core.queue:
        cluster, order = core.queue.pop(0)
        if isinstance(order, Reserve):
            sites.reserve(core, cluster, order)
        elif isinstance(order, Release):
            sites.release(core, cluster, order)
        elif (answer := core.answer(cluster, order)) is not None:
            core.report(cluster, answer)


@pytest.mark.parametrize("clusters", [("eu",), NAMES])
@pytest.mark.parametrize("seed", range(10))
def test_two_fabrics_that_each_have_what_the_other_needs_both_get_through(
    new_core: Callable[..., Any], clusters: tuple[str, ...], seed: int
) -> None:
    sites = Sites(slots=3)
    cores = [new_core(), new_core()]
    runs = []
    for number, core in enumerate(cores):
        core.register(*clusters)
        core._submitted = 100 * seed + 10 * number
        runs.append(core.submit(federation_id=f"fabric-{number}"))
    # Each has one cluster and waits for the other one's: the classic cycle.
    for core, order in zip(cores, (clusters, clusters[::-1]), strict=True):
        core.queue.sort(key=lambda sent, order=order: order.index(sent[0]))
    reserves = [[sent for sent in core.queue if isinstance(sent[1], Reserve)] for core in cores]
    for turn in range(len(clusters)):
        for core, sent in zip(cores, reserves, strict=True):
            core.queue.remove(sent[turn])
            sites.reserve(core, *sent[turn])
    if len(clusters) == 2:
        assert [core.get(run).status for core, run in zip(cores, runs, strict=True)] == ["RESERVING"] * 2
    for _ in range(400):
        for core in cores:
            serve(sites, core)
            core.pass_time(1.0, beating=clusters)
        sites.look()
        if all(core.get(run).status == "COMPLETED" for core, run in zip(cores, runs, strict=True)):
            return
    pytest.fail(str([core.get(run) for core, run in zip(cores, runs, strict=True)]))


@pytest.mark.parametrize("comes_back", [True, False])
def test_after_a_restart_a_run_in_line_waits_for_the_cluster_that_it_is_pinned_to(core: Any, comes_back: bool) -> None:
    core.register(*NAMES)
    first, second = core.submit(**everything_on("us")), core.submit(**everything_on("us"))
    core.play(hold=(StartRound,))
    assert status(core, first, second) == ["RUNNING", "QUEUED"]
    core = core.restarted()
    core.register("eu")
    assert status(core, second) == ["QUEUED"]
    assert core.get(second).waiting_for.startswith("clusters to register again; with those that have: ")
    if comes_back:
        core.register("us")
        core.play()
        assert status(core, first, second) == ["COMPLETED", "COMPLETED"]
    else:
        core.pass_time(core.policy.lease_ttl_s + 1.0, beating=("eu",))
        assert status(core, second) == ["FAILED"]
        assert core.error(second).code == "C011"
