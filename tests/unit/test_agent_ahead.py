"""What an agent does between its report and the next order: it begins with what was announced, and can go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from icrf.errors import NodeError
from icrf.exchange import MODEL, PARTIAL
from icrf.ports import Arrival, PayloadHeader, PhaseReport
from icrf.protocol import CENTRALIZED, AbortAttempt, Activate, NextRound, RoundReport, StartRound
from icrf.testing.round_driver import CLUSTER, RUN, activation
from icrf.update import choose_grid
from icrf_agent.core import Action, Advance, AgentCore, Discard, Say
from icrf_agent.round_machine import AGGREGATE, PUBLISH, TRAIN

ALONE, STAR = activation(CENTRALIZED), activation(CENTRALIZED, clusters=("c0", "c1"))
MADE = PhaseReport(absmax=(1.0,), model_hash="made")


def active_core(order: Activate, cluster: str) -> AgentCore:
    core = AgentCore(cluster)
    core.instructed(order, 0.0)
    return core


def steps_of(actions: Sequence[Action]) -> list[str]:
    return [action.step.kind for action in actions if isinstance(action, Advance)]


def payload(start: StartRound, kind: str, source: str, target: str) -> Arrival:
    """What one cluster sends another: the server's model, or a sum for the server."""
    return Arrival(
        PayloadHeader(
            run_id=start.run_id,
            generation=start.generation,
            round=start.round,
            attempt=start.attempt,
            kind=kind,
            sender=0 if kind == MODEL else -1,
            source=source,
            target=target,
            dtype="float32",
            num_elements=4,
            recipients=(0,) if kind == PARTIAL else (),
        ),
        10,
    )


def reports_of(core: AgentCore, actions: Sequence[Action]) -> list[RoundReport]:
    """Carry out all steps one after the other; what is reported in the end."""
    reports: list[RoundReport] = []
    while actions:
        reports += [a.report for a in actions if isinstance(a, Say) and isinstance(a.report, RoundReport)]
        actions = do(core, actions)
    return reports


def announced(number: int = 1, attempt: int = 1) -> StartRound:
    """A start that tells what comes next."""
    start = StartRound(RUN, 1, number, attempt, "", (0,), 10, evaluate=False)
    return replace(start, ahead=NextRound(20, evaluate=False, participants=b"\2"))


def following(**changes: Any) -> StartRound:
    """What is asked for after round 1 unless something comes in between."""
    start = announced().expected("made", choose_grid((1.0,), 20))
    assert start is not None
    return replace(start, ahead=NextRound(20, evaluate=True), **changes)


def gone_ahead() -> tuple[AgentCore, list[Action]]:
    """A core that has reported round 1, and its first steps of the next."""
    core = active_core(ALONE, CLUSTER)
    ahead: list[Action] = []
    queue = core.instructed(announced(), 0.0)
    while queue:
        action = queue.pop(0)
        if isinstance(action, Advance) and not action.ahead:
            result = MADE if action.step.kind == AGGREGATE else PhaseReport()
            queue += core.step_done(action.start, action.step, result, 0.0, 1.0)
        elif isinstance(action, Advance):
            ahead.append(action)
        else:
            assert isinstance(action, Say) and not ahead
    return core, ahead


def do(core: AgentCore, actions: Sequence[Action], result: PhaseReport = MADE) -> list[Action]:
    """Carry out steps; what is to be done next."""
    return [
        next_action
        for action in actions
        if isinstance(action, Advance)
        for next_action in core.step_done(action.start, action.step, result, 0.0, 2.0)
    ]


def test_the_next_round_is_begun_on_what_was_reported_and_stops_before_it_makes_a_state() -> None:
    core, publish = gone_ahead()
    (first,) = publish
    assert isinstance(first, Advance) and first.start == replace(following(), ahead=None)
    train = do(core, publish)
    assert (steps_of(publish), steps_of(train)) == ([PUBLISH], [TRAIN])
    assert do(core, train) == []
    # It goes on where it stands when the same is asked for.
    assert steps_of(core.instructed(following(), 3.0)) == [AGGREGATE]


def test_what_was_begun_ahead_goes_on_whenever_it_is_asked_for() -> None:
    core, publish = gone_ahead()
    assert core.instructed(following(), 2.0) == []
    (report,) = reports_of(core, publish)
    assert (report.round, report.attempt) == (2, 1)


@pytest.mark.parametrize("asked", [following(total_weight=10), following(attempt=2), following(participants=b"\3")])
def test_what_was_begun_ahead_is_dropped_where_something_else_is_asked_for(asked: StartRound) -> None:
    core, publish = gone_ahead()
    actions = core.instructed(asked, 2.0)
    assert actions[0] == Discard(RUN, 2, 1, ahead=True) and steps_of(actions) == [PUBLISH]
    if asked.attempt != 1:
        assert do(core, publish) == []


def test_the_round_before_can_be_repeated_while_the_next_is_under_way() -> None:
    core, publish = gone_ahead()
    assert core.instructed(AbortAttempt(RUN, 1, 1), 2.0) == [Discard(RUN, 1, 1), Discard(RUN, 2, 1, ahead=True)]
    assert do(core, publish) == []
    actions = core.instructed(replace(announced(1, 2), ahead=None), 3.0)
    assert [(r.round, r.attempt) for r in reports_of(core, actions)] == [(1, 2)]


def test_a_failure_ahead_is_told_when_somebody_asks() -> None:
    core, (step,) = gone_ahead()
    assert isinstance(step, Advance)
    error = NodeError("U003", "a host died")
    assert core.step_failed(step.start, error, "retry") == []
    (said,) = core.instructed(following(), 2.0)
    assert isinstance(said, Say) and isinstance(said.report, RoundReport)
    assert (said.report.round, said.report.error_json, said.report.recovery) == (2, error.to_json(), "retry")


def test_only_who_makes_the_model_goes_ahead() -> None:
    core = active_core(STAR, "c1")
    core.arrived(payload(announced(), MODEL, "c0", "c1"), 0.0)
    actions = core.instructed(announced(), 1.0)
    while steps := [a for a in actions if isinstance(a, Advance)]:
        assert not any(step.ahead for step in steps)
        actions = do(core, steps, PhaseReport(nodes=(2,)))
    assert isinstance(actions[0], Say) and len(actions) == 1


def test_a_partial_for_what_was_begun_ahead_waits_until_that_is_asked_for() -> None:
    core = active_core(STAR, "c0")
    queue = core.instructed(announced(), 0.0)
    queue += core.arrived(payload(announced(), PARTIAL, "c1", "c0"), 0.0)
    while not any(isinstance(a, Advance) and a.ahead for a in queue):
        queue = do(core, queue)
    early = replace(following(), ahead=None)
    queue = do(core, queue)
    assert core.arrived(payload(early, PARTIAL, "c1", "c0"), 2.0) == []
    while queue:
        queue = do(core, queue)
    assert steps_of(core.instructed(following(), 3.0)) == [AGGREGATE]
