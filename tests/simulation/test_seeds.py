"""Whole histories of faults under simulated time, one per seed, with every invariant checked on the way.

A failing seed says how to repeat it, and shows its last steps. The second half breaks the fabric on purpose: a checker
that lets a broken fence pass proves nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from icrf.ports import PayloadHeader
from icrf.protocol import COMPLETED, Register, RoundReport, StartRound
from icrf.testing.simulation import FAULTS, SimulationFailed, simulate
from icrf_agent.core import AgentCore
from icrf_agent.host_late import EarlierModels
from icrf_agent.host_state import VersionedState
from icrf_agent.topology_manager import HybridTopologyManager
from icrf_mediator.graphs import Graphs
from icrf_mediator.membership import Membership
from icrf_mediator.quorum import Quorum
from icrf_mediator.rounds import RoundLedger
from icrf_mediator.run_record import RunRecord
from icrf_mediator.runs import RunMachine

CHUNK = 50
MUST_CATCH_WITHIN = 500


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = metafunc.config.getoption("--seeds")
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        metafunc.parametrize("seeds", chunks, ids=[f"{c.start}-{c.stop - 1}" for c in chunks])


def test_every_seed_ends_as_without_faults(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)


def test_every_kind_of_fault_strikes_and_most_runs_complete() -> None:
    outcomes = [simulate(seed) for seed in range(1000, 1050)]
    struck = {kind for outcome in outcomes for kind in outcome.faults}
    statuses = [status for outcome in outcomes for status in outcome.statuses.values()]
    assert struck >= set(FAULTS)
    assert statuses.count(COMPLETED) > len(statuses) * 0.8


@pytest.mark.parametrize("kind", FAULTS)
def test_many_faults_of_one_kind(kind: str) -> None:
    for seed in range(5):
        simulate(seed, kinds=(kind,))


def test_a_seed_repeats_itself_in_another_process() -> None:
    script = "from icrf.testing.simulation import simulate; print([simulate(s).signature for s in (3, 26, 182)])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "12345"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str([simulate(seed).signature for seed in (3, 26, 182)])


# ---------------------------------------------------------------- a broken fabric is caught


def caught(*kinds: str) -> str:
    """The first violation that the seeds find, with faults of these kinds only."""
    for seed in range(MUST_CATCH_WITHIN):
        try:
            simulate(seed, kinds=kinds)
        except SimulationFailed as failure:
            assert f"simulate({seed}, trace=True" in str(failure)
            return str(failure).splitlines()[0]
    pytest.fail(f"no seed below {MUST_CATCH_WITHIN} has noticed")


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by one that is handed the original first."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def test_a_ledger_that_accepts_every_report_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundLedger, "accepts", lambda self, report: self.open is not None)
    assert "I6" in caught() or "I7" in caught() or "I1" in caught()


def test_a_mediator_without_a_generation_check_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_generation(
        original: Any, self: RunMachine, effects: Any, now: Any, cluster: str, report: RoundReport
    ) -> Any:
        return original(self, effects, now, cluster, replace(report, generation=self.generation))

    wrap(monkeypatch, RunMachine, "round_report", any_generation)
    assert "I6" in caught("cluster dies", "report is replayed")


def test_a_manager_that_takes_one_groups_sum_for_anothers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(original: Any, self: HybridTopologyManager, *arguments: Any) -> Any:
        return original(self, *arguments[:4])

    wrap(monkeypatch, HybridTopologyManager, "cluster_posting", all_of_them)
    assert "I1" in caught()


def test_a_cluster_without_a_generation_check_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_generation(original: Any, self: HybridTopologyManager, header: PayloadHeader, *rest: Any) -> Any:
        room = self._rooms.get(header.run_id)
        generation = room.activation.generation if room else header.generation
        return original(self, replace(header, generation=generation), *rest)

    wrap(monkeypatch, HybridTopologyManager, "deliver", any_generation)
    assert "I2" in caught()


def test_a_cluster_that_takes_in_payloads_of_old_attempts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def anything(original: Any, self: HybridTopologyManager, *payload: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "_require_open", lambda room, position: None)
            original(self, *payload)

    wrap(monkeypatch, HybridTopologyManager, "deliver", anything)
    assert "I2" in caught()


def test_a_repeated_partial_that_is_merged_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: HybridTopologyManager, room: Any, posting: Any) -> bool:
        held = room.postings.setdefault((posting.position, posting.kind), {})
        held[(*posting.senders, len(held))] = posting
        return True

    monkeypatch.setattr(HybridTopologyManager, "_keep", keep)
    monkeypatch.setattr(HybridTopologyManager, "_drop", lambda self, room, key: room.postings.pop(key))
    assert "I1" in caught()


def test_a_state_that_counts_an_abandoned_attempt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebase(original: Any, self: VersionedState, start: StartRound) -> Any:
        pending = self._pending
        if pending and pending[1] != start.attempt:
            self._pending = (start.round - 1, pending[1], pending[2])
        return original(self, start)

    wrap(monkeypatch, VersionedState, "rebase", rebase)
    assert "I1" in caught()


def test_a_round_that_is_committed_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(original: Any, self: RunRecord, effects: Any, now: Any, commit: Any, *rest: Any) -> None:
        original(self, effects, now, commit, *rest)
        original(self, effects, now, replace(commit, round=commit.round + 1), *rest)

    wrap(monkeypatch, RunRecord, "committed", twice)
    assert "I7" in caught()


def test_a_cluster_that_is_given_to_two_agents_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def anyone(original: Any, self: Membership, request: Register, peer: str, now_s: float) -> Any:
        self._members.pop(request.cluster, None)
        return original(self, request, peer, now_s)

    wrap(monkeypatch, Membership, "register", anyone)
    assert "I4" in caught()


def test_reports_of_an_agent_that_lost_its_cluster_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "owns", lambda self, cluster, incarnation: cluster in self._members)
    assert "I4" in caught()


def test_runs_that_do_without_lost_clusters_count_whom_they_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []
    wrap(monkeypatch, Quorum, "decide", lambda decide, self, *row: (decided.append(row[0]), decide(self, *row)))
    for seed in range(40):
        simulate(seed, kinds=("agent drains", "line is cut"), quorum=True)
    assert len(decided) > 3


# ---------------------------------------------------------------- clusters that others use too


def crowded(kind: str, seeds: int = 16) -> list[str]:
    """How runs end whose clusters are taken by other programs now and then."""
    return [
        status
        for seed in range(seeds)
        for status in simulate(seed, kinds=(kind,), gap_s=40.0, crowded=True).statuses.values()
    ]


@pytest.mark.parametrize("kind", ["cluster dies", "agent dies", "mediator is killed", "stream breaks", "line is cut"])
def test_runs_that_find_their_slots_taken_end_as_without_that(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []
    wrap(monkeypatch, RunMachine, "requeue", lambda requeue, self, *rest: (refused.append(1), requeue(self, *rest)))
    assert crowded(kind).count(COMPLETED) >= 12
    assert len(refused) > 3


def test_a_run_that_keeps_what_it_has_reserved_while_it_waits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold_on(requeue: Any, self: RunMachine, effects: Any, *rest: Any) -> None:
        sent = len(effects.sends)
        requeue(self, effects, *rest)
        del effects.sends[sent:]

    wrap(monkeypatch, RunMachine, "requeue", hold_on)
    with pytest.raises(SimulationFailed):
        crowded("stream breaks")


# ---------------------------------------------------------------- graphs that change


@pytest.mark.parametrize("kind", FAULTS)
def test_graphs_are_those_of_a_run_without_faults_whatever_strikes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linked: list[int] = []
    wrap(monkeypatch, Graphs, "linked", lambda original, self: (linked.append(1), original(self)))
    for seed in range(2):
        simulate(seed, kinds=(kind,), adapting=True)
    assert len(linked) > 10


def adapting(*kinds: str) -> str:
    """The first violation that long runs whose graph changes find."""
    for seed in range(MUST_CATCH_WITHIN):
        try:
            simulate(seed, kinds=kinds, adapting=True)
        except SimulationFailed as failure:
            return str(failure).splitlines()[0]
    pytest.fail(f"no seed below {MUST_CATCH_WITHIN} has noticed")


def test_a_mediator_that_goes_back_to_the_graph_of_another_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphs, "after", lambda self, number: self._after[max(self._after)])
    assert "X002" in adapting("cluster dies")


def test_a_mediator_that_keeps_its_generation_over_graphs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, Graphs, "ask", lambda original, self, number: original(self, number) and False)
    assert "P011" in adapting()


def test_a_mediator_that_opens_a_round_on_the_graph_before_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphs, "is_due", lambda self, number: False)
    assert "I1" in adapting()


# ---------------------------------------------------------------- late updates that count by their age


def late_histories(*kinds: str, seeds: int = MUST_CATCH_WITHIN) -> None:
    """Long stars, half of which let late updates count, with faults far enough apart to strike while one is owed."""
    for seed in range(seeds):
        simulate(seed, kinds=kinds, quorum=True, gap_s=80.0)


def test_late_updates_are_those_that_were_recorded_whatever_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    ages: list[int] = []
    generations: list[int] = []

    def opened(open_round: Any, self: RoundLedger, *args: Any, **keywords: Any) -> StartRound:
        start: StartRound = open_round(self, *args, **keywords)
        ages.extend(start.round - late.round for late in start.late)
        generations.extend(start.generation for _ in start.late)
        return start

    wrap(monkeypatch, RoundLedger, "open_round", opened)
    late_histories("host dies", "mediator is killed", seeds=30)
    assert len(ages) > 10 and max(generations) > 1


def test_a_mediator_that_forgets_who_was_late_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, RunMachine, "load_participants", lambda load, self, *row: load(self, *row[:2], ""))
    with pytest.raises(SimulationFailed, match=r"I1:"):
        late_histories("mediator is killed")


def test_a_late_cluster_that_trains_from_todays_model_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icrf.testing.sim_hosts.row_for", lambda start, recipients: 0)
    with pytest.raises(SimulationFailed, match=r"I1:"):
        late_histories("host dies")


def test_an_aggregator_that_forgets_what_late_clusters_need_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, EarlierModels, "__init__", lambda init, self, *models: init(self))
    with pytest.raises(SimulationFailed, match="X001"):
        late_histories("mediator is killed", "cluster dies")


# ---------------------------------------------------------------- rounds that are begun ahead


def test_rounds_are_begun_ahead_and_dropped_where_something_comes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed: list[int] = []
    dropped: list[int] = []

    def drop(original: Any, self: AgentCore, run: Any) -> Any:
        dropped.extend([1] if run.ahead else [])
        return original(self, run)

    wrap(monkeypatch, AgentCore, "_confirm", lambda original, *args: (confirmed.append(1), original(*args))[1])
    wrap(monkeypatch, AgentCore, "_drop_ahead", drop)
    for seed in range(60):
        simulate(seed, kinds=("mediator is killed",), quorum=True)
    assert len(confirmed) > 100 and len(dropped) > 3
