"""``scripts/bench assignment``: how well and how fast graphs are divided, in ICRF, by METIS alone and by Louvain."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import numpy as np
import pymetis

from benchmarks.document import table
from benchmarks.figures import Row, short, spread
from icrf.protocol import Capacity, ClusterInfo, Fingerprint
from icrf.topology import HybridAdjacencyMatrix
from icrf_mediator.assignment import assign

CLUSTERS = 8
REFERENCE = "pymetis"
# A system that takes longer than this is measured once.
_ONCE_S = 15.0
_PACKAGES = {"icrf": ("icrf", "pymetis"), "pymetis": ("pymetis",), "louvain": ("icrf", "networkx")}
_HEADER = ("case", "system", "seconds (least, largest)", "x METIS's time", "cut edges", "x METIS's cut", "imbalance")


def kreg(num_nodes: int) -> HybridAdjacencyMatrix:
    """A random 4-regular graph, but for few edges that fall together: two random rings."""
    rng = np.random.default_rng(1)
    rings = [rng.permutation(num_nodes) for _ in range(2)]
    return _graph(num_nodes, *(np.stack([ring, np.roll(ring, 1)], axis=1) for ring in rings))


def smallworld(num_nodes: int) -> HybridAdjacencyMatrix:
    """A circulant of degree 6, one in ten of whose edges leads anywhere (Watts and Strogatz 1998); ids along it."""
    rng = np.random.default_rng(2)
    nodes = np.arange(num_nodes)
    edges = np.concatenate([np.stack([nodes, (nodes + step) % num_nodes], axis=1) for step in (1, 2, 3)])
    rewired = rng.random(len(edges)) < 0.1
    edges[rewired, 1] = rng.integers(0, num_nodes, rewired.sum())
    return _graph(num_nodes, edges)


def blocks(num_nodes: int) -> HybridAdjacencyMatrix:
    """Twenty equal blocks with shuffled ids; a node has eight edges within its block and one to anywhere."""
    rng = np.random.default_rng(3)
    size = num_nodes // 20
    start, anywhere = rng.integers(0, num_nodes, num_nodes * 4), rng.integers(0, num_nodes, (num_nodes // 2, 2))
    end = np.minimum(start // size * size + rng.integers(0, size, len(start)), num_nodes - 1)
    return _graph(num_nodes, rng.permutation(num_nodes)[np.concatenate([np.stack([start, end], axis=1), anywhere])])


KINDS: dict[str, Callable[[int], HybridAdjacencyMatrix]] = {"kreg": kreg, "smallworld": smallworld, "blocks": blocks}


def by_metis(graph: HybridAdjacencyMatrix) -> Sequence[int]:
    """METIS as pymetis calls it when nothing else is said."""
    found = pymetis.part_graph(CLUSTERS, pymetis.CSRAdjacency(graph.indptr, graph.indices))
    parts: Sequence[int] = found.vertex_part
    return parts


def _by(strategy: str) -> Callable[[HybridAdjacencyMatrix], Sequence[int]]:
    fingerprint = Fingerprint("", "", "", 1, "cpu")
    clusters = [ClusterInfo(f"c{k}", "", Capacity(1, 1.0, 0.0, 0), fingerprint) for k in range(CLUSTERS)]
    return lambda graph: assign(strategy, graph, clusters, {}).clusters


SYSTEMS: dict[str, Callable[[HybridAdjacencyMatrix], Sequence[int]]] = {
    "icrf": _by("locality"),
    REFERENCE: by_metis,
    "louvain": _by("louvain"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    names = "kregN, smallworldN, blocksN, with k for thousand, comma-separated"
    parser.add_argument("--cases", type=_names, default=("kreg100k", "smallworld10k", "blocks10k"), help=names)
    parser.add_argument("--systems", type=_names, default=tuple(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each system on each case (default: 5)")
    parser.add_argument("--json", action="store_true", help="only JSON lines, no table")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; 2 for a command that makes no sense."""
    try:
        graphs = {name: parse_case(name) for name in arguments.cases}
        if unknown := [name for name in arguments.systems if name not in SYSTEMS]:
            raise ValueError(f"no system {', '.join(unknown)}: there are {', '.join(SYSTEMS)}")
        if arguments.repeat < 1:
            raise ValueError("--repeat: at least 1")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows = []
    for case, (make, num_nodes) in graphs.items():
        for row in compare(case, make(num_nodes), arguments.systems, arguments.repeat):
            rows.append(row)
            print(row.line(), flush=True)
    if not arguments.json:
        print(f"\n{table(_HEADER, [_cells(row) for row in rows])}")
    return 0


def parse_case(name: str) -> tuple[Callable[[int], HybridAdjacencyMatrix], int]:
    """The kind of graph and the number of nodes; ValueError for no such case."""
    for kind, make in KINDS.items():
        digits = name.removeprefix(kind)
        number = digits.removesuffix("k")
        if digits != name and number.isdecimal():
            num_nodes = int(number) * (1000 if digits.endswith("k") else 1)
            if num_nodes >= 20 * CLUSTERS:
                return make, num_nodes
    raise ValueError(f"no case {name}: there are {', '.join(f'{kind}N' for kind in KINDS)}, N from {20 * CLUSTERS}")


def compare(case: str, graph: HybridAdjacencyMatrix, systems: Sequence[str], repeats: int) -> list[Row]:
    """All systems in turn, as often as asked, and METIS beside them; a row for each that was asked for."""
    order = [REFERENCE, *(name for name in systems if name != REFERENCE)]
    seconds: dict[str, list[float]] = {name: [] for name in order}
    parts: dict[str, Sequence[int]] = {}
    for _ in range(repeats):
        for name in order:
            if seconds[name] and seconds[name][0] > _ONCE_S:
                continue
            begin = time.perf_counter()
            parts[name] = SYSTEMS[name](graph)
            seconds[name].append(time.perf_counter() - begin)
    cuts = {name: graph.cut_edges(found) for name, found in parts.items()}
    contiguous = graph.cut_edges(np.arange(graph.num_nodes) * CLUSTERS // graph.num_nodes)
    rows = []
    for name in systems:
        values = {
            **spread(seconds[name]),
            "unit": "s",
            "ratio_to_reference": short(min(seconds[name]) / min(seconds[REFERENCE])),
            "cut_edges": cuts[name],
            "cut_ratio_to_reference": short(cuts[name] / max(1, cuts[REFERENCE])),
            "cut_contiguous": contiguous,
            "imbalance": _imbalance(parts[name]),
            "nodes": graph.num_nodes,
            "edges": graph.num_edges // 2,
            "repeats": len(seconds[name]),
            "versions": {package: version(package) for package in _PACKAGES[name]},
        }
        rows.append(Row(case, name, values))
    return rows


def _imbalance(parts: Sequence[int]) -> float:
    """The largest part over the mean."""
    sizes = np.bincount(parts, minlength=CLUSTERS)
    return round(float(sizes.max() / sizes.mean()), 5)


def _graph(num_nodes: int, *edges: np.ndarray) -> HybridAdjacencyMatrix:
    pairs = np.concatenate(edges)
    return HybridAdjacencyMatrix.from_edges(num_nodes, pairs[pairs[:, 0] != pairs[:, 1]])


def _cells(row: Row) -> tuple[str, ...]:
    v: Mapping[str, float] = row.values
    return (
        row.case,
        row.system,
        f"{v['median']:.3g} ({v['min']:.3g}, {v['max']:.3g})",
        f"{v['ratio_to_reference']:.2f}",
        f"{v['cut_edges']:,}",
        f"{v['cut_ratio_to_reference']:.3f}",
        f"{v['imbalance']:.4f}",
    )
