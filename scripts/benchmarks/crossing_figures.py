"""What is made of measurements between clusters: rates, ratios to anchors of the same run, budgets, tables. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.crossings import CARRIERS, REFERENCE, Crossing
from benchmarks.document import table
from benchmarks.figures import Measured, Row, make_row, short, spread

ANCHORS = ("rayfed", "flower")
"""Systems besides the reference that budgets refer to."""
WIRE_BUDGET = 1.02
RELAY_BUDGET_MIB = 64
OVER_TRAINING_BUDGET_S = 0.1
ROUND_BUDGETS = {"flower": 50.0}


def budgets_of(crossing: Crossing, system: str) -> Mapping[str, float]:
    """How many times as fast as the anchors of the same run a system must be, at least."""
    if crossing.single or not crossing.all_ways:
        return {}
    if system == "icrf":
        return {REFERENCE: 0.8, "rayfed": 7.0} if crossing.megabytes else {REFERENCE: 0.5, "rayfed": 10.0}
    return {REFERENCE: 0.5} if system == "icrf-relay" and crossing.megabytes else {}


# ---------------------------------------------------------------- crossings


def rows_of(
    crossing: Crossing,
    runs: Mapping[str, Sequence[Measured]],
    *,
    tls: bool = False,
    singles: Mapping[str, Sequence[Measured]] | None = None,
) -> list[Row]:
    """A row for each system: delivered per second, and how often that of the anchors.

    Args:
        runs: the turns of each system, that of the reference among them.
        singles: those of the case with one payload, where the crossing is a fan-out.
    """
    return [_row(crossing, system, runs, tls, (singles or {}).get(system, ())) for system in runs]


def _row(
    crossing: Crossing, system: str, runs: Mapping[str, Sequence[Measured]], tls: bool, singles: Sequence[Measured]
) -> Row:
    about: dict[str, Any] = {"tls": tls, "megabytes": crossing.megabytes}
    for kind in ("unavailable", "failed"):
        if found := [run[kind] for run in runs[system] if kind in run]:
            return Row(crossing.name, system, about, found[0], kind == "failed")
    if _problem(runs[REFERENCE]):
        return Row(crossing.name, system, about, "the reference failed", True)
    rates = {name: _rates(turns) for name, turns in runs.items() if not _problem(turns)}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    values: dict[str, Any] = {**spread(rates[system]), "unit": crossing.unit, **about, "repeats": len(rates[system])}
    values["ratio_to_reference"] = short(medians[system] / medians[REFERENCE])
    values["against"] = {
        name: short(medians[system] / medians[name]) for name in (REFERENCE, *ANCHORS) if name in medians
    }
    if singles and not _problem(singles):
        values["single_ratio"] = short(_seconds(runs[system]) / _seconds(singles))
    if sent := [run["socket_bytes"] for run in runs[system] if "socket_bytes" in run]:
        # The plan has one payload for every cluster, however many nodes want it there.
        values["wire_ratio"] = short(statistics.median(sent) / (crossing.payload_bytes * crossing.clusters))
    if grown := [run["relay_growth_bytes"] for run in runs[system] if "relay_growth_bytes" in run]:
        values["relay_growth_mib"] = short(max(grown) / 2**20)
    values["budgets"] = dict(budgets_of(crossing, system))
    kept = [values[name] <= most for name, most in _MOST.items() if name in values]
    values.update(_verdict(values, kept, runs))
    values["versions"] = dict(runs[system][0]["versions"])
    return Row(crossing.name, system, values)


_MOST = {"wire_ratio": WIRE_BUDGET, "relay_growth_mib": RELAY_BUDGET_MIB}


def _problem(turns: Sequence[Measured]) -> bool:
    return any("failed" in run or "unavailable" in run for run in turns)


def _rates(turns: Sequence[Measured]) -> list[float]:
    return [run["delivered"] / seconds for run in turns for seconds in run["seconds"]]


def _seconds(turns: Sequence[Measured]) -> float:
    found: list[float] = [seconds for run in turns for seconds in run["seconds"]]
    return statistics.median(found)


# ---------------------------------------------------------------- rounds


def round_rows(case: str, runs: Mapping[str, Sequence[Measured]], reference: str) -> list[Row]:
    """A row for each system that did the same rounds: what a round takes more than the training alone, in pairs as
    they were run, and how often it is as fast as the peers.

    Args:
        reference: the system that only trains, in one process.
    """
    alone = runs[reference]
    rows = {name: make_row(case, name, turns, alone[: len(turns)]) for name, turns in runs.items()}
    medians = {name: row.values["median"] for name, row in rows.items() if not row.problem}
    return [
        row if row.problem else replace(row, values={**row.values, **_beside(name, runs, alone, medians)})
        for name, row in rows.items()
    ]


def _beside(
    name: str, runs: Mapping[str, Sequence[Measured]], alone: Sequence[Measured], medians: Mapping[str, float]
) -> dict[str, Any]:
    more = [
        statistics.median(run["round_s"]) - statistics.median(training["round_s"])
        for run, training in zip(runs[name], alone[: len(runs[name])], strict=True)
    ]
    values: dict[str, Any] = {"over_training_s": short(statistics.median(more))}
    values["against"] = {peer: short(medians[peer] / medians[name]) for peer in ANCHORS if peer in medians}
    values["budgets"] = dict(ROUND_BUDGETS) if name == "icrf" else {}
    if name == "icrf":
        values.update(_verdict(values, [values["over_training_s"] <= OVER_TRAINING_BUDGET_S], runs))
    return values


def _verdict(values: Mapping[str, Any], kept: Sequence[bool], asked: Collection[str]) -> dict[str, bool]:
    """Whether all budgets are kept; nothing where that is not known, because a peer failed.

    Args:
        kept: of the budgets that need no peer.
        asked: the systems that were to be measured.
    """
    against, budgets = values["against"], values["budgets"]
    found = [*kept, *(against[name] >= least for name, least in budgets.items() if name in against)]
    failed = [name for name in budgets if name in asked and name not in against]
    if not found or (all(found) and failed):
        return {}
    return {"within_budget": all(found)}


# ---------------------------------------------------------------- for people

_HEADER = (
    "case",
    "system",
    "TLS",
    "per second (least, largest)",
    "x copying stream (at least)",
    "x RayFed (at least)",
    "x time of one payload",
    f"bytes at sockets by the plan's (at most {WIRE_BUDGET})",
    f"relay's memory over idle, MiB (at most {RELAY_BUDGET_MIB})",
    "in budget",
)
_ROUND_HEADER = (
    "case",
    "system",
    "s per round (least, largest)",
    f"s over the training alone (at most {OVER_TRAINING_BUDGET_S})",
    "x as fast as Flower's deployment (at least)",
    "first round after s",
    "accuracy",
    "in budget",
)


def crossing_table(rows: Sequence[Row]) -> str:
    """What crosses, a line for each case, system and choice of TLS; what could not be measured says why."""
    return table(_HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    v = row.values
    begin = (row.case, CARRIERS[row.system].title, "on" if v["tls"] else "off")
    if row.problem:
        return (*begin, _said(row), *[""] * (len(_HEADER) - 4))
    return (
        *begin,
        f"{v['median']:.4g} ({v['min']:.4g}, {v['max']:.4g}) {v['unit'].removesuffix('/s')}",
        _against(v, REFERENCE),
        _against(v, "rayfed"),
        f"{v['single_ratio']:.2f}" if "single_ratio" in v else "",
        f"{v['wire_ratio']:.4f}" if "wire_ratio" in v else "",
        f"{v['relay_growth_mib']:.0f}" if "relay_growth_mib" in v else "",
        _kept(v),
    )


def round_table(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """Rounds, a line for each case and system."""
    return table(_ROUND_HEADER, [_round_cells(row, titles[row.system]) for row in rows])


def _round_cells(row: Row, title: str) -> tuple[str, ...]:
    if row.problem:
        return (row.case, title, _said(row), *[""] * (len(_ROUND_HEADER) - 3))
    v = row.values
    return (
        row.case,
        title,
        f"{v['median']:.3g} ({v['min']:.3g}, {v['max']:.3g})",
        f"{v['over_training_s']:.3g}",
        _against(v, "flower"),
        f"{v['first_round_s']['median']:.1f}",
        "" if v["accuracy"] is None else f"{v['accuracy']:.4f}",
        _kept(v),
    )


def _said(row: Row) -> str:
    return f"{'refused' if row.refused else 'not available'}: {row.problem}"


def _against(values: Mapping[str, Any], anchor: str) -> str:
    if anchor not in values["against"]:
        return ""
    least = values["budgets"].get(anchor)
    return f"{values['against'][anchor]:.3g}" + (f" ({least:g})" if least else "")


def _kept(values: Mapping[str, Any]) -> str:
    return {True: "yes", False: "**no**", None: ""}[values.get("within_budget")]
