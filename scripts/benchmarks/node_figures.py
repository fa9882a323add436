"""What is made of rounds of more and more nodes: cost per node, the mediator's share, a table and a plot. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.document import table
from benchmarks.figures import Measured, Row, short, spread
from benchmarks.plot import log_log

REFERENCE_NODES = 100
COST_BUDGET = 1.15
"""How much more than in a federation of `REFERENCE_NODES` a node may cost in a larger one."""
MEDIATOR_BUDGET = 0.05
"""How much of a round the mediator may take."""

_HEADER = (
    "graph",
    "nodes",
    "s per round (least, largest)",
    "us per node",
    f"x {REFERENCE_NODES} nodes' (at most {COST_BUDGET})",
    "processor us per node",
    f"mediator % (at most {MEDIATOR_BUDGET:.0%})".replace("%)", ")"),
    "first round after s",
    "private MB",
)


def node_row(graph: str, nodes: int, runs: Sequence[Measured], references: Sequence[Measured]) -> Row:
    """The row of a size out of its runs and those of `REFERENCE_NODES` nodes, in pairs as they were run.

    The mediator's share is what it took of all measured rounds of a run; it has the median of the runs, as all has.
    """
    case = f"{graph}{nodes}"
    for run in (*runs, *references):
        for kind in ("unavailable", "failed"):
            if kind in run:
                return Row(case, "icrf", {"graph": graph, "nodes": nodes}, problem=run[kind], refused=True)
    seconds = [statistics.median(run["round_s"]) for run in runs]
    costs = [s / nodes for s in seconds]
    ratios = [c * REFERENCE_NODES / statistics.median(r["round_s"]) for c, r in zip(costs, references, strict=True)]
    shares = [run["split"]["mediator_s"] / statistics.mean(run["round_s"]) for run in runs]
    values: dict[str, Any] = {"graph": graph, "nodes": nodes, **spread(seconds), "unit": "s/round"}
    values["node_round_us"] = short(1e6 * statistics.median(costs))
    values["ratio_to_reference"] = spread(ratios)["median"]
    values["ratio_spread"] = [short(min(ratios)), short(max(ratios))]
    values["processor_us"] = short(1e6 * statistics.median(run["processor_s"] for run in runs) / nodes)
    values["mediator_share"] = spread(shares)["median"]
    values["mediator_spread"] = [short(min(shares)), short(max(shares))]
    values["within_budget"] = values["mediator_share"] <= MEDIATOR_BUDGET and (
        nodes <= REFERENCE_NODES or values["ratio_to_reference"] <= COST_BUDGET
    )
    values["repeats"], values["rounds"] = len(runs), len(runs[0]["round_s"])
    values["first_round_s"] = spread([run["first_round_s"] for run in runs])
    for name in ("private_mb", "resident_mb"):
        values[name] = short(statistics.median(run[name] for run in runs))
    values["split"] = {part: short(statistics.median(r["split"][part] for r in runs)) for part in runs[0]["split"]}
    values["versions"] = dict(runs[0]["versions"])
    return Row(case, "icrf", values)


def node_table(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md; what was refused is said."""
    return table(_HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    v = row.values
    name = (v["graph"], f"{v['nodes']:,}")
    if row.problem:
        return (*name, f"refused: {row.problem}", *[""] * (len(_HEADER) - 3))
    return (
        *name,
        f"{v['median']:.3g} ({v['min']:.3g}, {v['max']:.3g})",
        f"{v['node_round_us']:.0f}",
        f"{v['ratio_to_reference']:.2f}",
        f"{v['processor_us']:.0f}",
        f"{100 * v['mediator_share']:.2g}",
        f"{v['first_round_s']['median']:.1f}",
        f"{v['private_mb']:.0f}",
    )


def node_plot(rows: Sequence[Row]) -> str:
    """Seconds per round by number of nodes, with what `REFERENCE_NODES` nodes' cost per node would give, as SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    dashed: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(f"ICRF, {row.values['graph']}", []).append((row.values["nodes"], row.values["median"]))
    for name, points in series.items():
        costs = dict(points)
        if REFERENCE_NODES in costs:
            per_node = costs[REFERENCE_NODES] / REFERENCE_NODES
            ends = [(nodes, per_node * nodes) for nodes in (REFERENCE_NODES, max(costs))]
            dashed.setdefault(f"{name.removeprefix('ICRF, ')}, linear", ends)
    return log_log(series, dashed, "nodes", "seconds per round")


def by_graph(sizes: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """(graph, nodes) of all that is measured: each size once, that of the reference always among them."""
    return [(graph, n) for graph, some in sizes.items() if some for n in sorted({*some, REFERENCE_NODES})]
