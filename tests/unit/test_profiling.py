"""Where the time of rounds went: what is written and shown of it, and that it adds up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from icrf.profiling import ALL_PARTS, MAX_HOSTS, ROUND_PARTS, profile_line, profile_table, round_seconds, total_seconds
from icrf.protocol import (
    ACTIVATING,
    IDLE,
    QUEUED,
    READY,
    RESERVED,
    RESERVING,
    ClusterProfile,
    PhaseSpan,
    RoundProfile,
    RoundResult,
    RunEvent,
)
from icrf.testing.scripted import scripted_round
from icrf_mediator.preparing import Preparing
from icrf_mediator.run_restore import run_event

BUSY = {"train": 2.0, "evaluate": 0.25, "sum": 0.5, "exchange": 1.0, "other": 0.125}


def measured(number: int, working_s: float, hosts: dict[str, dict[str, dict[str, float]]]) -> RoundResult:
    """A round of so many seconds before its commit of 0.5 s, and what hosts did in it, by cluster."""
    span = PhaseSpan("train", 0.25, 2.5)
    clusters = {name: ClusterProfile(found, (span,)) for name, found in hosts.items()}
    plan_s, activate_s = (0.25, 3.0) if number == 1 else (0.0, 0.0)
    profile = RoundProfile(working_s, plan_s, activate_s, clusters, mediator_s=0.125)
    return replace(scripted_round(number, ("eu", "us")), commit_s=0.5, profile=profile)


ROUNDS = [
    measured(1, 8.0, {"us": {"host-0": BUSY}, "eu": {"host-10": BUSY, "host-2": {**BUSY, "train": 4.0}}}),
    measured(2, 6.0, {"eu": {"host-2": BUSY, "host-10": BUSY}}),
    measured(3, 7.0, {"us": {"host-0": BUSY}, "eu": {"host-2": BUSY, "host-10": BUSY}}),
]


def test_the_parts_of_every_host_add_up_to_the_round() -> None:
    for result, whole in zip(ROUNDS, (8.5, 6.5, 7.5), strict=True):
        for seconds in round_seconds(result).values():
            assert tuple(seconds) and set(seconds) == set(ROUND_PARTS)
            assert sum(seconds.values()) == pytest.approx(whole)
    assert round_seconds(ROUNDS[0])["eu", "host-2"]["idle"] == pytest.approx(8.0 - 5.875)


def test_a_line_of_the_file_adds_up_and_has_the_phases() -> None:
    third = RoundProfile(2 / 3, clusters={"eu": ClusterProfile({"host-0": dict.fromkeys(BUSY, 1 / 9)}, ())})
    for result in (*ROUNDS, replace(ROUNDS[0], commit_s=1 / 7, profile=third)):
        assert result.profile is not None
        line = json.loads(json.dumps(profile_line(result, result.profile)))
        assert (line["round"], line["attempt"]) == (result.number, 1)
        for host in line["hosts"]:
            assert sum(host[part] for part in ROUND_PARTS) == pytest.approx(line["whole_s"], abs=1e-9)
    line = profile_line(ROUNDS[0], ROUNDS[0].profile or third)
    assert (line["whole_s"], line["plan_s"], line["activate_s"], line["mediator_s"]) == (8.5, 0.25, 3.0, 0.125)
    assert line["phases"] == {"eu": [["train", 0.25, 2.5]], "us": [["train", 0.25, 2.5]]}


def test_all_hosts_have_the_same_total_and_one_without_work_was_idle() -> None:
    totals = total_seconds([*ROUNDS, scripted_round(4, ("eu", "us"))])
    assert list(totals) == [("eu", "host-2"), ("eu", "host-10"), ("us", "host-0")]
    assert {round(sum(parts.values()), 9) for parts in totals.values()} == {8.5 + 6.5 + 7.5 + 3.25}
    assert totals["us", "host-0"]["train"] == 4.0
    assert totals["us", "host-0"]["idle"] == pytest.approx((8.0 - 3.875) + 6.0 + (7.0 - 3.875))
    assert totals["us", "host-0"]["activate"] == 3.0


def test_the_table_ends_with_shares_and_the_median_round() -> None:
    table = profile_table(ROUNDS)
    assert table is not None and table.left_out == 0
    assert table.columns == ("seconds", *ALL_PARTS, "total")
    *hosts, shares, median = table.rows
    assert [row[0] for row in hosts] == ["eu/host-2", "eu/host-10", "us/host-0"]
    assert {row[-1] for row in hosts} == {"25.750"}
    assert (shares[0], shares[-1]) == ("all, %", "100.0")
    assert sum(map(float, shares[1:-1])) == pytest.approx(100.0, abs=0.5)
    assert (median[0], median[-1]) == ("median round (3)", "7.500")
    assert median[1:3] == ("", "")


def test_a_large_fabric_keeps_the_table_short() -> None:
    hosts = {f"host-{k}": BUSY for k in range(MAX_HOSTS + 5)}
    table = profile_table([measured(1, 8.0, {"eu": hosts})])
    assert table is not None
    assert (len(table.rows), table.left_out) == (MAX_HOSTS + 2, 5)


def test_without_measurements_there_is_nothing() -> None:
    plain = scripted_round(1, ("eu",))
    assert round_seconds(plain) == {} and profile_table([plain]) is None and profile_table([]) is None


def test_a_profile_comes_out_of_the_journal_as_it_went_in() -> None:
    for result in (ROUNDS[0], scripted_round(1, ("eu",))):
        event = RunEvent("run", 1, 0.0, "round", round=result)
        assert run_event(json.loads(json.dumps(asdict(event)))) == event


def test_reserving_and_setting_up_count_once_and_waiting_for_a_user_does_not() -> None:
    preparing = Preparing()
    preparing.planned(0.5)
    for status, now_s in ((QUEUED, 0.0), (RESERVING, 10.0), (RESERVED, 12.0), (ACTIVATING, 100.0), (READY, 105.0)):
        preparing.entered(status, now_s)
    assert preparing.take() == (0.5, 7.0)
    preparing.entered(IDLE, 500.0)
    assert preparing.take() == (0.0, 0.0)
