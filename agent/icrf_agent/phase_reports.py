"""What a cluster says after a phase, put together from what its hosts say."""

from __future__ import annotations

from collections.abc import Sequence

from icrf.ports import PhaseReport


def merge_reports(reports: Sequence[PhaseReport]) -> PhaseReport:
    """One report of a cluster from those of its hosts, in host order, which is node order."""
    sums: dict[str, tuple[int, int]] = {}
    for report in reports:
        for name, (numerator, weight) in report.metric_sums.items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + numerator, old[1] + weight)
    return PhaseReport(
        nodes=tuple(n for r in reports for n in r.nodes),
        overflow=tuple(sorted({t for r in reports for t in r.overflow})),
        absmax=elementwise_max([r.absmax for r in reports]),
        metric_sums=sums,
        metrics={k: v for r in reports for k, v in r.metrics.items()},
        node_metrics={k: v for r in reports for k, v in r.node_metrics.items()},
        model_hash="".join(r.model_hash for r in reports),
        state_hashes=b"".join(r.state_hashes for r in reports),
        bytes_intra_cluster=sum(r.bytes_intra_cluster for r in reports),
    )


def elementwise_max(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """The largest of each column over the rows that are not empty."""
    return tuple(max(column) for column in zip(*(r for r in rows if r), strict=True))
