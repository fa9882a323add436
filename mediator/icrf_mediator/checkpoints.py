"""Which rounds of a run can be gone back to: checkpoints as they become durable, cluster by cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KEPT = 2


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        durable: round -> cluster -> artifact, complete ones only.
        open_round: the round whose checkpoint is being written; 0 for none.
    """

    durable: dict[int, dict[str, str]] = field(default_factory=dict)
    open_round: int = 0
    _missing: set[str] = field(default_factory=set)
    _arrived: dict[str, str] = field(default_factory=dict)

    def begin(self, round_number: int, clusters: tuple[str, ...]) -> None:
        """A checkpoint of `round_number` is asked of `clusters`; an unfinished older one is given up."""
        self.open_round, self._missing, self._arrived = round_number, set(clusters), {}

    def arrived(self, cluster: str, round_number: int, artifact: str) -> bool:
        """One cluster's part is durable; True when it was the last."""
        if round_number != self.open_round or cluster not in self._missing:
            return False
        self._missing.discard(cluster)
        self._arrived[cluster] = artifact
        if self._missing:
            return False
        self.durable[round_number] = self._arrived
        self.open_round, self._arrived = 0, {}
        return True

    def give_up(self) -> None:
        """The open checkpoint will not be completed."""
        self.open_round, self._missing, self._arrived = 0, set(), {}

    def due(self, round_number: int, every: int) -> bool:
        """Whether the newest one, being written or durable, lies `every` rounds back; 0: never.

        One that was given up counts for nothing: it is made up for at the next commit.
        """
        return every > 0 and round_number - max(self.open_round, *self.durable, 0) >= every

    def latest(self, not_after: int) -> int:
        """The newest durable round up to `not_after`; 0, the initial state, is always there."""
        return max((r for r in self.durable if r <= not_after), default=0)

    def artifact(self, round_number: int, cluster: str) -> str:
        """The artifact with a cluster's part; empty where it keeps none."""
        return self.durable.get(round_number, {}).get(cluster, "")

    def outdated(self) -> list[str]:
        """Forget all but the newest ones; the artifacts that may be deleted."""
        doomed = sorted(self.durable)[:-KEPT]
        return [artifact for r in doomed for artifact in self.durable.pop(r).values()]

    def load(self, round_number: int, artifacts: Mapping[str, str]) -> None:
        """Take over a journal row."""
        self.durable[round_number] = dict(artifacts)
