"""What lives inside a Ray cluster is killed: a host, the topology manager, the gateway, Ray's own head.

The agent is held in the phase by a fail-point while the victim is killed, so that each death is in the place that the
test is named after.
"""

from __future__ import annotations

import time

import pytest

from icrf.protocol import RECOVERING

from .bench import Bench, federation

pytestmark = pytest.mark.ray

HEAD = "gcs_server"


def check(bench: Bench, flow: str, cluster: str, phase: str, victim: str) -> None:
    environment = bench.environment
    name = f"agent-{cluster}@{phase}:3"
    killed_at = 0.0

    def harm() -> None:
        nonlocal killed_at
        environment.await_fired(name)
        pid = environment.kill_ray(cluster) if victim == HEAD else environment.kill_actor(cluster, victim)
        killed_at = time.time()
        environment.release(name)
        assert pid

    lives = [daemon.starts for daemon in environment.daemons]
    outcome = bench.disturbed(federation(flow), f"{name}!hold", harm)
    assert [daemon.starts for daemon in environment.daemons] == lives, "a daemon died with it"
    told = next((e.text for at, e in outcome.events if at >= killed_at and e.status == RECOVERING and e.text), "")
    what = f"{'Ray head' if victim == HEAD else victim} of {cluster} in {phase}, {flow}"
    bench.measured(what, outcome, killed_at, f"`{told}`" if told else "nothing")


def test_a_host_killed_in_training(bench: Bench) -> None:
    check(bench, "star", "local-2", "train", "host")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["host", "manager", "gateway", HEAD])
@pytest.mark.parametrize("phase", ["train", "exchange"])
@pytest.mark.parametrize(("flow", "cluster"), [("star", "local-1"), ("ring", "local-2")])
def test_each_killed_in_each_phase(bench: Bench, flow: str, cluster: str, phase: str, victim: str) -> None:
    check(bench, flow, cluster, phase, victim)
