"""A plan as people read it: where nodes go, what crosses, whether it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text

from icrf.codecs import NONE
from icrf.console.format import MISSING, compress_names, format_bytes, format_count, safe_text
from icrf.console.terminal import Terminal
from icrf.errors import IcrfError
from icrf.protocol import CENTRALIZED, LinkBytes, Plan


def nodes_by_cluster(plan: Plan) -> dict[str, list[str]]:
    """Node ids per cluster in the order of the specification; clusters without nodes too."""
    found: dict[str, list[str]] = {name: [] for name in plan.clusters}
    for node, cluster in plan.assignment.items():
        found.setdefault(cluster, []).append(node)
    return found


def consensus_text(plan: Plan) -> str:
    """How fast a decentralised plan mixes, in words; empty for a centralized one."""
    if plan.flow == CENTRALIZED or plan.slem < 0:
        return ""
    rounds = (
        "never reaches consensus"
        if plan.rounds_to_consensus < 0
        else (f"{format_count(plan.rounds_to_consensus, 'round')} to consensus (1e-6)")
    )
    return f"second-largest eigenvalue {plan.slem:.6f} ({plan.slem_kind}), {rounds}"


def _active_text(plan: Plan) -> str:
    """How many nodes will be active at once on each cluster, in words."""
    here = Counter(plan.assignment.values())
    return ", ".join(f"{active:,} of {here[name]:,} at once on {name}" for name, active in plan.residents.items())


def limit_text(plan: Plan) -> str:
    """What the nodes of a decentralised plan approach by mixing alone, in words; empty for a centralized one."""
    report = plan.mixing
    if report is None:
        return ""
    if report.problem:
        return f"no agreement: {report.problem}"
    if report.push_sum:
        return "approaches the mean of all nodes by push-sum: columns sum to 1, rows do not"
    if report.limit == "mean":
        return "approaches the mean of all nodes: rows and columns sum to 1"
    return "approaches a weighted mean of the nodes: rows sum to 1, columns do not"


def adaptation_text(plan: Plan) -> str:
    """When and by what the graph changes, in words."""
    every = "every round" if plan.adaptation_period == 1 else f"every {plan.adaptation_period:,} rounds"
    return f"changes after {every} by {plan.adaptation}; links, cut, traffic and mixing are those that it starts with"


def _groups(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Per aggregator: how many train in its group, on which clusters, and who."""
    members: dict[str, list[str]] = {}
    for node, aggregator in plan.groups.items():
        members.setdefault(aggregator, []).append(node)
    rows = []
    for aggregator, nodes in members.items():
        clusters = dict.fromkeys(plan.assignment[node] for node in (aggregator, *nodes) if node in plan.assignment)
        rows.append((aggregator, f"{len(nodes):,}", ", ".join(clusters), compress_names(nodes)))
    return rows


def show_comparison(terminal: Terminal, plans: Mapping[str, Plan | IcrfError]) -> None:
    """Print what assignment strategies come to, that of the federation first; of one that makes no plan, why."""
    rows = [
        (name, "", "", "", "", safe_text(str(plan)))
        if isinstance(plan, IcrfError)
        else (
            name,
            f"{plan.cut_edges:,}",
            format_bytes(plan.bytes_inter_cluster_per_round),
            format_bytes(plan.bytes_inter_cluster_total),
            format_bytes(plan.peak_memory_bytes),
            "yes" if plan.feasible else "no",
        )
        for name, plan in plans.items()
    ]
    columns = ("placed by", "cut edges", "bytes per round", "whole run", "peak memory", "feasible")
    terminal.line()
    terminal.table(columns, rows, right=columns[1:5], wrap=columns[5:])


def _traffic(plan: Plan) -> Iterator[tuple[str, str]]:
    """What crosses between clusters, and how much of it at most with a codec."""
    yield "traffic", f"{format_bytes(plan.bytes_inter_cluster_per_round)} per round between clusters"
    if plan.bytes_inter_cluster_per_evaluation:
        yield "", f"{format_bytes(plan.bytes_inter_cluster_per_evaluation)} more per evaluation"
    if plan.groups:
        yield "", f"{format_bytes(plan.bytes_inter_cluster_within_groups)} in a round within the groups"
        yield "", f"{format_bytes(plan.bytes_inter_cluster_per_merge)} in a round that merges them"
    if plan.bytes_inter_cluster_per_adaptation:
        yield "", f"{format_bytes(plan.bytes_inter_cluster_per_adaptation)} more per change of the graph"
    yield "", f"{format_bytes(plan.bytes_inter_cluster_total)} for the whole run"
    if plan.codec != NONE:
        yield f"with {plan.codec}", f"at most {format_bytes(plan.bytes_coded_per_round)} per round"


def _show_links(terminal: Terminal, links: Sequence[LinkBytes]) -> None:
    """What crosses each link, and how long that takes, as far as links were measured."""
    seconds = [f"{link.seconds_per_round:,.3f}" if link.seconds_per_round else MISSING for link in links]
    rows = [
        (link.source, link.target, format_bytes(link.bytes_per_round), text)
        for link, text in zip(links, seconds, strict=True)
    ]
    columns = ("from", "to", "bytes per round", "seconds per round")
    shown = 4 if any(link.seconds_per_round for link in links) else 3
    terminal.table(columns[:shown], [row[:shown] for row in rows], right=columns[2:shown])


def show_plan(terminal: Terminal, plan: Plan) -> None:
    """Print a plan."""
    title = Text.assemble((safe_text(plan.federation), "bold"), f"  {plan.flow}, placed by ", (plan.strategy, "cyan"))
    terminal.line(title)
    terminal.line()
    rows = [
        (
            name,
            f"{len(nodes):,}",
            str(plan.slots.get(name, 0)),
            format_bytes(plan.memory[name]) if name in plan.memory else "",
            "no" if name in plan.lacking else "yes",
            compress_names(nodes),
        )
        for name, nodes in nodes_by_cluster(plan).items()
    ]
    columns = ("cluster", "nodes", "slots", "memory", "fits", "which")
    terminal.table(columns, rows, right=("nodes", "slots", "memory"), wrap=("which",))
    terminal.line()
    if plan.groups:
        terminal.table(("group of", "nodes", "on", "which"), _groups(plan), right=("nodes",), wrap=("which",))
        terminal.line()
    if plan.links:
        _show_links(terminal, plan.links)
        terminal.line()
    cut = f"{plan.cut_edges:,} of {plan.num_edges:,}"
    if plan.num_edges:
        cut += f" ({100 * plan.cut_edges / plan.num_edges:.1f} %)"
    facts: list[tuple[str, str | Text]] = []
    if plan.num_models > 1:
        facts.append(("models", f"{plan.num_models:,}, of which every client gets all and trains one"))
    facts += [
        ("parameters", f"{plan.num_parameters:,}"),
        ("tensors", ", ".join(f"{count:,} {rule}" for rule, count in sorted(plan.tensors.items()))),
        ("cut edges", cut),
    ]
    facts += _traffic(plan)
    if mixing := consensus_text(plan):
        facts += [("mixing", mixing), ("", f"spectral gap {1 - plan.slem:.6f}"), ("", limit_text(plan))]
    if plan.adaptation:
        facts.append(("graph", adaptation_text(plan)))
    facts.append(("peak memory", f"{format_bytes(plan.peak_memory_bytes)} on the busiest cluster"))
    facts.append(("active nodes", _active_text(plan)))
    facts += [(key.replace("_", " "), text) for key, text in plan.explanation.items() if key not in plan.assignment]
    terminal.facts(facts)
    terminal.line()
    if plan.feasible:
        terminal.line(Text.assemble(("  ✓ feasible" if terminal.live else "feasible", "green")))
    for problem in plan.problems:
        mark = "  ✗ " if terminal.live else "not feasible: "
        terminal.line(Text.assemble((mark, "bold red"), safe_text(problem)))
