"""The mediator is killed in each phase of a run: users and agents wait, nothing is lost, the bits are the same."""

from __future__ import annotations

import pytest

from .bench import Bench, federation, fired_at

pytestmark = pytest.mark.ray

UNREACHABLE = "mediator unreachable, retrying"
POINTS = ("submit:0", "reserve:0", "activate:0", "train:3", "exchange:3", "aggregate:3", "commit:3", "result:0")


def check(bench: Bench, flow: str, point: str) -> None:
    lives = bench.environment.mediator.starts
    name = f"mediator@{point}"
    outcome = bench.disturbed(federation(flow), name)
    assert bench.environment.mediator.starts == lives + 1
    # These fall into the submission, which the SDK repeats: there is nothing to watch yet.
    assert outcome.saw(UNREACHABLE) or point in ("submit:0", "reserve:0")
    saw = f"`{UNREACHABLE} ...`" if outcome.saw(UNREACHABLE) else "submit takes longer"
    bench.measured(f"mediator in {point.partition(':')[0]}, {flow}", outcome, fired_at(bench.environment, name), saw)


@pytest.mark.parametrize("point", ["train:3", "commit:3"])
def test_killed_in_a_round(bench: Bench, point: str) -> None:
    check(bench, "star", point)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("flow", ["star", "ring"])
def test_killed_in_every_phase(bench: Bench, flow: str, point: str) -> None:
    check(bench, flow, point)
