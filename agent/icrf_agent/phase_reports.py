"""How the reports of a cluster's hosts become one, and those of the phases of an attempt what its report says. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.ports import PhaseReport
from icrf.update import elementwise_max, sum_metrics


def merge_reports(reports: Sequence[PhaseReport]) -> PhaseReport:
    """One report of a cluster from those of its hosts, in host order, which is node order."""
    return PhaseReport(
        nodes=tuple(n for r in reports for n in r.nodes),
        overflow=tuple(sorted({t for r in reports for t in r.overflow})),
        absmax=elementwise_max(r.absmax for r in reports),
        metric_sums=sum_metrics(r.metric_sums for r in reports),
        metrics={k: v for r in reports for k, v in r.metrics.items()},
        node_metrics={k: v for r in reports for k, v in r.node_metrics.items()},
        model_hash="".join(r.model_hash for r in reports),
        state_hashes=b"".join(r.state_hashes for r in reports),
        bytes_intra_cluster=sum(r.bytes_intra_cluster for r in reports),
        graph=next((r.graph for r in reports if r.graph), None),
    )


def by_node(phases: Sequence[PhaseReport]) -> dict[str, dict[str, float]]:
    """What each node reported in any of the phases."""
    found: dict[str, dict[str, float]] = {}
    for phase in phases:
        for node, values in phase.node_metrics.items():
            found.setdefault(node, {}).update(values)
    return found


def latest_state(phases: Sequence[PhaseReport]) -> PhaseReport:
    """What the phases say about the new state; a later phase overrides an earlier one where it says something."""
    found = PhaseReport()
    for phase in phases:
        found = PhaseReport(
            absmax=phase.absmax or found.absmax,
            model_hash=phase.model_hash or found.model_hash,
            state_hashes=phase.state_hashes or found.state_hashes,
        )
    return found
