"""What the mediator adds to a round's profile: its own times, on a clock that only the test moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icrf.errors import NodeError
from icrf.protocol import (
    Activate,
    ClusterProfile,
    PhaseSpan,
    Reserve,
    RoundProfile,
    RoundResult,
    RunInfo,
    StartRound,
    Submission,
)

DEATH = NodeError("U003", "a host died", place="host-0")
PROFILE = ClusterProfile({"host-0": {"train": 3.0}}, (PhaseSpan("train", 0.5, 3.5),))


def submit(core: Any, submission: Submission, planned_s: float) -> RunInfo:
    core.register("eu", "us")
    info, effects = core.mediator.submit(submission, "ab" * 16, core.now, planned_s)
    core.carry_out(effects)
    found: RunInfo = info
    return found


def answer_round(core: Any, after_s: float, **parts: Any) -> None:
    """All clusters answer the open round after so many seconds."""
    core.time_s += after_s
    for cluster, order in core.take(StartRound):
        core.report(cluster, core.round_report(cluster, order, **parts))


def rounds_of(core: Any, run: RunInfo) -> list[RoundResult]:
    return [event.round for event in core.events(run) if event.round]


def test_rounds_begin_when_they_are_told_and_what_came_before_counts_once(core: Any) -> None:
    run = submit(core, replace(core.submission(), profile=True), planned_s=0.25)
    core.time_s += 2.0
    core.play(hold=(Activate,))
    core.time_s += 3.0
    core.play(hold=(StartRound,))
    answer_round(core, 10.0, profile=PROFILE)
    core.mediator.commit_took(run.run_id, 1, 0.5)
    answer_round(core, 8.0, profile=PROFILE)
    both = {"eu": PROFILE, "us": PROFILE}
    # The second round was told when the first was durable.
    first, second = rounds_of(core, run)
    assert (first.profile, first.commit_s) == (RoundProfile(10.0, 0.25, 5.0, both), 0.5)
    assert second.profile == RoundProfile(7.5, 0.0, 0.0, both)
    again = core.restarted()
    assert [r.profile for r in rounds_of(again, run)] == [first.profile, second.profile]
    assert all("profile" not in write.row for write in core.commits(run))


def test_what_the_mediator_took_is_told_with_the_next_round_once(core: Any) -> None:
    run = submit(core, replace(core.submission(), profile=True), planned_s=0.0)
    core.play(hold=(StartRound,))
    for cluster, order in core.take(StartRound):
        report = core.round_report(cluster, order)
        core.report(cluster, report)
        core.mediator.handled(report, 0.25)
    answer_round(core, 1.0)
    answer_round(core, 1.0)
    # With the second report the first round was decided on: what it took comes with the next one.
    assert [r.profile.mediator_s for r in rounds_of(core, run) if r.profile] == [0.25, 0.25, 0.0]


def test_only_the_attempt_that_was_committed_counts(core: Any) -> None:
    run = submit(core, replace(core.submission(), profile=True), planned_s=0.0)
    core.play(hold=(StartRound,))
    (cluster, order), *_ = core.take(StartRound)
    core.time_s += 4.0
    core.report(cluster, core.round_report(cluster, order, overflow=(0,)))
    answer_round(core, 6.0, profile=PROFILE)
    (result,) = rounds_of(core, run)
    assert result.attempt == 2 and result.profile is not None and result.profile.working_s == 6.0


def test_setting_up_again_counts_before_the_round_that_follows(core: Any) -> None:
    run = submit(core, replace(core.submission(), profile=True), planned_s=0.0)
    core.play(hold=(StartRound,))
    answer_round(core, 1.0, profile=PROFILE)
    (cluster, order), *_ = core.take(StartRound)
    lost = core.round_report(cluster, order, error_json=DEATH.to_json(), recovery="restore")
    core.report(cluster, lost)
    core.play(hold=(Reserve,))
    core.time_s += 7.0
    core.play(hold=(StartRound,))
    # The first round runs again, which is told to nobody.
    answer_round(core, 1.0, profile=PROFILE)
    answer_round(core, 2.0, profile=PROFILE)
    assert [r.profile.activate_s for r in rounds_of(core, run) if r.profile] == [0.0, 7.0]


def test_a_run_that_was_not_asked_tells_nothing(core: Any) -> None:
    run = submit(core, core.submission(), planned_s=1.0)
    core.play(hold=(StartRound,))
    assert not any(order.profile for _, order in core.queue)
    answer_round(core, 1.0)
    assert rounds_of(core, run)[0].profile is None
