"""Rounds as transactions: commits in order, each on its parent, whatever the clusters report and in which order."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.protocol import CENTRALIZED, DECENTRALIZED, AbortAttempt, MetricSum, RoundReport, StartRound
from icrf.update import exact_metric, merkle_root
from icrf_mediator.rounds import MAX_ESCALATION, Commit, RoundLedger

NAMES = ("eu", "us")


def leaf(node: int, number: int) -> bytes:
    return bytes([node, number]) + bytes(30)


# ---------------------------------------------------------------- in the life of a run


@pytest.mark.parametrize("flow", [CENTRALIZED, DECENTRALIZED])
def test_rounds_commit_once_each_on_top_of_their_parent(core: Any, flow: str) -> None:
    core.register(*NAMES)
    run = core.submit(num_nodes=5, flow=flow, federated_learning_rounds=4)
    core.play()
    rows = [write.row for write in core.commits(run)]
    assert [row["number"] for row in rows] == [1, 2, 3, 4]
    assert [row["parent_sha256"] for row in rows[1:]] == [row["model_sha256"] for row in rows[:-1]]
    assert len({row["model_sha256"] for row in rows}) == 4
    assert all(row["participants"] == (4 if flow == CENTRALIZED else 5) for row in rows)
    shown = [e.round for e in core.events(run) if e.round]
    assert [r.number for r in shown] == [1, 2, 3, 4]
    assert shown[0].bytes_by_cluster == {"eu": 100, "us": 100} and shown[0].metrics["train_loss"] == 1.0
    starts = [i for c, i in core.sent if isinstance(i, StartRound) and c == "eu"]
    assert [s.parent_hash for s in starts] == [row["parent_sha256"] for row in rows]
    samples = sum(10 + n for n in range(1 if flow == CENTRALIZED else 0, 5))
    assert {s.total_weight for s in starts} == {samples}
    keys = {write.key[1:] for write in core.store.rows("attempts", (run.run_id,))}
    assert keys == {(r, 1, name) for r in range(1, 5) for name in NAMES}


def test_no_round_opens_before_every_cluster_has_reported(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    core.play(hold=(StartRound,))
    (cluster, start), (late, _) = core.take(StartRound)
    report = core.round_report(cluster, start)
    for _ in range(3):
        core.report(cluster, report)
    assert core.get(run).rounds_done == 0 and core.queue == []
    assert core.get(run).waiting_for == f"round 1 on {late}"
    core.report(late, core.round_report(late, start))
    core.report(late, core.round_report(late, start))
    assert core.get(run).rounds_done == 1 and len(core.commits(run)) == 1


@pytest.mark.parametrize(
    ("every", "rounds", "evaluated"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 4, [4]), (0, 2, [2])]
)
def test_every_nth_and_the_last_round_are_evaluated(core: Any, every: int, rounds: int, evaluated: list[int]) -> None:
    core.register("eu")
    core.submit(evaluate_every=every, federated_learning_rounds=rounds)
    core.play()
    assert [i.round for _, i in core.sent if isinstance(i, StartRound) and i.evaluate] == evaluated


def test_reaching_the_target_ends_the_run_early(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit(target_accuracy=0.8, federated_learning_rounds=9)
    core.play(hold=(StartRound,))
    for accuracy in (0.5, 0.8):
        core.accuracy = accuracy
        core.play_round()
    core.play()
    info = core.get(run)
    assert (info.status, info.rounds_done, info.rounds_to_target) == ("COMPLETED", 2, 2)


def test_more_rounds_than_to_the_target_are_there_for_the_asking(core: Any) -> None:
    core.register("eu")
    run = core.submit(target_accuracy=0.5, federated_learning_rounds=9, keep=True)
    core.play()
    assert (core.get(run).status, core.get(run).rounds_done) == ("IDLE", 1)
    core.advance(run, "run")
    core.play()
    assert core.get(run).rounds_done == 1
    core.advance(run, "run", 4)
    core.play()
    assert (core.get(run).rounds_done, core.get(run).rounds_to_target) == (4, 1)


def test_a_target_that_is_not_reached_changes_nothing(core: Any) -> None:
    core.register("eu")
    run = core.submit(target_accuracy=0.9)
    core.play()
    assert (core.get(run).rounds_done, core.get(run).rounds_to_target) == (3, 0)


def test_an_overflow_repeats_the_round_with_a_coarser_grid_for_those_tensors_only(core: Any) -> None:
    core.register(*NAMES)
    run = core.submit()
    core.play(hold=(StartRound,))
    (cluster, first), (other, _) = core.take(StartRound)
    core.report(cluster, core.round_report(cluster, first, overflow=(1,)))
    aborts = core.take(AbortAttempt)
    assert aborts == [(name, AbortAttempt(run.run_id, 1, 1)) for name in NAMES]
    (_, second), (_, same) = core.take(StartRound)
    assert second == same
    assert (second.round, second.attempt, second.parent_hash) == (1, 2, first.parent_hash)
    assert second.grid == (first.grid[0], first.grid[1] + 8)
    core.report(other, core.round_report(other, first))  # late, and void
    core.report(other, core.round_report(other, first, overflow=(0,)))
    assert core.take(StartRound) == []
    for name in NAMES:
        core.report(name, core.round_report(name, second))
    (commit,) = core.commits(run)
    assert (commit.row["number"], commit.row["attempt"]) == (1, 2)
    (_, third), _ = core.take(StartRound)
    assert (third.round, third.attempt, third.grid) == (2, 1, first.grid)
    assert [e.text for e in core.events(run) if e.kind == "warning"] == [
        "round 1: values of w left the exact grid; attempt 2 uses a coarser one"
    ]


def test_values_that_never_stop_growing_fail_the_run(core: Any) -> None:
    core.register("eu")
    run = core.submit()
    core.play(hold=(StartRound,))
    for _ in range(MAX_ESCALATION + 1):
        ((cluster, start),) = core.take(StartRound)
        core.report(cluster, core.round_report(cluster, start, overflow=(0,)))
    assert core.error(run).code == "W021" and "values of b keep growing" in str(core.error(run))


# ---------------------------------------------------------------- the ledger alone


def committed(groups: list[list[int]], order: list[int], flow: str) -> list[Commit]:
    """Three rounds over clusters that hold these nodes, reported in this order."""
    names = tuple(f"c{k}" for k in range(len(groups)))
    members = {name: tuple(sorted(nodes)) for name, nodes in zip(names, groups, strict=True)}
    coordinator = next(name for name in names if 0 in members[name])
    ledger = RoundLedger(flow, names, members, coordinator)
    ledger.begin([(1.0, 2.0)] * len(names), "first", 100)
    commits: list[Commit | None] = []
    for number in (1, 2, 3):
        draft = StartRound("run", 1, number, 1, "", (), 100, evaluate=True)
        start = ledger.open_round(draft, 0.0)
        for k in order:
            report = report_of(start, members[names[k]], names[k] == coordinator)
            assert ledger.accepts(report)
            commits.append(ledger.collect(names[k], report))
        assert ledger.round == number and not ledger.accepts(report)
    return [commit for commit in commits if commit]


def report_of(start: StartRound, nodes: tuple[int, ...], coordinates: bool) -> RoundReport:
    bits = sum(1 << node for node in nodes)
    losses = [exact_metric(0.1 * node + start.round, 10 + node) for node in nodes]
    return RoundReport(
        "run",
        1,
        start.round,
        start.attempt,
        participants=bits.to_bytes(2, "little"),
        absmax=(0.5 * max(nodes), 3.0),
        metric_sums={"train_loss": MetricSum(str(sum(losses)), sum(10 + n for n in nodes))},
        metrics={"accuracy": 0.25} if coordinates else {},
        model_hash=f"model-{start.round}" if coordinates else "",
        state_hashes=b"".join(leaf(node, start.round) for node in nodes),
    )


@settings(max_examples=60)
@given(st.integers(1, 10), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_grouping_and_order_of_reports_gives_equal_commits(
    num_nodes: int, num_clusters: int, dice: random.Random
) -> None:
    groups: list[list[int]] = [[] for _ in range(num_clusters)]
    for node in range(num_nodes):
        dice.choice(groups).append(node)
    groups = [nodes for nodes in groups if nodes]
    order = list(range(len(groups)))
    dice.shuffle(order)
    alone = committed([list(range(num_nodes))], [0], DECENTRALIZED)
    apart = committed(groups, order, DECENTRALIZED)
    assert [c.round for c in apart] == [1, 2, 3]
    for one, many in zip(alone, apart, strict=True):
        assert (one.model_hash, one.parent_hash) == (many.model_hash, many.parent_hash)
        assert (one.metrics, one.absmax, one.participants) == (many.metrics, many.absmax, many.participants)
        assert one.num_participants == many.num_participants == num_nodes
        assert one.consensus_hash == many.consensus_hash == f"model-{one.round}"
    assert alone[0].model_hash == merkle_root([leaf(node, 1) for node in range(num_nodes)])


def test_a_centralized_commit_is_what_the_coordinator_made() -> None:
    commit = committed([[0, 2], [1]], [1, 0], CENTRALIZED)[0]
    assert (commit.model_hash, commit.parent_hash, commit.absmax) == ("model-1", "first", (1.0, 3.0))
    assert commit.metrics["accuracy"] == 0.25 and commit.num_participants == 3
