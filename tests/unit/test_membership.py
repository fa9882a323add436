"""Who serves which cluster: names, leases, incarnations and the slots that runs hold. No clock but the test's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from icrf.errors import AgentError, ConfigError, ProtocolError
from icrf.protocol import Capacity, ClusterReset, Goodbye, Heartbeat, Lease, Reject


def names(core: Any) -> list[str]:
    return [c.name for c in core.mediator.clusters()]


def test_a_registration_is_answered_with_a_lease(core: Any) -> None:
    assert core.register("us", "eu") is None
    lease = Lease(core.policy.lease_ttl_s, core.policy.heartbeat_s)
    assert core.queue == [("us", lease), ("eu", lease)]
    assert names(core) == ["eu", "us"]
    assert all(c.alive and c.free_slots == 2 for c in core.mediator.clusters())


def test_a_name_is_served_by_one_agent_at_a_time(core: Any) -> None:
    core.register("eu")
    core.time_s += 5.0
    refusal = core.register("eu", incarnation="another")
    assert isinstance(refusal, AgentError) and refusal.code == "A001"
    assert "cluster eu is served by instance i-eu from 127.0.0.1:9, lease 15 s left" in refusal.message
    assert [c.incarnation for c in core.mediator.clusters()] == ["i-eu"]


def test_the_same_agent_may_come_back_and_keeps_what_its_runs_hold(core: Any) -> None:
    core.register("eu")
    core.submit()
    core.mediator.disconnected("eu", "i-eu")
    assert [(c.alive, c.free_slots) for c in core.mediator.clusters()] == [(False, 0)]
    assert core.register("eu") is None
    assert [(c.alive, c.free_slots) for c in core.mediator.clusters()] == [(True, 0)]


def test_heartbeats_keep_a_lease_and_silence_ends_it(core: Any) -> None:
    core.register("eu", "us")
    for _ in range(6):
        core.time_s += 15.0
        core.queue.clear()
        core.report("eu", Heartbeat("i-eu"))
        assert core.queue == [("eu", Lease(20.0, 5.0))]
        core.carry_out(core.mediator.tick(core.now))
    assert names(core) == ["eu"] and core.dropped == ["us"]
    core.time_s += 19.9
    core.carry_out(core.mediator.tick(core.now))
    assert names(core) == ["eu"]
    core.time_s += 0.1
    core.carry_out(core.mediator.tick(core.now))
    assert names(core) == [] and core.dropped == ["us", "eu"]


@pytest.mark.parametrize("ticks", [True, False])
def test_an_expired_lease_frees_the_name(core: Any, ticks: bool) -> None:
    core.register("eu")
    core.time_s += 20.0
    if ticks:
        core.carry_out(core.mediator.tick(core.now))
    assert core.register("eu", incarnation="another") is None
    core.queue.clear()
    core.report("eu", Heartbeat("i-eu"))
    ((_, reject),) = core.queue
    assert isinstance(reject, Reject) and json.loads(reject.error_json)["code"] == "A002"


def test_a_goodbye_frees_the_name_at_once(core: Any) -> None:
    core.register("eu")
    core.report("eu", Goodbye("i-eu", "stopped"))
    assert names(core) == [] and core.dropped == ["eu"]
    assert core.register("eu", incarnation="another") is None


def test_another_protocol_is_p004_and_says_what_to_install(core: Any) -> None:
    refusal = core.register("eu", protocol=99)
    assert isinstance(refusal, ProtocolError) and refusal.code == "P004"
    assert "speaks protocol 99" in refusal.message and refusal.allowed == "protocol 1" and "0.1" in refusal.hint
    assert names(core) == []


@pytest.mark.parametrize("name", ["", "../x", "EU", "a" * 64, "eu\n", "ée"])
def test_a_name_that_is_none_is_c013(core: Any, name: str) -> None:
    refusal = core.register(name, incarnation="i")
    assert isinstance(refusal, ConfigError) and refusal.code == "C013"
    assert "\n" not in str(refusal) and names(core) == []


@pytest.mark.parametrize("report", [Heartbeat("i-eu"), Goodbye("i-eu", "")])
def test_an_unregistered_agent_is_told_that_its_lease_is_lost(core: Any, report: Any) -> None:
    core.report("eu", report)
    ((cluster, reject),) = core.queue
    assert cluster == "eu" and json.loads(reject.error_json)["code"] == "A002"


def test_what_a_lost_connection_says_of_another_incarnation_is_ignored(core: Any) -> None:
    core.register("eu")
    core.mediator.disconnected("eu", "older")
    core.mediator.disconnected("us", "i-us")
    assert core.mediator.clusters()[0].alive


def test_free_slots_are_what_runs_leave(core: Any) -> None:
    core.register("eu", slots=5)
    core.submit(num_nodes=3)
    assert core.mediator.clusters()[0].free_slots == 2
    core.play()
    assert core.mediator.clusters()[0].free_slots == 5


def test_a_cluster_that_was_built_anew_offers_what_it_has_now(core: Any) -> None:
    core.register("eu")
    core.report("eu", ClusterReset("i-eu", "the head died", Capacity(3, 3.0, 0.0, 0), "127.0.0.1:99"))
    (info,) = core.mediator.clusters()
    assert (info.capacity.num_slots, info.free_slots, info.address) == (3, 3, "127.0.0.1:99")


def test_the_gateway_of_a_cluster_belongs_to_its_agent_over_all_its_lives(core: Any) -> None:
    assert core.mediator.holder("eu", core.now) is None
    core.register("eu")
    assert core.mediator.holder("eu", core.now) == "i-eu"
    core.register("us", agent_id="agent")
    core.register("us", agent_id="agent", incarnation="later")
    assert core.mediator.holder("us", core.now) == "agent"
    core.pass_time(25.0)
    assert core.mediator.holder("eu", core.now) is core.mediator.holder("us", core.now) is None
