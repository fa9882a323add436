"""What is made of the measurements: medians, ratios of pairs, refusals, JSON lines and a Markdown table. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.document import table

# Between two right systems a digit or two on the edge of two classes may differ, and the last bits of the weights.
ACCURACY_TOLERANCE = 0.0025
NORM_TOLERANCE = 1e-4
LEAST_REPEATS = 3

Measured = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One (case, system).

    Attributes:
        values: of the JSON line.
        problem: why there are no figures; empty if there are.
        refused: whether that is a failure, and not merely something the system does not have.
    """

    case: str
    system: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    refused: bool = False

    def line(self) -> str:
        """The row as a line of JSON."""
        said = {("refused" if self.refused else "unavailable"): self.problem} if self.problem else {}
        return json.dumps({"case": self.case, "system": self.system, **self.values, **said})


def short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": short(statistics.median(values)), "min": short(min(values)), "max": short(max(values))}


def difference(found: Measured, reference: Measured) -> str:
    """In what a run's outcome is not that of the reference on the same work; empty if it is."""
    mine, wanted = found["accuracy"], reference["accuracy"]
    if (mine is None) != (wanted is None) or (mine is not None and not abs(mine - wanted) <= ACCURACY_TOLERANCE):
        return f"accuracy {mine}, the reference has {wanted}: other work was done"
    if not abs(found["norm"] - reference["norm"]) <= NORM_TOLERANCE * reference["norm"]:
        return f"weights of norm {found['norm']:.6g}, the reference has {reference['norm']:.6g}: other work was done"
    return ""


def make_row(case: str, system: str, runs: Sequence[Measured], references: Sequence[Measured]) -> Row:
    """The row of a system out of its runs and those of the reference, in pairs as they were run.

    A run that failed has ``failed`` (why), one of a case that the system does not have ``unavailable``. The ratio is
    the median of those of the pairs: on a machine that others use too, neighbours in time are what can be compared.
    """
    for run in runs:
        for kind in ("unavailable", "failed"):
            if kind in run:
                return Row(case, system, problem=run[kind], refused=kind == "failed")
    if any("failed" in reference for reference in references):
        return Row(case, system, problem="the reference failed", refused=True)
    for run, reference in zip(runs, references, strict=True):
        if problem := difference(run, reference):
            return Row(case, system, problem=problem, refused=True)
    seconds = [statistics.median(run["round_s"]) for run in runs]
    ratios = [s / statistics.median(r["round_s"]) for s, r in zip(seconds, references, strict=True)]
    values: dict[str, Any] = {**spread(seconds), "unit": "s/round", "ratio_to_reference": spread(ratios)["median"]}
    values["ratio_spread"] = [short(min(ratios)), short(max(ratios))]
    # The round that the rest of the machine disturbed least.
    least, least_there = (min(s for run in some for s in run["round_s"]) for some in (runs, references))
    values["best_round"], values["best_ratio"] = short(least), short(least / least_there)
    if runs[0]["processor_s"] is not None:
        values["processor_s"] = short(statistics.median(run["processor_s"] for run in runs))
    values["repeats"], values["rounds"] = len(runs), len(runs[0]["round_s"])
    values["first_round_s"] = spread([run["first_round_s"] for run in runs])
    for name in ("private_mb", "resident_mb"):
        values[name] = short(statistics.median(run[name] for run in runs))
    values["accuracy"] = runs[0]["accuracy"]
    if splits := [run["split"] for run in runs if run["split"]]:
        values["split"] = {part: short(statistics.median(s[part] for s in splits)) for part in splits[0]}
    values["versions"] = dict(runs[0]["versions"])
    return Row(case, system, values)


# ---------------------------------------------------------------- for people


def _seconds(value: float) -> str:
    return f"{value:.3g}"


_HEADER = (
    "case",
    "system",
    "s per round (least, largest)",
    "x the loop",
    "processor s per round",
    "first round after s",
    "private MB",
    "accuracy",
)


def markdown(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The tables of docs/performance.md; what a system does not have is left out, what was refused is said."""
    cells = [_cells(row, titles[row.system]) for row in rows if row.refused or not row.problem]
    found = table(_HEADER, cells)
    split = [row for row in rows if "split" in row.values]
    if split:
        parts = list(split[0].values["split"])
        times = [
            (row.case, titles[row.system], *(_seconds(row.values["split"][part]) for part in parts)) for row in split
        ]
        found += "\n\nOf a round, seconds:\n\n" + table(("case", "system", *parts), times)
    return found


def _cells(row: Row, title: str) -> tuple[str, ...]:
    if row.problem:
        return (row.case, title, f"refused: {row.problem}", *[""] * (len(_HEADER) - 3))
    v = row.values
    return (
        row.case,
        title,
        f"{_seconds(v['median'])} ({_seconds(v['min'])}, {_seconds(v['max'])})",
        f"{v['ratio_to_reference']:.2f}",
        _seconds(v["processor_s"]) if "processor_s" in v else "",
        f"{v['first_round_s']['median']:.1f}",
        f"{v['private_mb']:.0f}",
        "" if v["accuracy"] is None else f"{v['accuracy']:.4f}",
    )
