"""The clusters of a fabric as people read them, and what was measured between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from icrf.console.format import MISSING, format_age, format_bytes
from icrf.console.terminal import Terminal
from icrf.errors import error_from_json
from icrf.protocol import ClusterInfo, MeasuredLink


def clusters_dict(clusters: Sequence[ClusterInfo], links: Sequence[MeasuredLink]) -> dict[str, Any]:
    """Clusters and links as ``--json`` has them; a link without figures has null in their place and its ``error``."""
    return {"clusters": [asdict(cluster) for cluster in clusters], "links": [_link_dict(link) for link in links]}


def _link_dict(link: MeasuredLink) -> dict[str, Any]:
    values = asdict(link)
    error = values.pop("error_json")
    if error:
        values.update(bytes_per_s=None, rtt_s=None)
    return {**values, "error": json.loads(error) if error else None}


def show_clusters(
    terminal: Terminal, clusters: Sequence[ClusterInfo], links: Sequence[MeasuredLink], now: float
) -> None:
    """A line per cluster, and one per measured link.

    Args:
        now: wall time.
    """
    if not clusters:
        terminal.line("no cluster is registered: fabric-agent --cluster NAME brings one")
        return
    columns = ("cluster", "free slots", "CPU", "GPU", "memory", "gateway", "labels", "")
    terminal.table(columns, [_cluster_row(one) for one in clusters], right=columns[1:5], wrap=("labels",))
    if len(clusters) < 2:
        return
    terminal.line()
    if not links:
        terminal.line("links are not measured: fabric clusters --measure does it")
        return
    columns_of_links = ("from", "to", "MB/s", "ms", "way", "measured")
    terminal.table(columns_of_links, [_link_row(link, now) for link in links], right=("MB/s", "ms"))
    for link in links:
        if link.error_json:
            terminal.line(f"{link.source} to {link.target}: {error_from_json(link.error_json)}")


def _cluster_row(info: ClusterInfo) -> tuple[str, ...]:
    capacity = info.capacity
    return (
        info.name,
        f"{info.free_slots}/{capacity.num_slots}",
        f"{capacity.num_cpus:g}",
        f"{capacity.num_gpus:g}",
        format_bytes(capacity.memory_bytes),
        info.address or "through the mediator",
        ", ".join(f"{key}={value}" for key, value in sorted(info.labels.items())),
        "" if info.alive else "away",
    )


def _link_row(link: MeasuredLink, now: float) -> tuple[str, ...]:
    failed = bool(link.error_json)
    return (
        link.source,
        link.target,
        MISSING if failed else f"{link.bytes_per_s / 1e6:,.2f}",
        MISSING if failed else f"{1e3 * link.rtt_s:,.1f}",
        "relayed" if link.relayed else "direct",
        f"failed {format_age(now - link.measured_at)}" if failed else format_age(now - link.measured_at),
    )
