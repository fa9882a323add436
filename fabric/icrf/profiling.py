"""Where the time of rounds went, per host: what ``fabric run --profile`` shows and writes.

A host's seconds of a round are its busy parts, the commit, for which all hosts wait, and what is left of the round:
``idle``. So they add up to the round. Planning and activation come before a round, and all hosts wait for them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icrf.protocol import (
    EVALUATING,
    EXCHANGING,
    HOST_PARTS,
    OTHER,
    SUMMING,
    TRAINING,
    RoundProfile,
    RoundResult,
)

PLAN, ACTIVATE, COMMIT, IDLE = "plan", "activate", "commit", "idle"
# Of a round, and with what comes before it; as columns of a table.
ROUND_PARTS = (TRAINING, EVALUATING, SUMMING, EXCHANGING, COMMIT, OTHER, IDLE)
ALL_PARTS = (PLAN, ACTIVATE, *ROUND_PARTS)
# More rows than anybody reads; profile.jsonl has all.
MAX_HOSTS = 48
_DIGITS = 6

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class ProfileTable:
    """A table of texts.

    Attributes:
        columns: the first one names a row.
        rows: a row per host, then one with all hosts' shares in per cent, then the median round.
        left_out: hosts for which there was no room.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0


def round_seconds(result: RoundResult) -> dict[tuple[str, str], dict[str, float]]:
    """(cluster, host) -> part of :data:`ROUND_PARTS` -> seconds in a round; empty where nothing was measured.

    The parts of each host add up to :func:`whole_s`.
    """
    if result.profile is None:
        return {}
    found = {}
    for cluster, profile in sorted(result.profile.clusters.items()):
        for host, busy in profile.hosts.items():
            parts = {part: busy.get(part, 0.0) for part in HOST_PARTS} | {COMMIT: result.commit_s}
            found[cluster, host] = {**parts, IDLE: whole_s(result, result.profile) - sum(parts.values())}
    return found


def whole_s(result: RoundResult, profile: RoundProfile) -> float:
    """Seconds of a round, from when the clusters were asked for it until it was durable."""
    return profile.working_s + result.commit_s


def profile_line(result: RoundResult, profile: RoundProfile) -> dict[str, Any]:
    """A line of ``profile.jsonl``; seconds, to the microsecond.

    Under ``hosts`` a row per host with the parts of :data:`ROUND_PARTS`, which add up to ``whole_s``; under ``phases``
    each cluster's phases as name, beginning and end since the cluster was asked, negative if begun ahead. What the
    mediator took is in a host's ``commit`` and ``idle`` already.
    """
    whole = round(whole_s(result, profile), _DIGITS)
    hosts = []
    for (cluster, host), seconds in round_seconds(result).items():
        parts = {part: round(seconds[part], _DIGITS) for part in ROUND_PARTS if part != IDLE}
        idle = round(whole - sum(parts.values()), _DIGITS)
        hosts.append({"cluster": cluster, "host": host, **parts, IDLE: idle})
    return {
        "round": result.number,
        "attempt": result.attempt,
        "whole_s": whole,
        "plan_s": round(profile.plan_s, _DIGITS),
        "activate_s": round(profile.activate_s, _DIGITS),
        "mediator_s": round(profile.mediator_s, _DIGITS),
        "hosts": hosts,
        "phases": {
            cluster: [[span.name, round(span.began_s, _DIGITS), round(span.ended_s, _DIGITS)] for span in found.phases]
            for cluster, found in sorted(profile.clusters.items())
        },
    }


def total_seconds(rounds: Sequence[RoundResult]) -> dict[tuple[str, str], dict[str, float]]:
    """(cluster, host) -> part of :data:`ALL_PARTS` -> seconds in all rounds that were measured.

    A host that had nothing to do in a round was idle in it: the parts of all hosts add up to the same.
    """
    hosts = sorted({host for result in rounds for host in round_seconds(result)}, key=_in_order)
    totals = {host: dict.fromkeys(ALL_PARTS, 0.0) for host in hosts}
    for result in rounds:
        if result.profile is None:
            continue
        found = round_seconds(result)
        unasked = {COMMIT: result.commit_s, IDLE: result.profile.working_s}
        for host, parts in totals.items():
            before = {PLAN: result.profile.plan_s, ACTIVATE: result.profile.activate_s}
            for part, seconds in {**before, **found.get(host, unasked)}.items():
                parts[part] += seconds
    return totals


def profile_table(rounds: Sequence[RoundResult]) -> ProfileTable | None:
    """What people see of all rounds; None where none was measured."""
    totals = total_seconds(rounds)
    if not totals:
        return None
    rows = [_row("/".join(host), parts) for host, parts in totals.items()]
    everything = sum(sum(parts.values()) for parts in totals.values()) or 1.0
    shares = {part: 100.0 * sum(parts[part] for parts in totals.values()) / everything for part in ALL_PARTS}
    whole = sum(shares.values())
    share_row = ("all, %", *(f"{shares[part]:.1f}" for part in ALL_PARTS), f"{whole:.1f}")
    left_out = max(0, len(rows) - MAX_HOSTS)
    median = _row(*_median_round(rounds))
    return ProfileTable(("seconds", *ALL_PARTS, "total"), (*rows[:MAX_HOSTS], share_row, median), left_out)


def _median_round(rounds: Sequence[RoundResult]) -> tuple[str, dict[str, float]]:
    """The round that took the median time (of two the shorter), and what its hosts did on average in it."""
    measured = [(whole_s(result, result.profile), result.number, result) for result in rounds if result.profile]
    _, number, result = sorted(measured, key=lambda found: found[:2])[(len(measured) - 1) // 2]
    found = round_seconds(result)
    mean = {part: sum(parts[part] for parts in found.values()) / len(found) for part in ROUND_PARTS} if found else {}
    return f"median round ({number})", mean


def _row(name: str, parts: Seconds) -> tuple[str, ...]:
    cells = [f"{max(0.0, parts[part]):.3f}" if part in parts else "" for part in ALL_PARTS]
    return (name, *cells, f"{sum(parts.values()):.3f}")


def _in_order(host: tuple[str, str]) -> tuple[str, int, str]:
    """By cluster, then by host, ``host-2`` before ``host-10``."""
    return host[0], len(host[1]), host[1]
