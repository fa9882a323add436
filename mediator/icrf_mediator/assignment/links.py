"""What an edge between two clusters costs, from what was measured between them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from icrf.protocol import MeasuredLink

# The cheapest link costs so much; others a power of two of it, in whole numbers, so that sums are exact.
CHEAPEST = 100
# A link that is so many times dearer than the cheapest is avoided anyway; numbers stay small.
_MOST_DOUBLINGS = 13
# What a round takes anyway: nobody notices on which of two links that are faster a payload has been.
_UNNOTICED_S = 0.005


def link_costs(
    names: Sequence[str], links: Iterable[MeasuredLink], payload_bytes: int
) -> tuple[tuple[int, ...], ...] | None:
    """The cost of an edge for every two clusters: how many times as long as on the cheapest link a payload takes.

    A payload takes half the round-trip time of its link and its bytes at the bandwidth. A link that was measured both
    ways takes the mean, one that was not measured the median of the others. Measuring is noisy: times are rounded down
    to the cheapest one's doubles, so that links within a factor of two of the fastest cost the same.

    Args:
        names: of the clusters in the order of their indices.

    Returns:
        Symmetric whole numbers with zeros on the diagonal; None where nothing was measured, or all links are alike.
    """
    index = {name: k for k, name in enumerate(names)}
    seconds: dict[tuple[int, int], list[float]] = {}
    for link in links:
        if link.source in index and link.target in index and link.source != link.target and not link.error_json:
            one, other = sorted((index[link.source], index[link.target]))
            seconds.setdefault((one, other), []).append(_seconds(link, payload_bytes))
    if not seconds:
        return None
    known = {pair: max(_UNNOTICED_S, statistics.fmean(values)) for pair, values in seconds.items()}
    least, usual = min(known.values()), statistics.median(known.values())
    rows = [[0] * len(names) for _ in names]
    for one in range(len(names)):
        for other in range(one + 1, len(names)):
            doublings = math.floor(math.log2(known.get((one, other), usual) / least))
            rows[one][other] = rows[other][one] = CHEAPEST << min(_MOST_DOUBLINGS, doublings)
    costs = {rows[one][other] for one in range(len(names)) for other in range(len(names)) if one != other}
    return tuple(tuple(row) for row in rows) if len(costs) > 1 else None


def link_seconds(links: Iterable[MeasuredLink], source: str, target: str, num_bytes: int) -> float:
    """How long bytes take from one cluster to another at least; 0.0 where that way was not measured."""
    found = [link for link in links if (link.source, link.target) == (source, target) and not link.error_json]
    return _seconds(found[-1], num_bytes) if found else 0.0


def _seconds(link: MeasuredLink, num_bytes: int) -> float:
    return link.rtt_s / 2 + num_bytes / link.bytes_per_s
