"""What an edge between two clusters costs, from what was measured between them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The cheapest link costs so much; others in proportion, in whole numbers, so that sums are exact.
CHEAPEST = 100
# A link that is so many times dearer than the cheapest is avoided anyway; numbers stay small.
_DEAREST = 10_000 * CHEAPEST


@dataclass(frozen=True)
class MeasuredLink:
    """What was measured from one cluster to another.

    Attributes:
        source, target: names of the clusters.
        bytes_per_s: bandwidth, > 0.
        rtt_s: round-trip time, >= 0.
    """

    source: str
    target: str
    bytes_per_s: float
    rtt_s: float


def link_costs(
    names: Sequence[str], links: Iterable[MeasuredLink], payload_bytes: int
) -> tuple[tuple[int, ...], ...] | None:
    """The cost of an edge for every two clusters: seconds that a payload takes each way, in units of the cheapest link.

    A link takes half its round-trip time and the bytes at its bandwidth. One that was measured in one direction counts
    for both; one that was not measured at all costs as much as the median of the others.

    Args:
        names: of the clusters in the order of their indices.

    Returns:
        Symmetric whole numbers with zeros on the diagonal; None where nothing was measured, or all links are alike.
    """
    index = {name: k for k, name in enumerate(names)}
    seconds: dict[tuple[int, int], list[float]] = {}
    for link in links:
        if link.source in index and link.target in index and link.source != link.target:
            one, other = sorted((index[link.source], index[link.target]))
            seconds.setdefault((one, other), []).append(link.rtt_s / 2 + payload_bytes / link.bytes_per_s)
    if not seconds:
        return None
    known = {pair: statistics.fmean(values) for pair, values in seconds.items()}
    least, usual = min(known.values()), statistics.median(known.values())
    rows = [[0] * len(names) for _ in names]
    for one in range(len(names)):
        for other in range(one + 1, len(names)):
            ratio = known.get((one, other), usual) / least if least > 0 else 1.0
            rows[one][other] = rows[other][one] = min(_DEAREST, round(CHEAPEST * ratio))
    costs = {rows[one][other] for one in range(len(names)) for other in range(len(names)) if one != other}
    return tuple(tuple(row) for row in rows) if len(costs) > 1 else None
