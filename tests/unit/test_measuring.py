"""Who measures which link when, and what is known afterwards. No clock but the test's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import AgentError, error_from_json, make_error
from icrf.protocol import (
    CallDone,
    ClusterReset,
    Draining,
    Goodbye,
    LinkMeasured,
    MeasureLink,
    PeerAddress,
    RunInfo,
    Submission,
)
from icrf.topology import build_topology

FAST, SLOW = (1e8, 0.001), (1e4, 0.5)


def measure(core: Any, call_id: str = "call") -> None:
    core.carry_out(core.mediator.measure_links(call_id, core.now))


def answer(core: Any, cluster: str, order: MeasureLink, figures: tuple[float, float] = FAST) -> None:
    core.report(cluster, LinkMeasured(order.measurement, *figures))


def measure_all(core: Any, slow: tuple[str, ...] = ()) -> None:
    """All there is to measure; links from and to `slow` clusters are slow."""
    measure(core)
    while orders := core.take(MeasureLink):
        for cluster, order in orders:
            answer(core, cluster, order, SLOW if {cluster, order.peer.cluster} & set(slow) else FAST)


def line(core: Any) -> Submission:
    """Nine peers, each with its neighbours in the order of the ids."""
    return replace(core.submission(num_nodes=9), graph=build_topology("line", 9, {}).to_graph())


def placed(core: Any, run: RunInfo) -> dict[str, str]:
    """Where the nodes of a run were placed."""
    found: dict[str, str] = core.store.rows("assignments", (run.run_id,))[-1].row["plan"]["assignment"]
    return found


def figures(core: Any) -> dict[tuple[str, str], float]:
    return {(link.source, link.target): link.bytes_per_s for link in core.mediator.links()}


def test_every_link_is_measured_each_way_and_no_cluster_takes_part_in_two_at_once(core: Any) -> None:
    core.register("a", "b", "c", "d")
    measure(core)
    done, together = [], []
    while orders := core.take(MeasureLink):
        together.append(len(orders))
        ends = Counter(end for cluster, order in orders for end in (cluster, order.peer.cluster))
        assert set(ends.values()) == {1}
        for cluster, order in orders:
            done.append((cluster, order.peer.cluster))
            assert core.answers == []
            answer(core, cluster, order)
    names = "abcd"
    assert sorted(done) == [(one, other) for one in names for other in names if one != other]
    assert max(together) == 2 and core.answers == [CallDone("", "call")]
    assert [(link.source, link.target) for link in core.mediator.links()] == sorted(done)
    assert {(m.bytes_per_s, m.rtt_s, m.relayed, m.measured_at) for m in core.mediator.links()} == {
        (*FAST, True, core.now.wall_s)
    }


def test_whoever_asks_meanwhile_gets_the_same_figures(core: Any) -> None:
    core.register("a", "b")
    measure(core, "first")
    measure(core, "second")
    for _ in range(2):
        ((cluster, order),) = core.take(MeasureLink)
        answer(core, cluster, order)
    assert core.answers == [CallDone("", "first"), CallDone("", "second")] and core.queue[2:] == []
    measure(core, "third")
    assert len(core.take(MeasureLink)) == 1


def test_a_gateway_that_can_be_dialled_is_measured_directly(core: Any) -> None:
    core.register("a", "b")
    capacity = core.mediator.clusters()[1].capacity
    core.report("b", ClusterReset("i-b", "test", capacity, "127.0.0.1:99"))
    measure_all(core)
    assert [(m.source, m.relayed) for m in core.mediator.links()] == [("a", False), ("b", True)]
    peers = [order.peer for _, order in core.sent if isinstance(order, MeasureLink)]
    assert peers == [PeerAddress("b", "127.0.0.1:99"), PeerAddress("a", "")]


def test_two_clusters_have_to_be_there(core: Any) -> None:
    for present in ("nobody", "a"):
        if present == "a":
            core.register("a")
        with pytest.raises(AgentError) as caught:
            measure(core)
        assert caught.value.code == "A005" and caught.value.hint
    core.register("b")
    core.report("b", Draining("i-b"))
    with pytest.raises(AgentError, match="A005"):
        measure(core)


def test_what_was_measured_survives_the_mediator(core: Any) -> None:
    core.register("a", "b")
    measure_all(core)
    again = core.restarted()
    assert again.mediator.links() == ()
    again.register("a", "b")
    assert again.mediator.links() == core.mediator.links() != ()


def test_another_agent_of_the_same_name_is_not_where_the_first_was(core: Any) -> None:
    core.register("a", agent_id="A")
    core.register("b", agent_id="B")
    measure_all(core)
    core.register("b", agent_id="B", incarnation="i-b2")
    assert len(figures(core)) == 2
    core.report("b", Goodbye("i-b2", "stopped"), incarnation="i-b2")
    assert figures(core) == {}
    core.register("b", agent_id="C")
    assert figures(core) == {}
    core.report("b", Goodbye("i-b", "stopped"))
    core.register("b", agent_id="B")
    assert len(figures(core)) == 2


def test_an_error_stands_where_there_is_no_figure(core: Any) -> None:
    core.register("a", "b")
    measure_all(core)
    measure(core)
    refusals = [make_error("P030", "cluster b cannot be reached").to_json(), ""]
    for error, bad in zip(refusals, ((0.0, 0.0), (float("nan"), -1.0)), strict=True):
        ((cluster, order),) = core.take(MeasureLink)
        core.report(cluster, LinkMeasured(order.measurement, *bad, error))
    links = core.mediator.links()
    assert [error_from_json(link.error_json).code for link in links] == ["P030", "P001"]
    assert [(link.bytes_per_s, link.rtt_s) for link in links] == [(0.0, 0.0)] * 2
    assert core.restarted().register("a", "b") is None


def test_an_agent_that_says_nothing_is_not_waited_for(core: Any) -> None:
    core.register("a", "b")
    measure(core)
    ((_, silent),) = core.take(MeasureLink)
    core.pass_time(55.0, beating=("a", "b"))
    assert core.take(MeasureLink) == []
    core.pass_time(5.0, beating=("a", "b"))
    answer(core, "a", silent)
    ((cluster, order),) = core.take(MeasureLink)
    answer(core, cluster, order)
    assert [link.error_json and error_from_json(link.error_json).code for link in core.mediator.links()] == ["A003", ""]
    assert len(core.answers) == 1


def test_only_the_agent_that_was_asked_is_listened_to(core: Any) -> None:
    core.register("a", "b")
    measure(core)
    ((_, order),) = core.take(MeasureLink)
    core.report("b", LinkMeasured(order.measurement, *SLOW))
    core.report("b", LinkMeasured("no such measurement", *SLOW))
    assert figures(core) == {}
    answer(core, "a", order)
    answer(core, "a", order, SLOW)
    assert figures(core) == {("a", "b"): FAST[0]}


@pytest.mark.parametrize("who", ["a", "b"])
def test_a_cluster_that_leaves_meanwhile_is_left_out(core: Any, who: str) -> None:
    core.register("a", "b", "c")
    measure(core)
    core.take(MeasureLink)
    core.report(who, Goodbye(f"i-{who}", "stopped"))
    core.carry_out(core.mediator.tick(core.now))
    while orders := core.take(MeasureLink):
        for cluster, order in orders:
            answer(core, cluster, order)
    left = {"a", "b", "c"} - {who}
    assert set(figures(core)) == {(one, other) for one in left for other in left if one != other}
    assert len(core.answers) == 1


def test_plans_and_runs_go_by_what_was_measured(core: Any) -> None:
    core.register("a", "b", "c")
    first = core.submit(line(core))
    before = placed(core, first)
    # In the order of the ids b is in the middle, between two neighbours; at an end it has one.
    assert [before[f"client_{i}"] for i in (0, 4, 8)] == ["a", "b", "c"]
    core.play()
    measure_all(core, slow=("b",))
    after = placed(core, core.submit(line(core)))
    assert "b" in {after["client_0"], after["client_8"]} and after["client_4"] != "b"


def test_a_run_that_waits_is_planned_anew_when_links_become_known(core: Any) -> None:
    core.register("a", "b", "c")
    core.submit(line(core))
    waiting = core.submit(line(core))
    measure_all(core, slow=("b",))
    core.play()
    assert placed(core, waiting)["client_4"] != "b"
