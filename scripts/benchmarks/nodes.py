"""``scripts/bench nodes``: what a round costs as the nodes become more, and how much of it the mediator takes."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.cases import MOST_TINY_MANY, Case
from benchmarks.catalogue import System
from benchmarks.document import write_part
from benchmarks.environments import ROOT
from benchmarks.figures import LEAST_REPEATS, Row
from benchmarks.machine import circumstances
from benchmarks.measure import measure
from benchmarks.node_figures import REFERENCE_NODES, by_graph, node_plot, node_row, node_table

DOCUMENT = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance-nodes.svg"
COMMAND = "scripts/bench nodes"
LEAST_NODES = 3

SYSTEMS = {
    # Every node is a peer with a model, a momentum that goes on from round to round, and two neighbours.
    "ring": System(
        "ring of peers",
        "nodes",
        options={
            "federated_learning_schema": "DecentralizedFederatedLearning",
            "federated_learning_topology": "ring",
            "momentum": 0.9,
            "keep_optimizer_state": True,
        },
        most_clients=MOST_TINY_MANY,
        tasks=("tiny",),
    ),
    # FedAvg: the nodes get the server's model, so there is less to do per node for all but the mediator.
    "star": System("star of clients", "nodes", most_clients=MOST_TINY_MANY, tasks=("tiny",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    with_reference = f"comma-separated; {REFERENCE_NODES} is always measured; '' for none"
    parser.add_argument("--nodes", type=_sizes, default="100,1000,10000", help=f"rings of so many, {with_reference}")
    parser.add_argument("--star", type=_sizes, default="10,100,1000,10000", help=f"stars of so many, {with_reference}")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each size, in turn (default: 3)")
    parser.add_argument("--rounds", type=int, help="measured rounds of a run (default: 5 to 40, by size)")
    parser.add_argument("--json", action="store_true", help="only JSON lines, no table")
    parser.add_argument("--write", action="store_true", help="write table and plot into docs")


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part)
    if any(not LEAST_NODES <= size <= MOST_TINY_MANY for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: from {LEAST_NODES} to {MOST_TINY_MANY} nodes")
    return sizes


def rounds_of(nodes: int) -> int:
    """As many rounds as give a steady median: the shorter they are, the more."""
    return max(5, min(40, 4000 // nodes))


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a row was refused, 2 for too few runs to be written down."""
    if arguments.write and arguments.repeat < LEAST_REPEATS:
        _say(f"{DOCUMENT.name} is written from at least {LEAST_REPEATS} runs only")
        return 2
    sizes = by_graph({"ring": arguments.nodes, "star": arguments.star})
    load = os.getloadavg()[0]
    runs: dict[tuple[str, int], list[Mapping[str, Any]]] = {size: [] for size in sizes}
    for number in range(arguments.repeat):
        for graph, nodes in sizes:
            found = measure(SYSTEMS[graph], Case("tiny", nodes, arguments.rounds or rounds_of(nodes)))
            runs[graph, nodes].append(found)
            _say(f"{graph} {nodes} {number + 1}/{arguments.repeat}: {_glance(found, nodes)}")
    rows = [node_row(graph, nodes, runs[graph, nodes], runs[graph, REFERENCE_NODES]) for graph, nodes in sizes]
    return _tell(rows, arguments, load)


def _tell(rows: list[Row], arguments: argparse.Namespace, load: float) -> int:
    for row in rows:
        print(row.line(), flush=True)
    found = node_table(rows)
    if not arguments.json:
        print(f"\n{found}")
    if any(row.refused for row in rows):
        return 1
    if arguments.write:
        measured_on = circumstances(COMMAND, (row.values["versions"] for row in rows), load)
        picture = f"![Seconds per round by number of nodes]({PLOT.name})"
        write_part(DOCUMENT, COMMAND, f"{measured_on}\n\n{found}\n\n{picture}")
        PLOT.write_text(node_plot(rows), encoding="utf-8")
    return 0


def _glance(found: Mapping[str, Any], nodes: int) -> str:
    if "round_s" not in found:
        return str(found.get("unavailable") or found.get("failed"))
    seconds = statistics.median(found["round_s"])
    share = found["split"]["mediator_s"] / statistics.mean(found["round_s"])
    return f"{seconds:.4f} s a round, {1e6 * seconds / nodes:.0f} us per node, mediator {share:.1%}"


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
