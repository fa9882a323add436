"""An agent is killed: it is started again, takes over its living hosts, and the bits are the same."""

from __future__ import annotations

import pytest

from .bench import Bench, federation, fired_at

pytestmark = pytest.mark.ray


def check(bench: Bench, flow: str, cluster: str, phase: str) -> None:
    agent = bench.environment.agents[cluster]
    lives = agent.starts
    name = f"agent-{cluster}@{phase}:3"
    outcome = bench.disturbed(federation(flow), name)
    assert agent.starts == lives + 1, agent.log()
    told = next((text for text in outcome.texts if cluster in text and "connected again" in text), "")
    bench.measured(
        f"agent {cluster} in {phase}, {flow}",
        outcome,
        fired_at(bench.environment, name),
        f"`{told}`" if told else "nothing",
    )


def test_killed_in_training(bench: Bench) -> None:
    check(bench, "star", "local-2", "train")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["train", "exchange"])
@pytest.mark.parametrize("cluster", ["local-1", "local-2"])
@pytest.mark.parametrize("flow", ["star", "ring"])
def test_each_killed_in_each_phase(bench: Bench, flow: str, cluster: str, phase: str) -> None:
    check(bench, flow, cluster, phase)
