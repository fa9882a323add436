"""Rules that tolerate participants which send anything at all. They need every update, so partials do not merge.

Updates come in node-index order and count the same each, whatever the nodes' sample counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icrf.errors import ConfigError
from icrf.learning.aggregation.base import Array, RoundFacts, UpdateAggregator, register_aggregator
from icrf.preconditions import fewest_updates, most_selected
from icrf.update import CHUNK


def _require(rule: str, num_updates: int, num_byzantine: int) -> None:
    fewest = fewest_updates(rule, num_byzantine)
    if num_updates < fewest:
        raise ConfigError(
            "C008",
            f"{rule} cannot tolerate {num_byzantine} of {num_updates} participants",
            place="num_byzantine",
            value=num_byzantine,
            allowed=f"at least {fewest} participants a round",
        )


class _Coordinates(UpdateAggregator):
    """A rule that looks at one coordinate at a time."""

    def combine(self, updates: Sequence[Array], previous: Array, out: Array, facts: RoundFacts) -> None:
        self.require(len(updates))
        width = max(1, CHUNK // len(updates))
        for start in range(0, len(out), width):
            values = np.stack([update[start : start + width] for update in updates]).astype(np.float64)
            values.sort(axis=0)
            out[start : start + width] = self.centre(values)

    def centre(self, ordered: Array) -> Array:
        """What becomes of each column of ascending values, shape (participants, n) -> (n,)."""
        raise NotImplementedError


@register_aggregator("Median")
class Median(_Coordinates):
    """The median of every coordinate; of an even number the mean of both middle ones (Yin et al. 2018,
    arXiv 1803.01498)."""

    def centre(self, ordered: Array) -> Array:
        middle = len(ordered) // 2
        centre: Array = ordered[middle]
        return centre if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + centre)


@register_aggregator("TrimmedMean")
class TrimmedMean(_Coordinates):
    """The mean of every coordinate without its f smallest and its f largest values (Yin et al. 2018,
    arXiv 1803.01498); needs 2f < n."""

    def __init__(self, num_byzantine: int) -> None:
        self.num_byzantine = num_byzantine

    def require(self, num_participants: int) -> None:
        _require("TrimmedMean", num_participants, self.num_byzantine)

    def centre(self, ordered: Array) -> Array:
        centre: Array = ordered[self.num_byzantine : len(ordered) - self.num_byzantine].mean(axis=0)
        return centre


def krum_scores(updates: Sequence[Array], num_byzantine: int) -> Array:
    """For each update the sum of its squared distances to its n - f - 2 nearest others; float64, shape (n,)."""
    count = len(updates)
    distances = np.zeros((count, count))
    for i in range(count):
        for j in range(i):
            square = 0.0
            for start in range(0, len(updates[i]), CHUNK):
                part = np.subtract(
                    updates[i][start : start + CHUNK], updates[j][start : start + CHUNK], dtype=np.float64
                )
                square += float(np.square(part, out=part).sum())
            distances[i, j] = distances[j, i] = square
    np.fill_diagonal(distances, -1.0)  # an update is no neighbour of itself: the first after sorting
    distances.sort(axis=1)
    scores: Array = distances[:, 1 : 1 + count - num_byzantine - 2].sum(axis=1)
    return scores


@register_aggregator("MultiKrum")
class MultiKrum(UpdateAggregator):
    """The mean of the m updates of lowest score (Blanchard et al. 2017, arXiv 1703.02757); ties go to the lower
    index. Needs n >= 2f + 3 and m <= n - f - 2, which is the default."""

    name = "MultiKrum"

    def __init__(self, num_byzantine: int, num_selected: int | None = None) -> None:
        self.num_byzantine, self.num_selected = num_byzantine, num_selected

    def require(self, num_participants: int) -> None:
        _require(self.name, num_participants, self.num_byzantine)
        most = most_selected(num_participants, self.num_byzantine)
        if self.num_selected is not None and self.num_selected > most:
            message = f"{self.name} cannot select {self.num_selected} of {num_participants} participants"
            raise ConfigError("C008", message, place="num_selected", value=self.num_selected, allowed=f"1 to {most}")

    def combine(self, updates: Sequence[Array], previous: Array, out: Array, facts: RoundFacts) -> None:
        self.require(len(updates))
        scores = krum_scores(updates, self.num_byzantine)
        wanted = self.num_selected or most_selected(len(updates), self.num_byzantine)
        chosen = sorted(np.argsort(scores, kind="stable")[:wanted].tolist())
        for start in range(0, len(out), CHUNK):
            total = updates[chosen[0]][start : start + CHUNK].astype(np.float64)
            for index in chosen[1:]:
                total += updates[index][start : start + CHUNK]
            out[start : start + CHUNK] = total / len(chosen)


@register_aggregator("Krum")
class Krum(MultiKrum):
    """The one update of lowest score (Blanchard et al. 2017, arXiv 1703.02757); needs n >= 2f + 3."""

    name = "Krum"

    def __init__(self, num_byzantine: int) -> None:
        super().__init__(num_byzantine, 1)
